"""Torch's nested compile regions: marked functions, their calls, guards for what shared a trace."""

import dataclasses
import functools
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
import torch.fx

from piecework.runtime.torch_compat.trace.guards import running_output

_MANY = 10_000  # of one region that torch compares a call with, before it raises


def compile_region(function: types.FunctionType) -> Callable[..., object] | None:
    """A copy of ``function`` as a nested compile region; None where torch shares no traces."""
    code, scope = function.__code__, function.__globals__
    parts = function.__name__, function.__defaults__, function.__closure__
    copy = types.FunctionType(code, scope, *parts)
    copy.__kwdefaults__ = function.__kwdefaults__
    try:
        return torch.compiler.nested_compile_region(copy, max_reuse_entries=_MANY)
    except (AttributeError, TypeError):
        return None


def region_settings() -> dict[str, object]:
    """Settings that leave the calls of regions in the graph: torch would lose shared memory."""
    names = ("inline_invoke_subgraph", "inline_single_use_invoke_subgraph")
    return {name: False for name in names if hasattr(torch._dynamo.config, name)}


def region_calls(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    target = torch.ops.higher_order.invoke_subgraph
    return list(graph.find_nodes(op="call_function", target=target))


def module_of(node: torch.fx.Node) -> int | None:
    """The identity of the module whose call made ``node``; None where torch does not say."""
    stack = node.meta.get("nn_module_stack") or {"": None}
    number = str(list(stack)[-1]).partition("@")[0]
    return int(number) if number.isdecimal() else None


def guard_past_marks(marked: Collection[object]) -> None:
    """Let the running trace guard functions in the place of the marks on them."""
    guards, output = _guards(), running_output()
    if guards is None or not marked:
        return
    ids = {id(each) for each in marked}
    scope = {"G": output.global_scope, "L": output.local_scope}
    known: dict[str, bool] = {}

    def unmarked(source: Any) -> Any:
        closure = getattr(getattr(source, "base", None), "base", None)
        if type(closure).__name__ != "ClosureSource":
            return source
        name = str(closure.base.name)
        if name not in known:
            known[name] = id(_value(name, scope)) in ids
        return closure.base if known[name] else source

    guards.inner = type(guards.inner)(_moved(each, unmarked) for each in guards.inner)


def guard_alike(pairs: Mapping[int, int]) -> bool:
    """Guard of modules what the running trace has guarded of others in their place."""
    guards = _guards()
    known = getattr(getattr(running_output(), "side_effects", None), "id_to_variable", {})
    sources = {each: getattr(known.get(each), "source", None) for each in {*pairs, *pairs.values()}}
    if guards is None or not all(hasattr(each, "clone") for each in sources.values()):
        return False
    others: dict[Any, list[Any]] = {}
    for module, first in pairs.items():
        others.setdefault(sources[first], []).append(sources[module])
    for guard in list(guards):
        for first in [each for each in _chain(guard.originating_source) if each in others]:
            for other in others[first]:
                guards.add(
                    _moved(guard, lambda at, first=first, other=other: other if at == first else at)
                )
    return True


def _value(name: str, scope: Mapping[str, object]) -> object:
    try:
        return eval(name, {**scope})
    except Exception:  # noqa: BLE001
        return None


def _guards() -> Any:
    context = torch._guards.TracingContext.try_get()
    return getattr(getattr(context, "guards_context", None), "dynamo_guards", None)


def _moved(guard: Any, move: Callable[[Any], Any]) -> Any:
    """``guard`` of another place; the same guard if it is none."""
    source = guard.originating_source.clone(move)
    create = guard.create_fn
    if isinstance(create, functools.partial):
        is_source = torch._guards.Source
        given = {
            k: v.clone(move) if isinstance(v, is_source) else v for k, v in create.keywords.items()
        }
        if any(given[k] != v for k, v in create.keywords.items()):
            create = functools.partial(create.func, *create.args, **given)
    if source == guard.originating_source and create is guard.create_fn:
        return guard
    return dataclasses.replace(guard, originating_source=source, create_fn=create, _hash=None)


def _chain(source: Any) -> Iterator[Any]:
    while source is not None:
        yield source
        source = getattr(source, "base", None)
