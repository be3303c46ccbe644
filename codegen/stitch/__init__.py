"""Stitching source: a stitching graph lowered to a plan, written, proved and bound."""
