"""The package's own names: all of them load, and nothing loads before it is used."""

from __future__ import annotations

import subprocess
import sys

import pytest

from piecework.runtime import graphs


def test_every_name_loads():
    assert sorted(graphs._HOME) == sorted(graphs.__all__)
    for name in graphs.__all__:
        value = getattr(graphs, name)
        assert value.__module__ == graphs._HOME[name]
        assert value.__name__ == name


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="has no attribute 'CudaGraph'"):
        graphs.CudaGraph  # noqa: B018


def test_a_mode_costs_no_graphs():
    program = (
        "import sys; from piecework.runtime.batch.mode import CUDAGraphMode; "
        "print([m for m in sys.modules if m.startswith('piecework.runtime.')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    assert "piecework.runtime.graphs.device.cuda" not in done.stdout
    assert "piecework.runtime.batch.mode" in done.stdout
