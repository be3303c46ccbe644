"""The flat way. In: a decoder whose tokens are flattened into one row. Out: its forwards, with attention behind one splitting op."""
