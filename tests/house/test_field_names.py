"""The field's names and their leading parameters, whatever room they live in: who knows vLLM's compilation package finds them."""

from __future__ import annotations

import inspect
from importlib import import_module
from types import ModuleType

import pytest
from field_names import METHODS, SIGNATURES
from processes import python

from piecework import codegen, runtime
from piecework.faces import homes
from piecework.runtime import graphs


@pytest.mark.parametrize("name", SIGNATURES)
def test_leading_parameters(name: str) -> None:
    found = [each for each in inspect.signature(getattr(runtime, name)).parameters]
    wanted = SIGNATURES[name].split()
    assert found[: len(wanted)] == wanted


@pytest.mark.parametrize(
    ("name", "method"),
    [(name, each) for name, listed in METHODS.items() for each in listed.split()],
)
def test_methods(name: str, method: str) -> None:
    assert hasattr(getattr(runtime, name), method)


@pytest.mark.parametrize("face", [runtime, graphs], ids=["runtime", "graphs"])
def test_a_face_hands_on_what_it_lists(face: ModuleType) -> None:
    """Also after every module is imported: a module of the same name would hide it."""
    found = homes(str(face.__file__))
    assert sorted(found) == sorted(face.__all__) and "coverage" in found
    for name, home in found.items():
        value = getattr(face, name)
        assert value is getattr(import_module(home), name) is not None
        if isinstance(value, type) or callable(value):
            assert value.__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'CudaGraph'"):
        face.CudaGraph  # noqa: B018


def test_a_mode_costs_no_graphs() -> None:
    program = (
        "import sys; from piecework.runtime.batch.mode import CUDAGraphMode; "
        "print([m for m in sys.modules if m.startswith('piecework.runtime.')])"
    )
    said = python("-c", program).stdout
    assert "piecework.runtime.graphs.device.cuda" not in said
    assert "piecework.runtime.batch.mode" in said


def test_codegen_has_its_own() -> None:
    for name in ("generate_execution_code", "compile_execution_fn", "split_graph", "SplitItem"):
        assert callable(getattr(codegen, name))
