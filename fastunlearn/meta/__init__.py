"""Meta-Unlearning (arXiv 2410.12777): three sets of images, a simulated attack, and the gradient of a loss behind it.
Not here: the erasure methods (`methods/`), any of which may be the base, or attacks on a finished model."""
