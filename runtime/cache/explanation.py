"""Why a key misses. In: the current key factors and a cache directory. Out: the nearest entry and each factor that differs.

It never changes the cache, and never reads more of an entry than its ``cache_key_factors.json``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from piecework.errors import CacheError
from piecework.runtime.cache.factors import MAX_FACTORS_BYTES, Difference, KeyFactors
from piecework.runtime.cache.files import FACTORS_NAME
from piecework.runtime.cache.manifest import MANIFEST_NAME
from piecework.runtime.cache.safety import UnsafeFile, read_regular, resolve_root
from piecework.runtime.cache.survey import entry_identities


@dataclass(frozen=True, slots=True)
class SavedKey:
    """A key that the cache has entries for, and when one of them was last used (seconds since the epoch)."""

    hash: str
    factors: KeyFactors
    last_used: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """How the current key relates to others in the cache.

    Attributes:
        current: its hash.
        nearest: the key that differs in the fewest factors; ``None`` when there is nothing to compare with.
        differences: those factors.
        keys_seen: how many keys it was compared with.
        is_saved: whether the current key is itself one of the cache's, and was compared with the others.
    """

    current: str
    nearest: SavedKey | None
    differences: tuple[Difference, ...]
    keys_seen: int
    is_saved: bool = False

    @property
    def found(self) -> bool:
        """Whether the cache has an entry with exactly these factors."""
        return self.nearest is not None and not self.differences

    def __str__(self) -> str:
        current = _short(self.current)
        place = "is in the cache" if self.is_saved else "is not in the cache"
        other = "other key" if self.is_saved else "key"
        if self.nearest is None:
            return f"{current} {place}, which has no {other} to compare it with"
        if self.found:
            return f"{current} is in the cache"
        if self.keys_seen == 1:
            others = f"The only {other} is {_short(self.nearest.hash)}"
        else:
            others = f"The nearest of {self.keys_seen} {other}s is {_short(self.nearest.hash)}"
        lines = [f"{current} {place}. {others}; from that one to this one:"]
        return "\n".join([*lines, *(f"  {difference}" for difference in self.differences)])


def explain(current_factors: KeyFactors, root: str | os.PathLike[str]) -> Explanation:
    """Find the saved key with the fewest differences (of equals, the one used last) and say what they are."""
    return compare(current_factors, saved_keys(root))


def compare(
    current_factors: KeyFactors, keys: tuple[SavedKey, ...], *, is_saved: bool = False
) -> Explanation:
    """The same over keys that are already read; ``is_saved``: the current key is in the cache too, and not among them."""
    if not keys:
        return Explanation(current_factors.hash, None, (), 0, is_saved)
    compared = [(current_factors.differences(key.factors), key) for key in keys]
    differences, nearest = min(compared, key=lambda pair: (len(pair[0]), -pair[1].last_used))
    return Explanation(current_factors.hash, nearest, differences, len(keys), is_saved)


def saved_keys(root: str | os.PathLike[str]) -> tuple[SavedKey, ...]:
    """Return every readable key in the cache, the one used last first. Damaged ones are left to `verify`."""
    real = resolve_root(root)
    found: dict[str, SavedKey] = {}
    for identity in entry_identities(real):
        directory = real.joinpath(*identity.parts)
        try:
            raw = read_regular(directory / FACTORS_NAME, MAX_FACTORS_BYTES)
            factors = KeyFactors.from_json(raw)
            last_used = os.stat(directory / MANIFEST_NAME).st_mtime
        except (OSError, UnsafeFile, CacheError):
            continue
        if factors.hash != identity.key:
            continue
        known = found.get(identity.key)
        if known is None or known.last_used < last_used:
            found[identity.key] = SavedKey(identity.key, factors, last_used)
    return tuple(sorted(found.values(), key=lambda key: (-key.last_used, key.hash)))


def read_factors_file(path: str | os.PathLike[str]) -> KeyFactors:
    """Read key factors that a run has written; raise `CacheError` if they cannot be read."""
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise CacheError(f"cannot be read: {error.strerror}", where=str(path)) from error
    return KeyFactors.from_json(raw, where=str(path))


def _short(key: str) -> str:
    """As much of a hash as `piecework cache ls` shows."""
    return key[:12]
