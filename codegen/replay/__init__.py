"""Replay source: what was captured of each piece, the straight line that replays it, and the proof of that."""
