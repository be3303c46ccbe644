"""The base of every configuration: a frozen pydantic model whose errors list all problems."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from piecework.errors import ConfigError, ConfigProblem, did_you_mean
from piecework.runtime.config.qualified_name import import_qualified
from piecework.runtime.store.digest import canonical, text_of

CACHE_KEY = "x-cache-key"
# Every field says, also in its JSON schema, whether the compile cache's key has it, or why not.
KEY: Any = Field(json_schema_extra={CACHE_KEY: True})


def ignored(reason: str) -> Any:
    """For a field that cannot change what is compiled or emitted, with the reason."""
    return Field(json_schema_extra={CACHE_KEY: reason})


class FrozenModel(BaseModel):
    """A frozen pydantic model whose errors are one ConfigError listing every problem."""

    explained_by: ClassVar[str] = "`piecework config schema` describes every field"
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        arbitrary_types_allowed=True,
        protected_namespaces=(),  # older pydantic warns about a field named model_name
    )

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise _config_error(type(self), error) from None

    # Without this mark pydantic would call __init__ for nested models too, and a nested problem
    # would then leave as an error of its own before the other fields were looked at.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    def conflicts(self) -> Iterable[ConfigProblem]:
        """What contradicts each other among fields that are valid alone; nothing by default."""
        return ()

    def model_post_init(self, context: Any, /) -> None:
        if found := tuple(self.conflicts()):
            raise report(type(self).__name__, found)

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """As pydantic's, with its errors as one ConfigError."""
        try:
            return super().model_validate(obj, **options)
        except ValidationError as error:
            raise _config_error(cls, error) from None

    @classmethod
    def given(cls, given: object, argument: str, where: str | None = None) -> Self:
        """What a caller gave for ``argument``: such a model, or a mapping of its fields.

        Raises:
            ConfigError: it is neither, or does not describe a model.
        """
        if isinstance(given, (cls, Mapping)):
            return cls.model_validate(given)
        raise ConfigError(
            f"{argument} must be a {cls.__name__} or a dict of its fields; got {given!r:.80}",
            where=where,
            hint=f"pass {cls.__name__}(...), or a dict of what differs from the defaults",
        )

    def replace(self, **changes: Any) -> Self:
        """A copy with ``changes``, validated as a whole (pydantic's own copy checks nothing)."""
        return type(self)(**{**dict(self), **changes})


class FrozenMap(Mapping[str, Any]):
    """A read-only, hashable mapping; the lists and dicts inside are frozen with it."""

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[str, Any]) -> None:
        self._items = {key: _frozen(value) for key, value in items.items()}

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and self._items == FrozenMap(other)._items

    def __repr__(self) -> str:
        return repr(self._items)


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return FrozenMap(value)
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


def thaw(value: Any) -> Any:
    """``value`` with plain dicts and lists in place of frozen ones."""
    if isinstance(value, Mapping):
        return {key: thaw(item) for key, item in value.items()}
    return list(map(thaw, value)) if isinstance(value, tuple) else value


def group_of(model: type[FrozenModel], name: str) -> type[FrozenModel] | None:
    """The group that a field of ``model`` holds, or None."""
    field = model.model_fields.get(name)
    kind = field and field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, FrozenModel) else None


def factors_of(model: FrozenModel) -> dict[str, str]:
    """Each field of the cache's key as canonical JSON, by dotted name.

    A value counts with its exact type and a pass by what it does.

    Raises:
        Unidentifiable: a value has no stable form.
    """
    factors: dict[str, str] = {}
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if field.json_schema_extra[CACHE_KEY] is not True:  # type: ignore[index]
            continue
        if isinstance(value, FrozenModel):
            factors |= {f"{name}.{key}": text for key, text in factors_of(value).items()}
        elif isinstance(value, FrozenMap):
            for key, each in sorted(value.items()):
                where = f"{name}.{key}"
                if name == "inductor_passes" and isinstance(each, str):
                    each = import_qualified(each, where=where)
                factors[where] = text_of(canonical(each, where))
        else:
            factors[name] = text_of(canonical(value, name))
    return factors


def digest(factors: Mapping[str, str]) -> str:
    """SHA-256 (hex) of named texts, independent of their order."""
    return hashlib.sha256(text_of(dict(factors)).encode()).hexdigest()


def report(
    subject: str, problems: Sequence[ConfigProblem], hint: str = FrozenModel.explained_by
) -> ConfigError:
    """One error that lists every problem of ``subject``, one a line."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    lines = "".join(f"\n  {each.field or subject}: {each.message}" for each in problems)
    return ConfigError(
        f"{count} in {subject}:{lines}",
        hint=hint,
        problems=tuple(problems),
    )


def _config_error(model: type[FrozenModel], error: ValidationError) -> ConfigError:
    problems = []
    for detail in error.errors(include_url=False):
        *path, name = map(str, detail["loc"]) if detail["loc"] else ("",)
        if detail["type"] == "extra_forbidden":
            owner = group_of(model, path[0]) if path else model
            known = owner.model_fields if owner is not None else ()
            hint = did_you_mean(name, known)
            message = f"is not a field of this configuration{hint and f'; {hint}'}"
        elif detail["type"] == "value_error":
            message = str(detail["ctx"]["error"])
        else:
            message = f"{detail['msg'][0].lower()}{detail['msg'][1:]}, got {detail['input']!r:.80}"
        problems.append(ConfigProblem(".".join([*path, name]), message))
    return report(model.__name__, problems, model.explained_by)
