"""The model's own forward. In: a decoder and its config. Out: what a call of it may ask for, what it is tried on, and whether another forward gives the same."""
