"""The traces of a stitched model: one compiled, all of them together, what is captured of them, and what can be seen of them at work. Entry point: `traces.Traces`."""
