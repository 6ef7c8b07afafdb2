"""Ops on latents (B, C, H, W): noise, losses between predictions, sampler steps; small tensors, one launch each.

Not here: gradients of parameters (`gradients`), schedules, models.
"""
