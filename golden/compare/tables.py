"""The comment tables of an emitted module. In: its lines. Out: submodules, constants and bound names, as its head and foot list them.

Only comments are read. A file without tables has empty ones.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

SUBMODS = "__vllm_submods__"
CONSTS = "__vllm_consts__"

_FORMAT = re.compile(r"^# piecework .*\bformat (\d+)")
_TABLE = re.compile(r"^# (__vllm_submods__|__vllm_consts__):$")
_ROW = re.compile(r"^#\s+\[(\d+)\] (.*)$")
_BOUND = re.compile(r"^#\s+(\w+): (.*)$")


@dataclass(slots=True)
class Tables:
    """``submods`` and ``consts`` by index, ``bound`` names with what they hold, ``digests`` of what submodules compute, by name;
    ``banner`` without its ``#``."""

    submods: dict[int, str] = field(default_factory=dict)
    consts: dict[int, str] = field(default_factory=dict)
    bound: dict[str, str] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    format_version: int | None = None
    banner: tuple[str, ...] = ()


def read_tables(lines: list[str]) -> Tables:
    """Read the comment tables at the head and the bound names at the foot."""
    tables = Tables()
    current: dict[int, str] | None = None
    banner: list[str] = []
    for line in lines:
        if not line.startswith("#"):
            break
        if found := _FORMAT.match(line):
            tables.format_version = int(found.group(1))
        elif found := _TABLE.match(line):
            current = tables.submods if found.group(1) == SUBMODS else tables.consts
        elif current is not None and (found := _ROW.match(line)):
            row, _, digest = found.group(2).partition("  ")
            if current is tables.submods and digest:
                tables.digests[row] = digest
            current[int(found.group(1))] = row if current is tables.submods else found.group(2)
        elif current is None and line != "#":
            banner.append(line[2:])
    tables.banner = tuple(banner)
    if any(line.startswith("# Bound names") for line in lines):
        start = max(i for i, line in enumerate(lines) if line.startswith("# Bound names"))
        for line in lines[start + 1 :]:
            if found := _BOUND.match(line):
                tables.bound[found.group(1)] = found.group(2)
    return tables
