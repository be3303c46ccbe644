"""What Inductor compiled: its artifacts, its sources, its kernels, and the processor that they are for."""
