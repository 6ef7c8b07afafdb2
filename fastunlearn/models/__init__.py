"""The model that is edited: its U-Net, text conditions, noise process, which weights a scope names, and loading it.
Not here: training, sampling loops, or how calls are counted (`denoisers/`)."""
