"""Adds a note to an exception that passed through stitched code: where in the model it was."""

from __future__ import annotations

import re
import traceback

from piecework.codegen import StitchedSource
from piecework.codegen.stitch.bind import filename_of

_PIECE = re.compile(r"__vllm_submods__\[(\d+)\]\(")


def add_piece_note(error: BaseException, source: StitchedSource) -> None:
    """Note which statement of ``source`` was running: its line, its piece or operator, and the module path it stands for."""
    line = _last_line_of(filename_of(source.code), error)
    if line is None or any("stitched source, line" in n for n in getattr(error, "__notes__", ())):
        return
    text = source.code.splitlines()[line - 1].strip()
    origin = source.lines.get(line)
    piece = _PIECE.search(text)
    what = source.submod_names[int(piece.group(1))] if piece else text.partition("(")[0]
    parts = [f"in {what}"]
    if origin is not None and origin.module:
        parts.append(f"of {origin.module}")
    if origin is not None and origin.source:
        parts.append(f"({origin.source})")
    error.add_note(f"{' '.join(parts)}; stitched source, line {line}: {text}")


def _last_line_of(filename: str, error: BaseException) -> int | None:
    """The line of the innermost frame that runs that source; the entry around it is another one."""
    lines = [
        number
        for frame, number in traceback.walk_tb(error.__traceback__)
        if frame.f_code.co_filename == filename
    ]
    return lines[-1] if lines else None
