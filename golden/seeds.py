"""Emission under another hash seed. In: a folder of cases. Out: case → kind → text, as a fresh process with another ``PYTHONHASHSEED`` emits it.

One process emits all cases. It inherits the environment, and it writes no file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from piecework.errors import EmitError

_SEEDS = ("1", "2")


def emit_in_other_process(root: Path, names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Emit cases in a process whose hash seed is not this one's.

    Returns:
        Case name → kind → text; a case that could not be emitted there has the error's text, which no golden equals.

    Raises:
        EmitError: the process failed as a whole.
    """
    seed = next(seed for seed in _SEEDS if seed != os.environ.get("PYTHONHASHSEED"))
    done = subprocess.run(
        [sys.executable, "-m", "piecework.golden.seeds", str(root), *names],
        env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    if done.returncode != 0:
        tail = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise EmitError(f"emitting under hash seed {seed} failed:\n{tail}", where=str(root))
    # Whatever a model prints while it is captured comes before the last line.
    found: dict[str, dict[str, str]] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(arguments: Sequence[str]) -> None:
    """Emit the cases named, or all, and print them as one line of JSON."""
    from piecework.golden.cases import discover, select
    from piecework.golden.text.texts import STITCHED

    root, *names = arguments
    texts: dict[str, dict[str, str]] = {}
    for case in select(discover(Path(root)), names):
        try:
            by_kind = case.load().by_kind
            texts[case.name] = {kind: text.code for kind, text in by_kind.items()}
        except Exception as error:  # noqa: BLE001 - told per case, and compared like a text
            texts[case.name] = {STITCHED: f"{type(error).__name__}: {error}"}
    print(json.dumps(texts))


if __name__ == "__main__":
    main(sys.argv[1:])
