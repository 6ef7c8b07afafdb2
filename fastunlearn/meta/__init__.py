"""Meta-Unlearning (arXiv 2410.12777): the gradient of a loss that is taken after a simulated attack.

The three sets of images, the simulated fine-tuning, the gradient through it, what an update gets on top, and the memory
that this takes. Not here: the erasure methods (`methods/`), any of which may be the base.
"""
