"""Triton and ptxas compile for GPUs that aren't there: our own kernels, and the pieces of a small Llama as Inductor makes them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("transformers")
SCRIPT = Path(__file__).resolve().parents[1] / "shared" / "without_device.py"


def has_ptxas() -> bool:
    from triton import knobs

    try:
        return bool(knobs.nvidia.ptxas.path)
    except RuntimeError:
        return shutil.which("ptxas") is not None


@pytest.mark.inductor
@pytest.mark.skipif(not has_ptxas(), reason="needs ptxas")
@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.nightly), 90])
def test_every_kernel_compiles(capability: int, tmp_path: Path) -> None:
    """In a process of its own: it replaces what torch sees of the device."""
    caches = {
        "TRITON_CACHE_DIR": str(tmp_path / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(capability)],
        env={**os.environ, **caches},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line for line in done.stdout.splitlines() if line.endswith(f"for sm_{capability}")]
    ours = [line for line in lines if line.startswith(("staging", "attention"))]
    assert len(ours) == 4
    pieces = {line.split()[0] for line in lines if line.startswith("submod_")}
    assert len(pieces) == 3, "each structure of the pieces: before, between and after attention"
