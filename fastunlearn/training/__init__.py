"""A run from start to end: checks, set-up, the loop, its records and checkpoints.
Not here: the mathematics of a method (`methods/`), or what remains of the run (`export/`)."""
