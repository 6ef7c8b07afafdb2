"""What turns a loss into new weights: sharded by DeepSpeed, or layer by layer on one GPU; and the optimizers.
Not here: where the loss comes from, or what is done to a gradient before its step (`gradients/`)."""
