"""``piecework cache``: in, a cache directory; out, what it holds, why a key misses, what is damaged, and less of it.

It never compiles anything and never imports torch; only ``gc`` removes files.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from piecework.cli.console import DIFFERS, console, typed_errors
from piecework.errors import CacheError, UsageError
from piecework.runtime.cache.collector import CollectionReport, collect_garbage
from piecework.runtime.cache.explanation import (
    Explanation,
    SavedKey,
    compare,
    read_factors_file,
    saved_keys,
)
from piecework.runtime.cache.safety import default_root, signing_key
from piecework.runtime.cache.survey import EntrySummary, list_entries, verify_cache

cache_app = typer.Typer(
    name="cache",
    help="Look into the cache of compiled pieces, check it and clean it up.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b)?", re.IGNORECASE)
_AGE = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h|d|w)?", re.IGNORECASE)
_UNITS = "kmgt"
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}

CacheDir = Annotated[
    Path | None,
    typer.Option(
        "--cache-dir", help="Default: $PIECEWORK_CACHE_DIR, $XDG_CACHE_HOME/piecework, ~/.cache."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@cache_app.command("ls", epilog="Example: piecework cache ls --json")
def list_command(cache_dir: CacheDir = None, as_json: AsJson = False) -> None:
    """List the entries, the one used last first. Exit code 0, also for an empty cache."""
    with typed_errors():
        root = _root(cache_dir)
        entries = list_entries(root)
    if as_json:
        total = sum(entry.bytes for entry in entries)
        _print_json(
            {"root": str(root), "bytes": total, "entries": [_entry_data(e) for e in entries]}
        )
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
    with typed_errors():
        if key is not None and factors is not None:
            raise UsageError("a key and --factors exclude each other", hint="give one of them")
        keys = saved_keys(_root(cache_dir))
        if factors is not None:
            current, others = read_factors_file(factors), keys
        elif keys:
            chosen = keys[0] if key is None else _find(keys, key)
            current, others = chosen.factors, tuple(other for other in keys if other != chosen)
        else:
            raise CacheError(
                "the cache has no readable key",
                where=str(_root(cache_dir)),
                hint="compile a model first, or name another cache with --cache-dir",
            )
        if to is not None:
            others = (_find(keys, to),)
        explanation = compare(current, others, is_saved=factors is None)
    if as_json:
        _print_json(_explanation_data(explanation))
    else:
        typer.echo(str(explanation))
    if not explanation.found:
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
    with typed_errors():
        root = _root(cache_dir)
        result = verify_cache(root, _read_key(hmac_key_file))
    if as_json:
        findings = [
            {"entry": finding.entry, "file": finding.file, "reason": finding.reason}
            for finding in result.findings
        ]
        _print_json(
            {
                "root": str(root),
                "entries": result.entries,
                "artifacts": result.artifacts,
                "bytes": result.bytes,
                "unchecked_signatures": result.unchecked_signatures,
                "findings": findings,
            }
        )
    else:
        for finding in result.findings:
            typer.echo(str(finding))
        typer.echo(
            f"{root}: {result.entries} entries, {result.artifacts} artifacts, "
            f"{_size(result.bytes)}, {len(result.findings)} damaged"
        )
        if result.unchecked_signatures:
            typer.echo(f"{result.unchecked_signatures} signatures not checked: no --hmac-key-file")
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
    with typed_errors():
        root = _root(cache_dir)
        report = collect_garbage(
            root,
            max_bytes=None if max_size is None else parse_size(max_size),
            max_age_s=None if max_age is None else parse_age(max_age),
            dry_run=dry_run,
        )
    if as_json:
        _print_json({"root": str(root)} | _report_data(report))
        return
    verb = "would remove" if dry_run else "removed"
    for name in report.removed:
        typer.echo(f"{verb} {name}")
    for name in report.busy:
        typer.echo(f"kept {name}: in use")
    typer.echo(
        f"{root}: {verb} {len(report.removed)} entries ({_size(report.removed_bytes)}) and "
        f"{report.leftover_files} other files ({_size(report.leftover_bytes)}); "
        f"{report.kept_entries} entries stay ({_size(report.kept_bytes)})"
    )


def parse_size(text: str) -> int:
    """Return bytes: ``500MB``, ``1.5 GiB``, ``4096``. Units count in 1024s. Raises `UsageError`."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text!r} is no size", where="--max-size", hint="write it like 500MB")
    power = _UNITS.index(match[2].lower()) + 1 if match[2] else 0
    return int(float(match[1]) * 1024**power)


def parse_age(text: str) -> float:
    """Return seconds: ``30d``, ``12h``, ``90`` (seconds). Raises `UsageError`."""
    match = _AGE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text!r} is no age", where="--max-age", hint="write it like 30d")
    return float(match[1]) * _SECONDS[(match[2] or "s").lower()]


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


def _find(keys: tuple[SavedKey, ...], beginning: str) -> SavedKey:
    matching = [key for key in keys if beginning and key.hash.startswith(beginning)]
    if len(matching) != 1:
        problem = "several keys begin" if matching else "no key in the cache begins"
        raise UsageError(f"{problem} with {beginning!r}", hint="`piecework cache ls` lists them")
    return matching[0]


def _read_key(path: Path | None) -> bytes | None:
    if path is None:
        return signing_key()
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"the key cannot be read: {error.strerror}", where=str(path)) from error


def _entry_data(entry: EntrySummary) -> dict[str, object]:
    identity = entry.identity
    return {
        "key": identity.key,
        "rank": identity.rank,
        "dp_rank": identity.dp_rank,
        "tag": identity.tag,
        "artifacts": entry.artifacts,
        "bytes": entry.bytes,
        "last_used": entry.last_used,
    }


def _explanation_data(explanation: Explanation) -> dict[str, object]:
    differences = [
        {"group": d.group, "name": d.name, "cached": d.cached, "current": d.current}
        for d in explanation.differences
    ]
    return {
        "current": explanation.current,
        "is_saved": explanation.is_saved,
        "found": explanation.found,
        "nearest": None if explanation.nearest is None else explanation.nearest.hash,
        "keys_seen": explanation.keys_seen,
        "differences": differences,
    }


def _report_data(report: CollectionReport) -> dict[str, object]:
    return {
        "dry_run": report.dry_run,
        "removed": list(report.removed),
        "busy": list(report.busy),
        "removed_bytes": report.removed_bytes,
        "leftover_files": report.leftover_files,
        "leftover_bytes": report.leftover_bytes,
        "kept_entries": report.kept_entries,
        "kept_bytes": report.kept_bytes,
    }


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TB"


def _ago(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return "just now"


def _print_json(data: object) -> None:
    typer.echo(json.dumps(data, indent=2))
