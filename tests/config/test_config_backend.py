"""``init_backend``: what Dynamo is given in each mode, and names that lead nowhere."""

from __future__ import annotations

import pytest
import torch

from piecework.errors import ConfigError
from piecework.runtime.batch.ranges import OPEN_END, Range
from piecework.runtime.config.compilation import CompilationConfig, RuntimeConfig
from piecework.runtime.config.model import import_qualified, qualified_name


class Outer:
    class Inner:
        pass


def test_mode_none_has_no_backend():
    with pytest.raises(ConfigError, match="NONE compiles nothing"):
        CompilationConfig(mode=0).init_backend()


@pytest.mark.parametrize("mode", [1, 2])
def test_whole_graph_modes_use_a_torch_backend_by_name(mode):
    assert CompilationConfig(mode=mode, backend="eager").init_backend() == "eager"
    backend = CompilationConfig(mode=mode, backend="eager").init_backend()
    compiled = torch.compile(lambda x: x + 1, backend=backend)
    assert compiled(torch.ones(2)).tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_such_backend", "can't be imported"),
        ("no_such_module:fn", "can't be imported"),
        ("operator:no_such", "can't be imported"),
    ],
)
def test_names_that_lead_nowhere(name, said):
    with pytest.raises(ConfigError, match=said) as caught:
        CompilationConfig(mode=1, backend=name).init_backend()
    assert caught.value.where == "backend"


def test_a_runtime_resolves_the_backends_config():
    runtime = RuntimeConfig(max_num_batched_tokens=64, max_num_seqs=4)
    backend = CompilationConfig(backend="eager", cudagraph_mode="FULL").init_backend(runtime)
    assert backend.range_table is None
    assert backend.config.cudagraph_capture_sizes == (1, 2, 4, 8)
    assert backend.config.splitting_ops is not None


@pytest.mark.parametrize(("is_encoder", "end"), [(False, 64), (True, OPEN_END)])
def test_the_backend_compiles_the_ranges_of_the_runtime(is_encoder, end):
    runtime = RuntimeConfig(max_num_batched_tokens=64, max_num_seqs=4)
    config = CompilationConfig(
        backend="eager", compile_ranges_endpoints=[16, 64], compile_sizes=[1]
    )
    backend = config.init_backend(runtime, is_encoder=is_encoder)
    assert backend.compile_ranges == (Range(1, 1), Range(1, 16), Range(17, end))


def test_qualified_names_go_both_ways():
    for value in (test_mode_none_has_no_backend, Outer.Inner, torch.nn.Linear.forward):
        name = qualified_name(value)
        assert ":" in name and qualified_name(name) == name
    assert import_qualified(qualified_name(torch.nn.Linear.forward), where="x") is (
        torch.nn.Linear.forward
    )
    for nameless in (lambda: None, object()):
        with pytest.raises(ValueError, match="no importable name"):
            qualified_name(nameless)
