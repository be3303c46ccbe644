"""Models of modules that are not the ones imported by their names: what they read is guarded where they read it, or they are refused."""

from __future__ import annotations

import collections.abc
import importlib.util
import itertools
import sys
import types

import pytest
import torch
from models import EAGER

import piecework
from piecework.errors import CaptureError, InputError
from piecework.runtime import torch_compat

SOURCE = """
import torch

RATE = 2

class Options:
    rate = 3

class Helper:
    def __call__(self, x):
        return x * RATE

def scaled(x):
    return x * RATE * Options.rate

class Model(torch.nn.Module):
    helper = Helper()

    def forward(self, x):
        return {body}
"""
BODIES = {
    "global": "x * RATE",
    "class": "x * Options.rate",
    "function": "scaled(x)",
    "object": "self.helper(x)",
    "inner function": "(lambda y: y * RATE)(x)",
}
CHANGES = {"RATE": 5, "Options": type("Options", (), {"rate": 7})}
_NUMBERS = itertools.count()
# Since 2.15 torch looks whose globals they are.
LOOKS = hasattr(torch._dynamo.symbolic_convert, "_registered_module_for_globals")


def loaded(tmp_path, body: str, name: str, *, registered: bool = True) -> types.ModuleType:
    path = tmp_path / f"{name}.py"
    path.write_text(SOURCE.format(body=body))
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    if registered:
        sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def name():
    made = f"other_module_{next(_NUMBERS)}"
    yield made
    sys.modules.pop(made, None)


def sees_changes(module: types.ModuleType) -> None:
    model = module.Model().eval()
    x = torch.randn(3, 4)
    stitched = piecework.compile(model, (x,), config=EAGER)
    torch.testing.assert_close(stitched(x), model(x))
    for changed, value in CHANGES.items():
        before = model(x)
        setattr(module, changed, value)
        if not torch.equal(model(x), before):
            with pytest.raises(InputError):
                stitched(x)


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_a_module_imported_anew_is_watched(tmp_path, name, body) -> None:
    sees_changes(loaded(tmp_path, body, name))
    sees_changes(loaded(tmp_path, body, name))


def test_the_first_of_two_modules_is_watched_still(tmp_path, name) -> None:
    first = loaded(tmp_path, BODIES["function"], name)
    model, x = first.Model().eval(), torch.randn(3, 4)
    stitched = piecework.compile(model, (x,), config=EAGER)
    second = loaded(tmp_path, BODIES["function"], name)
    sees_changes(second)
    torch.testing.assert_close(stitched(x), model(x))
    first.RATE = 11
    with pytest.raises(InputError):
        stitched(x)


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_a_module_that_was_replaced_is_refused_by_name(tmp_path, name, body) -> None:
    first = loaded(tmp_path, body, name)
    loaded(tmp_path, body, name)
    if LOOKS:
        sees_changes(first)
        return
    with pytest.raises(CaptureError, match=f"of a module {name}") as raised:
        piecework.compile(first.Model().eval(), (torch.randn(3, 4),), config=EAGER)
    assert "imported now" in raised.value.hint


def test_a_helper_of_a_module_that_was_replaced_is_refused(tmp_path, name) -> None:
    helper = loaded(tmp_path, BODIES["global"], f"{name}_helper")
    try:
        main = loaded(tmp_path, "other(x)", name)
        main.other = helper.scaled
        loaded(tmp_path, BODIES["global"], f"{name}_helper")
        if not LOOKS:
            with pytest.raises(CaptureError, match=f"of a module {name}_helper"):
                piecework.compile(main.Model().eval(), (torch.randn(3, 4),), config=EAGER)
    finally:
        del sys.modules[f"{name}_helper"]


def test_a_module_that_nobody_registered_is_refused_with_what_to_do(tmp_path, name) -> None:
    module = loaded(tmp_path, BODIES["function"], name, registered=False)
    if LOOKS:
        sees_changes(module)
        return
    with pytest.raises(CaptureError, match="can't be imported") as raised:
        piecework.compile(module.Model().eval(), (torch.randn(3, 4),), config=EAGER)
    assert f'sys.modules["{name}"]' in raised.value.hint


def test_code_in_a_dictionary_that_names_no_module_is_watched() -> None:
    scope: dict[str, object] = {}
    exec(SOURCE.format(body=BODIES["function"]), scope)
    model, x = scope["Model"]().eval(), torch.randn(3, 4)
    stitched = piecework.compile(model, (x,), config=EAGER)
    torch.testing.assert_close(stitched(x), model(x))
    scope["RATE"] = 9
    with pytest.raises(InputError):
        stitched(x)


class Table(collections.abc.Mapping):
    """Its ``get`` is of a module that says another name than its own."""

    def __getitem__(self, key: str) -> float:
        return {"rate": 3.0}[key]

    def __iter__(self):
        return iter(("rate",))

    def __len__(self) -> int:
        return 1


def test_a_module_of_pythons_under_another_name_is_known() -> None:
    table = Table()

    def forward(x: torch.Tensor) -> torch.Tensor:
        return x * table.get("rate") + len(table)

    code = {collections.abc.Mapping.get.__code__}
    assert torch_compat.guarded_elsewhere([Table, table], code) is None
    x = torch.randn(3, 4)
    stitched = piecework.compile(forward, (x,), config=EAGER)
    torch.testing.assert_close(stitched(x), forward(x))


def test_looking_for_other_modules_runs_nothing_of_the_users() -> None:
    class Loud:
        def __getattr__(self, key: str) -> object:
            raise AssertionError(key)

    assert torch_compat.guarded_elsewhere([Loud(), Loud], ()) is None
