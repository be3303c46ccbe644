"""Files in one sealed file: a saved program, or a piece in the compile cache.

The first line has the SHA-256 of all that follows and, given a key, its signature; a manifest with
facts and the files' sizes comes next. Every byte is verified before any is given out, and the file
is replaced in one step: a reader needs no lock.
"""

import contextlib
import hmac
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from piecework.errors import ArtifactError, ConfigError
from piecework.runtime.store.files import Damaged, read_regular, sha256, write_atomic

Place = str | os.PathLike[str]
KIND = "piecework artifact"
#: What the manifest says of each of several modules that were saved together.
PARTS = "parts"
FORMAT = 5
_HEAD = re.compile(rb"piecework ([0-9a-f]{64}) ([0-9a-f]{64}|-)")


def packed(
    files: Mapping[str, bytes], facts: Mapping[str, object], key: bytes | None, kind: str
) -> bytes:
    """Files as one ``bytes``, with facts of that kind."""
    files = dict(sorted(files.items()))
    whole = {
        **facts,
        "kind": kind,
        "format": FORMAT,
        "files": {n: len(d) for n, d in files.items()},
    }
    manifest = json.dumps(whole, sort_keys=True, allow_nan=False).encode()
    body = b"\n".join([manifest, b"".join(files.values())])
    seal = sha256(body)
    return f"piecework {seal} {_signature(key, seal)}\n".encode() + body


def unpacked(
    data: bytes, key: bytes | None, kind: str
) -> tuple[dict[str, bytes], dict[str, object]]:
    """The files and facts that `packed` was given; raises `Damaged`."""
    head, _, body = data.partition(b"\n")
    found = _HEAD.fullmatch(head)
    if found is None:
        raise Damaged("it is no file of piecework's, or of an older one's")
    seal, signature = (each.decode() for each in found.groups())
    if sha256(body) != seal:
        raise Damaged("it is not as it was saved: the SHA-256 is another one")
    if key is not None and not hmac.compare_digest(signature, _signature(key, seal)):
        raise Damaged("its signature does not match")
    manifest, _, held = body.partition(b"\n")
    files, at = dict[str, bytes](), 0
    try:
        facts: dict[str, object] = json.loads(manifest)
        form, sizes = (facts.pop("kind"), facts.pop("format")), facts.pop("files")
        if form != (kind, FORMAT):
            raise Damaged(f"it is of {form}, not of {(kind, FORMAT)}")
        for name, size in sizes.items():  # type: ignore[attr-defined]
            files[name] = held[at : at + size]
            at += size
    except (TypeError, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise Damaged("its manifest is none") from error
    return files, facts


def _signature(key: bytes | None, seal: str) -> str:
    return "-" if key is None else hmac.digest(key, seal.encode(), "sha256").hex()


@dataclass(frozen=True, slots=True)
class Package:
    """An artifact that was verified."""

    name: str  # where it is, for errors
    facts: Mapping[str, object]  # what the manifest says besides the files
    files: Mapping[str, bytes]  # name → bytes, exactly those that were saved

    @classmethod
    def of(cls, data: bytes, key: bytes | None, name: str = "<bytes>") -> Self:
        """What `packed` made of an artifact; raises `ArtifactError` unless every byte is right."""
        try:
            files, facts = unpacked(data, key, KIND)
        except Damaged as error:
            raise _damaged(name, error.message) from error
        return cls(name, facts, files)

    @classmethod
    def read(cls, place: Place, key: bytes | None) -> Self:
        """The artifact in a file; raises as `of`, or where none of ours is."""
        path = Path(os.path.realpath(file_of(place)))
        try:
            data = read_regular(path)
        except FileNotFoundError as error:
            hint = "stitched.save(path) makes one"
            raise ArtifactError("there is no artifact here", where=str(path), hint=hint) from error
        except (OSError, Damaged) as error:
            raise _damaged(str(path), str(error)) from error
        return cls.of(data, key, str(path))

    def file(self, name: str) -> bytes:
        """The bytes of a file; raises `ArtifactError` if the manifest lists none of that name."""
        if name not in self.files:
            raise _damaged(self.name, f"the manifest lists no file {name}")
        return self.files[name]

    def table(self, name: str) -> Mapping[str, str]:
        """What the manifest says of ``name``, as texts by name."""
        found = self.facts.get(name)
        return found if isinstance(found, dict) else {}

    def parts(self) -> tuple[Self, ...]:
        """The same as one artifact for each module that was saved in it with others."""
        rows = self.facts.get(PARTS)
        found = []
        for number, row in enumerate(rows if isinstance(rows, list) else ()):
            folder = part_folder(number)
            files = {name.removeprefix(folder): data for name, data in self.files.items()}
            found.append(Package(f"{self.name}/{folder}", {**self.facts, **row}, files))
        return tuple(found)


def part_folder(number: int) -> str:
    """Under what name the files of a module are that was saved with others."""
    return f"part_{number}/"


def file_of(place: Place) -> Path:
    """The file that ``place`` names; `ConfigError` where it names none."""
    named = os.fspath(place) if isinstance(place, (str, os.PathLike)) else ""
    if not named or "://" in named:
        hint = "for a URL, copy the file with tools of its own"
        raise ConfigError(f"an artifact is a file; got {place!r}", hint=hint)
    return Path(os.path.abspath(named))


def write_package(
    place: Place, files: Mapping[str, bytes], facts: Mapping[str, object], key: bytes | None
) -> None:
    """Write an artifact, in place of one that is there; `ArtifactError` where that can't be."""
    path = Path(os.path.realpath(file_of(place)))
    head, start = b"", b"piecework "
    with contextlib.suppress(OSError), path.open("rb") as file:
        head = file.read(len(start))
    if os.path.lexists(path) and head != start:
        hint = "name a new file, or remove what is there"
        raise ArtifactError("there is something else than an artifact", where=str(path), hint=hint)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, packed(files, facts, key, KIND), 0o644)
    except OSError as error:
        hint = "free some space, or name a file that this user can make, or replace"
        why = f"the artifact can't be written: {error.strerror}"
        raise ArtifactError(why, where=str(path), hint=hint) from error


def _damaged(where: str, reason: str) -> ArtifactError:
    why = f"the artifact is damaged or not to be trusted: {reason}"
    hint = "copy the file, or save the model, again, with the same key and as its only owner"
    return ArtifactError(why, where=where, hint=hint)
