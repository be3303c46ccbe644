"""Random functions of a batch. In: a seed. Out: a function with arguments, made of operators that keep rows apart, that don't, and that do for some arguments.

A step takes values that earlier steps made; one that eager refuses at the example's size is left out, so every function runs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

Values = list[Any]


@dataclass(frozen=True)
class Case:
    """A function, what it is called with, and which of these carry the batch in dimension 0."""

    function: Callable[..., Any]
    arguments: tuple[torch.Tensor, ...]
    batched: tuple[int, ...]


Step = Callable[[Values], Any]

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


def _write(place: Callable[[torch.Tensor], torch.Tensor], what: str) -> Callable[..., Any]:
    """Write through a view, and give what it is a view of."""

    def write(x: torch.Tensor, y: torch.Tensor, dim: int, number: int) -> torch.Tensor:
        base = x * 1
        view = place(base)
        match what:
            case "zero":
                view.zero_()
            case "add":
                view.add_(y)
            case "copy":
                view.copy_(y)
            case "scale":
                view.mul_(2)
        return base

    return write


_PLACES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "last row": lambda b: b[-1],
    "all but the last": lambda b: b[:-1],
    "every other": lambda b: b[::2],
    "first column": lambda b: b[..., 0],
    "columns": lambda b: b[..., 1:],
    "transposed": lambda b: b.transpose(0, -1),
    "row of transposed": lambda b: b.transpose(0, -1)[0],
    "flat": lambda b: b.view(-1),
    "head of flat": lambda b: b.view(-1)[:3],
    "split": lambda b: b.split(2, -1)[0],
    "diagonal": lambda b: b.diagonal(dim1=0, dim2=-1),
    "all": lambda b: b[:],
    "unsqueezed": lambda b: b.unsqueeze(0),
    "expanded": lambda b: b[..., :1],
    "grouped": lambda b: b.unflatten(-1, (2, -1)),
}

#: Functions of one value and a random source that was asked for a dimension and a small number.
UNARY: dict[str, Callable[..., Any]] = {
    "relu": lambda x, d, k: torch.relu(x),
    "exp": lambda x, d, k: torch.exp(x.clamp(-3, 3)),
    "clamp": lambda x, d, k: x.clamp(-1, 1),
    "scale": lambda x, d, k: x * 2 + 1,
    "gelu": lambda x, d, k: F.gelu(x),
    "to double": lambda x, d, k: x.double().float(),
    "compare": lambda x, d, k: (x > 0).float(),
    "nan_to_num": lambda x, d, k: x.nan_to_num(),
    "linear": lambda x, d, k: x @ W,
    "functional linear": lambda x, d, k: F.linear(x, W, ROW),
    "wide": lambda x, d, k: F.linear(x, W2),
    "weight first": lambda x, d, k: W @ x,
    "pairs": lambda x, d, k: x @ x.mT,
    "pairs of columns": lambda x, d, k: x.mT @ x,
    "transpose": lambda x, d, k: x.transpose(d, 0),
    "movedim": lambda x, d, k: x.movedim(0, d),
    "mT": lambda x, d, k: x.mT,
    "flat": lambda x, d, k: x.reshape(-1),
    "rows": lambda x, d, k: x.reshape(x.shape[0], -1),
    "columns": lambda x, d, k: x.reshape(-1, x.shape[-1]),
    "merged": lambda x, d, k: x.flatten(0, 1),
    "flatten": lambda x, d, k: x.flatten(d),
    "unflatten": lambda x, d, k: x.unflatten(d, (-1, 2)),
    "unflatten in front": lambda x, d, k: x.unflatten(d, (2, -1)),
    "turned": lambda x, d, k: x.reshape(x.shape[-1], x.shape[0]),
    "unsqueeze": lambda x, d, k: x.unsqueeze(d),
    "squeeze": lambda x, d, k: x.squeeze(),
    "squeeze one": lambda x, d, k: x.squeeze(d),
    "expand": lambda x, d, k: x.unsqueeze(0).expand(3, *x.shape),
    "expand to rows": lambda x, d, k: x.unsqueeze(0).expand(x.shape[0], *x.shape),
    "repeat": lambda x, d, k: x.repeat(2, *[1] * (x.dim() - 1)),
    "tile": lambda x, d, k: torch.tile(x, (2,)),
    "repeat rows": lambda x, d, k: x.unsqueeze(0).repeat(x.shape[0], *[1] * x.dim()),
    "repeat_interleave": lambda x, d, k: x.repeat_interleave(2, d),
    "select": lambda x, d, k: x.select(d, k),
    "last": lambda x, d, k: x.select(d, -1),
    "slice": lambda x, d, k: x.narrow(d, 0, 2),
    "head": lambda x, d, k: x[:k],
    "tail": lambda x, d, k: x[k:],
    "all but the last": lambda x, d, k: x[:-1],
    "every other": lambda x, d, k: x[::2],
    "columns from": lambda x, d, k: x[..., k:],
    "all": lambda x, d, k: x[: x.shape[0]],
    "chunk": lambda x, d, k: x.chunk(2, d)[-1],
    "split": lambda x, d, k: x.split(2, d)[0],
    "tensor_split": lambda x, d, k: x.tensor_split(2, d)[0],
    "unbind": lambda x, d, k: x.unbind(-1)[0],
    "unfold": lambda x, d, k: x.unfold(d, 2, 1),
    "diagonal": lambda x, d, k: x.diagonal(dim1=0, dim2=-1),
    "vstack": lambda x, d, k: torch.vstack([x, x])[::2],
    "sum": lambda x, d, k: x.sum(d),
    "sum all": lambda x, d, k: x.sum(),
    "mean": lambda x, d, k: x.mean(d, keepdim=True),
    "amax": lambda x, d, k: x.amax(d),
    "max": lambda x, d, k: x.max(d).values,
    "argmax": lambda x, d, k: x.argmax(d).float(),
    "var": lambda x, d, k: x.var(d, keepdim=True),
    "std_mean": lambda x, d, k: torch.std_mean(x, d)[1],
    "norm": lambda x, d, k: F.normalize(x, dim=d),
    "logsumexp": lambda x, d, k: x.logsumexp(d),
    "median": lambda x, d, k: x.median(d).values,
    "any": lambda x, d, k: (x > 0).any(d).float(),
    "count": lambda x, d, k: x.count_nonzero(d).float(),
    "softmax": lambda x, d, k: x.softmax(d),
    "log_softmax": lambda x, d, k: F.log_softmax(x, d),
    "cumsum": lambda x, d, k: x.cumsum(d),
    "cumprod": lambda x, d, k: x.clamp(-1, 1).cumprod(d),
    "cummax": lambda x, d, k: x.cummax(d).values,
    "logcumsumexp": lambda x, d, k: x.logcumsumexp(d),
    "sort": lambda x, d, k: x.sort(d).values,
    "argsort": lambda x, d, k: x.argsort(d, stable=True).float(),
    "topk": lambda x, d, k: x.topk(2, d).values,
    "kthvalue": lambda x, d, k: x.kthvalue(1, d).values,
    "flip": lambda x, d, k: x.flip(d),
    "roll": lambda x, d, k: x.roll(1, d),
    "roll all": lambda x, d, k: x.roll(1),
    "rot90": lambda x, d, k: x.rot90(),
    "diff": lambda x, d, k: x.diff(dim=d),
    "glu": lambda x, d, k: F.glu(x, d),
    "fft": lambda x, d, k: torch.fft.rfft(x, dim=d).abs(),
    "tril": lambda x, d, k: x.tril(k - 1),
    "triu": lambda x, d, k: x.triu(k - 1),
    "triangular sum": lambda x, d, k: torch.ones(x.shape[0], x.shape[0]).tril() @ x,
    "upper triangular sum": lambda x, d, k: torch.ones(x.shape[0], x.shape[0]).triu() @ x,
    "picked": lambda x, d, k: x.index_select(d, PICK % x.shape[d]),
    "picked by list": lambda x, d, k: x[..., [0, -1]],
    "picked rows": lambda x, d, k: x[[0, -1]],
    "masked": lambda x, d, k: x[..., MASK],
    "masked_fill": lambda x, d, k: x.masked_fill(x > 0, 0.5),
    "where": lambda x, d, k: torch.where(x > 0, x, -x),
    "positions": lambda x, d, k: x + torch.arange(x.shape[0]).view(-1, *[1] * (x.dim() - 1)),
    "positions behind": lambda x, d, k: x + torch.arange(x.shape[-1]),
    "positions from the end": lambda x, d, k: x
    + torch.arange(x.shape[0] - 1, -1, -1).view(-1, *[1] * (x.dim() - 1)),
    "divided": lambda x, d, k: x / x.shape[d],
    "minus size": lambda x, d, k: x - x.shape[0],
    "full": lambda x, d, k: x + torch.full((x.shape[0],), x.shape[0]).sum(),
    "zeros": lambda x, d, k: x + x.new_zeros(x.shape),
    "one more": lambda x, d, k: F.pad(x, (0, 0) * (x.dim() - 1) + (0, 1)),
    "one before": lambda x, d, k: F.pad(x, (0, 0) * (x.dim() - 1) + (1, 0)),
    "pad columns": lambda x, d, k: F.pad(x, (1, 1)),
    "replicate": lambda x, d, k: F.pad(x, (1, 1), mode="replicate"),
    "replicate planes": lambda x, d, k: F.pad(x.mT, (1, 1), mode="replicate").mT,
    "reflect": lambda x, d, k: F.pad(x, (1, 1), mode="reflect"),
    "circular": lambda x, d, k: F.pad(x, (1, 1), mode="circular"),
    "layer_norm": lambda x, d, k: F.layer_norm(x, x.shape[-1:]),
    "layer_norm of all": lambda x, d, k: F.layer_norm(x, x.shape[-2:]),
    "rms_norm": lambda x, d, k: F.rms_norm(x, x.shape[-1:]),
    "group_norm": lambda x, d, k: F.group_norm(x, 2),
    "group_norm of tokens": lambda x, d, k: F.group_norm(x.mT.unsqueeze(0), 2)[0].mT,
    "instance_norm": lambda x, d, k: F.instance_norm(x.unsqueeze(-1)),
    "instance_norm of tokens": lambda x, d, k: F.instance_norm(x.mT.unsqueeze(0))[0].mT,
    "batch_norm in training": lambda x, d, k: F.batch_norm(x, None, None, training=True),
    "batch_norm": lambda x, d, k: F.batch_norm(x, ROW, ROW.abs() + 1),
    "conv over columns": lambda x, d, k: F.conv1d(x.unsqueeze(1), KERNEL)[:, 0],
    "conv over tokens": lambda x, d, k: F.conv1d(x.mT, KERNEL4).mT,
    "conv without a batch": lambda x, d, k: F.conv1d(x, KERNEL4[..., :1]),
    "conv padded": lambda x, d, k: F.conv1d(x.mT, KERNEL4[..., :1].repeat(1, 1, 3), padding=1).mT,
    "avg_pool over columns": lambda x, d, k: F.avg_pool1d(x, 2),
    "avg_pool over tokens": lambda x, d, k: F.avg_pool1d(x.mT, 2).mT,
    "max_pool over tokens": lambda x, d, k: F.max_pool1d(x.mT, 3, 1, 1).mT,
    "max_pool": lambda x, d, k: F.max_pool1d(x, 2, 1),
    "adaptive pool": lambda x, d, k: F.adaptive_avg_pool1d(x, 2),
    "interpolate": lambda x, d, k: F.interpolate(x.unsqueeze(1), scale_factor=2)[:, 0],
    "interpolate tokens": lambda x, d, k: F.interpolate(x.mT.unsqueeze(0), size=x.shape[0])[0].mT,
    "attention over tokens": lambda x, d, k: _attention(x.unsqueeze(1))[:, 0],
    "attention": lambda x, d, k: _attention(x.unsqueeze(0))[0],
    "unbatched attention": lambda x, d, k: _attention(x),
    "encoder layer": lambda x, d, k: _encoder_layer(x),
    "encoder layer of rows": lambda x, d, k: _encoder_layer(x.unsqueeze(0))[0],
    "sdpa": lambda x, d, k: F.scaled_dot_product_attention(x, x, x),
    "sdpa with a batch": lambda x, d, k: F.scaled_dot_product_attention(*[x[:, None, None]] * 3)[:, 0, 0],
    "sdpa over tokens": lambda x, d, k: F.scaled_dot_product_attention(*[x[None, None]] * 3)[0, 0],
    "causal": lambda x, d, k: F.scaled_dot_product_attention(*[x[None, None]] * 3, is_causal=True)[0, 0],
    "softmax attention": lambda x, d, k: torch.softmax(x @ x.mT, -1) @ x,
    "meshgrid": lambda x, d, k: torch.meshgrid(x[:, 0], x[:, 1], indexing="ij")[k % 2],
    "meshgrid of positions": lambda x, d, k: torch.stack(
        torch.meshgrid(torch.arange(x.shape[0]), torch.arange(4), indexing="ij"), -1
    ).reshape(-1, 2).float(),
    "cdist": lambda x, d, k: torch.cdist(x, x),
    "nearest": lambda x, d, k: torch.cdist(x, x).min(-1).values,
    "nearest fixed": lambda x, d, k: torch.cdist(x, W).min(-1).values,
    "outer": lambda x, d, k: torch.outer(x.reshape(-1), x.reshape(-1)),
    "einsum": lambda x, d, k: torch.einsum("i...,j...->ij...", x, x),
    "einsum of rows": lambda x, d, k: torch.einsum("ij,ik->ijk", x, x),
    "einsum over rows": lambda x, d, k: torch.einsum("ij,ik->jk", x, x),
    "tensordot": lambda x, d, k: torch.tensordot(x, W, dims=1),
    "bmm": lambda x, d, k: torch.bmm(x.unsqueeze(1), x.unsqueeze(-1)).flatten(1),
    "baddbmm": lambda x, d, k: torch.baddbmm(x.unsqueeze(1), x.unsqueeze(1), W.expand(x.shape[0], 4, 4))[:, 0],
    "index_fill": lambda x, d, k: x.index_fill(d, torch.tensor([0]), 1.0),
    "index_add": lambda x, d, k: x.index_add(-1, torch.tensor([0]), x[..., :1]),
    "index_copy": lambda x, d, k: x.index_copy(0, torch.tensor([0]), x[-1:]),
    "select_scatter": lambda x, d, k: x.select_scatter(x.select(d, 0), d, -1),
    "slice_scatter": lambda x, d, k: x.slice_scatter(x[..., :1], -1, 0, 1),
    "slice_scatter of rows": lambda x, d, k: x.slice_scatter(x[:2] * 2, 0, 0, 2),
    "gather": lambda x, d, k: x.gather(-1, (x > 0).long()),
    "gather rows": lambda x, d, k: x.gather(0, (x > 0).long()),
    "scatter": lambda x, d, k: torch.zeros_like(x).scatter(-1, (x > 0).long(), x),
    "scatter rows": lambda x, d, k: torch.zeros_like(x).scatter_add(0, (x > 0).long(), x),
    "take_along_dim": lambda x, d, k: x.take_along_dim(x.argsort(-1), -1),
    "sorted by norm": lambda x, d, k: x[x.norm(dim=-1).argsort(stable=True)],
    "bucketize": lambda x, d, k: torch.bucketize(x, BORDERS).float(),
    "searchsorted": lambda x, d, k: torch.searchsorted(x.sort(-1).values, x).float(),
    "kron": lambda x, d, k: torch.kron(x, torch.ones(1, 2)),
    "cross": lambda x, d, k: torch.linalg.cross(x[..., :3], x[..., 1:]),
    "in place": lambda x, d, k: (x * 1).add_(1).mul_(x),
    "in place mean": lambda x, d, k: (x * 1).sub_(x.mean()),
    "y[-1] = 0": lambda x, d, k: _set(x, -1, 0.0),
    "y[:-1] = 0": lambda x, d, k: _set(x, slice(None, -1), 0.0),
    "y[0] = y[-1]": lambda x, d, k: _set(x, 0, x[-1]),
    "y[:, 0] = 0": lambda x, d, k: _set(x, (slice(None), 0), 0.0),
    "y[..., 1:] = x": lambda x, d, k: _set(x, (..., slice(1, None)), x[..., :-1]),
    "index_fill_": lambda x, d, k: (x * 1).index_fill_(0, torch.tensor([-1]), 0.0),
    "transposed in place": lambda x, d, k: (x * 1).t_().mul_(2),
    "unsqueezed in place": lambda x, d, k: (x * 1).unsqueeze_(0).mul_(2),
    "out": lambda x, d, k: torch.add(x, 1, out=torch.empty_like(x)),
    "out of another size": lambda x, d, k: torch.add(x, 1, out=x.new_empty(0)),
}  # fmt: skip

BINARY: dict[str, Callable[..., Any]] = {
    "add": lambda x, y, d, k: x + y,
    "mul": lambda x, y, d, k: x * y,
    "add across": lambda x, y, d, k: x.unsqueeze(0) + y.unsqueeze(1),
    "maximum": lambda x, y, d, k: torch.maximum(x, y),
    "where": lambda x, y, d, k: torch.where(x > 0, x, y),
    "matmul": lambda x, y, d, k: x @ y,
    "matmul transposed": lambda x, y, d, k: x @ y.mT,
    "cat": lambda x, y, d, k: torch.cat([x, y], d),
    "cat behind": lambda x, y, d, k: torch.cat([x, y], -1),
    "stack": lambda x, y, d, k: torch.stack([x, y], d),
    "stacked and merged": lambda x, y, d, k: torch.stack([x, y], d).flatten(0, 1),
    "copy": lambda x, y, d, k: torch.empty_like(x).copy_(y),
    "addmm": lambda x, y, d, k: torch.addmm(x, y, W),
    "cdist": lambda x, y, d, k: torch.cdist(x, y),
    "lerp": lambda x, y, d, k: torch.lerp(x, y, 0.3),
    **{
        f"{what} {name}": _write(place, what)
        for name, place in _PLACES.items()
        for what in ("zero", "add", "copy", "scale")
    },
}


def _set(x: torch.Tensor, where: Any, what: Any) -> torch.Tensor:
    y = x * 1
    y[where] = what
    return y


#: Functions of rows, numbers of rows, and two fixed tensors, some of which write to what they are given.
WITH_ARGUMENTS: dict[str, Callable[..., Any]] = {
    "embedding": lambda x, ids, cache, table: F.embedding(ids, table),
    "table of ids": lambda x, ids, cache, table: table[ids],
    "first of a table": lambda x, ids, cache, table: x + table[: x.shape[0]],
    "last of a table": lambda x, ids, cache, table: x + table[-x.shape[0] :],
    "index_select": lambda x, ids, cache, table: table.index_select(0, ids),
    "one_hot": lambda x, ids, cache, table: F.one_hot(ids, 8).float(),
    "rows by ids": lambda x, ids, cache, table: x[ids % 2],
    "pairs of ids": lambda x, ids, cache, table: x[torch.arange(x.shape[0]), ids % 4],
    "equal ids": lambda x, ids, cache, table: (ids[:, None] == ids[None]).float(),
    "count of ids": lambda x, ids, cache, table: (ids[:, None] == torch.arange(8)).sum(0).float(),
    "cache[:n].copy_": lambda x, ids, cache, table: cache[: x.shape[0]].copy_(x),
    "cache[ids] =": lambda x, ids, cache, table: _assigned(cache, ids, x),
    "cache add": lambda x, ids, cache, table: cache.add_(1),
    "cache of the mean": lambda x, ids, cache, table: cache.add_(x.mean(0)),
    "cache column": lambda x, ids, cache, table: cache[:, 0].fill_(2),
    "cache index_add_": lambda x, ids, cache, table: cache.index_add_(0, ids, x),
    "cache and x": lambda x, ids, cache, table: x + cache.sum(0),
    "x in place": lambda x, ids, cache, table: x.mul_(2),
    "a column of x": lambda x, ids, cache, table: x[:, 0].zero_(),
    "the last row of x": lambda x, ids, cache, table: x[-1].zero_(),
    "ids in place": lambda x, ids, cache, table: ids.clamp_(0, 3),
}


def _assigned(cache: torch.Tensor, ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    cache[ids] = x
    return cache * 1


def _program(steps: Sequence[Step], result: int) -> Callable[..., Any]:
    """Steps in order; each takes values by their place."""

    def program(*arguments: Any) -> Any:
        values = list(arguments)
        for step in steps:
            values.append(step(values))
        return values[result]

    return program


def random_case(seed: int) -> tuple[Case, list[str]]:
    """A function of ``x [n, 4]``, ``ids [n]``, ``cache [12, 4]`` and ``table [12, 4]``, and the names of its steps."""
    source = random.Random(seed)
    rows = source.choice((3, 5, 6))
    generator = torch.Generator().manual_seed(seed)
    arguments = (
        torch.randn(rows, 4, generator=generator),
        torch.randint(0, 8, (rows,), generator=generator),
        torch.randn(12, 4, generator=generator),
        torch.randn(12, 4, generator=generator),
    )
    values: Values = [each.clone() for each in arguments]
    steps: list[Step] = []
    names: list[str] = []
    for _ in range(source.randint(1, 5)):
        for _ in range(20):
            name, step = _step(source, len(values))
            try:
                made = step(values)
            except (RuntimeError, IndexError, ValueError, TypeError, AssertionError):
                continue
            if isinstance(made, torch.Tensor) and made.numel() <= 4096 and made.dim() <= 5:
                values.append(made)
                steps.append(step)
                names.append(name)
                break
    result = len(values) - 1 if source.random() < 0.8 else source.randrange(4, max(5, len(values)))
    result = min(result, len(values) - 1)
    return Case(_program(tuple(steps), result), arguments, (0, 1)), names


def _step(source: random.Random, count: int) -> tuple[str, Step]:
    """One step; mostly of the newest values."""
    dim, number = source.choice((0, 0, 1, -1, -1, 2)), source.choice((0, 1, 2))

    def place() -> int:
        made = [*range(4, count)]
        return source.choice((0, 0, *made, *made[-2:], *made[-1:]))

    kind = source.random()
    if kind < 0.6:
        name = source.choice(list(UNARY))
        one = place()
        return name, lambda values: UNARY[name](values[one], dim, number)
    if kind < 0.85:
        name = source.choice(list(BINARY))
        one, two = place(), place()
        return name, lambda values: BINARY[name](values[one], values[two], dim, number)
    name = source.choice(list(WITH_ARGUMENTS))
    one = place()
    return name, lambda values: WITH_ARGUMENTS[name](values[one], *values[1:4])
