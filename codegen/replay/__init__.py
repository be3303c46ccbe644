"""Replay source: what was captured of each piece, and the straight line that replays it."""
