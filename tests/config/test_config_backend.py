"""``init_backend``: what Dynamo is given in each mode, and names that lead nowhere."""

from __future__ import annotations

import pytest
import torch

from piecework.errors import ConfigError
from piecework.runtime.batch.ranges import OPEN_END, Range
from piecework.runtime.config.compilation import CompilationConfig, RuntimeConfig
from piecework.runtime.config.model import import_qualified, qualified_name

RUNTIME = RuntimeConfig(max_num_batched_tokens=64, max_num_seqs=4)


@pytest.mark.parametrize("mode", [1, 2])
def test_whole_graph_modes_use_a_torch_backend_by_name(mode):
    backend = CompilationConfig(mode=mode, backend="eager").init_backend()
    assert backend == "eager"
    compiled = torch.compile(lambda x: x + 1, backend=backend)
    assert compiled(torch.ones(2)).tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    ("mode", "name", "said"),
    [
        (0, "eager", "NONE compiles nothing"),
        (1, "no_such_backend", "can't be imported"),
        (1, "no_such_module:fn", "can't be imported"),
        (1, "operator:no_such", "can't be imported"),
    ],
)
def test_names_that_lead_nowhere(mode, name, said):
    with pytest.raises(ConfigError, match=said) as caught:
        CompilationConfig(mode=mode, backend=name).init_backend()
    assert caught.value.where in ("mode", "backend")


@pytest.mark.parametrize(("is_encoder", "end"), [(False, 64), (True, OPEN_END)])
def test_the_backend_has_what_the_runtime_settles(is_encoder, end):
    config = CompilationConfig(
        backend="eager", cudagraph_mode="FULL", compile_ranges_endpoints=[16, 64]
    )
    backend = config.init_backend(RUNTIME, is_encoder=is_encoder)
    assert backend.compile_ranges == (Range(1, 16), Range(17, end))
    assert backend.config.cudagraph_capture_sizes == (1, 2, 4, 8)
    assert backend.config.splitting_ops is not None
    assert CompilationConfig(backend="eager").init_backend(RUNTIME).range_table is None


def test_qualified_names_go_both_ways():
    for value in (test_qualified_names_go_both_ways, torch.nn.Linear.forward):
        name = qualified_name(value)
        assert ":" in name and qualified_name(name) == name
    assert import_qualified(name, where="x") is torch.nn.Linear.forward
    for nameless in (lambda: None, object()):
        with pytest.raises(ValueError, match="no importable name"):
            qualified_name(nameless)
