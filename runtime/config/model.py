"""The base of every configuration: a frozen pydantic model whose errors list all problems."""

from __future__ import annotations

import hashlib
import pkgutil
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from piecework.errors import ConfigError, ConfigProblem, did_you_mean
from piecework.runtime.store.digest import canonical, text_of

CACHE_KEY = "x-cache-key"
# ``package.module:name.attribute``, or dots throughout.
QUALIFIED_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*[.:][A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def key(default: Any, description: str, **limits: Any) -> Any:
    """A field that the compile cache's key has, as its JSON schema says."""
    return Field(default, description=description, json_schema_extra={CACHE_KEY: True}, **limits)


def no_key(default: Any, description: str, **limits: Any) -> Any:
    """A field that cannot change what is compiled or emitted."""
    return Field(default, description=description, json_schema_extra={CACHE_KEY: False}, **limits)


def is_keyed(field: FieldInfo) -> bool:
    """Whether the compile cache's key has ``field``."""
    return bool(field.json_schema_extra[CACHE_KEY])  # type: ignore[index]


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
        """What a caller gave for ``argument``: such a model, or a mapping of its fields."""
        if isinstance(given, (cls, Mapping)):
            return cls.model_validate(given)
        message = f"{argument} must be a {cls.__name__} or a dict of its fields; got {given!r:.80}"
        raise ConfigError(message, where=where)

    def replace(self, **changes: Any) -> Self:
        """A copy with ``changes``, validated as a whole (pydantic's own copy checks nothing)."""
        return type(self)(**{**dict(self), **changes})


class FrozenMap(dict[str, Any]):
    """A read-only, hashable dict; the lists and dicts inside are frozen with it."""

    def __init__(self, items: Mapping[str, Any]) -> None:
        ordered = sorted(items, key=str)  # so that equal ones are also written alike
        super().__init__((name, _frozen(items[name])) for name in ordered)

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("a configuration is frozen: replace(...) makes another")

    __setitem__ = __delitem__ = __ior__ = _refuse
    update = pop = popitem = clear = setdefault = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[type[FrozenMap], tuple[dict[str, Any]]]:
        return FrozenMap, (dict(self),)


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return FrozenMap(value)
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


def thaw(value: Any) -> Any:
    """``value`` with plain dicts and lists in place of frozen ones."""
    if isinstance(value, Mapping):
        return {name: thaw(item) for name, item in value.items()}
    return list(map(thaw, value)) if isinstance(value, tuple) else value


def group_of(model: type[FrozenModel], name: str) -> type[FrozenModel] | None:
    """The group that a field of ``model`` holds, or None."""
    field = model.model_fields.get(name)
    kind = field and field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, FrozenModel) else None


def factors_of(model: FrozenModel) -> dict[str, str]:
    """Each field of the cache's key as canonical JSON by dotted name; a pass by what it does."""
    factors: dict[str, str] = {}
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if not is_keyed(field):
            continue
        if isinstance(value, FrozenModel):
            factors |= {f"{name}.{inner}": text for inner, text in factors_of(value).items()}
        elif isinstance(value, FrozenMap):
            for option, each in sorted(value.items()):
                where = f"{name}.{option}"
                if name == "inductor_passes" and isinstance(each, str):
                    each = import_qualified(each, where=where)
                factors[where] = text_of(canonical(thaw(each), where))
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
    return ConfigError(f"{count} in {subject}:{lines}", hint=hint, problems=tuple(problems))


def _config_error(model: type[FrozenModel], error: ValidationError) -> ConfigError:
    problems = []
    for detail in error.errors(include_url=False):
        *path, name = map(str, detail["loc"] or ("",))
        if detail["type"] == "extra_forbidden":
            owner = group_of(model, path[0]) if path else model
            hint = did_you_mean(name, owner.model_fields if owner is not None else ())
            message = f"is not a field of this configuration{hint and f'; {hint}'}"
        elif detail["type"] == "value_error":
            message = str(detail["ctx"]["error"])
        else:
            message = f"{detail['msg'][0].lower()}{detail['msg'][1:]}, got {detail['input']!r:.80}"
        problems.append(ConfigProblem(".".join([*path, name]), message))
    return report(model.__name__, problems, model.explained_by)


def qualified_name(value: str | Callable[..., Any]) -> str:
    """How a callable is written in a file: ``module:name``; a string stays as it is."""
    if isinstance(value, str):
        return value
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not module or not name or "<" in name or module == "__main__":
        raise ValueError(f"{value!r} has no importable name, so it can't be written to a file")
    return f"{module}:{name}"


def import_qualified(name: str, *, where: str) -> Any:
    """The object that ``name`` points to: ``module:name`` or ``module.name``, nested or not."""
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{name!r} can't be imported: {error}",
            where=where,
            hint="write package.module:name, and put the package on the Python path",
        ) from error
