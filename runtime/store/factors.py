"""The key of the cache: what emitted code depends on, as texts by group and name, and their hash.

It imports no torch; `piecework.runtime.store.surroundings` lists what counts. A factor belongs here
if and only if changing it can change what is compiled. Paths do not: sources count by content.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Self

from piecework.errors import CacheError

FACTORS_NAME = "cache_key_factors.json"
_FORMAT = 2
_DIGEST = re.compile(r"(sha256:)?[0-9a-f]{32,}")


class Difference(NamedTuple):
    """A factor that two keys disagree on; None where one of them lacks it."""

    group: str
    name: str
    cached: str | None
    current: str | None

    def __str__(self) -> str:
        was, now = ("none" if each is None else each for each in (self.cached, self.current))
        if _DIGEST.fullmatch(was) and _DIGEST.fullmatch(now):
            return f"{self.group}: {self.name} has changed"
        return f"{self.group}: {self.name}: {was:.80} -> {now:.80}"


@dataclass(frozen=True, slots=True)
class KeyFactors:
    """All factors, by group and name."""

    groups: Mapping[str, Mapping[str, str]]

    @property
    def hash(self) -> str:
        """The name of the key's directory: 32 hexadecimal digits of SHA-256 over all factors."""
        return hashlib.sha256(self.to_json()).hexdigest()[:32]

    def signed_with(self, key: bytes) -> Self:
        """With the signing key, so that signed and unsigned entries, or two keys', never meet."""
        key_id = hashlib.sha256(b"piecework cache key id\n" + key).hexdigest()[:16]
        return KeyFactors({**self.groups, "signing": {"key id": key_id}})

    def to_json(self) -> bytes:
        """``cache_key_factors.json``: the same factors give the same bytes."""
        groups = {name: group for name, group in self.groups.items() if group}
        body = {"format": _FORMAT, "factors": groups}
        return json.dumps(body, indent=1, sort_keys=True).encode("ascii") + b"\n"

    @classmethod
    def from_json(cls, raw: bytes, where: str = FACTORS_NAME) -> Self:
        """What `to_json` wrote; raises `CacheError` for anything else."""
        try:
            key = cls(json.loads(raw)["factors"])
            texts = (text for group in key.groups.values() for text in group.values())
            if key.to_json() == raw and all(isinstance(text, str) for text in texts):
                return key
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            pass
        hint = f"such files are written as {FACTORS_NAME}"
        raise CacheError("not a file of key factors", where=where, hint=hint)

    def differences(self, cached: Self) -> tuple[Difference, ...]:
        """Every factor in which these, the current ones, differ from ``cached``, in order."""
        places = [
            (group, name)
            for key in (self, cached)
            for group in key.groups
            for name in sorted(key.groups[group])
        ]
        both = (
            Difference(*at, *(key.groups.get(at[0], {}).get(at[1]) for key in (cached, self)))
            for at in dict.fromkeys(places)
        )
        return tuple(each for each in both if each.cached != each.current)


def content_key(*parts: str | bytes) -> str:
    """SHA-256 over the parts and their lengths, which never run together."""
    digest = hashlib.sha256()
    for part in parts:
        is_text = isinstance(part, str)
        data = b"s" + part.encode("utf-8", "surrogatepass") if is_text else b"b" + part
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()
