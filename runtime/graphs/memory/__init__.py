"""Memory behind static graphs: one owner per model, addresses, stand-ins for tensors that move, the wrapper that captures a callable per batch shape."""
