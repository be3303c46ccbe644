"""What is read of FX graphs: where nodes come from, what they call, which values are constants, which pieces are the same."""
