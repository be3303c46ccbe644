"""The base of every configuration model: in, keyword data; out, a frozen object or one error with every problem.

It knows no field of piecework, and it never reads the environment or a file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, get_args

from pydantic import AliasChoices, BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from piecework.errors import ConfigError, ConfigProblem, did_you_mean


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
            raise ConfigError(
                f"the fields of {type(self).__name__} are given by name; got {positional[0]!r:.80}",
                hint=(
                    f"write {type(self).__name__}(backend='eager'), with the names of fields"
                    if "backend" in type(self).model_fields
                    else f"write {next(iter(type(self).model_fields))}=..., with the names of fields"
                ),
            )
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise _config_error(type(self), error, data) from None

    # Without this mark pydantic would call __init__ for nested models too, and a nested problem
    # would then leave as an error of its own before the other fields were looked at.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    def __setattr__(self, name: str, value: object) -> None:
        raise self._frozen(name)

    def __delattr__(self, name: str) -> None:
        raise self._frozen(name)

    def _frozen(self, name: str) -> ConfigError:
        return ConfigError(
            "a configuration is frozen",
            where=f"{type(self).__name__}.{name}",
            hint=f"make a changed copy with .replace({name}=…)",
        )

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
        """The model that ``data`` describes (a parsed JSON or TOML object).

        Raises:
            ConfigError: one or more fields are unknown, wrong or in conflict; all are listed.
        """
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
        raise ConfigError(
            f"{argument} must be a {cls.__name__} or a dict of its fields; got "
            + (
                f"the class {given.__name__}"
                if isinstance(given, type)
                else f"a {type(given).__qualname__}"
            ),
            where=where,
            hint=_instead_of(given, cls),
        )

    def replace(self, **changes: Any) -> Self:
        """A copy with ``changes``, validated again as a whole.

        Raises:
            ConfigError: the copy would not be valid.
        """
        # Not model_copy(update=…): pydantic would take the changes unchecked.
        current = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self)(**{**current, **changes})


def _instead_of(given: object, cls: type) -> str:
    if isinstance(given, type):
        return f"pass an instance: {given.__name__}(...)"
    if isinstance(given, (str, os.PathLike)):
        return "read the file first, as with json or tomllib, and pass what is in it"
    return f"pass {cls.__name__}(...), or a dict of what differs from the defaults"


def hash_roles(model: type[FrozenModel]) -> dict[str, HashRole | None]:
    """Each field's declared role, or None where it declares none (a test fails on that)."""
    return {
        name: next((item for item in field.metadata if isinstance(item, HashRole)), None)
        for name, field in model.model_fields.items()
    }


def nested_model(annotation: Any) -> type[FrozenModel] | None:
    """The FrozenModel that an annotation names, also inside a union, or None."""
    if isinstance(annotation, type) and issubclass(annotation, FrozenModel):
        return annotation
    for part in get_args(annotation):
        if (found := nested_model(part)) is not None:
            return found
    return None


def other_names(model: type[FrozenModel]) -> dict[str, str]:
    """Accepted aliases and the field that each one names."""
    names: dict[str, str] = {}
    for name, field in model.model_fields.items():
        if isinstance(field.validation_alias, AliasChoices):
            names.update({str(alias): name for alias in field.validation_alias.choices})
    return {alias: name for alias, name in names.items() if alias != name}


def _problems(model: type[FrozenModel], error: ValidationError) -> list[ConfigProblem]:
    found: list[ConfigProblem] = []
    for detail in error.errors(include_url=False):
        cause = detail.get("ctx", {}).get("error")
        where = ".".join(str(part) for part in detail["loc"])
        if isinstance(cause, ConflictsFound):
            prefix = f"{where}." if where else ""
            found += [
                ConfigProblem(", ".join(prefix + name for name in each.fields), each.message)
                for each in cause.conflicts
            ]
        else:
            found.append(ConfigProblem(where, _sentence(model, detail, cause)))
    return found


def _sentence(model: type[FrozenModel], detail: ErrorDetails, cause: object) -> str:
    """One problem in words, with the near misses of an unknown name."""
    if detail["type"] == "extra_forbidden":
        name = str(detail["loc"][-1])
        if len(detail["loc"]) == 1 and name in (aliases := other_names(model)):
            return f"is another name of {aliases[name]}, which is given too"
        owner: type[FrozenModel] | None = model
        for part in detail["loc"][:-1]:
            field = None if owner is None else owner.model_fields.get(str(part))
            owner = None if field is None else nested_model(field.annotation)
        known = [] if owner is None else [*owner.model_fields, *other_names(owner)]
        hint = did_you_mean(name, known)
        return f"is not a field of this configuration{hint and f'; {hint}'}"
    if cause is not None:
        return str(cause)
    shown = repr(detail["input"])
    return f"{detail['msg'][0].lower()}{detail['msg'][1:]}, got {shown[:80]}"


def _config_error(
    model: type[FrozenModel], error: ValidationError, data: Mapping[str, Any]
) -> ConfigError:
    """The error for ``data``, with the conflicts among the fields that were valid alone."""
    problems = _problems(model, error)
    bad = {str(detail["loc"][0]) for detail in error.errors() if detail["loc"]}
    if bad:
        aliases = other_names(model)
        bad_fields = {aliases.get(name, name) for name in bad}
        rest = {
            key: value for key, value in data.items() if aliases.get(key, key) not in bad_fields
        }
        try:
            model(**rest)
        except ConfigError as more:
            problems += [
                problem
                for problem in more.problems
                if not bad_fields & set(problem.field.split(", "))
            ]
    return report(model.__name__, problems)


def report(subject: str, problems: Sequence[ConfigProblem]) -> ConfigError:
    """One error that lists every problem of ``subject``, one a line."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    lines = "".join(f"\n  {each.field or subject}: {each.message}" for each in problems)
    return ConfigError(
        f"{count} in {subject}:{lines}",
        hint="`piecework config schema` describes every field",
        problems=tuple(problems),
    )
