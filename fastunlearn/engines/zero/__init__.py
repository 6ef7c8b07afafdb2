"""DeepSpeed ZeRO: the trained weights, their gradients and moments sharded over any number of ranks.
Not here: what is done to the gradients (`gradients/`), or the launcher (`commands/train.py`)."""
