"""How models lie on disk: headers, single files and their original names, architectures, random weights.
Not here: anything that loads weights into a pipeline (`models/loading.py`)."""
