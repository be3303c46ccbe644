"""``piecework cache``: in, a cache directory; out, what it holds, why a key misses, what is damaged, and less of it.

It never compiles anything and never imports torch; only ``gc`` removes files.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import pick_unit_and_suffix
from rich.table import Table

from piecework.cli.console import DIFFERS, commands, console, print_json
from piecework.cli.options import AsJson
from piecework.errors import CacheError, UsageError
from piecework.runtime.store import cache
from piecework.runtime.store.factors import KeyFactors
from piecework.runtime.store.files import default_root, signing_key

cache_app = commands("cache", "Look into the cache of compiled pieces, check it and clean it up.")

_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)")
_SIZES = {u + end: 1024**n for n, u in enumerate(("", *"kmgt")) for end in ("", "b", "ib")}
_AGES = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}

CacheDir = Annotated[
    Path | None,
    typer.Option(
        "--cache-dir", help="Default: $PIECEWORK_CACHE_DIR, $XDG_CACHE_HOME/piecework, ~/.cache."
    ),
]


@cache_app.command("ls", epilog="Example: piecework cache ls --json")
def list_command(cache_dir: CacheDir = None, as_json: AsJson = False) -> None:
    """List the entries, the one used last first. Exit code 0, also for an empty cache."""
    root = _root(cache_dir)
    entries = cache.list_entries(root)
    if as_json:
        total = sum(entry.bytes for entry in entries)
        rows = [{**each._asdict(), **each.identity._asdict()} for each in entries]
        for row in rows:
            del row["identity"]
        print_json({"root": str(root), "bytes": total, "entries": rows})
        return
    if not entries:
        typer.echo(f"{root}: no entries")
        return
    table = Table("key", "rank", "tag", "artifacts", "size", "last used", box=None)
    for entry in entries:
        identity = entry.identity
        rank = f"{identity.rank}_{identity.dp_rank}"
        used = _ago(time.time() - entry.last_used)
        table.add_row(
            identity.key[:12], rank, identity.tag, str(entry.artifacts), _size(entry.bytes), used
        )
    out = console()
    out.print(table)
    count = f"{len(entries)} {'entry' if len(entries) == 1 else 'entries'}"
    out.print(f"{root}: {count}, {_size(sum(entry.bytes for entry in entries))}")


@cache_app.command(epilog="Example: piecework cache explain 3fd6 --to 91c0")
def explain(
    key: Annotated[
        str | None,
        typer.Argument(help="A key's hash or the beginning of it; default: the key used last."),
    ] = None,
    factors: Annotated[
        Path | None,
        typer.Option("--factors", help="A cache_key_factors.json that a run has written."),
    ] = None,
    to: Annotated[
        str | None, typer.Option("--to", help="Compare with this key, not with the nearest.")
    ] = None,
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
) -> None:
    """Say which factors differ between a key and the nearest other one in the cache.

    Exit code 0: nothing differs (the cache has this key); 1: something does, or there is nothing to compare with.
    """
    if key is not None and factors is not None:
        raise UsageError("a key and --factors exclude each other", hint="give one of them")
    keys = cache.saved_keys(_root(cache_dir))
    if factors is not None:
        current = _read_factors(factors)
    elif keys:
        current = next(iter(keys.values())) if key is None else _find(keys, key)
    else:
        raise CacheError(
            "the cache has no readable key",
            where=str(_root(cache_dir)),
            hint="compile a model first, or name another cache with --cache-dir",
        )
    others = [each for each in keys.values() if factors is not None or each != current]
    found = cache.nearest(current, others if to is None else [_find(keys, to)])
    differences = () if found is None else found[1]
    nearest = None if found is None else found[0].hash
    if as_json:
        rows = [each._asdict() for each in differences]
        print_json({"current": current.hash, "nearest": nearest, "differences": rows})
    elif nearest is None:
        typer.echo(f"{current.hash[:12]}: there is no other key to compare it with")
    elif not differences:
        typer.echo(f"{current.hash[:12]} is in the cache")
    else:
        typer.echo(f"the nearest key is {nearest[:12]}; from that one to {current.hash[:12]}:")
        for each in differences:
            typer.echo(f"  {each}")
    if nearest is None or differences:
        raise typer.Exit(DIFFERS)


@cache_app.command(epilog="Example: piecework cache verify --hmac-key-file secret.key")
def verify(
    cache_dir: CacheDir = None,
    hmac_key_file: Annotated[
        Path | None,
        typer.Option(
            help="The secret that entries are signed with, as raw bytes; default: $PIECEWORK_CACHE_KEY_FILE."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check every byte of every entry against its manifest. Exit code 1 if something is damaged; nothing is changed."""
    root = _root(cache_dir)
    result = cache.verify(root, signing_key(hmac_key_file))
    if as_json:
        findings = [each._asdict() for each in result.findings]
        print_json({"root": str(root), **result._asdict(), "findings": findings})
    else:
        for finding in result.findings:
            typer.echo(": ".join(finding))
        typer.echo(
            f"{root}: {result.entries} entries, {result.artifacts} artifacts, "
            f"{_size(result.bytes)}, {len(result.findings)} damaged"
        )
    if result.findings:
        raise typer.Exit(DIFFERS)


