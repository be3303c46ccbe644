"""The key of the cache. In: what emitted code depends on, as texts by group and name. Out: their hash, and the differences between two.

It imports no torch and reads nothing by itself; `piecework.runtime.store.surroundings` lists what counts. A factor belongs here if and only if changing
it can change what is compiled. Paths do not: sources count by content.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from piecework.errors import CacheError

FACTORS_NAME = "cache_key_factors.json"
MAX_FACTORS_BYTES = 16 << 20
GROUPS = ("versions", "device", "environment", "torch", "config", "sources", "signing")
_FORMAT = 2
_HASH_DIGITS = 32
_DIGEST = re.compile(r"(sha256:)?[0-9a-f]{32,}")


@dataclass(frozen=True, slots=True)
class Difference:
    """A factor that two keys disagree on; None where one of them lacks it."""

    group: str
    name: str
    cached: str | None
    current: str | None

    def __str__(self) -> str:
        title = f"{self.group}: {self.name}"
        if self.cached is None:
            return f"{title} is new ({_short(self.current)})"
        if self.current is None:
            return f"{title} is gone (was {_short(self.cached)})"
        if _DIGEST.fullmatch(self.cached) and _DIGEST.fullmatch(self.current):
            return f"{title} has changed"
        return f"{title}: {_short(self.cached)} -> {_short(self.current)}"


@dataclass(frozen=True, slots=True)
class KeyFactors:
    """All factors, by group and name.

    Example:
        >>> KeyFactors({"versions": {"torch": "2.13.0"}}).hash
        '4f2248ff912352163bafb85775922f6b'
    """

    groups: Mapping[str, Mapping[str, str]]

    @property
    def hash(self) -> str:
        """The name of the key's directory: 32 hexadecimal digits of SHA-256 over all factors."""
        return hashlib.sha256(self.to_json()).hexdigest()[:_HASH_DIGITS]

    def signed_with(self, key: bytes) -> KeyFactors:
        """With the key that signs the entry, so that signed and unsigned entries, or two keys', never meet."""
        key_id = hashlib.sha256(b"piecework cache key id\n" + key).hexdigest()[:16]
        return KeyFactors({**self.groups, "signing": {"key id": key_id}})

    def to_json(self) -> bytes:
        """``cache_key_factors.json``: the same factors give the same bytes, whatever their order."""
        groups = {name: self.groups[name] for name in GROUPS if self.groups.get(name)}
        body = {"format": _FORMAT, "factors": groups}
        return json.dumps(body, indent=1, sort_keys=True).encode("ascii") + b"\n"

    @classmethod
    def from_json(cls, raw: bytes, where: str = FACTORS_NAME) -> KeyFactors:
        """What `to_json` wrote.

        Raises:
            CacheError: it is anything else.
        """
        try:
            body = json.loads(raw.decode("ascii"))
            groups = body["factors"] if body["format"] == _FORMAT else None
            texts = [
                text
                for group in groups.values()
                for pair in group.items()
                for text in pair
                if not isinstance(text, str)
            ]
            if texts or not groups.keys() <= set(GROUPS):
                raise ValueError("a factor is not text")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CacheError(
                f"not a file of key factors ({type(error).__name__}: {error})",
                where=where,
                hint=f"such files are written as {FACTORS_NAME}",
            ) from error
        return cls(groups)

    def differences(self, cached: KeyFactors) -> tuple[Difference, ...]:
        """Every factor in which these, the current ones, differ from ``cached``, in order."""
        found = []
        for group in GROUPS:
            ours, theirs = self.groups.get(group, {}), cached.groups.get(group, {})
            for name in sorted({*ours, *theirs}):
                if ours.get(name) != theirs.get(name):
                    found.append(Difference(group, name, theirs.get(name), ours.get(name)))
        return tuple(found)


def content_key(*parts: str | bytes) -> str:
    """SHA-256 over the parts and their lengths, which never run together: a name for something by its content."""
    digest = hashlib.sha256()
    for part in parts:
        is_text = isinstance(part, str)
        data = b"s" + part.encode("utf-8", "surrogatepass") if is_text else b"b" + part
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


def _short(value: str | None) -> str:
    text = value or ""
    if _DIGEST.fullmatch(text):
        return text.removeprefix("sha256:")[:12]
    return text if len(text) <= 80 else f"{text[:77]}..."
