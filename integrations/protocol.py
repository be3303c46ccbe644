"""What an integration is. In: nothing; this is the vocabulary of `loading`, `comparing` and the command line. Out: `Integration`, `LoadedModel` and `Outcome`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from piecework.errors import UsageError
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.stitched import StitchedModule

#: Positional and keyword arguments.
Call = tuple[tuple[object, ...], dict[str, object]]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model and what to call it with.

    Attributes:
        name: for reports.
        module: the model.
        example_args: positional example arguments.
        integration: knows how models of this kind are stitched and run.
        config_text: the model's ``config.json``, if it has one.
        example_kwargs: keyword arguments beside ``example_args``.
        more_calls: of other sizes and masks, which a run makes too.
        other_sizes: what `capture` has to know of sizes beside the batch size.
    """

    name: str
    module: Callable[..., object]
    example_args: tuple[object, ...]
    integration: Integration
    config_text: str | None = None
    example_kwargs: Mapping[str, object] = field(default_factory=dict)
    more_calls: Sequence[Call] = ()
    other_sizes: Mapping[str, Literal["batch"]] = field(default_factory=dict)

    def stitch(self, config: CompilationConfig) -> StitchedModule:
        """The stitched form of the model; some kinds are stitched in place."""
        return self.integration.stitch(self, config)

    def warm(self, artifact: Path) -> StitchedModule:
        """The same by what ``StitchedModule.save`` wrote; see `Integration.warm`."""
        return self.integration.warm(self, artifact)

    def save(self, stitched: StitchedModule, artifact: Path) -> None:
        """Write what `warm` takes; see `Integration.save`."""
        self.integration.save(self, stitched, artifact)

    def modules(self, stitched: StitchedModule) -> Sequence[StitchedModule]:
        """What serves the model by now; see `Integration.modules`."""
        return self.integration.modules(self, stitched)

    @torch.no_grad()
    def run(self, new_tokens: int, stitched: StitchedModule | None = None) -> Outcome:
        """Run the model on its example arguments; see `Integration.run`."""
        return self.integration.run(self, new_tokens, stitched)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run.

    Attributes:
        tokens: generated token ids ``[new]``; None for a model that generates none.
        values: what is compared: the logits ``[new, vocabulary]`` that chose the tokens, or the model's tensors.
    """

    tokens: torch.Tensor | None
    values: tuple[torch.Tensor, ...]


class Integration(Protocol):
    """One kind of model: how it is loaded, stitched and run.

    A package of `piecework.integrations` with a module ``integration`` that holds one as ``INTEGRATION`` is found by itself, as is
    what another distribution names in the entry points ``piecework.integrations``.
    """

    def load(self, path: Path, seed: int) -> LoadedModel | None:
        """The model of a local folder or file; None if it is of another kind.

        Args:
            seed: of random weights and of the example arguments.

        Raises:
            UsageError: it is of this kind, and can't be loaded.
        """
        ...

    def stitch(self, loaded: LoadedModel, config: CompilationConfig) -> StitchedModule:
        """Stitch the model.

        Raises:
            PieceworkError: it can't be, with the reason.
        """
        ...

    def save(self, loaded: LoadedModel, stitched: StitchedModule, artifact: Path) -> None:
        """Write what serves the model.

        Raises:
            ArtifactError: something can't be told again in another process, or the directory can't be written.
        """
        ...

    def modules(self, loaded: LoadedModel, stitched: StitchedModule) -> Sequence[StitchedModule]:
        """The stitched modules that serve calls of the model by now, ``stitched`` among them."""
        ...

    def warm(self, loaded: LoadedModel, artifact: Path) -> StitchedModule:
        """Stitch the model by an artifact of a like one.

        Raises:
            ArtifactError: it does not fit.
        """
        ...

    def run(
        self, loaded: LoadedModel, new_tokens: int, stitched: StitchedModule | None = None
    ) -> Outcome:
        """Run the model on its example arguments: generate ``new_tokens`` tokens, or call it once.

        Args:
            stitched: the stitched form, to call in place of a model that is not stitched in place.
        """
        ...

    def dry_context(self) -> Callable[..., AbstractContextManager[object]] | None:
        """What runs on dummy inputs need around them while static graphs are captured (``context_for`` of ``capture``); None for nothing."""
        ...


def first_line(error: BaseException) -> str:
    """What a library's error says, in one line: its first one, and what follows a colon at its end."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    while len(lines) > 1 and lines[0].endswith(":"):
        lines[:2] = [f"{lines[0]} {lines[1]}"]
    return lines[0] if lines else type(error).__name__


def with_weights(made: Any, path: Path, **options: object) -> torch.nn.Module:
    """The model of a folder.

    Args:
        made: a class of Hugging Face's with ``from_pretrained``, which gets ``options``.

    Raises:
        UsageError: it can't be loaded.
    """
    try:
        model: torch.nn.Module = made.from_pretrained(path, local_files_only=True, **options)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"can't load the model in {str(path)!r}: {first_line(error)}",
            hint="give its config.json to run it with random weights, or load it yourself and use module:factory",
        ) from error
    return model


def require_packages(names: Iterable[str], extra: str) -> None:
    """Raise `UsageError` if one of these packages, which the extra ``extra`` installs, is missing."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"this needs {', '.join(missing)}, which {'are' if missing[1:] else 'is'} not installed",
            hint=f"pip install 'piecework[{extra}]'",
        )
