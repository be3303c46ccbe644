"""Compiled models that outlive their process. In: the traces of a stitched model. Out: a directory; and traces again, bound to a model in another process. Entry points: `save.save`, `load.read`."""
