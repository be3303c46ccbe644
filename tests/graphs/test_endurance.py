"""A long mixed load. In: eight threads that call one captured model with random sizes while weights are replaced, refitted and captured anew, and operators fail. Out: every answer right or a typed error, and no memory that grows."""

from __future__ import annotations

import os
import random
import statistics
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

import piecework
from piecework.errors import InputError, PieceworkError

CHANGES = ("rebound", "refitted", "captured")
SECONDS = float(os.environ.get("PIECEWORK_ENDURANCE_SECONDS", "120"))
THREADS, LARGEST, WIDTH = 8, 12, 16
FAILS = 1000.0  # a row that begins with it makes the operator fail


class Unfit(RuntimeError):
    """What the operator raises."""


@piecework.splitting_op("endurance::turn", mutates_args=("out",), rows="independent")
def turn(x: torch.Tensor, out: torch.Tensor) -> None:
    if bool((x[:, 0] > FAILS / 2).any()):
        raise Unfit("a row that can't be")
    out.copy_(x.flip(1))


class Model(nn.Module):
    """``answer`` is what it computes, for each of the scales that it had."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH), requires_grad=False)
        self.shift = nn.Parameter(torch.zeros(WIDTH), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        turn(x + 1, out := torch.empty_like(x))
        return out * self.scale + self.shift


def answer(x: torch.Tensor, scale: float) -> torch.Tensor:
    return (x + 1).flip(1) * scale


def resident() -> int:
    """Bytes of this process's memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Load:
    """The threads' work, and what came of it."""

    def __init__(self, seconds: float) -> None:
        self.model = Model().eval()
        config = {"backend": "eager"}
        self.stitched = piecework.compile(self.model, (torch.randn(4, WIDTH),), config=config)
        self.capture()
        self.until = time.monotonic() + seconds
        self.late = self.until + 120
        self.seen: Counter[str] = Counter()
        self.scales = [1.0]  # the last one is bound, or is about to be
        self.wrong: list[str] = []
        self.memory: list[int] = []
        self.quiet = threading.Lock()  # held while weights change where they lie
        self.calling = 0
        self.count = threading.Condition()

    def capture(self) -> None:
        self.stitched.capture([1, 2, 4, 8], progress=False, estimate=False)

    def over(self) -> bool:
        """Whether the time is, and each change was made at least once: on a busy machine one takes long."""
        now = time.monotonic()
        made = all(self.seen[each] for each in CHANGES)
        return bool(self.wrong) or now > (self.until if made else self.late)

    def serve(self, seed: int) -> None:
        chance = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        while not self.over():
            x = torch.rand(chance.randint(1, LARGEST), WIDTH, generator=generator)
            fails = chance.random() < 0.05
            if fails:
                x[chance.randrange(len(x)), 0] = FAILS
            with self.quiet, self.count:
                self.calling += 1
            before = len(self.scales) - 1
            try:
                result = self.stitched(x)
            except Unfit:
                self.note("the operator failed" if fails else "WRONG: failed without a reason")
            except InputError:
                # The weight was replaced and is not bound yet.
                self.note("refused" if len(self.scales) > 1 else "WRONG: refused for nothing")
            else:
                known = self.scales[max(0, before - 1) :]
                right = any(torch.allclose(result, answer(x, scale)) for scale in known)
                self.note("answered" if right and not fails else f"WRONG: {len(x)} rows")
            finally:
                with self.count:
                    self.calling -= 1
                    self.count.notify_all()

    def change(self, seed: int) -> None:
        """Replace a weight, write one in place while nobody calls, or capture anew."""
        chance = random.Random(seed)
        while not self.over():
            time.sleep(0.05)
            self.memory.append(resident())
            number = chance.randrange(2, 100) / 8
            try:
                match chance.randrange(4):
                    case 0:
                        self.scales.append(number)
                        self.model.scale = nn.Parameter(
                            torch.full((WIDTH,), number), requires_grad=False
                        )
                        self.stitched.rebind()
                        self.note("rebound")
                    case 1:
                        with self.quiet:
                            with self.count:
                                self.count.wait_for(lambda: self.calling == 0)
                            self.scales.append(number)
                            self.stitched.refit({"scale": torch.full((WIDTH,), number)})
                        self.note("refitted")
                    case 2:
                        self.capture()
                        self.note("captured")
                    case _:
                        self.stitched.metrics().prometheus()
                        self.note("asked")
            except PieceworkError as error:
                self.note(f"WRONG: {type(error).__name__}: {error}")

    def note(self, what: str) -> None:
        self.seen[what] += 1
        if what.startswith("WRONG"):
            self.wrong.append(what)


def run(seconds: float) -> Load:
    load = Load(seconds)
    threads = [threading.Thread(target=load.serve, args=(seed,)) for seed in range(THREADS)]
    threads.append(threading.Thread(target=load.change, args=(THREADS,)))
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not load.wrong, (load.wrong[:3], load.seen)
    return load


def test_a_few_seconds_of_mixed_load() -> None:
    seen = run(3).seen
    assert min(seen[each] for each in ("answered", *CHANGES)) > 0, seen


@pytest.mark.nightly
def test_memory_does_not_grow_under_a_long_mixed_load() -> None:
    load = run(SECONDS)
    assert min(load.seen[each] for each in ("answered", "refused", "the operator failed")) > 0
    quarter = len(load.memory) // 4
    early = statistics.median(load.memory[quarter : 2 * quarter])
    late = statistics.median(load.memory[3 * quarter :])
    assert late - early < 16 * 2**20, (early, late, load.seen)
