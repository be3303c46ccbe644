"""The proof that emitted text does what its graph does."""
