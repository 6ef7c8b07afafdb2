"""What a model's tokenizers and text encoders say of prompts and names before anything is drawn: what is cut off, what
is near. Embedding the prompts of a run is in ``models/pipeline.py``."""
