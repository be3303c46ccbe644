"""How the API reference reads docstrings. In: what griffe found in the sources. Out: the same, with each ``Example:`` as a section of code."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object


class Examples(Extension):
    """griffe knows ``Examples:``; anything else would be a remark whose ``>>>`` are quotations."""

    def on_object(self, *, obj: Object, **rest: Any) -> None:
        if obj.docstring is not None:
            text = obj.docstring.value
            obj.docstring.value = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.M)
