"""Operators to cut at: Python functions, registered with torch, that stitched code may call."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any, Generic, Literal, ParamSpec, TypeVar, get_args

import torch

from piecework.errors import SplitError, short_errors, short_methods

P = ParamSpec("P")
R = TypeVar("R")

#: What an operator says of the rows of a batch: row ``i`` of all that it returns or writes depends on row ``i`` of its arguments
#: alone, whatever the batch size; or it reads the batch's real size from the forward context and leaves rows beyond it alone.
RowsOf = Literal["independent", "context"]
#: Which whole forwards may be one static graph with an operator inside it: none; those in which every request decodes one token; those
#: in which every request decodes as many; any. What it plans on the host for a batch is frozen in such a graph.
GraphsOf = Literal["never", "single_token_decode", "uniform_decode", "always"]
_WORDS = {"rows": get_args(RowsOf), "full_graphs": get_args(GraphsOf)}
HOW_TO_DECLARE = "say splitting_op(..., rows=...), or piecework.declare_rows(op, ...)"


@short_methods
class SplittingOp(Generic[P, R]):
    """A registered splitting operator; calling it calls the operator through the dispatcher.

    Attributes:
        splitting_op_name: ``ns::name``.
        overload: the operator, as it appears in graphs.
        implementation: the function given to `splitting_op`.
        by_device: device types → functions given to `register_kernel`.
    """

    def __init__(self, name: str, function: Callable[P, R], mutates_args: tuple[str, ...]) -> None:
        self.splitting_op_name = name
        self.implementation = function
        namespace, _, short = name.partition("::")
        self._library = torch.library.Library(namespace, "FRAGMENT")
        schema = _schema_of(function, mutates_args, name)
        self._library.define(f"{short}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        self._library.impl(short, function, "CompositeExplicitAutograd")
        self.overload = getattr(getattr(torch.ops, namespace), short).default
        self.by_device: dict[str, Callable[P, R]] = {}
        returns = bool(self.overload._schema.returns)
        self.register_fake(self._no_fake if returns else lambda *args, **kwargs: None)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.overload(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<splitting op {self.splitting_op_name}>"

    def _no_fake(self, *args: object, **kwargs: object) -> None:
        raise SplitError(
            f"splitting op {self.splitting_op_name} returns a value and has no fake implementation",
            hint=f"decorate a function that returns empty tensors of the right shape with "
            f"@{self.implementation.__name__}.register_fake",
        )

    def register_fake(self, fake: Callable[P, R]) -> Callable[P, R]:
        """Set what tells shapes and dtypes of the results while tracing; also a decorator."""
        torch.library.register_fake(
            self.splitting_op_name, fake, lib=self._library, allow_override=True
        )
        return fake

    def register_kernel(self, device_type: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Set the implementation for one device type, ``"cpu"`` or ``"cuda"``; also a decorator.

        Raises:
            SplitError: torch knows no such device.
        """
        try:
            kind = torch.device(device_type).type
        except (RuntimeError, TypeError) as error:
            raise SplitError(
                f"torch knows no device {device_type!r}",
                where=self.splitting_op_name,
                hint='say "cpu" or "cuda"',
            ) from error

        def register(function: Callable[P, R]) -> Callable[P, R]:
            self._library.impl(self.splitting_op_name.partition("::")[2], function, kind.upper())
            self.by_device[kind] = function
            return function

        return register

    def implementation_for(self, device_type: str) -> Callable[P, R]:
        """The function that the dispatcher would reach for plain tensors on ``device_type``."""
        return self.by_device.get(device_type, self.implementation)


class SplittingOpRegistry:
    """The operators registered with `splitting_op`, by name; what ``splitting_ops=None`` means.

    Attributes:
        functions: names of other libraries' operators → the Python function that each runs, for every
            device; who puts one there vouches for it.
    """

    def __init__(self) -> None:
        self._ops: dict[str, SplittingOp[..., object]] = {}
        self._said: dict[str, dict[str, Any]] = {"rows": {}, "full_graphs": {}}
        self.functions: dict[str, Callable[..., object]] = {}

    def add(
        self, name: str, function: Callable[P, R], mutates_args: tuple[str, ...]
    ) -> SplittingOp[P, R]:
        if not inspect.isroutine(function):
            raise SplitError(f"a splitting op is made of a function; got {function!r}", where=name)
        old = self._ops.get(name)
        if old is not None:
            if _identity(old.implementation) != _identity(function):
                raise SplitError(
                    f"splitting op {name} is already registered by {_identity(old.implementation)}",
                    hint="choose another name",
                )
            # The same definition again: a reloaded module or a notebook cell.
            old._library._destroy()
        op = SplittingOp(name, function, mutates_args)
        self._ops[name] = op  # type: ignore[assignment]
        return op

    def names(self) -> tuple[str, ...]:
        return tuple(self._ops)

    def find(self, target: object) -> SplittingOp[..., object] | None:
        """The registered operator that a graph node's target is, if any."""
        return self._ops.get(qualified_name(target))

    def function_of(self, target: object) -> Callable[..., object] | None:
        """The function that ``functions`` has for the operator of a graph node."""
        return self.functions.get(qualified_name(target))

    def rows_of(self, op: torch._ops.OpOverload) -> RowsOf | None:
        """What an operator says of its rows; None if it was not said."""
        return self._said["rows"].get(op._schema.name)

    def graphs_of(self, op: torch._ops.OpOverload) -> GraphsOf:
        """Which whole forwards may be captured with ``op`` inside; any, if it was not said."""
        return self._said["full_graphs"].get(op._schema.name) or "always"

    def declare(self, name: str, **words: RowsOf | GraphsOf | None) -> None:
        """Note what an operator says of its ``rows`` and of ``full_graphs``; None takes it back."""
        for field, word in words.items():
            if word not in (None, *_WORDS[field]):
                raise SplitError(
                    f"{field}={word!r} of {name} is not known",
                    hint=f"say one of {', '.join(map(repr, _WORDS[field]))}, or nothing",
                )
            self._said[field][name] = word


