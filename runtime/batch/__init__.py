"""What a batch is, and what runs for it: modes, sizes, ranges, captured keys, the dispatcher, the forward context. Nothing here knows a model."""
