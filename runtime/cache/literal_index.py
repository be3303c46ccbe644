"""The index of one cache entry, `piecework_compile_cache.py`. In: artifact names and where their bytes are. Out: a Python literal, and back.

It never executes the file, and never hands Python's parser a text that is not of the one form in which an index is written.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass

from piecework.errors import CacheError
from piecework.runtime.cache.manifest import MAX_ARTIFACT_BYTES, Damaged

INDEX_NAME = "piecework_compile_cache.py"
FORMAT = 1
MAX_INDEX_BYTES = 16 << 20
_HEADER = (
    "# Index of compiled pieces: name -> (SHA-256, bytes). Read as a literal, never executed.\n"
)
# Printable ASCII without quotes and backslash, so that a name is written as itself.
_NAME = re.compile(r"[ !#-&(-\[\]-~]{1,512}")
_ENTRY = rf'        "{_NAME.pattern}": \("[0-9a-f]{{64}}", (0|[1-9][0-9]{{0,14}})\),\n'
_FORM = re.compile(
    rf'{re.escape(_HEADER)}\{{\n    "format": {FORMAT},\n    "key": "[0-9a-f]*",\n'
    rf'    "entries": \{{\n({_ENTRY})*    \}},\n\}}\n'
)


@dataclass(frozen=True, slots=True)
class Record:
    """Where the bytes of one name are: their SHA-256 and how many there are."""

    digest: str
    size: int


def check_name(name: str) -> str:
    """Return `name` if it can be an artifact's name (1 to 512 printable ASCII characters, no quote or backslash)."""
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise CacheError(
            "an artifact's name must be 1 to 512 printable ASCII characters without quotes or backslashes",
            where=ascii(name)[:80],
            hint="use `content_key` to make a name of any content",
        )
    return name


def render_index(key: str, records: Mapping[str, Record]) -> bytes:
    """Return the file's bytes; the same records give the same bytes."""
    lines = [_HEADER, "{\n", f'    "format": {FORMAT},\n', f'    "key": "{key}",\n']
    lines.append('    "entries": {\n')
    for name in sorted(records):
        record = records[name]
        lines.append(f'        "{check_name(name)}": ("{record.digest}", {record.size}),\n')
    lines.append("    },\n}\n")
    return "".join(lines).encode("ascii")


def parse_index(raw: bytes, key: str) -> dict[str, Record]:
    """Return the records in `raw`; raise `Damaged` for anything that `render_index` would not have written."""
    if len(raw) > MAX_INDEX_BYTES:
        raise _bad("it is too large")
    text = raw.decode("latin-1")
    if _FORM.fullmatch(text) is None:
        raise _bad("it is not in the form in which it was written")
    value = ast.literal_eval(text)
    if value["key"] != key:
        raise _bad("it was made for another key")
    records = {name: Record(*entry) for name, entry in value["entries"].items()}
    if any(each.size > MAX_ARTIFACT_BYTES for each in records.values()):
        raise _bad("an entry has an impossible size")
    if render_index(key, records) != raw:
        raise _bad("it is not in the form in which it was written")
    return records


def _bad(reason: str) -> Damaged:
    return Damaged(reason, file=INDEX_NAME)
