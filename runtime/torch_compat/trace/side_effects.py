"""What traced code writes outside its graph, as Dynamo recorded it to repeat it after the graph, which a capture does not."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from piecework.runtime.torch_compat.trace.guards import running_output, source_name

_TORCH = os.path.dirname(torch.__file__) + os.sep
_MISSING = object()

#: Told a fake tensor that was stored, and what lies at its place: whether they are the same tensor.
SameTensor = Callable[[object, object], bool]


@dataclass(frozen=True, slots=True)
class Write:
    """Something that existed before the trace and is another thing after it.

    Attributes:
        place: Dynamo's name of it, such as ``L['model'].calls``.
        line: the user's line that wrote, ``model.py:41 in forward``; "" where it isn't known.
        store: a module, the name of its attribute and the number, text or None that it is set to; None for any other write.
    """

    place: str
    line: str = ""
    store: tuple[torch.nn.Module, str, object] | None = None


def writes_of_trace(same: SameTensor) -> list[Write]:
    """What the trace that is running wrote outside its graph; for a backend to ask.

    What was stored again where it lay already is no write: the same object, an equal number or text, or a tensor that the
    graph wrote in place (``self.state += 1``).

    Returns:
        The writes; none where torch doesn't show its records.
    """
    effects = _effects()
    if effects is None:
        return []
    objects = {id(each): each for each in effects.keepalive}
    found: list[Write] = []
    for number, var in list(effects.id_to_variable.items()):
        if type(var.mutation_type).__name__ not in _EXISTING or not effects.is_modified(var):
            continue
        line = _line(effects, var)
        if hasattr(var, "symbolic_stack"):  # not an object of the user's, and it has no place
            if not _modes_as_before(var):
                found.append(Write("the torch function modes that are entered", line))
            continue
        place = source_name(var.source)
        target = objects.get(number, _MISSING)
        stored = effects.store_attr_mutations.get(var)
        for name, value in (stored or {}).items():
            if not _Same(effects, same).attribute(var, target, name, value):
                outer = type(var).__name__ == "NewGlobalVariable"
                store = None if outer else _plain_store(target, name, value)
                found.append(Write(place if outer else f"{place}.{name}", line, store))
        if stored is None or getattr(var, "_base_vt", None) is not None:
            inner = getattr(var, "_base_vt", None) or var
            keys = _Same(effects, same).changed_items(inner, target)
            found += [Write(f"{place}{key}", line) for key in keys]
    found += [Write("a tensor's hooks") for _ in effects.tensor_hooks]
    return found


_EXISTING = ("AttributeMutationExisting", "ValueMutationExisting")


def _effects():  # type: ignore[no-untyped-def]
    """Dynamo's record; None where it is kept elsewhere or has another form."""
    effects = getattr(running_output(), "side_effects", None)
    wanted = ("keepalive", "id_to_variable", "store_attr_mutations", "is_modified", "tensor_hooks")
    return effects if all(hasattr(effects, name) for name in wanted) else None


def _modes_as_before(var) -> bool:  # type: ignore[no-untyped-def]
    """Whether each torch function mode that the trace entered was left again, and no other one."""
    before = running_output().torch_function_mode_stack
    now = [getattr(each, "value", _MISSING) for each in var.symbolic_stack]
    return len(now) == len(before) and all(map(operator.is_, now, before))


def _plain_store(target: object, name: str, var) -> tuple[torch.nn.Module, str, object] | None:  # type: ignore[no-untyped-def]
    """A number, text or None that replaces another one in a module's own dictionary."""
    if (
        not isinstance(target, torch.nn.Module)
        or type(target.__dict__.get(name, _MISSING)) not in _PLAIN
    ):
        return None
    if type(target).__setattr__ is not torch.nn.Module.__setattr__ or hasattr(type(target), name):
        return None
    if getattr(var, "proxy", None) is not None or not var.is_python_constant():
        return None
    value = var.as_python_constant()
    return (target, name, value) if type(value) in _PLAIN else None


_PLAIN = (bool, int, float, str, type(None))


class _Same:
    """Compares what Dynamo would store with what is there."""

    def __init__(self, effects, same: SameTensor) -> None:  # type: ignore[no-untyped-def]
        self._effects = effects
        self._tensor = same

    def attribute(self, var, target: object, name: str, value) -> bool:  # type: ignore[no-untyped-def]
        if type(var).__name__ == "NewGlobalVariable":
            scope = getattr(self._effects.output_graph_weakref(), "global_scope", {})
            return self._value(value, scope.get(name, _MISSING))
        held = getattr(target, "__dict__", None)
        now = held.get(name, _MISSING) if isinstance(held, dict) else _MISSING
        if now is _MISSING and not isinstance(target, torch.nn.Module):
            # A slot, or the contents of a closure's cell.
            try:
                now = object.__getattribute__(target, name)
            except (AttributeError, ValueError):
                now = _MISSING
        return self._value(value, now)

    def changed_items(self, var, target: object) -> Iterator[str]:  # type: ignore[no-untyped-def]
        """The keys of a dictionary whose items are others now, as text; "" for a change of another container."""
        items = getattr(var, "items", None)
        if isinstance(target, (list, tuple)) and isinstance(items, list):
            if len(items) != len(target) or not all(map(self._value, items, target)):
                yield ""
        elif isinstance(target, (set, frozenset)) and isinstance(items, dict):
            if {_key(key) for key in items} != target:
                yield ""
        elif isinstance(target, dict) and isinstance(items, dict):
            now = {_key(key): value for key, value in items.items()}
            for key in {**now, **target}:
                if key not in now or not self._value(now[key], target.get(key, _MISSING)):
                    yield f"[{key!r}]"
        else:
            yield ""

    def _value(self, var, now: object) -> bool:  # type: ignore[no-untyped-def]
        """Whether ``var`` stands for ``now``."""
        if type(var).__name__ == "DeletedVariable" or now is _MISSING:
            return type(var).__name__ == "DeletedVariable" and now is _MISSING
        if hasattr(var, "is_realized"):
            if not var.is_realized():
                return hasattr(var, "peek_value") and var.peek_value() is now
            var = var.realize()
        if self._effects.id_to_variable.get(id(now)) is var:
            return True
        proxy = getattr(var, "proxy", None)
        if proxy is not None:  # first: asking a size for its constant would fix it
            fake = proxy.node.meta.get("example_value")
            return isinstance(fake, torch.Tensor) and self._tensor(fake, now)
        if var.is_python_constant():
            value = var.as_python_constant()
            return value is now or (type(value) is type(now) and repr(value) == repr(now))
        return getattr(var, "value", _MISSING) is now


def _key(key: object) -> object:
    """The key of a dictionary, out of what Dynamo wraps it in; itself if it is no constant."""
    var = getattr(key, "vt", None)
    if var is None:
        return key
    if var.is_python_constant():
        return var.as_python_constant()
    return getattr(var, "value", key)


def _line(effects, var) -> str:  # type: ignore[no-untyped-def]
    stacks = getattr(effects, "mutation_user_stacks", {}).get(var) or ()
    for stack in reversed(stacks):
        for frame in reversed(stack):
            if not frame.filename.startswith(_TORCH):
                return f"{os.path.basename(frame.filename)}:{frame.lineno} in {frame.name}"
    return ""
