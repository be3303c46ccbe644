"""The program's limits, given to `piecework.compile` and to decorated classes: the last range, ranks in the cache's path, what is captured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import piecework
from piecework.errors import ConfigError, InputError
from piecework.runtime.config.compilation import CompilationConfig, RuntimeConfig
from piecework.runtime.decorators import stitched_of

EAGER = {"backend": "eager"}
RANKED = RuntimeConfig(
    max_num_batched_tokens=32,
    max_num_seqs=8,
    rank=1,
    world_size=2,
    dp_rank=3,
    data_parallel_size=4,
    model_name="served",
)


@piecework.support_torch_compile(dynamic_arg_dims={"x": 0})
class Decorated(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).relu()


def compiled(kind: str, runtime: object, **fields: object) -> piecework.StitchedModule:
    config = CompilationConfig(**{**EAGER, **fields})
    x = torch.randn(4, 8)
    if kind == "compile":
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())
        return piecework.compile(model, (x,), config=config, runtime_config=runtime)  # type: ignore[arg-type]
    if kind == "keyword":
        decorated = Decorated(compilation_config=config, runtime_config=runtime)  # type: ignore[call-arg]
    else:
        decorated = Decorated(compilation_config=config)  # type: ignore[call-arg]
        decorated.runtime_config = runtime  # type: ignore[assignment]
    decorated(x)
    made = stitched_of(decorated)
    assert made is not None
    return made


KINDS = pytest.mark.parametrize("kind", ["compile", "keyword", "attribute"])


@KINDS
@pytest.mark.parametrize("runtime", [RANKED, RANKED.model_dump()], ids=["object", "mapping"])
def test_the_last_range_is_closed_at_the_largest_batch(kind: str, runtime: object) -> None:
    made = compiled(kind, runtime, compile_ranges_endpoints=[8])
    assert [str(each) for each in made.program.compile_ranges] == ["[1, 8]", "[9, 32]"]
    assert made.report().model == "served"
    x = torch.randn(32, 8)
    torch.testing.assert_close(made(x), made.model(x))
    with pytest.raises(InputError, match=r"33.*\[9, 32\]"):
        made(torch.randn(33, 8))
    open_ended = compiled(kind, None, compile_ranges_endpoints=[8])
    assert open_ended(torch.randn(33, 8)).shape == (33, 8)  # type: ignore[attr-defined]


@KINDS
def test_what_does_not_fit_the_limits_is_refused_before_anything_is_traced(kind: str) -> None:
    with piecework.counters.expect(num_graphs_seen=0), pytest.raises(ConfigError, match="64"):
        compiled(kind, RANKED, compile_sizes=[64])
    with pytest.raises(ConfigError, match="largest batch"):
        compiled(kind, RANKED, compile_ranges_endpoints=[64])
    with pytest.raises(ConfigError, match="runtime_config must be a RuntimeConfig"):
        compiled(kind, 3)


@KINDS
def test_capture_goes_by_the_limits(kind: str) -> None:
    made = compiled(kind, RANKED, cudagraph_mode="FULL").capture(progress=False, estimate=False)
    assert max(made.static_graphs.sizes) == 16
    other = compiled(kind, None, cudagraph_mode="FULL").capture(
        [1, 64], progress=False, estimate=False
    )
    assert max(other.static_graphs.sizes) == 64


@pytest.mark.inductor
def test_ranks_are_part_of_the_caches_path(own_compile_cache: Path) -> None:
    made = compiled("keyword", RANKED, backend="inductor")
    (folder,) = {path.parent for path in own_compile_cache.rglob("stitched.py")}
    assert folder.parent.name == "rank_1_3"
    compiled("compile", RANKED.replace(rank=0), backend="inductor")
    assert {p.parent.parent.name for p in own_compile_cache.rglob("stitched.py")} == {
        "rank_1_3",
        "rank_0_3",
    }
    assert made(torch.randn(5, 8)).shape == (5, 8)  # type: ignore[attr-defined]
