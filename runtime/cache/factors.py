"""The key of the cache. In: what the emitted code depends on. Out: a typed, ordered list of factors, its hash, and differences.

It never imports torch and never reads the environment on its own: the caller says which parts to collect.

A factor belongs here if and only if changing it can change what is compiled. Paths do not: sources count by content
under a name relative to their package, so that a moved source tree or home directory finds its entries again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from piecework.errors import CacheError

FORMAT = 1
HASH_DIGITS = 32
MAX_FACTORS_BYTES = 16 << 20
_DIGEST = re.compile(r"[0-9a-f]{32,}")
GROUPS = ("versions", "device", "config", "environment", "sources", "model", "signing")


@dataclass(frozen=True, slots=True, order=True)
class Factor:
    """One thing that the key depends on, as text."""

    group: str
    name: str
    value: str


@dataclass(frozen=True, slots=True)
class Difference:
    """A factor that two keys disagree on; ``None`` where one of them lacks it."""

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
    """All factors, ordered by group and name whatever order they were given in.

    Example:
        >>> KeyFactors.collect(config={"dtype": "bf16"}, versions={"torch": "2.13.0"}).hash
        'df6a44f9d698b9f5f0bb36e09ad57c71'
    """

    factors: tuple[Factor, ...]

    def __post_init__(self) -> None:
        seen: set[tuple[str, str]] = set()
        for factor in self.factors:
            if factor.group not in GROUPS:
                raise CacheError(
                    f"unknown group of key factors {factor.group!r}",
                    where=factor.name,
                    hint="one of " + ", ".join(GROUPS),
                )
            if not all(isinstance(part, str) for part in (factor.name, factor.value)):
                raise CacheError("a key factor is not text", where=f"{factor.group}: {factor.name}")
            if (factor.group, factor.name) in seen:
                raise CacheError(
                    "a key factor is given twice", where=f"{factor.group}: {factor.name}"
                )
            seen.add((factor.group, factor.name))
        ordered = sorted(self.factors, key=lambda f: (GROUPS.index(f.group), f.name))
        object.__setattr__(self, "factors", tuple(ordered))

    @classmethod
    def collect(
        cls,
        *,
        config: str | Mapping[str, str],
        versions: Mapping[str, str],
        device: Mapping[str, str] | None = None,
        environment: Mapping[str, str] | None = None,
        sources: Mapping[str, str] | None = None,
        model: Mapping[str, str] | None = None,
    ) -> KeyFactors:
        """Put the groups together.

        Args:
            config: the config's hash, or (better: `explain` can then name the field) each hashed field as text.
            versions: torch, triton, the compiler, piecework; see `collect.installed_versions`.
            device: capability, threads, vector instructions; see `collect.host_factors`.
            environment: see `collect.environment_factors`.
            sources: name to SHA-256; see `collect.source_factors`.
            model: what else tells two models apart.
        """
        fields = {"hash": config} if isinstance(config, str) else config
        groups: dict[str, Mapping[str, str]] = {
            "versions": versions,
            "device": device or {},
            "config": fields,
            "environment": environment or {},
            "sources": sources or {},
            "model": model or {},
        }
        return cls(
            tuple(
                Factor(group, name, value)
                for group, values in groups.items()
                for name, value in values.items()
            )
        )

    @property
    def hash(self) -> str:
        """The name of the key's directory: 32 hexadecimal digits of SHA-256 over all factors."""
        return hashlib.sha256(self.to_json()).hexdigest()[:HASH_DIGITS]

    def signed_with(self, hmac_key: bytes) -> KeyFactors:
        """Add which key signs the entry, so that signed and unsigned entries, or two keys', never meet."""
        key_id = hashlib.sha256(b"piecework cache key id\n" + hmac_key).hexdigest()[:16]
        return KeyFactors((*self.factors, Factor("signing", "hmac_key_id", key_id)))

    def to_json(self) -> bytes:
        """Return ``cache_key_factors.json``: the same factors give the same bytes."""
        groups: dict[str, dict[str, str]] = {}
        for factor in self.factors:
            groups.setdefault(factor.group, {})[factor.name] = factor.value
        body = {"format": FORMAT, "factors": groups}
        return json.dumps(body, indent=1, ensure_ascii=True).encode("ascii") + b"\n"

    @classmethod
    def from_json(cls, raw: bytes, *, where: str = "cache_key_factors.json") -> KeyFactors:
        """Read what `to_json` wrote; raise `CacheError` for anything else."""
        try:
            if len(raw) > MAX_FACTORS_BYTES:
                raise ValueError("too large")
            body = json.loads(raw.decode("ascii"))
            if not isinstance(body, dict) or body.get("format") != FORMAT:
                raise ValueError("unknown format")
            groups = body.get("factors")
            if not isinstance(groups, dict):
                raise ValueError("no factors")
            factors: list[Factor] = []
            for group, values in groups.items():
                if not isinstance(values, dict):
                    raise ValueError(f"group {group!r} is not an object")
                factors += [Factor(group, name, value) for name, value in values.items()]
        except (ValueError, RecursionError) as error:
            raise CacheError(
                f"not a file of key factors ({error})",
                where=where,
                hint="such files are written as cache_key_factors.json",
            ) from error
        return cls(tuple(factors))

    def differences(self, cached: KeyFactors) -> tuple[Difference, ...]:
        """Every factor in which these, the current ones, differ from `cached`, in order."""
        ours = {(factor.group, factor.name): factor.value for factor in self.factors}
        theirs = {(factor.group, factor.name): factor.value for factor in cached.factors}
        keys = sorted({*ours, *theirs}, key=lambda key: (GROUPS.index(key[0]), key[1]))
        return tuple(
            Difference(*key, cached=theirs.get(key), current=ours.get(key))
            for key in keys
            if theirs.get(key) != ours.get(key)
        )


def content_key(*parts: str | bytes) -> str:
    """Return a name for an artifact made of content: SHA-256 over the parts and their lengths.

    Parts never run together: ``content_key("ab", "c") != content_key("a", "bc")``.
    """
    digest = hashlib.sha256()
    for part in parts:
        is_text = isinstance(part, str)
        data = b"s" + part.encode("utf-8", "surrogatepass") if is_text else b"b" + part
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    return digest.hexdigest()


def _short(value: str | None) -> str:
    text = "" if value is None else value
    if _DIGEST.fullmatch(text):
        return text[:12]
    return text if len(text) <= 80 else f"{text[:77]}..."
