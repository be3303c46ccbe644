"""The function that users call: what it checks, as one table, its text and the proof of that."""
