"""All lists. In: the name of a list. Out: its rows.

A list whose package isn't installed says so.
"""

from __future__ import annotations

from piecework.bench.lists.families import encoders, families, heads
from piecework.bench.lists.plain import plain_models
from piecework.bench.lists.sample import Row
from piecework.bench.lists.torch_modules import torch_modules
from piecework.bench.lists.tutorials import tutorials
from piecework.errors import UsageError

LISTS = {
    "module_db": (torch_modules, "torch's own list of modules; needs expecttest"),
    "transformers": (families, "small models of transformers' families; needs transformers"),
    "plain torch": (plain_models, "models written by hand"),
    "tutorials": (tutorials, "models of PyTorch's tutorials that need no download"),
}
#: Lists that are run where they are asked for.
OTHERS = {
    "encoders": (encoders, "encoders of transformers' families; needs transformers"),
    "heads": (heads, "every class of transformers' registries of tasks; needs transformers"),
}


def rows_of(source: str) -> list[Row]:
    """The rows of one list.

    Raises:
        UsageError: a package that the list needs isn't installed.
    """
    make, text = (LISTS | OTHERS)[source]
    try:
        return make()
    except ImportError as error:
        raise UsageError(f"the list {source!r} can't be read: {error}", hint=text) from error


def find(source: str, name: str) -> Row:
    """One row.

    Raises:
        UsageError: the list has no row of that name, or can't be read.
    """
    for row in rows_of(source):
        if row.name == name:
            return row
    raise UsageError(f"there is no model {name!r} in the list {source!r}")
