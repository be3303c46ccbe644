"""A model and what to call it with, how two runs compare, and what integrations need to load one.

An integration is a function ``load(path, seed)`` in the module ``integration`` of a package beside
this file, or in the entry points ``piecework.integrations``: a `LoadedModel`, or None if not its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from piecework.errors import UsageError
from piecework.runtime.compile import compile as compile_model
from piecework.runtime.compile import load
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.stitched import StitchedModule

#: Positional and keyword arguments.
Call = tuple[tuple[object, ...], dict[str, object]]
#: Largest accepted difference of two runs, relative to the largest value.
TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run: the generated token ids ``[new]`` or None, and what is compared, such as logits."""

    tokens: torch.Tensor | None
    values: tuple[torch.Tensor, ...]


@dataclass
class LoadedModel:
    """A model and what to call it with; a kind that is run in another way overrides what differs.

    Attributes:
        name: for reports.
        module: the model.
        example_args, example_kwargs: of the call that it is traced with.
        config_text: the model's ``config.json``, if it has one.
        more_calls: of other sizes and masks, which a run makes too.
    """

    name: str
    module: Callable[..., object]
    example_args: tuple[object, ...]
    example_kwargs: Mapping[str, object] = field(default_factory=dict)
    config_text: str | None = None
    more_calls: Sequence[Call] = ()

    @classmethod
    def of_calls(
        cls, model: torch.nn.Module, calls: Sequence[Call], config_text: str
    ) -> LoadedModel:
        """A model that is traced with the first of ``calls``."""
        (args, kwargs), *more = calls
        return cls(type(model).__name__, model, args, kwargs, config_text, more)

    def stitch(self, config: CompilationConfig) -> StitchedModule:
        """The stitched form of the model; some kinds are stitched in place."""
        return compile_model(self.module, self.example_args, self.example_kwargs, config=config)

    def save(self, stitched: StitchedModule, artifact: Path) -> None:
        """Write what `warm` takes."""
        stitched.save(artifact)

    def warm(self, artifact: Path) -> StitchedModule:
        """The stitched form by an artifact; raises `ArtifactError` where it does not fit."""
        return load(artifact, self.module)

    def modules(self, stitched: StitchedModule) -> Sequence[StitchedModule]:
        """The stitched modules that serve calls of the model by now."""
        return (stitched,)

    def run(self, new_tokens: int, stitched: StitchedModule | None = None) -> Outcome:
        """Run the model, or its stitched form: generate so many tokens, or make its calls."""
        model = stitched or self.module
        calls = ((self.example_args, self.example_kwargs), *self.more_calls)
        with torch.no_grad():
            result = [model(*args, **kwargs) for args, kwargs in calls]
        values = tuple(x for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor))
        return Outcome(None, values)

    def dry_context(self) -> Callable[..., AbstractContextManager[object]] | None:
        """What runs on dummy inputs need around them (``context_for`` of ``capture``)."""
        return None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Whether two runs agree: the same tokens, and values within `TOLERANCE`."""

    tokens_equal: bool
    difference: float

    @property
    def agree(self) -> bool:
        return self.tokens_equal and self.difference <= TOLERANCE

    def text(self, outcome: Outcome) -> str:
        """What was compared of ``outcome``, and how it came out."""
        shapes = [f"{str(v.dtype).removeprefix('torch.')}{list(v.shape)}" for v in outcome.values]
        shown = ", ".join(shapes[:3]) + (f" and {len(shapes) - 3} more" if len(shapes) > 3 else "")
        what, tokens = f"results ({shown})", ""
        if outcome.tokens is not None:
            what, tokens = "logits", f"tokens {'equal' if self.tokens_equal else 'DIFFER'}; "
        verdict = "they agree" if self.agree else "they DISAGREE"
        return f"{tokens}{what} differ by {self.difference:.1e} relative (limit {TOLERANCE:.0e}): {verdict}"


def compare(reference: Outcome, other: Outcome) -> Comparison:
    """Compare two runs of the same model on the same arguments."""
    tokens_equal = (reference.tokens is None) == (other.tokens is None) and (
        reference.tokens is None or torch.equal(reference.tokens, other.tokens)
    )
    worst = 0.0
    for expected, actual in zip(reference.values, other.values, strict=True):
        if expected.shape != actual.shape or expected.dtype != actual.dtype:
            return Comparison(tokens_equal, float("inf"))
        if expected.numel():
            largest = expected.double().abs().max().item() or 1.0
            difference = (expected.double() - actual.double()).abs().max().item() / largest
            worst = max(worst, difference if difference == difference else float("inf"))
    return Comparison(tokens_equal, worst)


def first_line(error: BaseException) -> str:
    """What a library's error says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    while len(lines) > 1 and lines[0].endswith(":"):
        lines[:2] = [f"{lines[0]} {lines[1]}"]
    return lines[0] if lines else type(error).__name__


def config_in(path: Path) -> tuple[Path, dict[str, Any]]:
    """The ``config.json`` of a folder, or ``path`` as one, and its fields; {} if it is none."""
    file = path / "config.json" if path.is_dir() else path
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        found = None
    return file, found if isinstance(found, dict) else {}


def model_of(
    kind: Any, path: Path, seed: int, make: Callable[[], torch.nn.Module], **options: object
) -> torch.nn.Module:
    """A folder's model, or with seeded random weights what ``make`` makes; raises `UsageError`."""
    torch.manual_seed(seed)
    weights = path.is_dir() and any(any(path.glob(each)) for each in ("*.safetensors", "*.bin"))
    try:
        model = kind.from_pretrained(path, local_files_only=True, **options) if weights else make()
    except Exception as error:  # a config that doesn't fit its model fails in its layers
        raise UsageError(
            f"no model can be made of {str(path)!r}: {type(error).__name__}: {first_line(error)}",
            hint="give its config.json to run it with random weights, or use module:factory",
        ) from error
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


@torch.no_grad()
def add_noise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """``model`` with seeded noise in each parameter: many are made with blocks that add nothing."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.is_floating_point():
            noise = torch.randn(weight.shape, generator=generator)
            weight.add_(noise.to(weight.dtype) * 0.02)
    return model


def require_packages(names: Iterable[str], extra: str) -> None:
    """Raise `UsageError` if one of these packages of an extra is missing."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"this needs {', '.join(missing)}, which {'are' if missing[1:] else 'is'} not installed",
            hint=f"pip install 'piecework[{extra}]'",
        )
