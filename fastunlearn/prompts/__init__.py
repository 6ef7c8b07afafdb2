"""Text: what the trajectories, the kept samples and the meta sets ask for, and the captions of folders.
Not here: embeddings, pictures, or a model."""
