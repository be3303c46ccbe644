"""Example calls of a diffusion transformer, from its forward's parameters and its config.

It knows arguments by name, and no class; whether a call runs is for the caller to try.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from piecework.integrations.encoders.arguments import SEED, TOKENS, Size, Ways, padding_mask
from piecework.integrations.protocol import Call

_STEPS = 1000  # of the noise schedule
_SIDE = 16  # of latents, where a config says none
_FRAMES = 2
_TEXT_WIDTHS = (
    "caption_channels",
    "joint_attention_dim",
    "text_dim",
    "text_embed_dim",
    "cap_feat_dim",
    "caption_dim",
    "cross_attention_dim",
)


def candidates(model: torch.nn.Module) -> Iterator[Ways]:
    """Ways to call ``model``: with images, a row of patches, and videos of both layouts."""
    names = [
        name for name in inspect.signature(model.forward).parameters if name in vars(_Arguments)
    ]
    if not getattr(model.config, "guidance_embeds", False):
        names = [name for name in names if name != "guidance"]
    for layout in ("image", "patches", "video", "frames"):
        yield partial(_call, model.config, layout, names)


def _call(config: Any, layout: str, names: Sequence[str], size: Size) -> Call:
    made = _Arguments(config, layout, size)
    return (), {name: getattr(made, name)() for name in names}


class _Arguments:
    """Makes each argument by its name, equal at each call of a size."""

    def __init__(self, config: Any, layout: str, size: Size) -> None:
        self._config, self._layout, self._size = config, layout, size
        said = getattr(config, "sample_size", None) or _SIDE
        side = int(said[0] if isinstance(said, (list, tuple)) else said)
        self._side = side if size.tokens >= TOKENS else side // 2
        self._generator = torch.Generator().manual_seed(SEED)

    def _drawn(self, *shape: int) -> torch.Tensor:
        return torch.randn(self._size.rows, *shape, generator=self._generator)

    def hidden_states(self) -> torch.Tensor:
        channels, side = int(self._config.in_channels), self._side
        shapes = {
            "image": (channels, side, side),
            "patches": (side * side, channels),
            "video": (channels, _FRAMES, side, side),
            "frames": (_FRAMES, channels, side, side),
        }
        return self._drawn(*shapes[self._layout])

    def encoder_hidden_states(self) -> torch.Tensor:
        said = (getattr(self._config, name, None) for name in _TEXT_WIDTHS)
        return self._drawn(self._size.tokens, int(next((width for width in said if width), 32)))

    def timestep(self) -> torch.Tensor:
        return torch.randint(_STEPS, (self._size.rows,), generator=self._generator)

    def class_labels(self) -> torch.Tensor:
        classes = int(getattr(self._config, "num_embeds_ada_norm", 0) or 2)
        return torch.randint(classes, (self._size.rows,), generator=self._generator)

    def pooled_projections(self) -> torch.Tensor:
        return self._drawn(int(self._config.pooled_projection_dim))

    def encoder_attention_mask(self) -> torch.Tensor:
        return padding_mask(self._size)

    def img_ids(self) -> torch.Tensor:
        rows, columns = torch.meshgrid(
            torch.arange(self._side), torch.arange(self._side), indexing="ij"
        )
        return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).view(-1, 3).float()

    def txt_ids(self) -> torch.Tensor:
        return torch.zeros(self._size.tokens, 3)

    def guidance(self) -> torch.Tensor:
        return torch.full((self._size.rows,), 3.5)

    def added_cond_kwargs(self) -> dict[str, torch.Tensor | None]:
        if not getattr(self._config, "use_additional_conditions", False):
            return {"resolution": None, "aspect_ratio": None}
        sides = torch.full((self._size.rows, 2), 8.0 * self._side)
        return {"resolution": sides, "aspect_ratio": torch.ones(self._size.rows, 1)}
