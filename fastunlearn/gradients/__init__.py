"""What is done to gradients between the backward pass and the step: storing, projecting, adding, clipping, refusing.
Not here: whose gradients they are, or how they are sharded (`engines/`)."""
