"""Where a run's samples come from: key steps, trajectories, latent pools, batches of what is kept.
Not here: a loss, or the gradient of one."""
