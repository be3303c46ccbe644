"""Pieces: compiled once each, per batch range, and put together as a `program.Program`."""
