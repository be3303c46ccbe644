"""Goldens of a test-suite, from the command line. In: the working folder. Out: the tests that use `stitched_golden`, and a pytest run of them alone.

The run is a process of its own, so that the suite's configuration and plugins are what they are for its owner.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from piecework.errors import UsageError
from piecework.golden.plugin import ONLY, OPTION
from piecework.golden.text import snapshot
from piecework.golden.text.snapshot import folders

_FIXTURE = b"stitched_golden"
_TEST_FILE = re.compile(r"test_.*\.py|.*_test\.py|conftest\.py")


def suite_under(place: Path) -> list[Path]:
    """Test files that speak of the fixture; the whole folder of a ``conftest.py`` that does."""
    found: list[Path] = []
    for folder, files in folders(place):
        tests = [folder / name for name in files if _TEST_FILE.fullmatch(name)]
        speak = [path for path in tests if _FIXTURE in path.read_bytes()]
        found += [folder] if folder / "conftest.py" in speak else speak
    return [path for path in found if not any(other in path.parents for other in found)]


def run_suite(tests: Iterable[str | os.PathLike[str]], *, update: bool, quiet: bool) -> bool:
    """Run the tests that use the fixture; True if they all passed. ``quiet`` keeps pytest's output back.

    Raises:
        UsageError: none of ``tests`` uses the fixture, or pytest could not run them.
    """
    # What torch logs while it traces says nothing of a golden.
    options = [ONLY, "-q", "--tb=short", "--show-capture=no", *([OPTION] if update else [])]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *map(os.fspath, tests)],
        stdout=subprocess.PIPE if quiet else None,
        stderr=subprocess.STDOUT if quiet else None,
        text=True,
        check=False,
    )
    match done.returncode:
        case 0 | 1 as code:
            return code == 0
        case 5:
            raise UsageError(
                "no test here uses stitched_golden", hint="name test files, or cases with --root"
            )
        case code:
            tail = "\n".join((done.stdout or "").splitlines()[-20:])
            raise UsageError(f"pytest could not run the tests (exit code {code})\n{tail}".rstrip())


def proposals(tests: Sequence[Path]) -> list[Path]:
    """Goldens of these tests that have a proposal."""
    places = {path if path.is_dir() else path.parent / snapshot.STORE_NAME for path in tests}
    return snapshot.pending(places)
