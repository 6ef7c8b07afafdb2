"""Text: what the trajectories, the kept samples and the meta sets ask for.
Not here: embeddings, pictures, or a model."""
