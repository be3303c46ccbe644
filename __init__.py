"""piecework: a stitching compiler and runtime for PyTorch inference."""
