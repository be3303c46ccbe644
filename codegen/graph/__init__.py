"""What is read of FX graphs: where nodes come from, what they call, which are the same."""
