"""The formats in which a run leaves its weights, one file each.
Not here: the order in which results come to be (`export/results.py`), or how models are read (`models/`)."""
