"""Fields from a command line: in, texts like ``.pass_config.clean_up=false`` or ``3``; out, nested data, or the texts of a model.

It never validates a value: the model does, together with everything else that was given.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from piecework.errors import ConfigError, ConfigProblem
from piecework.runtime.config.model import FrozenModel, nested_model, other_names, report
from piecework.runtime.config.text import parse_json, to_data

_DOTTED = re.compile(r"[\w-]+(\.[\w-]+)*")


def parse_overrides(
    model: type[FrozenModel], texts: Iterable[str], *, flag: str = "-O"
) -> dict[str, Any]:
    """Nested data from the values of one option, in any order.

    Each text is ``.field=value`` (dots reach into groups; below a table of options the rest of the
    path is one key), a mode's number as in ``-O3``, or a JSON object of fields. A value is JSON where
    it reads as JSON, else a string as it stands; lists may be written with commas.

    Raises:
        ConfigError: a text has another form, or a field is given twice; all such texts are listed.

    Example:
        >>> parse_overrides(CompilationConfig, ["3", ".pass_config.clean_up=false"])
        {'mode': 3, 'pass_config': {'clean_up': False}}
    """
    data: dict[str, Any] = {}
    problems: list[ConfigProblem] = []
    for text in texts:
        for path, value in _assignments(model, text, flag, problems):
            if not _place(data, path, value):
                problems.append(ConfigProblem(".".join(path), "is given more than once"))
    if problems:
        raise report(f"the {flag} options", problems)
    return data


def _assignments(
    model: type[FrozenModel], text: str, flag: str, problems: list[ConfigProblem]
) -> list[tuple[tuple[str, ...], Any]]:
    """The (path, value) pairs that one text gives; what is wrong with it goes to ``problems``."""
    text = text.removeprefix(flag).strip()
    if text.startswith("{"):
        try:
            return _leaves(model, parse_json(text, where=flag))
        except ConfigError as error:
            problems.append(ConfigProblem(text, error.message))
            return []
    if text.isdecimal() and "mode" in model.model_fields:
        return [(("mode",), int(text))]
    name, equals, value = text.partition("=")
    if not equals or not name.startswith(".") or not all(name[1:].split(".")):
        problems.append(ConfigProblem(flag + text, f"is not of the form {flag}.field=value"))
        return []
    return [(_path(model, name[1:].split(".")), _value(value))]


def _leaves(model: type[FrozenModel], data: Mapping[str, Any]) -> list[tuple[tuple[str, ...], Any]]:
    """The fields of ``data``, those of groups one by one, so that they merge with others."""
    found: list[tuple[tuple[str, ...], Any]] = []
    for name, value in data.items():
        path = _path(model, [name])
        group = _group(model, path[0])
        if group is not None and isinstance(value, Mapping):
            found += [((*path, *rest), each) for rest, each in _leaves(group, value)]
        elif _is_options(model, path[0]) and isinstance(value, Mapping):
            found += [((*path, key), each) for key, each in value.items()]
        else:
            found.append((path, value))
    return found


def _path(model: type[FrozenModel], parts: list[str]) -> tuple[str, ...]:
    """The keys to walk: aliases become field names, and an option's name keeps its dots."""
    name = other_names(model).get(parts[0], parts[0])
    rest = parts[1:]
    if not rest:
        return (name,)
    group = _group(model, name)
    if group is not None:
        return (name, *_path(group, rest))
    if _is_options(model, name):
        return (name, ".".join(rest))
    return (name, *rest)


def _group(model: type[FrozenModel], name: str) -> type[FrozenModel] | None:
    field = model.model_fields.get(name)
    return None if field is None else nested_model(field.annotation)


def _is_options(model: type[FrozenModel], name: str) -> bool:
    field = model.model_fields.get(name)
    return field is not None and isinstance(field.default, Mapping)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _place(data: dict[str, Any], path: Sequence[str], value: Any) -> bool:
    """Put ``value`` at ``path``; False if something is there already."""
    *parents, last = path
    for name in parents:
        data = data.setdefault(name, {})
        if not isinstance(data, dict):
            return False
    if last in data:
        return False
    data[last] = value
    return True


def merge(
    model: type[FrozenModel], below: Mapping[str, Any], above: Mapping[str, Any]
) -> dict[str, Any]:
    """``below`` (a file's fields) with ``above`` (overrides) on top; groups and options merge by key."""
    aliases = other_names(model)
    merged: dict[str, Any] = {}
    for name, value in below.items():
        field = aliases.get(name, name)
        # Both names in one file stay apart, so that validation reports them.
        merged[name if field in below else field] = value
    for name, value in above.items():
        old = merged.get(name)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            group = _group(model, name)
            merged[name] = merge(group, old, value) if group else {**old, **value}
        else:
            merged[name] = value
    return merged


def to_overrides(config: FrozenModel, *, flag: str = "-O") -> list[str]:
    """The options that give ``config`` when nothing else is given, one for each changed field.

    Raises:
        ConfigError: an option or a pass can't be written as text.
    """
    changed = to_data(config, only_changed=True)
    return [_option(flag, path, value) for path, value in _leaves(type(config), changed)]


def _option(flag: str, path: Sequence[str], value: Any) -> str:
    dotted = ".".join(path)
    if not _DOTTED.fullmatch(dotted):
        # A table's key can be any text; one that dots and = can't carry goes as a JSON object.
        for name in reversed(path):
            value = {name: value}
        return flag + _compact(value)
    # Bare where that reads back as the same string, which is how a person would write it.
    bare = isinstance(value, str) and _value(value) == value and value == value.strip()
    return f"{flag}.{dotted}={value if bare else _compact(value)}"


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
