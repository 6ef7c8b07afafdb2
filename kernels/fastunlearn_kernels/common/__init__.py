"""What every op builds on: choice of the backend, precision, rounding, memory, and how a kernel walks a tensor.

Not here: an op, or anything that knows what its tensors mean.
"""
