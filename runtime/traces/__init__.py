"""The traces of a stitched model: each compiled, all of them together, what is captured of them, and how they are watched at work."""
