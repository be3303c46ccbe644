"""Differences as a person sees them. In: a `SourceDiff`. Out: lines for a terminal, boxes and links, rows side by side."""
