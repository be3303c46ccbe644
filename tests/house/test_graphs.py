"""The package's own names: all of them load, and nothing loads before it is used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import piecework.runtime
from piecework.faces import homes
from piecework.runtime import graphs


@pytest.mark.parametrize("face", [graphs, piecework.runtime], ids=["graphs", "runtime"])
def test_every_name_loads(face):
    found = homes(face.__file__)
    assert sorted(found) == sorted(face.__all__) and "coverage" in found
    for name, home in found.items():
        value = getattr(face, name)
        if isinstance(value, type) or callable(value):
            assert value.__module__.startswith(home.rpartition(".")[0])
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
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=600
    )
    assert "piecework.runtime.graphs.device.cuda" not in done.stdout
    assert "piecework.runtime.batch.mode" in done.stdout
