"""Causal LMs of transformers with their decoders stitched, ready for ``generate()``.

Transformers is never patched, nor weights changed; ``unstitch`` gives back the model that came in.
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
