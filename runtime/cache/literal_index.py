"""The index of one cache entry, `piecework_compile_cache.py`. In: artifact names and where their bytes are. Out: a Python literal, and back.

It never executes the file and never hands Python's parser anything but brackets, plain strings, short numbers and
commas: depth, size and digits are checked on the characters first, the types of the result afterwards.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass

from piecework.errors import CacheError
from piecework.runtime.cache.manifest import MAX_ARTIFACT_BYTES, Damaged, is_digest

INDEX_NAME = "piecework_compile_cache.py"
FORMAT = 1
MAX_INDEX_BYTES = 16 << 20
MAX_DEPTH = 4
MAX_DIGITS = 15
_HEADER = (
    "# Index of compiled pieces: name -> (SHA-256, bytes). Read as a literal, never executed.\n"
)
# Printable ASCII without quotes and backslash, so that a name is written as itself.
_NAME = re.compile(r"[ !#-&(-\[\]-~]{1,512}")
_TOKEN = re.compile(
    r"""(?P<space>[ \n]+)|(?P<open>[{(])|(?P<close>[)}])|(?P<mark>[,:])|(?P<text>"[^"'\\\n]*"|'[^"'\\\n]*')|(?P<number>[0-9]+)"""
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
    try:
        text = raw.decode("ascii")
    except UnicodeDecodeError as error:
        raise _bad("it is not ASCII text") from error
    literal = text.removeprefix(_HEADER)
    _check_tokens(literal)
    try:
        tree = ast.parse(literal.strip(), mode="eval")
        value = ast.literal_eval(tree)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        raise _bad(f"it is not a Python literal ({type(error).__name__})") from error
    _check_no_duplicates(tree)
    return _records(value, key)


def _check_tokens(text: str) -> None:
    """Let through only what the index's own grammar has, before Python's parser sees it."""
    position = depth = 0
    while position < len(text):
        token = _TOKEN.match(text, position)
        if token is None:
            raise _bad(f"character {position} does not belong into an index")
        if token.lastgroup == "open":
            depth += 1
            if depth > MAX_DEPTH:
                raise _bad("its brackets are nested too deeply")
        elif token.lastgroup == "close":
            depth -= 1
        elif token.lastgroup == "number" and len(token.group()) > MAX_DIGITS:
            raise _bad("it holds a number that is too long")
        position = token.end()


def _check_no_duplicates(tree: ast.Expression) -> None:
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            keys = [child.value for child in node.keys if isinstance(child, ast.Constant)]
            if len(set(keys)) != len(node.keys):
                raise _bad("a key occurs twice")


def _records(value: object, key: str) -> dict[str, Record]:
    if not isinstance(value, dict) or set(value) != {"format", "key", "entries"}:
        raise _bad("it does not have the fields of an index")
    if type(value["format"]) is not int or value["format"] != FORMAT:
        raise _bad("unknown format")
    if value["key"] != key:
        raise _bad("it was made for another key")
    entries = value["entries"]
    if not isinstance(entries, dict):
        raise _bad("its entries are not a dict")
    records: dict[str, Record] = {}
    for name, entry in entries.items():
        if not isinstance(name, str) or _NAME.fullmatch(name) is None:
            raise _bad("an entry has an impossible name")
        if not isinstance(entry, tuple) or len(entry) != 2:
            raise _bad("an entry is not a pair")
        digest, size = entry
        if not is_digest(digest) or type(size) is not int or not 0 <= size <= MAX_ARTIFACT_BYTES:
            raise _bad("an entry has an impossible digest or size")
        records[name] = Record(digest, size)
    return records


def _bad(reason: str) -> Damaged:
    return Damaged(reason, file=INDEX_NAME)
