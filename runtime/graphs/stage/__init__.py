"""Inputs of static graphs: persistent buffers, filled and padded before a replay."""
