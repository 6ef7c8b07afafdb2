"""How MiniCanvas was made: fitting its VAE, text encoders, U-Net and judge from scratch.
Not here: anything that a training or an evaluation needs."""
