"""Is an operator fit to be cut at? In: a registered operator, and arguments to try it with. Out: an `OpReport` with its mutations, results and what is wrong with it.

The operator's fake implementation is run once on meta tensors to see that there is one. Its real implementation runs only on copies of
arguments that were given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch._ops import OpOverload

from piecework.codegen.graph.schemas import overloads_of, shows_nothing, writes_to
from piecework.codegen.split.splitting import SplittingOp
from piecework.errors import SplitError, short_errors


@dataclass(frozen=True, slots=True)
class OpReport:
    """What is known of an operator.

    Attributes:
        name: ``ns::op.overload``.
        schema: its schema, as text.
        mutates: names of the arguments that it changes.
        returns: types of what it returns.
        problems: why it is not fit to be a splitting op; empty if it is.
    """

    name: str
    schema: str
    mutates: tuple[str, ...]
    returns: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def fit(self) -> bool:
        return not self.problems

    @property
    def style(self) -> str:
        """Where results go: ``"out-buffer"``, ``"fresh outputs"``, ``"both"`` or ``"none"``."""
        styles = {(True, True): "both", (True, False): "out-buffer", (False, True): "fresh outputs"}
        return styles.get((bool(self.mutates), bool(self.returns)), "none")


@short_errors
def check_op(
    op: SplittingOp,
    args: Sequence[object] | None = None,
    kwargs: Mapping[str, object] | None = None,
) -> OpReport:
    """Tell whether ``op`` is fit to be a splitting op: schema, fake implementation, mutation, results.

    Args:
        op: ``"ns::op"``, ``"ns::op.overload"``, an overload, a packet, or what `piecework.splitting_op` returned.
        args, kwargs: arguments to run it with, on copies. Only a run can tell that it changes an argument or returns one
            against its schema, or that its fake implementation has other shapes than the real one (`torch.library.opcheck`).

    Raises:
        SplitError: there is no such operator, or its overload is not clear.

    Example:
        >>> check_op("mylib::attention").problems
        ('it has no fake implementation, so that graphs with it can not be traced',)
    """
    if isinstance(args, torch.Tensor):
        raise SplitError("args must be a tuple of arguments; got a Tensor", hint="pass (x,)")
    overload = _overload(op)
    schema = overload._schema
    mutates = tuple(each.name for each in schema.arguments if writes_to(each))
    problems: list[str] = []
    if any(each.alias_info is not None for each in schema.returns):
        problems.append(
            "it returns an alias of an argument, which a captured piece can not tell from a fresh tensor"
        )
    if shows_nothing(overload):
        problems.append("it neither returns nor changes anything, so that a compiler may drop it")
    if not _has_fake(overload):
        problems.append("it has no fake implementation, so that graphs with it can not be traced")
    elif args is not None or kwargs is not None:
        problems += _problems_of_a_run(overload, tuple(args or ()), dict(kwargs or {}))
    return OpReport(
        name=f"{schema.name}.{schema.overload_name or 'default'}",
        schema=str(schema),
        mutates=mutates,
        returns=tuple(str(each.type) for each in schema.returns),
        problems=tuple(problems),
    )


def _problems_of_a_run(
    overload: OpOverload, args: tuple[object, ...], kwargs: dict[str, object]
) -> list[str]:
    """What ``torch.library.opcheck`` says, one line each."""
    results = torch.library.opcheck(
        overload, args, kwargs, test_utils=_TESTS, raise_exception=False
    )
    said = (" ".join(str(result).split()) for result in results.values() if result != "SUCCESS")
    return [
        f"it does not do what its schema and fake say: {text[:300]}" for text in dict.fromkeys(said)
    ]


_TESTS = ("test_schema", "test_faketensor")


def _overload(op: SplittingOp) -> OpOverload:
    found: object = getattr(op, "splitting_op_name", op)
    name = str(found)
    if isinstance(found, str):
        namespace, _, rest = found.partition("::")
        base, _, overload = rest.partition(".")
        packet = getattr(getattr(torch.ops, namespace, None), base, None) if base else None
        found = getattr(packet, overload, None) if overload else packet
    overloads: tuple[OpOverload, ...] = overloads_of(found)
    if not overloads:
        raise SplitError(
            f"there is no operator {name!a}",
            hint="register it first (piecework.splitting_op), and name it as 'ns::op'",
        )
    if len(overloads) > 1:
        names = ", ".join(each._overloadname for each in overloads)
        raise SplitError(
            f"operator {name!a} has several overloads", hint=f"name one of them: {names}"
        )
    return overloads[0]


def _has_fake(overload: OpOverload) -> bool:
    """Run ``overload`` on meta tensors: only its absence raises what it raises then."""
    args: list[object] = []
    kwargs: dict[str, object] = {}
    for argument in overload._schema.arguments:
        if argument.has_default_value():
            continue
        value = _sample(str(argument.type))
        if argument.kwarg_only:
            kwargs[argument.name] = value
        else:
            args.append(value)
    try:
        overload(*args, **kwargs)
    except NotImplementedError:
        return False
    except Exception as error:  # noqa: BLE001 - a fake that dislikes the sample is a fake
        return "no fake impl" not in str(error)
    return True


def _sample(kind: str) -> object:
    """A value of a schema's type, tensors without data."""
    if kind.startswith("Optional") or kind.endswith("?"):
        return None
    if kind.startswith("List") or kind.endswith("[]"):
        inner = kind.removeprefix("List[").removesuffix("]") if kind[0] == "L" else kind[:-2]
        return [_sample(inner)]
    samples: dict[str, object] = {
        "Tensor": torch.empty(2, 2, device="meta"),
        "str": "",
        "float": 1.0,
        "bool": False,
    }
    return samples.get(kind, 1)
