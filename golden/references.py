"""Which goldens tests asked for. In: the tests that were found, and the goldens that they used. Out: goldens that no test asks for.

A golden is only called unreferenced if every test that could use it was found and ran to its end. No file is read or changed.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path

from piecework.golden.text.snapshot import STORE_NAME

_UNSAFE = re.compile(r"[^\w.\-]+", re.ASCII)
_LONGEST = 100
_PARAMETERS = re.compile(r"([\w.]{1,80})\[(\w(?:[\w.\-]{0,60}\w)?)\]", re.ASCII)


def golden_path(test_file: Path, test_name: str, name: str | None = None) -> Path:
    """Where the golden of a test lies: ``__stitched__/<test file>/<test name>.py``, with ``--<name>`` if it has several."""
    stem = safe_name(test_name) + (f"--{safe_name(name)}" if name is not None else "")
    return store_of(test_file) / f"{stem}.py"


def store_of(test_file: Path) -> Path:
    """The folder with the goldens of one test file."""
    return test_file.parent / STORE_NAME / test_file.stem


def safe_name(name: str) -> str:
    """``name`` as a file name: the parameters of a test after a dash, and a digest where two names could look the same."""
    if found := _PARAMETERS.fullmatch(name):
        name_only, parameters = found.groups()
        return f"{name_only}-{parameters}"
    safe = _UNSAFE.sub("-", name)[:_LONGEST]
    if safe == name:
        return safe
    return f"{safe.strip('-.')}-{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


@dataclass(slots=True)
class References:
    """What one pytest session knows; the sessions of several workers are merged.

    Attributes:
        tests: test file → names of the tests found in it.
        partial: files of which only some tests were asked for.
        passed: test file → names of tests that ran to their end.
        used: goldens that were compared.
    """

    tests: dict[str, set[str]] = field(default_factory=dict)
    partial: set[str] = field(default_factory=set)
    passed: dict[str, set[str]] = field(default_factory=dict)
    used: dict[str, str] = field(default_factory=dict)

    def collected(self, file: Path, name: str, partial: bool) -> None:
        self.tests.setdefault(str(file), set()).add(name)
        if partial:
            self.partial.add(str(file))

    def ran(self, file: Path, name: str) -> None:
        self.passed.setdefault(str(file), set()).add(name)

    def use(self, golden: Path, node_id: str) -> str:
        """Note that a test uses ``golden``; returns the test that used it first."""
        return self.used.setdefault(str(golden), node_id)

    def as_data(self) -> dict[str, object]:
        """Plain data, for the way from a worker."""
        return {
            "tests": {file: sorted(names) for file, names in self.tests.items()},
            "partial": sorted(self.partial),
            "passed": {file: sorted(names) for file, names in self.passed.items()},
            "used": dict(self.used),
        }

    def merge(self, data: dict[str, object]) -> None:
        """Take over what `as_data` gave in another process."""
        for mine, key in ((self.tests, "tests"), (self.passed, "passed")):
            theirs = data[key]
            assert isinstance(theirs, dict)
            for file, names in theirs.items():
                mine.setdefault(file, set()).update(names)
        partial, used = data["partial"], data["used"]
        assert isinstance(partial, list) and isinstance(used, dict)
        self.partial.update(partial)
        self.used.update(used)

    def unreferenced(self) -> list[Path]:
        """Goldens beside the collected files that no test asks for."""
        found: set[Path] = set()
        folders = {Path(file).parent for file in self.tests}
        for folder in folders:
            for store in sorted((folder / STORE_NAME).glob("*/")):
                found.update(self._strays(folder / f"{store.name}.py", store))
        return sorted(found)

    def _strays(self, test_file: Path, store: Path) -> list[Path]:
        goldens = sorted(store.glob("*.py"))
        file = str(test_file)
        if not test_file.is_file():
            return goldens  # the test file is gone
        if file not in self.tests or file in self.partial:
            return []
        waiting = [safe_name(name) for name in self.tests[file] - self.passed.get(file, set())]
        return [
            golden
            for golden in goldens
            if str(golden) not in self.used and not any(_belongs(golden, stem) for stem in waiting)
        ]


def _belongs(golden: Path, stem: str) -> bool:
    return golden.stem == stem or golden.stem.startswith(f"{stem}--")
