"""What a run leaves: weights in each format, pictures, figures, the model card.
Not here: checkpoints that a run resumes from (`training/`), or measurements (`evaluation/`)."""
