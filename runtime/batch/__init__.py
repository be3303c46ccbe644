"""How a batch runs: its mode, its captured size, its range."""
