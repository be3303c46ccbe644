"""One sample, tried.

Batch 0 is judged apart from the others: it may be refused by name.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

import piecework
from piecework.bench.lists.judge import Answer, difference, kept, outputs_with_strides_of
from piecework.bench.lists.sample import Sample
from piecework.errors import PieceworkError
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.stitched import StitchedModule

Status = Literal["equal", "refused", "failed", "wrong"]
#: From good to bad: what is said of a row with several samples is the worst of them.
STATUSES: tuple[Status, ...] = ("equal", "refused", "failed", "wrong")

CONTENDERS = ("stock", "piecework", "split", "captured")

#: Sizes to capture, and to call then: captured, padded, and beyond.
CAPTURED = (1, 2, 4, 8)
CALLED = (4, 1, 3, 5, 2, 9)
SEED = 7

Contender = Callable[..., object]
Heard = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Options:
    """How a sample is tried."""

    backend: str = "inductor"  # what compiles, for stock and for piecework's pieces
    cut: bool = False  # try it with a splitting op and captured as well
    # whether stock is tried always, or only where piecework is not equal to eager; half the time
    # where it mostly is
    stock: Literal["always", "if unequal"] = "always"

    def config(self) -> CompilationConfig:
        return CompilationConfig(backend=self.backend)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one contender did with one sample."""

    # equal to eager; refused by name; failed with an error that nobody meant; or wrong
    status: Status
    why: str = ""  # the first error or difference, one line
    zero: str = ""  # what became of batch 0: "" (not tried), "equal", or how it went wrong
    trace: str = ""  # the traceback of an error


@dataclass(slots=True)
class Outcome:
    """Verdicts by contender, one of `CONTENDERS`."""

    verdicts: dict[str, Verdict] = field(default_factory=dict)
    skipped: str = ""
    pieces: int = 0
    unique: int = 0
    traces: int = 0
    way: str = ""


def try_sample(sample: Sample, options: Options, heard: Heard = lambda _: None) -> Outcome:
    """Run ``sample`` eagerly and by each contender.

    Args:
        heard: told the name of each contender before it starts.
    """
    return _Trial(sample, options, heard).run()


