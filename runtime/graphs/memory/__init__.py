"""Memory behind static graphs: its owner, its addresses, and callables captured per batch shape."""
