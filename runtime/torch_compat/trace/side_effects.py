"""What traced code writes outside its graph, as Dynamo recorded it to repeat it afterwards."""

import operator
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from piecework.runtime.torch_compat.trace.guards import running_output, source_name

_NOT_USERS = (os.path.dirname(torch.__file__) + os.sep, str(Path(__file__).parents[2]) + os.sep)
_MISSING = object()
_EXISTING = ("AttributeMutationExisting", "ValueMutationExisting")

#: Told a fake tensor that was stored, and what lies at its place: whether they are the same tensor.
SameTensor = Callable[[object, object], bool]


def writes_of_trace(same: SameTensor) -> list[tuple[str, str]]:
    """What the running trace wrote outside its graph: Dynamo's names of places, and users' lines.

    No write is what was stored again where it lay: the same object, an equal number or text, or a
    tensor that the graph wrote in place (``self.state += 1``).
    """
    effects = running_output().side_effects
    is_held = partial(_is_held, effects, same)
    objects = {id(each): each for each in effects.keepalive}
    found = [("a tensor's hooks", "") for _ in effects.tensor_hooks]
    for number, var in list(effects.id_to_variable.items()):
        if type(var.mutation_type).__name__ not in _EXISTING or not effects.is_modified(var):
            continue
        line = _line(effects, var)
        if hasattr(var, "symbolic_stack"):  # not an object of the user's, and it has no place
            before = running_output().torch_function_mode_stack
            now = [getattr(each, "value", _MISSING) for each in var.symbolic_stack]
            if len(now) != len(before) or not all(map(operator.is_, now, before)):
                found.append(("the torch function modes that are entered", line))
            continue
        place, target = source_name(var.source), objects.get(number, _MISSING)
        stored, inner = effects.store_attr_mutations.get(var), getattr(var, "_base_vt", None)
        is_global = type(var).__name__ == "NewGlobalVariable"
        for name, value in (stored or {}).items():
            if is_global:
                scope = getattr(effects.output_graph_weakref(), "global_scope", {})
                if not is_held(value, scope.get(name, _MISSING)):
                    found.append((place, line))
            elif not is_held(value, _attribute(target, name)):
                found.append((f"{place}.{name}", line))
        if stored is None or inner is not None:
            change = _changed_item(is_held, inner or var, target)
            found += [] if change is None else [(f"{place}{change}", line)]
    return found


def _attribute(target: object, name: str) -> object:
    held = getattr(target, "__dict__", None)
    now = held.get(name, _MISSING) if isinstance(held, dict) else _MISSING
    if now is _MISSING and not isinstance(target, torch.nn.Module):
        try:  # a slot, or the contents of a closure's cell
            return object.__getattribute__(target, name)
        except (AttributeError, ValueError):
            return _MISSING
    return now


def _changed_item(is_held, var, target: object) -> str | None:  # type: ignore[no-untyped-def]
    """The first key of a dictionary with another item now; "" for other changes, None for none."""
    items = getattr(var, "items", None)
    same = False
    if isinstance(target, dict) and isinstance(items, dict):
        now = {_key(key): value for key, value in items.items()}
        for key in {**now, **target}:
            if key not in now or not is_held(now[key], target.get(key, _MISSING)):
                return f"[{key!r}]"
        same = True
    elif isinstance(target, (list, tuple)) and isinstance(items, list):
        same = len(items) == len(target) and all(map(is_held, items, target))
    elif isinstance(target, (set, frozenset)) and isinstance(items, dict):
        same = {_key(key) for key in items} == target
    return None if same else ""


def _is_held(effects, same: SameTensor, var, now: object) -> bool:  # type: ignore[no-untyped-def]
    """Whether ``var``, which Dynamo would store, stands for what is there."""
    if type(var).__name__ == "DeletedVariable" or now is _MISSING:
        return type(var).__name__ == "DeletedVariable" and now is _MISSING
    if hasattr(var, "is_realized"):
        if not var.is_realized():
            return hasattr(var, "peek_value") and var.peek_value() is now
        var = var.realize()
    if effects.id_to_variable.get(id(now)) is var:
        return True
    proxy = getattr(var, "proxy", None)
    if proxy is not None:  # first: asking a size for its constant would fix it
        fake = proxy.node.meta.get("example_value")
        return isinstance(fake, torch.Tensor) and same(fake, now)
    if var.is_python_constant():
        value = var.as_python_constant()
        return value is now or (type(value) is type(now) and repr(value) == repr(now))
    return vars(var).get("value", _MISSING) is now


def _key(key: object) -> object:
    """The key of a dictionary, out of what Dynamo wraps it in; itself if it is no constant."""
    var = getattr(key, "vt", None)
    if var is None:
        return key
    return var.as_python_constant() if var.is_python_constant() else getattr(var, "value", key)


def _line(effects, var) -> str:  # type: ignore[no-untyped-def]
    stacks = getattr(effects, "mutation_user_stacks", {}).get(var) or ()
    for frame in (frame for stack in reversed(stacks) for frame in reversed(stack)):
        if not frame.filename.startswith(_NOT_USERS):
            return f"{os.path.basename(frame.filename)}:{frame.lineno} in {frame.name}"
    return ""
