"""Emitted text read back: its grammar, what it does, and the proof that this is what a graph does."""
