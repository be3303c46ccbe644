"""Runs one contender in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from piecework.errors import PieceworkError


def apart(module: str, arguments: Sequence[str], caches: Path, **environment: str) -> Any:
    """What ``python -m module --one …`` prints as its last line, JSON.

    Args:
        caches: the folder of its compile caches.
        environment: variables that it has otherwise than this process.

    Raises:
        PieceworkError: it ended with an error; the message says how.
    """
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "PIECEWORK_CACHE_DIR")
    done = subprocess.run(
        [sys.executable, "-m", module, "--one", *arguments],
        env={**os.environ, **{name: str(caches / name) for name in names}, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    last = done.stdout.strip().rpartition("\n")[2]
    if done.returncode or not last.startswith(("{", "[")):
        tail = "\n".join(done.stderr.splitlines()[-5:])
        raise PieceworkError(f"its process ended with {done.returncode}", hint=tail or None)
    return json.loads(last)
