"""Models from lists that others made, each run eagerly, by `torch.compile`, and by `piecework.compile`, and compared."""
