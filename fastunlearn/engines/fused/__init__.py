"""The fused engine: one GPU, layers projected and stepped as their gradients come, no whole gradient.
Not here: sharding (`engines/zero`), or the kernels (`fastunlearn_kernels`)."""
