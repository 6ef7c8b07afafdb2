"""Erasure methods, one file each: the facts that the rest of the package asks for, and the loss.
Not here: the loop (`training/`), where samples come from (`sampling/`), or what is added to any method (`meta/`)."""
