"""A model cut over two processes: modes, with commas between, and a folder in; JSON of what this rank found out."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import nn

import piecework
from piecework.runtime.compilers import EagerAdaptor

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
HIDDEN, WIDE = 8, 16
ALL_REDUCE = ["_c10d_functional::all_reduce"]


@piecework.splitting_op("ranks_model::reduce", rows="independent")
def reduce(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    dist.all_reduce(y)
    return y


@reduce.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


DIES = False


def die() -> None:
    if DIES and RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)


class Mlp(nn.Module):
    """A feed-forward whose columns, then rows, are this rank's share."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        up, down = torch.randn(WIDE, HIDDEN), torch.randn(HIDDEN, WIDE)
        self.whole = [up, down]
        share = slice(RANK * WIDE // WORLD, (RANK + 1) * WIDE // WORLD)
        self.up, self.down = nn.Parameter(up[share].clone()), nn.Parameter(down[:, share].clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(x @ self.up.mT) @ self.down.mT
        if self.how == "inside":
            return x + funcol.all_reduce(y, "sum", "0")
        if self.how == "in place":
            dist.all_reduce(y)
            return x + y
        return x + reduce(y)


def build(how: str, layers: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Mlp(how) for _ in range(layers))).eval().requires_grad_(False)


def whole(model: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    for each in model:
        up, down = each.whole  # type: ignore[union-attr]
        x = x + torch.relu(x @ up.mT) @ down.mT
    return x


def inputs(rows: int) -> torch.Tensor:
    return torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(rows))


def right(stitched: piecework.StitchedModule, model: nn.Sequential) -> bool:
    with torch.no_grad():
        pairs = [(stitched(inputs(n)), whole(model, inputs(n))) for n in (1, 2, 3, 9)]
    return all(torch.allclose(a, b, atol=1e-3, rtol=1e-4) for a, b in pairs)


def compiled(model: nn.Module, limits=None, **config: object) -> piecework.StitchedModule:  # type: ignore[no-untyped-def]
    config = {"backend": "eager", **config}
    return piecework.compile(model, (inputs(3),), config=config, runtime_config=limits)


class Keeping(EagerAdaptor):
    """Runs pieces as they are, keeps bytes of them, and notes each compilation in a file."""

    name = "keeping"

    def compile(self, graph, example_inputs, config, compile_range=None):  # type: ignore[no-untyped-def]
        die()
        with open(Path(FOLDER, "compiled"), "a") as file:
            file.write(f"{RANK}\n")
        time.sleep(0.3)
        return super().compile(graph, example_inputs, config, compile_range)

    def compute_hash(self, config):  # type: ignore[no-untyped-def]
        return "keeping"

    def to_bytes(self, piece):  # type: ignore[no-untyped-def]
        return b"kept"

    def from_bytes(self, data, graph):  # type: ignore[no-untyped-def]
        die()
        return super().compile(graph, [], None, None)


class Communicator:
    """Stands for one whose buffers are registered, over all ranks, when a run of captures is over."""

    def __init__(self) -> None:
        self.is_open, self.opened = False, 0

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        self.is_open, self.opened = True, self.opened + 1
        try:
            yield
        finally:
            self.is_open = False
            dist.barrier()


def main(mode: str) -> object:
    global DIES
    limits = {"rank": RANK, "world_size": WORLD, "tensor_parallel_size": WORLD}
    match mode:
        case "run":
            found = {}
            for how in ("inside", "in place", "outside"):
                model = build(how)
                found[how] = right(compiled(model), model)
            model = build("inside")
            found["cut"] = right(compiled(model, splitting_ops=ALL_REDUCE), model)
            return found
        case "sizes":
            model = build("inside")
            if RANK:
                model[1].up = nn.Parameter(model[1].up[:, :4])
                model[1].forward = lambda x: funcol.all_reduce(x[:, :4], "sum", "0")
            compiled(model)
        case "absent":
            if not RANK:
                compiled(build("inside"))
            time.sleep(20)
        case "once":
            model = build("inside")
            backend = f"{__name__}:Keeping"
            stitched = compiled(model, limits, backend=backend, splitting_ops=ALL_REDUCE)
            pieces = sum(len(each.program.pieces) for each in stitched.traces)
            return {"right": right(stitched, model), "pieces": pieces}
        case "save" | "load":
            model = build("inside")
            before = piecework.counters.num_graphs_seen
            how = {"config": {"backend": "eager"}, "artifact": f"{FOLDER}/rank_{RANK}"}
            stitched = piecework.compile(model, (inputs(3),), **how)
            traced = piecework.counters.num_graphs_seen - before
            return {"right": right(stitched, model), "traced": traced}
        case "capture":
            found = {}
            for how, ops in (("inside", None), ("inside", ALL_REDUCE), ("outside", None)):
                model, mine = build(how), Communicator()
                stitched = compiled(model, limits, splitting_ops=ops)
                stitched.capture([2, 4], around=mine.capture, progress=False)
                served = right(stitched, model)
                modes = {row.mode for row in stitched.call_report()}
                found[f"{how} {ops}"] = [served, mine.opened, mine.is_open, "PIECEWISE" in modes]
            return found
        case "budget":
            model = build("outside")
            stitched = compiled(model, limits)
            stitched.capture([1, 2, 64], memory_budget=10**9 if RANK else 600, progress=False)
            groups = stitched.static_graphs.dispatcher.get_capture_descs()
            ready = sorted(each.num_tokens for _, group in groups for each in group)
            return {"right": right(stitched, model), "sizes": ready}
        case "capture others":
            stitched = compiled(build("outside"), limits)
            stitched.capture([2, 4 + RANK], progress=False)
        case "measure":
            compiled(build("inside")).measure([2, 4])
        case "killed":
            DIES, model = True, build("outside")
            right(compiled(model, backend=f"{__name__}:Keeping", limits=limits), model)
    return "finished"


TIMEOUT = datetime.timedelta(seconds=float(os.environ.get("RANKS_TIMEOUT", "60")))
FOLDER = sys.argv[2]

if __name__ == "__main__":
    sys.modules["ranks_model"] = sys.modules[__name__]
    __name__ = "ranks_model"
    # Where the time is short, it begins when both are here, however long their imports took.
    Path(FOLDER, f"rank_{RANK}_is_here").touch()
    while not all(Path(FOLDER, f"rank_{each}_is_here").exists() for each in range(WORLD)):
        time.sleep(0.05)
    dist.init_process_group("gloo", timeout=TIMEOUT)
    try:
        # Of several modes, what each found; of one, what that one found.
        modes = sys.argv[1].split(",")
        each = {mode: main(mode) for mode in modes}
        said = {"found": each if len(modes) > 1 else each[modes[0]]}
    except Exception as error:  # noqa: BLE001 - the test reads which
        said = {"error": type(error).__name__, "says": str(error)}
    # A line is one write: two ranks may share one pipe.
    os.write(1, f"{json.dumps({'rank': RANK, **said})}\n".encode())
    if "error" not in said:
        dist.destroy_process_group()
    # After torch's functional collectives gloo's threads outlive the group, and may abort an interpreter that ends.
    os._exit(3 if "error" in said else 0)
