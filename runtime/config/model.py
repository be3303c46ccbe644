"""The base of every configuration: a frozen pydantic model whose errors list all problems at once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, get_args

from pydantic import AliasChoices, BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from piecework.errors import ConfigError, ConfigProblem, did_you_mean
from piecework.runtime.config.frozen_map import FrozenMap
from piecework.runtime.config.qualified_name import import_qualified
from piecework.runtime.store.digest import canonical, text_of


@dataclass(frozen=True, slots=True)
class HashRole:
    """Whether a field is part of the compile cache's key; an ignored one says why it may be.

    Used as metadata: ``mode: Annotated[CompilationMode, KEY]``.
    """

    in_key: bool
    reason: str = ""
    unordered: bool = False


KEY = HashRole(in_key=True)
# For a list whose order means nothing: two orders are one key.
KEY_AS_SET = HashRole(in_key=True, unordered=True)


def ignored(reason: str) -> HashRole:
    """The role of a field that cannot change what is compiled or emitted, with the reason."""
    return HashRole(in_key=False, reason=reason)


@dataclass(frozen=True, slots=True)
class Conflict:
    """Two or more fields that cannot hold together, and why."""

    fields: tuple[str, ...]
    message: str


class ConflictsFound(ValueError):
    """What a model's cross-field check raises inside pydantic: every conflict at once."""

    def __init__(self, conflicts: list[Conflict]) -> None:
        self.conflicts = tuple(conflicts)
        super().__init__("; ".join(conflict.message for conflict in conflicts))


class FrozenModel(BaseModel):
    """A frozen pydantic model whose errors are one ConfigError listing every problem.

    Subclasses may override :meth:`conflicts`; pydantic runs it once all fields are valid.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        arbitrary_types_allowed=True,
        protected_namespaces=(),  # older pydantic warns about a field named model_name
    )

    def __init__(self, *positional: object, **data: Any) -> None:
        if positional:
            fields = type(self).model_fields
            example = "backend" if "backend" in fields else next(iter(fields))
            raise ConfigError(
                f"the fields of {type(self).__name__} are given by name; got {positional[0]!r:.80}",
                hint=f"write {type(self).__name__}({example}=...), with the names of fields",
            )
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise _config_error(type(self), error, data) from None

    # Without this mark pydantic would call __init__ for nested models too, and a nested problem
    # would then leave as an error of its own before the other fields were looked at.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    def __setattr__(self, name: str, value: object) -> None:
        raise ConfigError(
            "a configuration is frozen",
            where=f"{type(self).__name__}.{name}",
            hint=f"make a changed copy with .replace({name}=…)",
        )

    def __delattr__(self, name: str) -> None:
        setattr(self, name, None)

    def conflicts(self) -> Iterable[Conflict]:
        """Fields that are valid alone and not together; none by default."""
        return ()

    def model_post_init(self, context: Any, /) -> None:
        found = list(self.conflicts())
        if found:
            raise ConflictsFound(found)

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """As pydantic's, with its errors as one ConfigError."""
        try:
            return super().model_validate(obj, **options)
        except ValidationError as error:
            raise _config_error(cls, error, obj if isinstance(obj, Mapping) else {}) from None

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Self:
        """The model that ``data`` describes (a parsed JSON or TOML object); all its errors are one."""
        return cls(**dict(data))

    @classmethod
    def given(cls, given: object, argument: str, where: str | None = None) -> Self:
        """What a caller gave for ``argument``: such a model, or a mapping of its fields.

        Raises:
            ConfigError: it is neither, or does not describe a model.
        """
        if isinstance(given, cls):
            return given
        if isinstance(given, Mapping):
            return cls.from_data(given)
        kind = f"a {type(given).__qualname__}"
        hint = f"pass {cls.__name__}(...), or a dict of what differs from the defaults"
        if isinstance(given, type):
            kind, hint = f"the class {given.__name__}", f"pass an instance: {given.__name__}(...)"
        elif isinstance(given, (str, os.PathLike)):
            hint = "read the file first, as with json or tomllib, and pass what is in it"
        raise ConfigError(
            f"{argument} must be a {cls.__name__} or a dict of its fields; got {kind}",
            where=where,
            hint=hint,
        )

    def replace(self, **changes: Any) -> Self:
        """A copy with ``changes``, validated again as a whole (pydantic's own copy checks nothing)."""
        current = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self)(**{**current, **changes})


def hash_roles(model: type[FrozenModel]) -> dict[str, HashRole | None]:
    """Each field's declared role, or None where it declares none (a test fails on that)."""
    return {
        name: next((item for item in field.metadata if isinstance(item, HashRole)), None)
        for name, field in model.model_fields.items()
    }


