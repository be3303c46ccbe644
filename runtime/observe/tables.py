"""rich's tables. Importing them draws from Python's random numbers, which are the caller's: they are put back."""

from __future__ import annotations

import random

_before = random.getstate()
from rich.table import Table  # noqa: E402

random.setstate(_before)
__all__ = ["Table"]
