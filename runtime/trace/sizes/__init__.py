"""Which sizes of a forward's arguments may differ from the example's. In: annotations, declarations, an example. Out: marks for a trace, and what it asked of sizes."""
