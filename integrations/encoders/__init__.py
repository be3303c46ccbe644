"""Models of transformers that are no causal decoders, compiled as any module is."""
