"""What padding reaches: a table of graphs, each with what is said of its result, and checked against running it padded."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from models import EAGER

import piecework
from piecework.runtime.analysis.rows.verdict import Verdict, rows_of

W = torch.randn(4, 4)


@piecework.splitting_op("padding_test::own", rows="independent")
def own(x: torch.Tensor, rows: int) -> torch.Tensor:
    return x * 2


@own.register_fake
def _(x: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.empty_like(x)


def attention(x: torch.Tensor) -> torch.Tensor:
    """``[L, N, 2]``, unscaled weights."""
    eye, bias = torch.eye(2), torch.zeros(2)
    return F.multi_head_attention_forward(
        x.transpose(0, 1), x.transpose(0, 1), x.transpose(0, 1), 2, 1, torch.ones(6, 2), torch.ones(6), None, None, False, 0.0,
        eye, bias, training=False, need_weights=False,
    )[0].transpose(0, 1)  # fmt: skip


def tokens(layer: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """A layer over ``[1, channels, tokens]``, where the tokens are the batch."""
    return lambda x: layer(x.t()[None])[0].t()


def set_to_zero(x: torch.Tensor, where: object) -> torch.Tensor:
    y = x * 1
    y[where] = 0  # type: ignore[index]
    return y


def through_a_view(x: torch.Tensor) -> torch.Tensor:
    y = x * 1
    y.t()[0].add_(x[:, 1])
    return y


def written_last(x: torch.Tensor) -> torch.Tensor:
    y = x * 1
    y.t()[:, -1].zero_()
    return y


def own_numbers(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(x.shape[0])


def shifted_numbers(x: torch.Tensor, view: bool = False) -> torch.Tensor:
    """The numbers of the rows from the end, made in place."""
    numbers = own_numbers(x)
    kept = numbers[:, None]
    (kept if view else numbers).add_(1).neg_()
    return numbers if view else kept[:, 0]


ENCODER = torch.nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval().requires_grad_(False)
ATTENTION = torch.nn.MultiheadAttention(4, 2, batch_first=True).eval().requires_grad_(False)


def region(x: torch.Tensor, body: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    with torch.autocast("cpu", enabled=False):
        return body(x)


def verdict(model: Callable[..., object], *args: torch.Tensor) -> Verdict:
    for each in args:
        torch._dynamo.mark_dynamic(each, 0)
    stitched = piecework.compile(model, args, config=EAGER)
    program = stitched.program
    assert program.batch.symbol is not None
    return rows_of(program.graph, {program.batch.symbol})


def said(model: Callable[..., object], *args: torch.Tensor) -> tuple[str | None, ...]:
    found = verdict(model, *args)
    return found.results if found.refused is None else (found.refused,)


KEEP: dict[str, Callable[[torch.Tensor], object]] = {
    "rowwise": lambda x: torch.relu(x @ W) + 1,
    "sum of each row": lambda x: x.sum(-1, keepdim=True) + x,
    "transposed": lambda x: (x.t() * 2).t(),
    "softmax of each row": lambda x: F.softmax(x, -1) + torch.softmax(x, dim=1),
    "reshaped and back": lambda x: x.view(-1, 2, 2).transpose(1, 2).reshape(x.shape[0], 4),
    "positions": lambda x: x + torch.arange(x.shape[0])[:, None],
    "like": lambda x: x + torch.zeros_like(x) + x.new_zeros(4) + torch.ones(x.shape[0], 1),
    "split columns": lambda x: torch.cat(x.chunk(2, -1)[::-1], -1),
    "weights alone": lambda x: (x + W.sum(0) + W.mean()),
    "causal": lambda x: F.scaled_dot_product_attention(*[x[None, None]] * 3, is_causal=True)[0, 0],
    "attention within rows": lambda x: attention(x.view(-1, 2, 2)).flatten(1),
    "conv within rows": lambda x: F.conv1d(x[:, None], torch.ones(1, 1, 3)),
    "padded columns": lambda x: F.pad(x, (1, 2)),
    "group norm of rows": lambda x: F.group_norm(x, 2),
    "instance norm of rows": lambda x: F.instance_norm(x.view(-1, 2, 2)),
    "batch norm with fixed statistics": lambda x: F.batch_norm(x, W[0], W[0].abs() + 1),
    "columns set": lambda x: set_to_zero(x, (slice(None), -1)),
    "written through a view": lambda x: through_a_view(x),
    "pairs": lambda x: x @ x.t(),
    "in place": lambda x: (x * 1).add_(1).mul_(2),
    "own op": lambda x: own(x, x.shape[0]) + 1,
    "sorted columns": lambda x: x.sort(-1).values.flip(1),
    "running sum": lambda x: x.cumsum(0),
    "autocast region": lambda x: region(x, lambda y: y @ W + 1),
    "own numbers": lambda x: x[own_numbers(x)[:, None], torch.arange(4)[None, :2]],
    "own numbers of another type": lambda x: x[own_numbers(x).to(torch.int32).long()] * 2,
    "own numbers, expanded": lambda x: x[own_numbers(x)[:, None].expand(-1, 3), torch.arange(3)],
    "own numbers twice": lambda x: (x @ x.t())[own_numbers(x), own_numbers(x)],
}
CHANGE: dict[str, tuple[Callable[[torch.Tensor], object], str]] = {
    "mean": (lambda x: x - x.mean(0), "mean .* takes all rows together"),
    "keepdim": (lambda x: x / x.sum(0, keepdim=True), "sum .* takes all rows together"),
    "max": (lambda x: x - x.amax(0), "amax .* takes all rows"),
    "last row": (lambda x: x + x[-1], "select .* takes one row"),
    "size": (lambda x: x * x.shape[0], "mul .* uses the batch size as a number"),
    "size plus one": (lambda x: x / (x.shape[0] + 1), "div .* uses the batch size"),
    "full": (lambda x: x + torch.full((x.shape[0], 1), x.shape[0]), "full .* uses the batch size"),
    "softmax": (lambda x: F.softmax(x, 0), "softmax .* along the batch"),
    "softmax by keyword": (lambda x: torch.softmax(x, dim=-2), "softmax .* along the batch"),
    "flip": (lambda x: x.flip(0), "flip .* along the batch"),
    "roll": (lambda x: x.roll(1, 0), "roll .* along the batch"),
    "roll of all": (lambda x: x.roll(1), "roll .* along the batch"),
    "sort": (lambda x: x.sort(0).values, "sort .* along the batch"),
    "attention": (lambda x: torch.softmax(x @ x.t(), -1) @ x, "softmax .* along the batch"),
    "product": (lambda x: (x @ x.t()) @ x, "product over the batch"),
    "sdpa": (
        lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]),
        "attends over the batch|works along the batch",
    ),
    "dealt anew": (lambda x: x.view(4, x.shape[0]).t(), "deals rows out anew"),
    "from the end": (lambda x: x + torch.arange(x.shape[0] - 1, -1, -1)[:, None], "arange"),
    "in place": (lambda x: (x * 1).sub_(x.mean()), "mean .* takes all rows"),
    "through memory": (
        lambda x: torch.empty_like(x).copy_(x.mean(0)) + 1,
        "mean .* takes all rows",
    ),
    "mean in an autocast region": (
        lambda x: region(x, lambda y: y - y.mean(0)),
        "mean .* takes all rows",
    ),
    "attention layer over tokens": (
        lambda x: ATTENTION(x[None], x[None], x[None])[0][0],
        "softmax",
    ),
    "encoder layer over tokens": (lambda x: ENCODER(x[None])[0], "softmax|attend|encoder"),
    "conv over tokens": (tokens(lambda x: F.conv1d(x, torch.ones(4, 4, 3), padding=1)), "convol"),
    "conv without a batch": (
        lambda x: F.conv1d(x.t(), torch.ones(4, 4, 3), padding=1).t(),
        "convol",
    ),
    "pooling over tokens": (
        tokens(lambda x: F.max_pool2d(x[..., None], (3, 1), 1, (1, 0))[..., 0]),
        "pool",
    ),
    "average over tokens": (tokens(lambda x: F.avg_pool1d(x, 3, 1, 1)), "pool"),
    "replicate padding": (
        lambda x: F.pad(x.t()[None], (1, 1), mode="replicate")[0].t()[1:-1] * 1
        + F.pad(x.t()[None], (0, 2), mode="replicate")[0].t()[2:],
        "index|pad",
    ),
    "y[-1] = 0": (lambda x: set_to_zero(x, -1), "select .* takes one row"),
    "y[:-1] = 0": (lambda x: set_to_zero(x, slice(None, -1)), "slice .* takes some"),
    "index_fill": (lambda x: x.index_fill(0, torch.tensor([-1]), 3.0), "index_fill"),
    "index_fill in place": (
        lambda x: (x * 1).index_fill_(0, torch.tensor([-1]), 3.0),
        "index_fill",
    ),
    "select_scatter": (lambda x: x.select_scatter(torch.zeros(4), 0, -1), "select_scatter"),
    "group norm of tokens": (tokens(lambda x: F.group_norm(x, 2)), "group_norm"),
    "instance norm of tokens": (tokens(F.instance_norm), "batch_norm"),
    "batch norm in training": (
        lambda x: F.batch_norm(x, None, None, training=True),
        "batch_norm.* together",
    ),
    "upper triangular sum": (
        lambda x: torch.ones(x.shape[0], x.shape[0]).triu() @ x,
        "product over the batch",
    ),
    "cdist and min": (
        lambda x: x + torch.cdist(x, 5 - x).min(-1).values[:, None],
        "min .* together",
    ),
    "write through a view": (lambda x: written_last(x), "select .* takes one row"),
    "numbers from the end": (lambda x: x[-1 - own_numbers(x)], "picks rows by number"),
    "numbers from one": (lambda x: x[torch.arange(1, x.shape[0])], "picks rows|computed from"),
    "numbers in twos": (lambda x: x[torch.arange(0, x.shape[0] // 2 * 2, 2)], "index|arange"),
    "numbers flipped": (lambda x: x[own_numbers(x).flip(0)], "flip .* along the batch"),
    "numbers written to": (lambda x: x[shifted_numbers(x)], "picks rows by number"),
    "numbers written to through a view": (
        lambda x: x[shifted_numbers(x, view=True)],
        "picks rows by number",
    ),
    "numbers summed up": (
        lambda x: x[own_numbers(x)[:, None].expand(-1, 2).cumsum(1)[:, 1] % x.shape[0]],
        "picks rows by number|uses the batch size",
    ),
    "numbers of columns": (
        lambda x: (x @ x.t())[:, own_numbers(x).flip(0)],
        "flip .* along the batch",
    ),
    "numbers read from rows": (lambda x: x[x[:, 0].argsort()], "picks rows|along the batch"),
    "sum of positions": (lambda x: x + torch.arange(x.shape[0]).sum(), "sum .* takes all rows"),
}


@pytest.mark.parametrize("name", KEEP)
def test_rows_that_padding_does_not_reach(name: str) -> None:
    model = KEEP[name]
    assert said(model, torch.randn(5, 4)) == (None,)
    # and so it is: a padded run has the same first rows
    x = torch.randn(3, 4)
    padded, alone = model(torch.cat([x, torch.full((4, 4), 9.0)])), model(x)
    for dim in range(alone.dim()):  # type: ignore[attr-defined]
        padded = padded.narrow(dim, 0, alone.shape[dim])  # type: ignore[attr-defined]
    torch.testing.assert_close(padded, alone)


@pytest.mark.parametrize("name", CHANGE)
def test_rows_that_padding_changes(name: str) -> None:
    model, why = CHANGE[name]
    [reason] = said(model, torch.randn(5, 4))
    assert reason is not None
    assert re.search(why, reason), reason
    assert re.search(r"\((test_padding|functional)\.py:\d+\)", reason)
    # and so it is: a padded run has other first rows
    x = torch.randn(3, 4)
    tail = torch.tensor([[9.0], [-9.0]]).expand(2, 4)
    padded, alone = model(torch.cat([x, tail])), model(x)
    assert not torch.equal(padded[..., :3, :], alone)  # type: ignore[index]


def test_each_result_is_told_by_itself() -> None:
    def model(x, y):
        y = x + y
        return x + 1, y.sum(), x * 2, (y * 2).mean(0)

    reasons = said(model, torch.randn(5, 4), torch.randn(5, 4))
    assert [reason is None for reason in reasons] == [True, False, True, False]


def test_what_a_higher_order_operator_runs_is_looked_into() -> None:
    def model(x, flag):
        y = torch.cond(flag, lambda z: z - z.mean(0), lambda z: z + 1, (x,))
        return y * 2, torch.cond(flag, lambda z: z * 2, lambda z: z + 1, (x,))

    x, flag = torch.randn(5, 4), torch.tensor(True)
    torch._dynamo.mark_dynamic(x, 0)
    program = piecework.compile(model, (x, flag), config=EAGER).program
    mixed, kept = rows_of(program.graph, {program.batch.symbol}).results
    assert mixed is not None and "mean" in mixed and kept is None


def test_writes_reach_every_view_of_the_memory() -> None:
    def model(x):
        base = x * 1
        row = base[:, 0]
        row.sub_(x.mean())
        return base, x + 1

    reasons = said(model, torch.randn(5, 4))
    assert reasons[0] is not None and reasons[1] is None


SIZES_OF_THEIR_OWN: dict[str, Callable[[torch.Tensor], object]] = {
    "vstack": lambda x: torch.vstack([x, x])[::2],
    "meshgrid": lambda x: torch.stack(torch.meshgrid(x[:, 0], x[:, 1], indexing="ij"), -1).reshape(
        -1, 2
    ),
    "unfold": lambda x: x.unfold(0, 2, 1),
    "listed twice": lambda x: torch.stack([x, x]).flatten(0, 1),
}


@pytest.mark.parametrize("name", SIZES_OF_THEIR_OWN)
def test_results_with_other_sizes_are_never_padded(name: str) -> None:
    [reason] = said(SIZES_OF_THEIR_OWN[name], torch.randn(5, 4))
    assert reason is not None


def test_an_argument_that_is_written_to_is_told_by_itself() -> None:
    def model(x, cache):
        cache[: x.shape[0]].copy_(x)
        return x + 1

    x, cache = torch.randn(5, 4), torch.zeros(9, 4)
    torch._dynamo.mark_dynamic(x, 0)
    program = piecework.compile(model, (x, cache), config=EAGER).program
    found = rows_of(program.graph, {program.batch.symbol})
    assert found.results == (None,)
    [reason] = found.written.values()
    assert reason is not None and "as many rows as the batch has" in reason


def test_the_trace_learns_nothing_from_the_analysis() -> None:
    x = torch.randn(5, 4)
    torch._dynamo.mark_dynamic(x, 0)
    program = piecework.compile(
        lambda x: F.conv1d(x[:, None], torch.ones(1, 1, 3)), (x,), config=EAGER
    ).program
    size = next(iter(program.graph.graph.nodes)).meta["example_value"]
    env = (size if isinstance(size, torch.SymInt) else size.shape[0]).node.shape_env
    before = (len(env.guards), dict(env.var_to_range), dict(env.replacements))
    for _ in range(2):
        rows_of(program.graph, {program.batch.symbol})
    assert (len(env.guards), dict(env.var_to_range), dict(env.replacements)) == before


def test_autocast_and_grad_mode_are_as_they_were_after_a_graph_that_fails() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = torch.randn(3)
    mode = graph.call_function(
        torch.amp.autocast_mode._enter_autocast, ("cpu", torch.bfloat16, True, None)
    )
    graph.call_function(torch._C._set_grad_enabled, (False,))
    broken = graph.call_function(torch.mm, (x, x))
    graph.call_function(torch.amp.autocast_mode._exit_autocast, (mode,))
    graph.output(broken)
    found = rows_of(torch.fx.GraphModule({}, graph), {"s0"})
    assert found.refused is not None and "can't be followed" in found.refused
    assert not torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()


def test_how_many_elements_rows_made_is_a_number_of_theirs() -> None:
    def model(x):
        found = x[x > 0].shape[0]
        return torch.ones(3) * found, torch.ones(3) * 2, found

    x = torch.randn(5, 4)
    torch._dynamo.mark_dynamic(x, 0)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        program = piecework.compile(model, (x,), config=EAGER).program
    verdict = rows_of(program.graph, {program.batch.symbol})
    reasons = verdict.results or (verdict.refused,)
    assert all(each is not None for number, each in enumerate(reasons) if number != 1)


def test_a_number_that_is_read_from_rows_mixes_what_it_meets() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    from torch._dynamo.source import ConstantSource
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import (
        DimDynamic,
        ShapeEnv,
        StatelessSymbolicContext,
    )

    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC])
    fake = FakeTensorMode(shape_env=ShapeEnv()).from_tensor(
        torch.randn(5, 4), source=ConstantSource("x"), symbolic_context=context
    )
    x.meta["example_value"] = fake
    number = graph.call_method("item", (graph.call_method("sum", (x,)),))
    graph.output(
        (graph.call_function(torch.mul, (x, number)), graph.call_function(torch.mul, (x, 2)))
    )
    found = rows_of(torch.fx.GraphModule({}, graph), {str(fake.shape[0])})
    assert found.refused is not None or (found.results[0] is not None and found.results[1] is None)


@pytest.mark.sample(2)
@pytest.mark.parametrize("batch_first", [True, False])
def test_rows_are_followed_through_views_whose_other_sizes_are_dynamic_too(
    batch_first: bool,
) -> None:
    """Attention lists ``batch × heads`` blocks of tokens: their number is an expression of a dynamic size."""
    layer = torch.nn.MultiheadAttention(8, 2, batch_first=batch_first).eval()

    def model(x: torch.Tensor) -> torch.Tensor:
        tokens = x if batch_first else x.transpose(0, 1)
        attended = layer(tokens, tokens, tokens, need_weights=False)[0]
        return attended if batch_first else attended.transpose(0, 1)

    with torch.no_grad():
        stitched = piecework.compile(model, (torch.randn(4, 5, 8),), config=EAGER)
        stitched.capture([2, 4], progress=False, estimate=False)
        for rows, length in ((1, 5), (3, 5), (3, 7), (4, 3)):
            x = torch.randn(rows, length, 8)
            torch.testing.assert_close(stitched(x), model(x))
    assert stitched.static_graphs.shape.mixes is None
