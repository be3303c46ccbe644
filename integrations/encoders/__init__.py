"""Hugging Face transformers: in, a model that is no causal decoder; out, the model, or the encoder of an encoder-decoder, with example calls, to be compiled as any module."""