def qualified_name(op: object) -> str:
    """``ns::name`` of an operator, however it is held; "" for what is none."""
    if isinstance(op, torch._ops.OpOverload):
        return str(op._schema.name)
    if isinstance(op, torch._ops.OpOverloadPacket):
        return str(op._qualified_op_name)
    return str(getattr(op, "splitting_op_name", None) or getattr(op, "_qualname", ""))


def _identity(function: Callable[..., object]) -> str:
    return f"{function.__module__}.{function.__qualname__}"


#: Mirrors torch's own operator registry, which is one per process.
registry = SplittingOpRegistry()


AnyOp = str | torch._ops.OpOverload | torch._ops.OpOverloadPacket | SplittingOp[..., object]


@short_errors
def declare_rows(op: AnyOp, rows: RowsOf | None) -> None:
    """Say what an operator of others does with the rows of a batch, as `splitting_op` does.

    Args:
        op: ``"namespace::name"``, the operator, or what ``torch.library.custom_op`` made.
        rows: ``"independent"``, ``"context"``, or None to take it back.
    """
    registry.declare(_name_of(op), rows=rows)


@short_errors
def declare_full_graphs(op: AnyOp, graphs: GraphsOf | None) -> None:
    """Say which whole forwards may be one static graph with an operator of others inside.

    Args:
        op: as for `declare_rows`.
        graphs: as ``full_graphs`` of `splitting_op`, or None to take it back.
    """
    registry.declare(_name_of(op), full_graphs=graphs)


def _name_of(op: AnyOp) -> str:
    name = op if isinstance(op, str) else qualified_name(op)
    _require_name(name)
    namespace, _, short = name.partition("::")
    if not hasattr(getattr(torch.ops, namespace), short):
        raise SplitError(
            f"there is no operator {name!a}",
            hint="check its spelling, and import the module that defines it first",
        )
    return name


def _require_name(name: object) -> None:
    parts = name.split("::") if isinstance(name, str) else ()
    if len(parts) != 2 or not all(part.isidentifier() for part in parts):
        raise SplitError(
            f"operator name {name!a} is not of the form 'namespace::name'",
            hint="both are names as Python's are: 'mylib::attention'",
        )


@short_errors
def splitting_op(
    name: str,
    *,
    mutates_args: Iterable[str] = (),
    rows: RowsOf | None = None,
    full_graphs: GraphsOf | None = None,
) -> Callable[[Callable[P, R]], SplittingOp[P, R]]:
    """Register the decorated function as an operator that graphs are cut at.

    Args:
        name: ``"namespace::name"``.
        mutates_args: parameters that the function writes into.
        rows: what it does with the rows of a batch. ``"independent"``: row ``i`` of all that it returns
            or writes depends on row ``i`` of its arguments alone. ``"context"``: it reads the batch's
            real size from the forward context, and touches no row beyond it.
        full_graphs: which whole forwards may be one static graph with it inside: ``"never"``,
            ``"single_token_decode"``, ``"uniform_decode"`` or ``"always"``, which nothing means too.

    Returns:
        A decorator; the result is called like the function. If the function returns a value, give it a
        fake with ``.register_fake``.

    Raises:
        SplitError: the name is malformed or taken, or an annotation is missing or unsupported.

    Example:
        >>> @piecework.splitting_op("demo::attention", mutates_args=("out",))
        ... def attention(query: torch.Tensor, key: torch.Tensor, out: torch.Tensor) -> None:
        ...     out.copy_(query @ key.mT)
    """
    _require_name(name)

    def register(function: Callable[P, R]) -> SplittingOp[P, R]:
        op = registry.add(name, function, tuple(mutates_args))
        registry.declare(name, rows=rows, full_graphs=full_graphs)
        return op

    return register


def _schema_of(function: Callable[..., object], mutates_args: tuple[str, ...], name: str) -> str:
    try:
        return torch.library.infer_schema(function, mutates_args=mutates_args)
    except (ValueError, TypeError) as error:
        reason = str(error).removeprefix("infer_schema(func): ").partition("Got func with")[0]
        raise SplitError(
            f"no operator schema for {name}: {reason.partition('The valid types are')[0].strip(' .')}",
            where=_identity(function),
            hint="annotate every parameter and the result with types that torch.library knows: Tensor, list[Tensor], int, "
            "float, bool, str, …, optional ones",
        ) from error
