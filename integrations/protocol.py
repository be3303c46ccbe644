"""A model and what to call it with, how two runs compare, and what integrations need to load one.

An integration is a function ``load(path, seed)``: a `LoadedModel` of a local folder or file, or
None for one of another kind. A package beside this file that has one in its module ``integration``
is found by itself, as is what another distribution names in the entry points
``piecework.integrations``.
"""

from __future__ import annotations

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
    """One run.

    Attributes:
        tokens: generated token ids ``[new]``; None for a model that generates none.
        values: what is compared: the logits ``[new, vocabulary]``, or the model's tensors.
    """

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
        if expected.numel() == 0:
            continue
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


def with_weights(made: Any, path: Path, **options: object) -> torch.nn.Module:
    """The model of a folder, by ``from_pretrained``; raises `UsageError` where it can't be loaded."""
    try:
        model: torch.nn.Module = made.from_pretrained(path, local_files_only=True, **options)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"can't load the model in {str(path)!r}: {first_line(error)}",
            hint="give its config.json to run it with random weights, or load it yourself and use module:factory",
        ) from error
    return model


@torch.no_grad()
def add_noise(model: torch.nn.Module, seed: int) -> None:
    """Add seeded noise to each parameter: models are often made with blocks that add nothing."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.is_floating_point():
            noise = torch.randn(weight.shape, generator=generator)
            weight.add_(noise.to(weight.dtype) * 0.02)


def with_seeded_weights(
    make: Callable[[], torch.nn.Module], name: str, file: Path, seed: int
) -> torch.nn.Module:
    """What ``make`` makes, with `add_noise`; raises `UsageError` where it can't be made."""
    torch.manual_seed(seed)
    try:
        model = make()
    except Exception as error:  # a config that doesn't fit its model fails in its layers
        raise UsageError(
            f"no {name} can be made of {str(file)!r}: {type(error).__name__}: {first_line(error)}",
            hint="its fields do not fit together, or the class makes no model of a config alone: use module:factory",
        ) from error
    add_noise(model, seed)
    return model


def require_packages(names: Iterable[str], extra: str) -> None:
    """Raise `UsageError` if one of these packages of an extra is missing."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"this needs {', '.join(missing)}, which {'are' if missing[1:] else 'is'} not installed",
            hint=f"pip install 'piecework[{extra}]'",
        )
