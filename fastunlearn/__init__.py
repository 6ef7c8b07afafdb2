"""Erase concepts from Stable Diffusion and SDXL models. Importing this package loads nothing else."""

__version__ = "0.1.0"
