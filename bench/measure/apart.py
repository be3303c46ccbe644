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


def apart(
    module: str,
    arguments: Sequence[str],
    caches: Path | None = None,
    *,
    limit: float | None = None,
    **environment: str,
) -> Any:
    """What ``python -m module --one …`` prints as its last line, JSON.

    Args:
        caches: the folder of its compile caches; those of this process if None.
        limit: seconds after which it is stopped.
        environment: variables that it has otherwise than this process.

    Raises:
        PieceworkError: it did not end, or ended with an error; the message says how.
    """
    if caches is not None:
        names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "PIECEWORK_CACHE_DIR")
        environment = {name: str(caches / name) for name in names} | environment
    try:
        done = subprocess.run(
            [sys.executable, "-m", module, "--one", *arguments],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise PieceworkError(f"not done after {limit:.0f} s") from error
    last = done.stdout.strip().rpartition("\n")[2]
    if done.returncode or not last.startswith(("{", "[")):
        tail = "\n".join(done.stderr.splitlines()[-5:])
        raise PieceworkError(f"its process ended with {done.returncode}", hint=tail or None)
    return json.loads(last)
