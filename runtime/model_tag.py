"""Which part of a program is being compiled, and whom to tell when it is, by thread or task."""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass

from piecework.errors import ConfigError
from piecework.scope import set_for

DEFAULT_TAG = "backbone"
TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
"""What a tag may look like, as a part of folder names."""


@dataclass(frozen=True, slots=True)
class ModelTag:
    """A name that keeps the models of one program apart in reports, folders and the cache."""

    tag: str = DEFAULT_TAG  # ``backbone`` unless said otherwise
    is_encoder: bool = False  # the model is an encoder: its last batch range is open-ended

    def prefix(self, model_name: str) -> str:
        """``model_name`` with the tag before it, where there is one: ``drafter.Llama``."""
        return model_name if self.tag == DEFAULT_TAG else f"{self.tag}.{model_name}"


_TAG: ContextVar[ModelTag | None] = ContextVar("piecework_model_tag", default=None)
_ON_COMPLETE: ContextVar[Callable[[], object] | None] = ContextVar(
    "piecework_on_compilation_complete", default=None
)


def set_model_tag(tag: str, is_encoder: bool = False) -> AbstractContextManager[ModelTag]:
    """Tag every model that is made or compiled in the block; the outer tag is back afterwards.

    Args:
        tag: up to 100 letters, digits, ``_``, ``.`` and ``-``; it becomes part of folder names.
        is_encoder: the last batch range is open-ended.

    Example:
        >>> with set_model_tag("drafter"):
        ...     drafter = piecework.compile(draft_model, (tokens,))
    """
    if not isinstance(tag, str) or not TAG.fullmatch(tag):
        raise ConfigError(
            f"{tag!r} can't be a model tag",
            where="set_model_tag",
            hint="use up to 100 letters, digits, '_', '.' and '-', a letter, a digit or '_' first",
        )
    return set_for(_TAG, ModelTag(tag, is_encoder))


def current_model_tag() -> ModelTag:
    """The tag of the innermost block, or the default one."""
    return _TAG.get() or ModelTag()


def model_tag_is_set() -> bool:
    """Whether a block has set a tag; tells an explicit default from none."""
    return _TAG.get() is not None


def use_model_tag(tag: ModelTag | None) -> AbstractContextManager[object]:
    """The tag that a model was made under, for what is compiled of it later; None for no tag."""
    return set_for(_TAG, tag)


def set_on_compilation_complete(callback: Callable[[], object]) -> AbstractContextManager[object]:
    """Have ``callback()`` called each time that a model was compiled in the block."""
    return set_for(_ON_COMPLETE, callback)


def compilation_complete() -> None:
    """Tell the innermost block's callback, if there is one, that a model is compiled."""
    if callback := _ON_COMPLETE.get():
        callback()
