"""What a rule is. In: nothing. Out: `Rule`, and the helpers that build tables of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from piecework.runtime.analysis.rows.call import Call
from piecework.runtime.analysis.state import Rows

Answer: TypeAlias = "Rows | Sequence[Rows]"


@dataclass(frozen=True, slots=True)
class Rule:
    """How one operator treats rows.

    Attributes:
        apply: what its results are, one answer for all or one for each; raises `Mixes` where rows don't stay apart.
        sizes: parameters that may hold the batch size; anywhere else it is a number like any other, and results change with it.
        reads: whether it reads the values of its tensors, and not their shapes alone.
        plain: compilers are known to handle it where the batch size has no number behind it.
        numbers: ``Rows.numbers`` of its answers is meant; of other rules' answers it is dropped.
    """

    apply: Callable[[Call], Answer]
    sizes: frozenset[str] = frozenset()
    reads: bool = True
    plain: bool = False
    numbers: bool = False


def rules(
    names: str,
    apply: Callable[[Call], Answer],
    *,
    sizes: Iterable[str] = (),
    reads: bool = True,
    plain: bool = False,
    numbers: bool = False,
) -> dict[str, Rule]:
    """One rule for several operators, named in one text."""
    rule = Rule(apply, frozenset(sizes), reads, plain, numbers)
    return dict.fromkeys(names.split(), rule)
