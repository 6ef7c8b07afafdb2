"""The networks that a run calls: student, frozen teacher, moving average, low-rank additions, and the count of calls.
Not here: what a Stable Diffusion model looks like (`models/`), or a loss (`methods/`)."""