def nested_model(model: type[FrozenModel] | None, name: str) -> type[FrozenModel] | None:
    """The group that a field of ``model`` holds, or None."""
    field = None if model is None else model.model_fields.get(name)
    parts = [] if field is None else [field.annotation, *get_args(field.annotation)]
    groups = (p for p in parts if isinstance(p, type) and issubclass(p, FrozenModel))
    return next(groups, None)


def other_names(model: type[FrozenModel]) -> dict[str, str]:
    """Accepted aliases and the field that each one names."""
    return {
        str(alias): name
        for name, field in model.model_fields.items()
        if isinstance(field.validation_alias, AliasChoices)
        for alias in field.validation_alias.choices
        if alias != name
    }


# --- the cache's key -----------------------------------------------------------------------------


def factors_of(model: FrozenModel) -> dict[str, str]:
    """Each field whose role is KEY as canonical JSON, by dotted name; groups one level down.

    A value counts with its exact type and a pass by what it does.

    Raises:
        ConfigError: a field declares no role.
        Unidentifiable: a value has no stable form.
    """
    factors: dict[str, str] = {}
    for name, role in hash_roles(type(model)).items():
        if role is None:
            raise ConfigError(
                "the field does not say whether it is part of the cache key",
                where=f"{type(model).__name__}.{name}",
                hint="annotate it with KEY or ignored(reason)",
            )
        value = getattr(model, name)
        if not role.in_key:
            continue
        if isinstance(value, FrozenModel):
            factors |= {f"{name}.{key}": text for key, text in factors_of(value).items()}
        elif isinstance(value, FrozenMap):
            for key, each in sorted(value.items()):
                where = f"{name}.{key}"
                if name == "inductor_passes" and isinstance(each, str):
                    each = import_qualified(each, where=where)
                factors[where] = _short(text_of(canonical(each, where)))
        else:
            if role.unordered and isinstance(value, tuple):
                value = tuple(sorted(set(value)))
            factors[name] = _short(text_of(canonical(value, name)))
    return factors


def _short(text: str) -> str:
    """``text`` if people can read it, else its digest, which no such text begins like."""
    if len(text) <= 200:
        return text
    return f"sha256:{hashlib.sha256(text.encode('ascii')).hexdigest()}"


def digest(factors: Mapping[str, str]) -> str:
    """SHA-256 (hex) of named texts, independent of their order."""
    return hashlib.sha256(text_of(dict(factors)).encode()).hexdigest()


# --- errors --------------------------------------------------------------------------------------


def report(subject: str, problems: Sequence[ConfigProblem]) -> ConfigError:
    """One error that lists every problem of ``subject``, one a line."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    lines = "".join(f"\n  {each.field or subject}: {each.message}" for each in problems)
    return ConfigError(
        f"{count} in {subject}:{lines}",
        hint="`piecework config schema` describes every field",
        problems=tuple(problems),
    )


def _config_error(
    model: type[FrozenModel], error: ValidationError, data: Mapping[str, Any]
) -> ConfigError:
    """The error for ``data``, with the conflicts among the fields that were valid alone."""
    problems = list(_problems(model, error))
    aliases = other_names(model)
    locations = [str(each["loc"][0]) for each in error.errors() if each["loc"]]
    bad = {aliases.get(name, name) for name in locations}
    if bad:
        try:
            model(**{key: each for key, each in data.items() if aliases.get(key, key) not in bad})
        except ConfigError as more:
            problems += [each for each in more.problems if not bad & set(each.field.split(", "))]
    return report(model.__name__, problems)


def _problems(model: type[FrozenModel], error: ValidationError) -> Iterator[ConfigProblem]:
    for detail in error.errors(include_url=False):
        cause = detail.get("ctx", {}).get("error")
        where = ".".join(map(str, detail["loc"]))
        if isinstance(cause, ConflictsFound):
            prefix = f"{where}." if where else ""
            for each in cause.conflicts:
                yield ConfigProblem(", ".join(prefix + name for name in each.fields), each.message)
        elif cause is not None:
            yield ConfigProblem(where, str(cause))
        else:
            yield ConfigProblem(where, _sentence(model, detail))


def _sentence(model: type[FrozenModel], detail: ErrorDetails) -> str:
    """One problem in words, with the near misses of an unknown name."""
    if detail["type"] != "extra_forbidden":
        return f"{detail['msg'][0].lower()}{detail['msg'][1:]}, got {detail['input']!r:.80}"
    *path, name = map(str, detail["loc"])
    if not path and name in other_names(model):
        return f"is another name of {other_names(model)[name]}, which is given too"
    owner: type[FrozenModel] | None = model
    for part in path:
        owner = nested_model(owner, part)
    known = [] if owner is None else [*owner.model_fields, *other_names(owner)]
    hint = did_you_mean(name, known)
    return f"is not a field of this configuration{hint and f'; {hint}'}"
