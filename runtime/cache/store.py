"""The cache's door. In: a root directory, key factors, ranks and a tag. Out: a `CacheEntry`, checked and ready.

It never keeps state of its own: two stores on one directory, in one process or in many, are as good as one.
"""

from __future__ import annotations

import os

from piecework.errors import CacheError
from piecework.runtime.cache.entry import COMPILE_LOCK_SECONDS, CacheEntry
from piecework.runtime.cache.factors import KeyFactors
from piecework.runtime.cache.files import EntryFiles
from piecework.runtime.cache.locks import EntryLocks
from piecework.runtime.cache.manifest import Identity
from piecework.runtime.cache.safety import default_root, resolve_root
from piecework.runtime.model_tag import TAG

MIN_HMAC_KEY_BYTES = 16
MAX_RANK = 10**6


class CacheStore:
    """Opens entries. Layout: ``<root>/<hash>/rank_<rank>_<dp_rank>/<tag>/``."""

    @staticmethod
    def open(
        root: str | os.PathLike[str] | None,
        key_factors: KeyFactors,
        rank: int = 0,
        dp_rank: int = 0,
        tag: str = "backbone",
        *,
        hmac_key: bytes | None = None,
        disabled: bool = False,
        lock_timeout_s: float = COMPILE_LOCK_SECONDS,
    ) -> CacheEntry:
        """Return the entry for these factors; it is created when something is first saved.

        Args:
            root: the cache directory; ``None`` for `default_root`.
            key_factors: everything that the compiled code depends on.
            rank: this process's rank.
            dp_rank: its data-parallel rank.
            tag: which model of the process (``backbone``, ``eagle_head``); letters, digits, ``_ . -``.
            hmac_key: sign the manifest with this secret, and accept none that it did not sign (16 bytes or more).
            disabled: keep nothing and touch no file.
            lock_timeout_s: how long to wait for another process that compiles the same artifact.

        Raises:
            CacheError: an impossible tag, rank or key, or a directory that others can write, that is
                somebody else's, or that is a link.

        Example:
            >>> entry = CacheStore.open(None, KeyFactors.collect(config="8c1f", versions={"torch": "2.13.0"}))
            >>> entry.get_or_compile(content_key(graph_text, "1-16"), compile_to_bytes).data
        """
        identity = Identity(
            key_factors.hash, _rank(rank, "rank"), _rank(dp_rank, "dp_rank"), _checked_tag(tag)
        )
        if hmac_key is not None:
            if not isinstance(hmac_key, bytes) or len(hmac_key) < MIN_HMAC_KEY_BYTES:
                raise CacheError(
                    f"the cache's HMAC key must be bytes, at least {MIN_HMAC_KEY_BYTES} of them",
                    where="hmac_key",
                )
            key_factors = key_factors.signed_with(hmac_key)
            identity = Identity(key_factors.hash, rank, dp_rank, tag)
        if disabled:
            return CacheEntry(None, None, key_factors.to_json())
        real = resolve_root(default_root() if root is None else root)
        entry = CacheEntry(
            EntryFiles(real, identity, hmac_key),
            EntryLocks(real, identity),
            key_factors.to_json(),
            lock_timeout_s,
        )
        entry.verify_on_open()
        return entry


def _rank(value: int, where: str) -> int:
    if type(value) is not int or not 0 <= value <= MAX_RANK:
        raise CacheError(
            f"a rank must be an integer from 0 to {MAX_RANK}, not {value!r}", where=where
        )
    return value


def _checked_tag(tag: str) -> str:
    if not isinstance(tag, str) or TAG.fullmatch(tag) is None:
        raise CacheError(
            "a tag must be 1 to 100 letters, digits, `_`, `.` or `-`, and not start with `.` or `-`",
            where=ascii(tag)[:80],
        )
    return tag