class _Trial:
    """One sample with what was found so far."""

    def __init__(self, sample: Sample, options: Options, heard: Heard) -> None:
        self._sample = sample
        self._options = options
        self._heard = heard
        self._outcome = Outcome()
        self._expected: dict[int, Answer] = {}
        self._stock: dict[int, Answer] = {}

    def run(self) -> Outcome:
        self._heard("eager")
        sizes = [self._sample.example, *self._sample.others]
        self._expected, problem = _eager(self._sample, sizes)
        if self._sample.example not in self._expected:
            self._outcome.skipped = f"eager can't run the example: {problem}"
            return self._outcome
        if self._options.stock == "always":
            self._try("stock", self._make_stock)
        made = self._try_compiled()
        if (
            self._options.stock != "always"
            and self._outcome.verdicts["piecework"].status != "equal"
        ):
            self._try("stock", self._make_stock)
            made = self._try_compiled()  # with stock as a yardstick
        if made and self._options.cut and self._outcome.verdicts["piecework"].status == "equal":
            self._cut(made)
        return self._outcome

    def _try_compiled(self) -> StitchedModule | None:
        """Try it compiled; returns what was made, if anything was."""
        stitched = self._try("piecework", self._compiled)
        if stitched is not None:
            report = stitched.report()
            self._outcome.pieces, self._outcome.unique = report.pieces, report.unique
            self._outcome.traces = len(stitched.traces)
        return stitched

    def _cut(self, whole: StitchedModule) -> None:
        """Try it cut at an operator in the middle of its graph, then that with static graphs."""
        op = splitting_op_for(whole)
        if op is None:
            return
        made = self._try("split", lambda: self._compiled([op]))
        if self._outcome.verdicts["split"].status != "equal" or self._sample.example < 1:
            return
        more, _ = _eager(self._sample, [size for size in CALLED if size not in self._expected])
        self._expected = {size: found for size, found in (self._expected | more).items() if size}
        self._try("captured", lambda: made.capture(CAPTURED, progress=False, estimate=False))

    # --- contenders --------------------------------------------------------------------------------

    def _make_stock(self) -> Contender:
        torch._dynamo.reset()
        return torch.compile(self._sample.build(), backend=self._options.backend, fullgraph=True)

    def _compiled(
        self, splitting_ops: Sequence[Callable[..., object]] | None = None
    ) -> StitchedModule:
        torch._dynamo.reset()
        args, kwargs = self._sample.arguments(self._sample.example)
        return piecework.compile(
            self._sample.build(),
            args,
            kwargs,
            config=self._options.config(),
            splitting_ops=splitting_ops,
        )

    # --- judging -----------------------------------------------------------------------------------

    def _try(self, name: str, make: Callable[[], Any]) -> Any:
        """Judge one contender; returns it, or None where it can't be made."""
        import torch._inductor.config as inductor

        self._heard(name)
        contender, answers = None, {}
        with inductor.patch(fallback_random=True):  # type: ignore[attr-defined]  # draws as eager does
            try:
                contender = make()
            except Exception as error:  # noqa: BLE001 - the error is the finding
                verdict = _verdict_of(name, error)
            else:
                verdict, answers = self._judged(name, contender)
        if name == "stock":
            self._stock = answers
        self._outcome.verdicts[name] = verdict
        return contender

    def _judged(self, name: str, contender: Contender) -> tuple[Verdict, dict[int, Answer]]:
        answers: dict[int, Answer] = {}
        found, zero = [Verdict("equal")], ""
        for size in self._expected:
            try:
                answers[size] = _ask(contender, self._sample, size)
            except Exception as error:  # noqa: BLE001 - the error is the finding
                verdict = _verdict_of(name, error)
            else:
                wrong = self._difference(size, answers[size])
                verdict = Verdict("wrong", wrong) if wrong else found[0]
            if size == 0:
                zero = f"{verdict.status}: {verdict.why}" if verdict.why else "equal"
            if size or (verdict.status != "refused" and self._stock_serves_zero()):
                found.append(replace(verdict, why=verdict.why and f"batch {size}: {verdict.why}"))
        worst = max(found, key=lambda each: STATUSES.index(each.status))
        return replace(worst, zero=zero), answers

    def _stock_serves_zero(self) -> bool:
        stock = self._outcome.verdicts.get("stock")
        return stock is not None and stock.zero == "equal"

    def _difference(self, size: int, answer: Answer) -> str:
        expected, stock = self._expected[size], self._stock.get(size)
        strided = outputs_with_strides_of(stock, expected) if stock is not None else set()
        return difference(answer, expected, stock, strided)


def splitting_op_for(stitched: StitchedModule) -> Callable[..., object] | None:
    """The function that is called nearest to the middle of the graph and gives a tensor."""
    targets = [
        node.target
        for node in stitched.program.graph.graph.nodes
        if node.op == "call_function"
        and isinstance(node.meta.get("example_value"), torch.Tensor)
        and getattr(node.target, "__module__", "") != "_operator"
    ]
    return targets[len(targets) // 2] if targets else None


def _eager(sample: Sample, sizes: Sequence[int]) -> tuple[dict[int, Answer], str]:
    """Batch size → eager's answer for the sizes that eager can run, and why it can't run the first that it can't.

    A size at which eager returns memory that nobody wrote is left out: torch fills such memory in the second run.
    """
    found: dict[int, Answer] = {}
    problem = ""
    model = sample.build()
    for size in sizes:
        try:
            answer = _ask(model, sample, size)
            with _filled_memory():
                again = _ask(model, sample, size)
        except Exception as error:  # noqa: BLE001 - what eager can't run is left out
            problem = problem or _line(error)
            continue
        unstable = difference(again, answer)
        if unstable:
            problem = problem or f"two runs differ: {unstable}"
        else:
            found[size] = answer
    return found, problem


@contextmanager
def _filled_memory() -> Iterator[None]:
    """Fill new memory with NaN for the block, as torch does under deterministic algorithms."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def _ask(model: Contender, sample: Sample, size: int) -> Answer:
    args, kwargs = sample.arguments(size)
    torch.manual_seed(SEED)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        result = model(*args, **kwargs)
    return Answer(kept(result), (args, kwargs))


def _verdict_of(name: str, error: Exception) -> Verdict:
    trace = "".join(traceback.format_exception(error))[-6000:]
    by_name = name == "stock" or isinstance(error, PieceworkError)
    return Verdict("refused" if by_name else "failed", _line(error), "", trace)


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
