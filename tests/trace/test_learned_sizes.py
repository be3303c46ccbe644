"""What a compilation finds out about sizes: the checks of a call are the same whether a piece was compiled, loaded, or compiled for another size."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import sympy
import torch
from torch._dynamo.source import LocalSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import piecework
from piecework.errors import InputError
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.pieces.backend import PieceworkBackend
from piecework.runtime.torch_compat import (
    known_sizes,
    learn_again,
    learned_since,
    shape_env_of,
    sizes_text,
)

BACKED = {"type": "backed"}


def compiled(
    model: Callable[..., object],
    *args: torch.Tensor,
    dims: tuple[int, ...] = (0,),
    **fields: object,
) -> piecework.StitchedModule:
    torch._dynamo.reset()
    for x in args:
        for dim in dims:
            torch._dynamo.mark_dynamic(x, dim)
    config = CompilationConfig(dynamic_shapes_config=BACKED, **fields)
    return piecework.compile(model, args, config=config)


def sort(x: torch.Tensor) -> torch.Tensor:
    return x.sort(0).values


def attention(x: torch.Tensor) -> torch.Tensor:
    return torch.softmax(x @ x.transpose(1, 2), -1) @ x


def convolved(x: torch.Tensor) -> torch.Tensor:
    weight = torch.ones(4, 3, 3, 3)
    return torch.nn.functional.conv2d(torch.nn.functional.max_pool2d(x, 2), weight)


CASES = {
    "sort": (sort, (40, 8), (0,)),
    "attention": (attention, (4, 10, 16), (0, 1)),
    "convolved": (convolved, (4, 3, 32, 32), (0, 2, 3)),
}


@pytest.mark.sample(2)
@pytest.mark.inductor
@pytest.mark.parametrize("name", CASES)
def test_a_loaded_piece_checks_what_its_compilation_relied_on(
    name: str, own_compile_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, shape, dims = CASES[name]
    cold = compiled(model, torch.randn(shape), dims=dims)
    with piecework.counters.expect(num_inductor_compiles=0, num_compiled_artifacts_loaded=1):
        warm = compiled(model, torch.randn(shape), dims=dims)
    assert warm.entry_source.code == cold.entry_source.code
    # And where this cache is empty, and Inductor's own is not.
    shutil.rmtree(own_compile_cache)
    own_compile_cache.mkdir(mode=0o700)
    # Inductor writes the conditions in another form.
    again = compiled(model, torch.randn(shape), dims=dims)
    sizes = [
        tuple(n if dim in dims and dim else old for dim, old in enumerate(shape))
        for n in (2, 3, 6, 7, 9, 33)
    ]
    sizes += [(5000, *shape[1:])] if len(dims) < 3 else []
    refused = [[n for n, size in enumerate(sizes) if refuses(each, size)] for each in (cold, again)]
    assert refused[0] == refused[1]


def refuses(model: piecework.StitchedModule, size: tuple[int, ...]) -> bool:
    try:
        model(torch.zeros(size))
    except InputError:
        return True
    return False


@pytest.mark.inductor
def test_example_sizes_that_what_is_kept_does_not_serve_get_a_form_of_their_own() -> None:
    small, large = torch.randn(40, 1), torch.randn(40_000, 1)
    compiled(sort, small)
    with piecework.counters.expect(num_inductor_compiles=1):
        other = compiled(sort, large)
    torch.testing.assert_close(other(large), sort(large))
    with piecework.counters.expect(num_inductor_compiles=0, num_compiled_artifacts_loaded=1):
        again = compiled(sort, large)
    torch.testing.assert_close(again(large), sort(large))
    with piecework.counters.expect(num_inductor_compiles=0, num_compiled_artifacts_loaded=1):
        first = compiled(sort, torch.randn(30, 1))  # another size that the first form does serve
    x = torch.randn(7, 1)
    torch.testing.assert_close(first(x), sort(x))
    with pytest.raises(InputError):  # Inductor sorts with 16-bit indices below 32768 rows
        first(large)


@pytest.mark.inductor
def test_a_backend_that_serves_two_traces_shares_no_piece_between_them() -> None:
    """Symbols of two traces have the same names and mean nothing to each other."""

    def halves(x: torch.Tensor) -> torch.Tensor:
        return x.relu() if x.shape[0] % 2 == 0 else x.relu() + 1

    torch._dynamo.reset()
    backend = PieceworkBackend(CompilationConfig(backend="inductor"))
    run = torch.compile(halves, backend=backend, dynamic=True)
    with piecework.counters.expect(num_compiled_artifacts_saved=2):
        for rows in (4, 5, 6, 7):
            x = torch.randn(rows, 8)
            torch.testing.assert_close(run(x), halves(x))


# --- the record --------------------------------------------------------------------------------------


def traced(size: int) -> tuple[ShapeEnv, torch.SymInt]:
    env = ShapeEnv()
    fake = FakeTensorMode(shape_env=env).from_tensor(
        torch.empty(size, 3),
        source=LocalSource("x"),
        symbolic_context=StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC]),
    )
    assert shape_env_of([fake]) is env and shape_env_of([fake.shape[0]]) is env
    return env, fake.shape[0]


CONDITIONS: dict[str, Callable[[torch.SymInt], bool]] = {
    "bound": lambda n: bool(n < 100),
    "divisible": lambda n: bool(n % 4 == 0),
    "floor": lambda n: bool(n // 3 * 64 + 1 > 7),
    "product": lambda n: bool(n * n * 4 < 2**31),
    "maximum": lambda n: bool(torch.sym_max(n // 2, 5) <= 4096),
    "unequal": lambda n: bool(n != 17),
    "fixed": lambda n: bool(n == 12),
}


@pytest.mark.parametrize("name", CONDITIONS)
def test_what_was_learned_is_learned_again_from_bytes(name: str) -> None:
    env, size = traced(12)
    before = known_sizes(env)
    assert learned_since(env, before) == ()
    assert CONDITIONS[name](size)
    learned = pickle.loads(pickle.dumps(learned_since(env, before)))
    assert learned
    other, _ = traced(12)
    assert learn_again(other, learned)
    assert sizes_text(other) == sizes_text(env)
    refusing, _ = traced(17 if name != "maximum" else 9000)
    known = sizes_text(refusing)
    if name in ("bound", "floor", "product"):
        return  # it holds for 17 as well
    assert not learn_again(refusing, learned)
    assert sizes_text(refusing) == known


def test_conditions_on_sizes_that_the_data_decides_can_not_be_kept() -> None:
    env, _ = traced(12)
    unknown = env.create_unbacked_symint()
    before = known_sizes(env)
    torch._check(unknown >= 3)
    assert learned_since(env, before) is None
    env, size = traced(12)
    before = known_sizes(env)
    env.create_unbacked_symint()  # new ones are the compiler's own
    assert learned_since(env, before) == ()
    assert isinstance(size.node.expr, sympy.Symbol)
