"""The architectures that can be edited, one file each: facts without torch, and how and with what they are called.
Not here: loading, or what files look like (`models/formats/`). A new one is one file and one line in `registry.py`."""
