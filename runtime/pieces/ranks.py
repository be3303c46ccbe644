"""Compares, in bounded time, what processes do that run one model, or else would hang."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Protocol

import torch
from torch.fx import GraphModule, Node

from piecework.codegen.graph.origin import graph_of, value_of
from piecework.codegen.split.splitting import SplitItem
from piecework.errors import RankError
from piecework.runtime import torch_compat
from piecework.runtime.batch.ranges import RangeTable
from piecework.runtime.config.compilation import RuntimeConfig


@dataclass(frozen=True, slots=True)
class Together:
    """What one process does that others must do too."""

    order: tuple[str, ...]  # pieces, splitting ops and collectives, in the order in which they run
    collectives: tuple[tuple[str, tuple[str, ...]], ...]  # group name → its collectives, in order


class Runs(Protocol):
    """Something that processes run together: a `Program`, or what becomes one."""

    @property
    def together(self) -> Together: ...


def together(
    split_gm: GraphModule, items: Sequence[SplitItem], table: RangeTable | None
) -> Together:
    """What the processes that run ``split_gm`` must agree on."""
    ranges = f"batches {', '.join(map(str, table.entries))}" if table is not None else "all batches"
    order, groups = [ranges], {}
    splitting = {item.submod_name for item in items if item.is_splitting_graph}
    for node in split_gm.graph.find_nodes(op="call_module", sort=True):
        if node.target not in splitting:
            order.append("a piece")
        for each in graph_of(split_gm, str(node.target)).graph.nodes:
            if each.op != "call_function":
                continue
            operator = torch_compat.collective_of(each.target)
            if operator is not None:
                names = (arg.name for arg in operator._schema.arguments)
                given = dict(zip(names, each.args, strict=False)) | each.kwargs
                group = str(given.pop("group_name", ""))
                text = f"{operator}({', '.join(map(_written, given.values()))})"
                groups.setdefault(group, [ranges]).append(text)
                order.append(text)
            elif node.target in splitting:
                order.append(str(each.target))
    return Together(tuple(order), tuple((name, tuple(rows)) for name, rows in groups.items()))


def _written(value: object) -> str:
    if isinstance(value, Node):
        value = value_of(value)
    if isinstance(value, torch.Tensor):
        sizes = ", ".join(str(n) if type(n) is int else "*" for n in value.shape)
        return f"{str(value.dtype).removeprefix('torch.')}[{sizes}]"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_written, value))}]"
    return "*" if isinstance(value, torch.SymInt) else str(value)


def require_agreement(
    program: Runs, runtime: RuntimeConfig | None, before: Sequence[str] = ()
) -> None:
    """Return once all that run ``program`` together came with the same, all equally often."""
    rank = torch_compat.own_rank()
    for ranks, rows in _run_together(program, runtime):
        mine = [*before, *rows]
        for other, text in _exchange(rank, ranks, mine).items():
            steps = enumerate(zip_longest(text.split("\n"), mine, fillvalue="nothing more"))
            for index, (theirs, ours) in steps:
                if theirs != ours:
                    raise _error(
                        f"rank {other} would do something else than rank {rank}, and they would "
                        f"wait for each other: step {index} is {theirs} on rank {other} and {ours} "
                        f"on rank {rank}",
                        ranks,
                        "compile the same model with the same configuration on each of them",
                    )


def in_common(
    program: Runs, runtime: RuntimeConfig | None, offers: Sequence[str]
) -> frozenset[str]:
    """Those of ``offers`` that every process has which runs ``program`` together with this one."""
    common = frozenset(offers)
    for ranks, _ in _run_together(program, runtime):
        for text in _exchange(torch_compat.own_rank(), ranks, sorted(common)).values():
            common &= frozenset(text.split("\n"))
    return common


def runs_alone(program: Runs, runtime: RuntimeConfig | None) -> bool:
    """Whether no other process runs ``program`` together with this one."""
    return next(_run_together(program, runtime), None) is None


def _run_together(
    program: Runs, runtime: RuntimeConfig | None
) -> Iterator[tuple[tuple[int, ...], tuple[str, ...]]]:
    """Each set of ranks that this one runs ``program`` with, and what they do in which order."""
    rank = torch_compat.own_rank()
    if rank is None:
        return
    found = program.together
    for name, rows in found.collectives:
        try:
            ranks = torch_compat.ranks_of_group(name)
        except (RuntimeError, ValueError) as error:
            raise _error(
                f"there is no process group {name!r}, which the graph's collectives name: {error}",
                (rank,),
                "make the groups before the model is compiled or loaded",
            ) from error
        if rank in ranks:
            yield ranks, rows
    size = 1 if runtime is None else runtime.tensor_parallel_size
    if size > 1:
        first = rank - rank % size
        yield tuple(range(first, first + size)), found.order


def _exchange(rank: int | None, ranks: tuple[int, ...], mine: Sequence[str]) -> dict[int, str]:
    """The lines that each rank gives, as one text, once all have given theirs."""
    label = hashlib.sha256(repr(ranks).encode()).hexdigest()[:16]
    store: Any = torch_compat.shared_store()
    try:
        turn = store.add(f"{label}/turns of {rank}", 1)  # how often it was here
        places = [f"{label}/{turn}/rank {each}" for each in ranks]
        store.set(f"{label}/{turn}/rank {rank}", "\n".join(mine))
        store.wait(places)  # as long as init_process_group(timeout=…) says
        return {each: store.get(place).decode() for each, place in zip(ranks, places, strict=True)}
    except RuntimeError as error:  # torch's errors of its stores are
        raise _error(
            f"a rank did not come to compare what it will run, or they lost each other: {error}",
            ranks,
            "the other rank's own error says why; init_process_group(timeout=…) bounds the wait",
        ) from error


def _error(why: str, ranks: Iterable[int], hint: str) -> RankError:
    return RankError(why, where=f"ranks {', '.join(map(str, ranks))}", hint=hint)
