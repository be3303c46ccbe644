"""Diffusion transformers of diffusers, compiled as any module is."""
