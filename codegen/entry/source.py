"""The emitted entry as a value."""

from collections.abc import Mapping
from dataclasses import dataclass, field

FUNCTION_NAME = "entry"


@dataclass(frozen=True, slots=True)
class EntrySource:
    """The emitted entry."""

    code: str  # the Python text, exactly what is executed
    # name → value of the objects that the text mentions
    consts: Mapping[str, object] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.code
