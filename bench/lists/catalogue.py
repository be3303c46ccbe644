"""All lists of models, by name: their rows, and how each is tried and told of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from piecework.bench.lists.families import encoders, families, heads, is_encoder_family
from piecework.bench.lists.generation import causal_lms, encoder_decoders
from piecework.bench.lists.sample import Row
from piecework.bench.lists.torch_modules import torch_modules
from piecework.bench.lists.tutorials import tutorials
from piecework.errors import UsageError


@dataclass(frozen=True, slots=True)
class ModelList:
    """One list."""

    rows: Callable[[], list[Row]]  # makes its rows; `ImportError` where a package isn't installed
    text: str  # what it is, and what it needs
    backend: str = "inductor"  # what compiles, where nobody says
    # stock runs it always, every third row is also cut and captured; else stock is asked only where
    # piecework is not equal
    everywhere: bool = True
    # whether a row belongs to it, where that takes a config to tell
    admits: Callable[[str], bool] = lambda name: True


LISTS = {
    "module_db": ModelList(torch_modules, "torch's own list of modules; needs expecttest"),
    "transformers": ModelList(families, "small models of transformers' families"),
    "tutorials": ModelList(
        tutorials,
        "models of PyTorch's tutorials that need no download, as the tutorials write them",
    ),
    "heads": ModelList(heads, "every class of transformers' registries of tasks"),
    "encoders": ModelList(
        encoders,
        "transformers' text encoders, vision and audio models, called with 1 to 5 rows, tokens of three lengths with padding on either side and none, "
        "and sound of two lengths; of an encoder-decoder its encoder",
        "eager",
        False,
        is_encoder_family,
    ),
    "causal LMs": ModelList(
        causal_lms,
        "transformers' causal LMs, stitched: `generate`, greedy, two prompts of seven tokens, six tokens more; tokens and scores are compared",
        "eager",
        False,
    ),
    "encoder-decoders": ModelList(
        encoder_decoders, "the same for transformers' encoder-decoders", "eager", False
    ),
}


def rows_of(source: str) -> list[Row]:
    """The rows of one list.

    Raises:
        UsageError: a package that the list needs isn't installed.
    """
    try:
        return LISTS[source].rows()
    except ImportError as error:
        raise UsageError(
            f"the list {source!r} can't be read: {error}", hint=LISTS[source].text
        ) from error
