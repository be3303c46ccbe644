"""A graph cut at its splitting operators: a stitching graph and its pieces."""
