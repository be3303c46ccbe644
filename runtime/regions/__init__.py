"""Layers of a model that are alike: found, traced once, and written out for each of them."""
