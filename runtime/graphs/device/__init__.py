"""Static graphs of one device: the contract, and its implementations for the CPU and for CUDA."""
