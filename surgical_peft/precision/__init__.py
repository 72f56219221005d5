"""16-bit weights: their 32-bit masters, float16 gradients, and a warning to other optimizers."""
