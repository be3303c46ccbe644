"""Random functions of a batch, of operators that keep rows apart, that don't, and that do for some arguments.

A step takes values that earlier steps made; one that eager refuses at the example's size is left out.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

_GENERATOR = torch.Generator().manual_seed(0)


def _fixed(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=_GENERATOR)


W, W2, ROW, COLUMN = _fixed(4, 4), _fixed(8, 4), _fixed(4), _fixed(3, 1)
KERNEL, KERNEL4 = _fixed(1, 1, 3), _fixed(4, 4, 2)
IN, OUT, BIAS = _fixed(12, 4), _fixed(4, 4), _fixed(12)
PICK, MASK = torch.tensor([1, 0, 2]), torch.tensor([True, False, True, False])
BORDERS = torch.tensor([-1.0, 0.0, 1.0])


def _attention(x: torch.Tensor) -> torch.Tensor:
    return F.multi_head_attention_forward(
        x, x, x, 4, 2, IN, BIAS, None, None, False, 0.0, OUT, ROW, training=False, need_weights=False
    )[0]  # fmt: skip


def _encoder_layer(x: torch.Tensor) -> torch.Tensor:
    y = F.layer_norm(x + _attention(x), (4,))
    return F.layer_norm(y + F.relu(y @ W2.t()) @ W2, (4,))


def _write(place: Callable[..., Any], what: Callable[..., Any]) -> Callable[..., Any]:
    """Write through a view, and give what it is a view of."""

    def write(x: torch.Tensor, y: torch.Tensor, dim: int, number: int) -> torch.Tensor:
        base = x * 1
        what(place(base), y)
        return base

    return write


_WRITES: dict[str, Callable[..., Any]] = {
    "zero": lambda view, y: view.zero_(),
    "add": lambda view, y: view.add_(y),
    "copy": lambda view, y: view.copy_(y),
    "scale": lambda view, y: view.mul_(2),
}
_PLACES: dict[str, Callable[..., Any]] = {
    "last row": lambda b: b[-1],
    "all but the last": lambda b: b[:-1],
    "first column": lambda b: b[..., 0],
    "columns": lambda b: b[..., 1:],
    "transposed": lambda b: b.transpose(0, -1),
    "flat": lambda b: b.view(-1),
    "split": lambda b: b.split(2, -1)[0],
    "diagonal": lambda b: b.diagonal(dim1=0, dim2=-1),
    "grouped": lambda b: b.unflatten(-1, (2, -1)),
}

#: Functions of one value and a random source that was asked for a dimension and a small number.
UNARY: dict[str, Callable[..., Any]] = {
    "relu": lambda x, d, k: torch.relu(x),
    "exp": lambda x, d, k: torch.exp(x.clamp(-3, 3)),
    "scale": lambda x, d, k: x * 2 + 1,
    "compare": lambda x, d, k: (x > 0).float(),
    "linear": lambda x, d, k: x @ W,
    "wide": lambda x, d, k: F.linear(x, W2),
    "weight first": lambda x, d, k: W @ x,
    "pairs": lambda x, d, k: x @ x.mT,
    "transpose": lambda x, d, k: x.transpose(d, 0),
    "mT": lambda x, d, k: x.mT,
    "flat": lambda x, d, k: x.reshape(-1),
    "merged": lambda x, d, k: x.flatten(0, 1),
    "flatten": lambda x, d, k: x.flatten(d),
    "unflatten": lambda x, d, k: x.unflatten(d, (-1, 2)),
    "unsqueeze": lambda x, d, k: x.unsqueeze(d),
    "squeeze": lambda x, d, k: x.squeeze(),
    "expand to rows": lambda x, d, k: x.unsqueeze(0).expand(x.shape[0], *x.shape),
    "repeat rows": lambda x, d, k: x.unsqueeze(0).repeat(x.shape[0], *[1] * x.dim()),
    "repeat_interleave": lambda x, d, k: x.repeat_interleave(2, d),
    "select": lambda x, d, k: x.select(d, k),
    "slice": lambda x, d, k: x.narrow(d, 0, 2),
    "tail": lambda x, d, k: x[k:],
    "all but the last": lambda x, d, k: x[:-1],
    "all": lambda x, d, k: x[: x.shape[0]],
    "split": lambda x, d, k: x.split(2, d)[0],
    "diagonal": lambda x, d, k: x.diagonal(dim1=0, dim2=-1),
    "sum": lambda x, d, k: x.sum(d),
    "mean": lambda x, d, k: x.mean(d, keepdim=True),
    "argmax": lambda x, d, k: x.argmax(d).float(),
    "var": lambda x, d, k: x.var(d, keepdim=True),
    "norm": lambda x, d, k: F.normalize(x, dim=d),
    "median": lambda x, d, k: x.median(d).values,
    "softmax": lambda x, d, k: x.softmax(d),
    "cumsum": lambda x, d, k: x.cumsum(d),
    "sort": lambda x, d, k: x.sort(d).values,
    "topk": lambda x, d, k: x.topk(2, d).values,
    "flip": lambda x, d, k: x.flip(d),
    "roll": lambda x, d, k: x.roll(1, d),
    "diff": lambda x, d, k: x.diff(dim=d),
    "glu": lambda x, d, k: F.glu(x, d),
    "fft": lambda x, d, k: torch.fft.rfft(x, dim=d).abs(),
    "tril": lambda x, d, k: x.tril(k - 1),
    "triangular sum": lambda x, d, k: torch.ones(x.shape[0], x.shape[0]).tril() @ x,
    "picked": lambda x, d, k: x.index_select(d, PICK % x.shape[d]),
    "picked rows": lambda x, d, k: x[[0, -1]],
    "masked": lambda x, d, k: x[..., MASK],
    "positions": lambda x, d, k: x + torch.arange(x.shape[0]).view(-1, *[1] * (x.dim() - 1)),
    "positions from the end": lambda x, d, k: x
    + torch.arange(x.shape[0] - 1, -1, -1).view(-1, *[1] * (x.dim() - 1)),
    "divided": lambda x, d, k: x / x.shape[d],
    "one more": lambda x, d, k: F.pad(x, (0, 0) * (x.dim() - 1) + (0, 1)),
    "replicate": lambda x, d, k: F.pad(x, (1, 1), mode="replicate"),
    "circular": lambda x, d, k: F.pad(x, (1, 1), mode="circular"),
    "layer_norm": lambda x, d, k: F.layer_norm(x, x.shape[-1:]),
    "layer_norm of all": lambda x, d, k: F.layer_norm(x, x.shape[-2:]),
    "group_norm": lambda x, d, k: F.group_norm(x, 2),
    "instance_norm": lambda x, d, k: F.instance_norm(x.unsqueeze(-1)),
    "batch_norm in training": lambda x, d, k: F.batch_norm(x, None, None, training=True),
    "batch_norm": lambda x, d, k: F.batch_norm(x, ROW, ROW.abs() + 1),
    "conv over columns": lambda x, d, k: F.conv1d(x.unsqueeze(1), KERNEL)[:, 0],
    "conv over tokens": lambda x, d, k: F.conv1d(x.mT, KERNEL4).mT,
    "avg_pool over tokens": lambda x, d, k: F.avg_pool1d(x.mT, 2).mT,
    "max_pool over tokens": lambda x, d, k: F.max_pool1d(x.mT, 3, 1, 1).mT,
    "interpolate tokens": lambda x, d, k: F.interpolate(x.mT.unsqueeze(0), size=x.shape[0])[0].mT,
    "attention over tokens": lambda x, d, k: _attention(x.unsqueeze(1))[:, 0],
    "attention": lambda x, d, k: _attention(x.unsqueeze(0))[0],
    "encoder layer": lambda x, d, k: _encoder_layer(x),
    "sdpa with a batch": lambda x, d, k: F.scaled_dot_product_attention(*[x[:, None, None]] * 3)[:, 0, 0],
    "sdpa over tokens": lambda x, d, k: F.scaled_dot_product_attention(*[x[None, None]] * 3)[0, 0],
    "causal": lambda x, d, k: F.scaled_dot_product_attention(*[x[None, None]] * 3, is_causal=True)[0, 0],
    "meshgrid": lambda x, d, k: torch.meshgrid(x[:, 0], x[:, 1], indexing="ij")[k % 2],
    "meshgrid of positions": lambda x, d, k: torch.stack(
        torch.meshgrid(torch.arange(x.shape[0]), torch.arange(4), indexing="ij"), -1
    ).reshape(-1, 2).float(),
    "cdist": lambda x, d, k: torch.cdist(x, x),
    "nearest fixed": lambda x, d, k: torch.cdist(x, W).min(-1).values,
    "einsum of rows": lambda x, d, k: torch.einsum("ij,ik->ijk", x, x),
    "einsum over rows": lambda x, d, k: torch.einsum("ij,ik->jk", x, x),
    "bmm": lambda x, d, k: torch.bmm(x.unsqueeze(1), x.unsqueeze(-1)).flatten(1),
    "index_fill": lambda x, d, k: x.index_fill(d, torch.tensor([0]), 1.0),
    "index_copy": lambda x, d, k: x.index_copy(0, torch.tensor([0]), x[-1:]),
    "select_scatter": lambda x, d, k: x.select_scatter(x.select(d, 0), d, -1),
    "slice_scatter of rows": lambda x, d, k: x.slice_scatter(x[:2] * 2, 0, 0, 2),
    "gather": lambda x, d, k: x.gather(-1, (x > 0).long()),
    "gather rows": lambda x, d, k: x.gather(0, (x > 0).long()),
    "scatter": lambda x, d, k: torch.zeros_like(x).scatter(-1, (x > 0).long(), x),
    "scatter rows": lambda x, d, k: torch.zeros_like(x).scatter_add(0, (x > 0).long(), x),
    "sorted by norm": lambda x, d, k: x[x.norm(dim=-1).argsort(stable=True)],
    "bucketize": lambda x, d, k: torch.bucketize(x, BORDERS).float(),
    "in place": lambda x, d, k: (x * 1).add_(1).mul_(x),
    "in place mean": lambda x, d, k: (x * 1).sub_(x.mean()),
    "y[-1] = 0": lambda x, d, k: _set(x, -1, 0.0),
    "y[:-1] = 0": lambda x, d, k: _set(x, slice(None, -1), 0.0),
    "y[:, 0] = 0": lambda x, d, k: _set(x, (slice(None), 0), 0.0),
    "index_fill_": lambda x, d, k: (x * 1).index_fill_(0, torch.tensor([-1]), 0.0),
    "unsqueezed in place": lambda x, d, k: (x * 1).unsqueeze_(0).mul_(2),
    "out": lambda x, d, k: torch.add(x, 1, out=torch.empty_like(x)),
}  # fmt: skip

BINARY: dict[str, Callable[..., Any]] = {
    "add": lambda x, y, d, k: x + y,
    "add across": lambda x, y, d, k: x.unsqueeze(0) + y.unsqueeze(1),
    "matmul": lambda x, y, d, k: x @ y,
    "cat": lambda x, y, d, k: torch.cat([x, y], d),
    "stack": lambda x, y, d, k: torch.stack([x, y], d),
    "stacked and merged": lambda x, y, d, k: torch.stack([x, y], d).flatten(0, 1),
    "copy": lambda x, y, d, k: torch.empty_like(x).copy_(y),
    "addmm": lambda x, y, d, k: torch.addmm(x, y, W),
    **{
        f"{what} {name}": _write(place, write)
        for name, place in _PLACES.items()
        for what, write in _WRITES.items()
    },
}


def _set(x: torch.Tensor, where: Any, what: Any) -> torch.Tensor:
    y = x * 1
    y[where] = what
    return y


#: Functions of rows, numbers of rows, and two fixed tensors, some of which write to what they are given.
WITH_ARGUMENTS: dict[str, Callable[..., Any]] = {
    "embedding": lambda x, ids, cache, table: F.embedding(ids, table),
    "first of a table": lambda x, ids, cache, table: x + table[: x.shape[0]],
    "last of a table": lambda x, ids, cache, table: x + table[-x.shape[0] :],
    "one_hot": lambda x, ids, cache, table: F.one_hot(ids, 8).float(),
    "rows by ids": lambda x, ids, cache, table: x[ids % 2],
    "pairs of ids": lambda x, ids, cache, table: x[torch.arange(x.shape[0]), ids % 4],
    "equal ids": lambda x, ids, cache, table: (ids[:, None] == ids[None]).float(),
    "cache[:n].copy_": lambda x, ids, cache, table: cache[: x.shape[0]].copy_(x),
    "cache[ids] =": lambda x, ids, cache, table: _assigned(cache, ids, x),
    "cache add": lambda x, ids, cache, table: cache.add_(1),
    "cache of the mean": lambda x, ids, cache, table: cache.add_(x.mean(0)),
    "cache and x": lambda x, ids, cache, table: x + cache.sum(0),
    "x in place": lambda x, ids, cache, table: x.mul_(2),
    "the last row of x": lambda x, ids, cache, table: x[-1].zero_(),
    "ids in place": lambda x, ids, cache, table: ids.clamp_(0, 3),
}


def _assigned(cache: torch.Tensor, ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    cache[ids] = x
    return cache * 1


Found = tuple[Callable[..., Any], tuple[torch.Tensor, ...], list[str]]


def random_function(seed: int) -> Found:
    """A function, what to call it with, and the names of its steps.

    Arguments are ``x [n, 4]``, ``ids [n]``, which carry the batch, ``cache [12, 4]`` and ``table [12, 4]``.
    """
    source = random.Random(seed)
    rows = source.choice((3, 5, 6))
    generator = torch.Generator().manual_seed(seed)
    x, cache, table = (torch.randn(n, 4, generator=generator) for n in (rows, 12, 12))
    arguments = (x, torch.randint(0, 8, (rows,), generator=generator), cache, table)
    values = [each.clone() for each in arguments]
    steps: list[Callable[[list[Any]], Any]] = []
    names: list[str] = []
    wanted = source.randint(1, 5)
    for _ in range(20 * wanted):
        name, step = _step(source, len(values))
        try:
            made = step(values)
        except (RuntimeError, IndexError, ValueError, TypeError, AssertionError):
            continue
        if isinstance(made, torch.Tensor) and made.numel() <= 4096 and made.dim() <= 5:
            values.append(made)
            steps.append(step)
            names.append(name)
        if len(steps) == wanted:
            break
    result = len(values) - 1
    if steps and source.random() > 0.8:
        result = source.randrange(4, len(values))

    def program(*given: Any) -> Any:
        held = list(given)
        for step in steps:
            held.append(step(held))
        return held[result]

    return program, arguments, names


def _step(source: random.Random, count: int) -> tuple[str, Callable[[list[Any]], Any]]:
    """One step; mostly of the newest values."""
    dim, number = source.choice((0, 0, 1, -1, -1, 2)), source.choice((0, 1, 2))
    made = [*range(4, count)]
    one, two = (source.choice((0, 0, *made, *made[-2:], *made[-1:])) for _ in range(2))
    kind = source.random()
    if kind < 0.6:
        name = source.choice(list(UNARY))
        return name, lambda values: UNARY[name](values[one], dim, number)
    if kind < 0.85:
        name = source.choice(list(BINARY))
        return name, lambda values: BINARY[name](values[one], values[two], dim, number)
    name = source.choice(list(WITH_ARGUMENTS))
    return name, lambda values: WITH_ARGUMENTS[name](values[one], *values[1:4])
