"""What the specs of all ops are made of: what a spec is, and the gradients that several ops are tried on.

Not here: any op; those are in `testing.specs`.
"""
