"""One operator at work. In: an ATen operator with fake arguments and results. Out: its arguments by name, and what is known of them, for a rule to ask.

The name is that of the functional form: ``add`` for ``add_.Tensor`` and ``add.out`` as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch._ops import OpOverload, OpOverloadPacket

from piecework.codegen.graph.schemas import writes_to
from piecework.runtime.analysis.state import Batch, Mixes, Rows, tensors_in


@dataclass(frozen=True, slots=True)
class Call:
    """What a rule sees.

    Attributes:
        op: the overload.
        args: every argument of the schema by name, defaults included; without tensors that only take results (``out=``).
        written: tensors that it writes to.
        out: what it returned.
        batch: the batch size.
        state_of: what is known of a tensor before the call.
    """

    op: torch._ops.OpOverload
    args: dict[str, object]
    written: tuple[torch.Tensor, ...]
    out: object
    batch: Batch
    state_of: Callable[[torch.Tensor], Rows]

    @property
    def name(self) -> str:
        return base_name(self.op)

    @property
    def results(self) -> tuple[torch.Tensor, ...]:
        return tuple(tensors_in(self.out))

    def has(self, name: str) -> bool:
        return isinstance(self.args.get(name), torch.Tensor)

    def tensor(self, name: str) -> torch.Tensor:
        value = self.args.get(name)
        if not isinstance(value, torch.Tensor):
            raise Mixes("takes arguments that are not known")
        return value

    def tensors(self, name: str) -> tuple[torch.Tensor, ...]:
        return tuple(tensors_in(self.args.get(name)))

    def rows(self, name: str) -> Rows:
        return self.state_of(self.tensor(name)) if self.has(name) else Rows()

    def inputs(self) -> tuple[torch.Tensor, ...]:
        """All tensors that it reads."""
        return tuple(tensors_in(list(self.args.values())))

    def number(self, name: str, otherwise: int = 0) -> int:
        """A plain whole number."""
        value = self.args.get(name)
        if value is None:
            return otherwise
        if type(value) is not int and not isinstance(value, bool):
            raise Mixes(f"takes a symbolic {name}")
        return int(value)

    def dim(self, name: str = "dim", of: str = "self") -> int:
        """A dimension, counted from the front."""
        return self.front(self.number(name), self.tensor(of).dim())

    def dims(self, name: str = "dim", of: str = "self") -> tuple[int, ...] | None:
        """Dimensions, counted from the front; None where none are given."""
        value = self.args.get(name)
        if value is None or (isinstance(value, (list, tuple)) and not value):
            return None
        found = value if isinstance(value, (list, tuple)) else [value]
        rank = self.tensor(of).dim()
        return tuple(self.front(_plain(each, name), rank) for each in found)

    @staticmethod
    def front(dim: int, rank: int) -> int:
        return dim + rank if dim < 0 else dim

    def same(self, *names: str) -> None:
        """Refuse arguments that carry rows where only fixed ones are known to work."""
        for name in names:
            for each in self.tensors(name):
                if self.state_of(each).dims:
                    raise Mixes(f"takes rows as {name}")


def _plain(value: object, name: str) -> int:
    if type(value) is not int:
        raise Mixes(f"takes a symbolic {name}")
    return value


def base_name(op: torch._ops.OpOverload) -> str:
    """``add`` for ``aten.add_.Tensor`` and ``aten.add.out``; ``_softmax`` for ``aten._softmax.default``."""
    name = str(op._schema.name).rpartition("::")[2]
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def is_metadata_only(op: torch._ops.OpOverload) -> bool:
    """Whether an operator that is declared to write changes sizes and strides alone, as ``t_`` does."""
    return torch.Tag.inplace_view in op.tags


def bound(
    op: torch._ops.OpOverload, args: Sequence[object], kwargs: dict[str, object]
) -> tuple[dict[str, object], tuple[torch.Tensor, ...]]:
    """The arguments of a call by name, without those for results; and the tensors that it writes to."""
    found: dict[str, object] = {}
    written: list[torch.Tensor] = []
    for index, argument in enumerate(op._schema.arguments):
        name = "self" if argument.name == "input" and "self" not in found else argument.name
        if index < len(args):
            value = args[index]
        elif argument.name in kwargs:
            value = kwargs[argument.name]
        else:
            value = argument.default_value if argument.has_default_value() else None
        if writes_to(argument):
            written += tensors_in(value)
            if argument.is_out:
                continue
        found[name] = value
    return found, tuple(written)


def is_own(op: object) -> bool:
    """Whether an operator is somebody's own, not torch's."""
    return getattr(op, "namespace", "aten") not in ("aten", "prims", "prim")


def computes(target: object) -> bool:
    """Whether a function computes values of its arguments, as torch's own functions and Python's operators do. One from elsewhere may change
    how the operators after it run (a level of ``torch.func``, a mode), and what the dispatcher showed of them is not what is compiled.
    """
    if isinstance(target, (OpOverload, OpOverloadPacket)):
        return True
    module = getattr(target, "__module__", None)
    return module in _COMPUTING or (module, getattr(target, "__name__", None)) in _SETTING


_COMPUTING = frozenset(
    (
        *("_operator", "builtins", "math", "torch", "torch.functional", "torch.nn.functional"),
        *("torch._C._nn", "torch._C._linalg", "torch._C._fft", "torch._C._special"),
    )
)
# No operators either, but what the dispatcher shows after them is what is compiled.
_SETTING = frozenset(
    (
        ("torch._C", "_log_api_usage_once"),
        ("torch._C", "_set_grad_enabled"),
        ("torch.amp.autocast_mode", "_enter_autocast"),
        ("torch.amp.autocast_mode", "_exit_autocast"),
    )
)


def placed(dims: Iterable[int], rows: Rows, what: str) -> None:
    """Refuse rows in any of ``dims``.

    Raises:
        Mixes: there are some; ``what`` completes the sentence.
    """
    if any(rows.at(dim) for dim in dims):
        raise Mixes(what)
