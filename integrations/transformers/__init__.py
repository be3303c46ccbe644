"""Hugging Face transformers: in, a causal LM; out, the same model with its decoder stitched, ready for ``generate()``.

It never patches transformers or changes the model's weights; ``unstitch`` gives back exactly the model that came in.
"""

from piecework.integrations.transformers.stitcher import (
    how_served,
    load,
    save,
    sleep,
    stitch,
    stitched_module,
    unstitch,
    wake_up,
)

__all__ = [
    "how_served",
    "load",
    "save",
    "sleep",
    "stitch",
    "stitched_module",
    "unstitch",
    "wake_up",
]
