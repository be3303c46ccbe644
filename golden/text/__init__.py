"""Emitted texts and the files that hold them. In: what a compilation emitted. Out: a golden file, its proposal, and what may be said of the text alone."""
