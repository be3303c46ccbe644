"""The traces of a stitched model: compiled, captured, and watched at work."""
