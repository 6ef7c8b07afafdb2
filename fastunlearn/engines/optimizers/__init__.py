"""Optimizers, one file each: the facts that configuration, planner and doctor ask for, and how it is built.
Not here: the sharding (`engines/zero`), or the learning-rate schedule (diffusers', which the engines step)."""
