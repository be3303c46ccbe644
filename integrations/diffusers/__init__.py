"""Hugging Face diffusers: in, a diffusion transformer; out, the model with example calls, to be compiled as any module."""
