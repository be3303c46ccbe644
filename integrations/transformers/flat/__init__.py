"""The flat way: the tokens of a batch in one row, with attention behind one splitting op."""
