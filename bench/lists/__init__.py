"""Models from lists that others made, run eagerly, by `torch.compile` and by piecework."""