@cache_app.command(epilog="Example: piecework cache gc --max-size 10GB --max-age 30d")
def gc(
    max_size: Annotated[
        str | None, typer.Option(help="Keep at most this much, the longest unused goes: 500MB.")
    ] = None,
    max_age: Annotated[
        str | None, typer.Option(help="Remove what was not used for so long: 12h, 30d, 4w.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
) -> None:
    """Remove entries by age, then by size, and what only takes space: leftovers, old quarantine, unused locks.

    Without --max-size and --max-age only the latter. Exit code 0, also when there was nothing to do.
    """
    root = _root(cache_dir)
    report = cache.collect(
        root,
        max_bytes=None if max_size is None else parse_size(max_size),
        max_age_s=None if max_age is None else parse_age(max_age),
        dry_run=dry_run,
    )
    if as_json:
        print_json({"root": str(root), "dry_run": dry_run, **report._asdict()})
        return
    verb = "would remove" if dry_run else "removed"
    for name in report.removed:
        typer.echo(f"{verb} {name}")
    for name in report.busy:
        typer.echo(f"kept {name}: in use")
    typer.echo(
        f"{root}: {verb} {len(report.removed)} entries ({_size(report.removed_bytes)}); "
        f"{report.kept_entries} entries stay ({_size(report.kept_bytes)})"
    )


def parse_size(text: str) -> int:
    """Return bytes: ``500MB``, ``1.5 GiB``, ``4096``. Units count in 1024s. Raises `UsageError`."""
    return int(_amount(text, _SIZES, "size", "500MB"))


def parse_age(text: str) -> float:
    """Return seconds: ``30d``, ``12h``, ``90`` (seconds). Raises `UsageError`."""
    return _amount(text, _AGES, "age", "30d")


def _amount(text: str, units: Mapping[str, int], what: str, example: str) -> float:
    match = _AMOUNT.fullmatch(text.strip().lower())
    if match is None or match[2] not in units:
        raise UsageError(
            f"{text!r} is no {what}", where=f"--max-{what}", hint=f"write it like {example}"
        )
    return float(match[1]) * units[match[2]]


def _root(cache_dir: Path | None) -> Path:
    if cache_dir is None:
        return default_root()
    if not cache_dir.is_dir():
        raise CacheError(
            "there is no such cache directory",
            where=str(cache_dir),
            hint="leave --cache-dir out for the usual one, or name the one that was compiled with",
        )
    return cache_dir


def _find(keys: Mapping[str, KeyFactors], beginning: str) -> KeyFactors:
    matching = [key for key in keys if beginning and key.startswith(beginning)]
    if len(matching) != 1:
        problem = "several keys begin" if matching else "no key in the cache begins"
        raise UsageError(f"{problem} with {beginning!r}", hint="`piecework cache ls` lists them")
    return keys[matching[0]]


def _read_factors(path: Path) -> KeyFactors:
    try:
        return KeyFactors.from_json(path.read_bytes(), str(path))
    except OSError as error:
        raise CacheError(f"cannot be read: {error.strerror}", where=str(path)) from error


def _size(count: float) -> str:
    unit, name = pick_unit_and_suffix(int(count), ["B", "kB", "MB", "GB", "TB"], 1024)
    return f"{count / unit:.{0 if unit == 1 else 1}f} {name}"


def _ago(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return "just now"
