"""What makes the same result come sooner: attention backends, compilation, CUDA graphs, cached text keys and values.
Not here: anything that changes a prediction beyond rounding, or the modules themselves (`models/`)."""
