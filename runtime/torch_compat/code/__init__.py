"""What Inductor compiled: artifacts, sources, kernels, and the processor that they are for."""
