"""Erase concepts from Stable Diffusion and SDXL models: the commands are in `commands/`, the loop in `training/`.
Not here: the kernels, a package of their own (`fastunlearn_kernels`). Importing this loads nothing else."""

__version__ = "0.1.0"
