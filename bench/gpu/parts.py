"""The parts of the GPU benchmark."""

from __future__ import annotations

import cProfile
import importlib.util
import pstats
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

import piecework
from piecework.bench.decoder import build, token_ids
from piecework.bench.gpu.contenders import Contenders, stitch
from piecework.bench.gpu.rows import (
    Rows,
    Scale,
    Step,
    checked,
    host_seconds,
    step_seconds,
    synchronize,
    targets_of,
    timed_rows,
    times,
)
from piecework.bench.measure.result import Row, Target
from piecework.errors import PieceworkError
from piecework.runtime.graphs.plan.phase import format_bytes
from piecework.runtime.graphs.stage.inputs import StaticInputs


@torch.no_grad()
def staging(scale: Scale, rows: Rows) -> None:
    """B10: 1, 2 and 8 inputs into static buffers, padded."""
    kinds = {
        "reference": {"kernel": "reference"},
        "grouped": {},
        "tails kept": {"keeps_tails": True},
    }
    if scale.device == "cuda":
        kinds["one kernel"] = {"kernel": "triton"}
    for inputs in (1, 2, 8):
        for count, padded in ((37, 40), (64, 64)):
            setting: dict[str, object] = {"inputs": inputs, "rows": count, "padded": padded}
            examples, tensors, plain = to_stage(inputs, count, scale.device)
            contenders: dict[str, Step] = {"plain copies": plain}
            for name, options in kinds.items():
                with rows.attempt({**setting, "what": "first call"}, name):
                    static = StaticInputs.allocate(examples, 256, **options)  # type: ignore[arg-type]
                    contenders[name] = _first_call(static, tensors, padded, scale, rows, name)
            host = times(contenders, scale, host_seconds, rows, setting)
            row = times(contenders, scale, step_seconds, rows, setting)
            rows.add(timed_rows({**setting, "what": "host"}, host, "plain copies"))
            rows.add(timed_rows({**setting, "what": "in a row"}, row, "plain copies"))
            asked = [
                (
                    "B10",
                    "host time over plain copies",
                    1.0,
                    host,
                    "tails kept",
                    "plain copies",
                    True,
                )
            ]
            if (inputs, count) == (8, 37):
                text = "host time of a copy and a fill each over ours"
                asked.append(("B10", text, 2.0, host, "reference", "tails kept", False))
            rows.targets(targets_of(f"{inputs} inputs, {count} rows", asked))
            for name, step in contenders.items():
                with rows.attempt({**setting, "what": "launches"}, name):
                    launched = _launches(step, scale.device)
                    rows.add([Row({**setting, "what": "launches"}, name, 0.0, note=f"{launched}")])


def to_stage(
    inputs: int, count: int, device: str
) -> tuple[dict[str, torch.Tensor], list[torch.Tensor], Step]:
    """Examples of ``inputs`` tensors of two dtypes, tensors of ``count`` rows, and what copies those plainly."""
    dtypes = ([torch.int64, torch.int32] * 4)[:inputs]
    examples = {f"input {n}": torch.zeros(1, dtype=d, device=device) for n, d in enumerate(dtypes)}
    tensors = [torch.arange(count, device=device).to(dtype) for dtype in dtypes]
    buffers = [torch.zeros_like(tensor) for tensor in tensors]

    def plain() -> None:
        for buffer, tensor in zip(buffers, tensors, strict=True):
            buffer.copy_(tensor, non_blocking=True)

    return examples, tensors, plain


def _first_call(
    static: StaticInputs,
    tensors: Sequence[torch.Tensor],
    padded: int,
    scale: Scale,
    rows: Rows,
    name: str,
) -> Step:
    """The step, after its first call was timed and its result checked."""
    synchronize(scale.device)
    start = time.perf_counter()
    staged = static.stage(tensors, padded)
    synchronize(scale.device)
    setting = {"inputs": len(tensors), "rows": len(tensors[0]), "what": "first call"}
    rows.add([Row(dict(setting), name, time.perf_counter() - start)])
    for tensor, view in zip(tensors, staged, strict=True):
        if not torch.equal(view[: len(tensor)], tensor) or view[len(tensor) :].any():
            raise PieceworkError("what was staged is not the input, padded")
    if name != "tails kept":
        return lambda: static.stage(tensors, padded)
    # As captured models stage, whose entry has checked the arguments.
    return lambda: static.stage_alike(tensors, padded, tensors[0].shape[0])


def _launches(step: Step, device: str) -> int:
    """How many kernels, copies and fills the device runs in one step."""
    step()
    synchronize(device)
    with torch.profiler.profile() as profile:
        step()
        synchronize(device)
    on_gpu = torch.autograd.DeviceType.CUDA
    return sum(event.device_type == on_gpu for event in profile.events())


@torch.no_grad()
def inductor(scale: Scale, rows: Rows) -> None:
    """Compiling cold and from the cache: seconds, pieces entered directly, the first served call."""
    layers = 4 if scale.device == "cuda" else 2
    model = build(layers, scale.shape, scale.device)
    ids = token_ids(max(scale.batches), scale.shape, scale.device)
    for start in ("cold", "from the cache"):
        setting: dict[str, object] = {"layers": layers, "start": start}
        with rows.attempt(setting, "compile"):
            torch.compiler.reset()
            before = time.perf_counter()
            stitched = stitch(model, ids, scale.compiler)
            rows.add(
                [Row(setting, "compile", time.perf_counter() - before, note=_entered(stitched))]
            )
        with rows.attempt(setting, "capture and serve"):
            before = time.perf_counter()
            stitched.capture(scale.batches, progress=False, estimate=False)
            rows.add([Row(setting, "capture", time.perf_counter() - before)])
            expected = model(ids)
            synchronize(scale.device)
            before = time.perf_counter()
            stitched(ids)
            synchronize(scale.device)
            rows.add([Row(setting, "first served call", time.perf_counter() - before)])
            serve = partial(stitched, ids)
            checked(serve, expected)
            found = times({"served call": serve}, scale, step_seconds, rows, setting)
            rows.add(timed_rows(setting, found, "served call"))


def _entered(stitched: piecework.StitchedModule) -> str:
    """How many pieces are entered directly, and why others are not."""
    compiled = [
        entry.compiled
        for backend in stitched.traces[0].program.backends.values()
        for entry in backend.entries.values()
    ]
    reasons = sorted({each.indirect_because for each in compiled if each.direct is None})
    direct = sum(each.direct is not None for each in compiled)
    return f"{direct} of {len(compiled)} entered directly {'; '.join(reasons)}"


@torch.no_grad()
def steps(scale: Scale, rows: Rows, deep: bool = False) -> None:
    """B8 and B9: one decode step, by every contender; ``deep``: with many layers."""
    for layers in scale.deep_layers if deep else scale.layers:
        model = build(layers, scale.shape, scale.device)
        ids = token_ids(max(scale.batches), scale.shape, scale.device)
        found = Contenders(model, ids, scale.batches, scale.backend)
        for batch in scale.batches:
            if not scale.in_time:
                rows.note(f"no time left for {layers} layers, batch {batch}")
                break
            setting: dict[str, object] = {"layers": layers, "batch": batch}
            expected = model(ids[:batch])
            contenders: dict[str, Step] = {}
            for name, make in found.makers(batch).items():
                with rows.attempt({**setting, "what": "made"}, name):
                    contenders[name] = checked(make(), expected)
            host = times(contenders, scale, host_seconds, rows, setting)
            whole = times(contenders, scale, step_seconds, rows, setting)
            rows.add(timed_rows({**setting, "what": "host"}, host, "bare loop"))
            rows.add(timed_rows({**setting, "what": "step"}, whole, "one graph"))
            ours, bare, one = "piecework", "bare loop", "one graph"
            asked = (
                ("B8", "host time over the bare loop", 1.05, host, ours, bare, True),
                ("B8", "host time over the bare list", 1.05, host, ours, "bare list", True),
                ("B8", "conventional's over ours", 1.5, host, "conventional", ours, False),
                ("B9", "step over one graph", 1.02, whole, ours, one, True),
                ("B9", "step over the bare loop", 1.03, whole, ours, bare, True),
            )
            rows.targets(targets_of(f"{layers} layers, batch {batch}", asked))
        del model, found, contenders
        torch.compiler.reset()  # it holds what it compiled, and so the weights


def transformers_decode(scale: Scale, rows: Rows) -> None:
    """Seconds a token of a Llama by ``generate``, beside transformers' own static cache."""
    from piecework.integrations.transformers import stitch, stitched_module
    from piecework.integrations.transformers.request.state import dry_request

    model = _llama(scale)
    for batch in scale.batches:
        if not scale.in_time:
            rows.note(f"no time left for batch {batch}")
            break
        with _serving(model, batch, scale, rows) as timed:
            stitch(model, config=piecework.CompilationConfig(backend=scale.compiler))
            captured, context = stitched_module(model), dry_request
            captured.capture([batch], context_for=context, pad=True, progress=False, estimate=False)
            timed("piecework, dynamic cache", {})
            timed("piecework, static cache", _UNCOMPILED)


def whole_steps(scale: Scale, rows: Rows) -> None:
    """The same at batch 1, each decode step one graph: what most callers ask first."""
    from piecework.integrations.transformers import stitch

    model = _llama(scale)
    config, length = piecework.CompilationConfig(backend=scale.compiler), 16 + scale.tokens + 1
    with _serving(model, 1, scale, rows) as timed:
        stitch(model, config=config, capture=[1], max_cache_len=length)
        timed("piecework, whole steps", _UNCOMPILED)


_STATIC: dict[str, object] = {"cache_implementation": "static"}
_UNCOMPILED: dict[str, object] = {**_STATIC, "disable_compile": True}


@contextmanager
def _serving(
    model: torch.nn.Module, batch: int, scale: Scale, rows: Rows
) -> Iterator[Callable[[str, Mapping[str, object]], None]]:
    """Requests, generated by transformers before the block, which stitches, and after it; the block gets what times one way."""
    from piecework.integrations.transformers import stitched_module, unstitch

    config: Any = model.config
    setting: dict[str, object] = {"batch": batch, "layers": config.num_hidden_layers}
    ids = torch.randint(1, config.vocab_size, (batch, 16), device=scale.device)
    found: list[float] = []

    def run(how: Mapping[str, object]) -> tuple[torch.Tensor, float]:
        generate: Callable[..., torch.Tensor] = model.generate  # type: ignore[assignment]
        synchronize(scale.device)
        start = time.perf_counter()
        tokens = generate(ids, max_new_tokens=scale.tokens, do_sample=False, **how)
        synchronize(scale.device)
        return tokens, (time.perf_counter() - start) / scale.tokens

    expected, _ = run({})

    def timed(name: str, how: Mapping[str, object]) -> None:
        with rows.attempt(setting, name):
            run(how)  # warms up, and compiles
            tokens, seconds = run(how)
            found.append(seconds)
            note = f"a token; {(tokens == expected).float().mean().item():.0%} of tokens as eager"
            rows.add([Row(setting, name, seconds, {"the first": seconds / found[0]}, note)])

    timed("transformers, dynamic cache", {})
    with rows.attempt(setting, "stitch and capture"):
        yield timed
        served = {row.mode: row.calls for row in stitched_module(model).call_report()}
        rows.note(f"batch {batch}: calls by mode: {served}")
    unstitch(model)
    # Its own compiles with ``reduce-overhead``.
    timed("transformers, static cache", _STATIC if scale.device == "cuda" else _UNCOMPILED)


def vllm_decode(scale: Scale, rows: Rows) -> None:
    """Seconds a token in a vLLM engine with FULL_AND_PIECEWISE."""
    if importlib.util.find_spec("vllm") is None or scale.device != "cuda":
        rows.note("vLLM is not installed, or there is no GPU")
        return
    import vllm

    model = _llama(scale)
    tokens: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as place:
        model.save_pretrained(place)
        del model
        for backend in ("piecework", "inductor"):
            with rows.attempt({"batch": 1}, f"vLLM, {backend}"):
                engine = vllm.LLM(
                    place,
                    skip_tokenizer_init=True,
                    max_model_len=256,
                    gpu_memory_utilization=0.4,
                    compilation_config={"backend": backend, "cudagraph_mode": "FULL_AND_PIECEWISE"},
                )
                options = vllm.SamplingParams(
                    max_tokens=scale.tokens, temperature=0, detokenize=False, ignore_eos=True
                )
                given = [{"prompt_token_ids": list(range(1, 17))}]
                engine.generate(given, options, use_tqdm=False)
                start = time.perf_counter()
                [done] = engine.generate(given, options, use_tqdm=False)
                seconds = (time.perf_counter() - start) / scale.tokens
                tokens[backend] = list(done.outputs[0].token_ids)
                alike = tokens[backend] == next(iter(tokens.values()))
                note = f"a token; tokens as the first: {alike}"
                rows.add([Row({"batch": 1}, f"vLLM, {backend}", seconds, note=note)])
                del engine


def _llama(scale: Scale) -> Any:
    """A Llama of random weights that never ends a sequence."""
    import transformers

    dtype = torch.bfloat16 if scale.device == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(scale.device):
        config = transformers.LlamaConfig(max_position_embeddings=1024, **scale.llama)
        model = transformers.LlamaForCausalLM(config).to(dtype).eval()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return model


@torch.no_grad()
def profile(scale: Scale, rows: Rows) -> None:
    """One decode step under the profiler, pieces by name."""
    layers, batch = min(scale.layers), min(scale.batches)
    model = build(layers, scale.shape, scale.device)
    found = Contenders(
        model, token_ids(max(2, batch), scale.shape, scale.device), (batch,), scale.backend
    )
    step = found.makers(batch)["piecework"]()
    step()
    synchronize(scale.device)
    with torch.profiler.profile() as profiled, found.stitched.named_pieces():
        step()
        synchronize(scale.device)
    events = sorted(profiled.events(), key=lambda event: event.time_range.start)
    lines = [profiled.key_averages().table(sort_by="self_cpu_time_total", row_limit=40), ""]
    first = events[0].time_range.start if events else 0
    lines += [
        f"{event.time_range.start - first:10.1f} {event.time_range.elapsed_us():8.1f} µs  {event.device_type.name:5} {event.name}"
        for event in events[:400]
    ]
    if scale.out is not None:
        (scale.out / "gpu_profile.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows.note(f"{len(events)} events in one step of {layers} layers")


@torch.no_grad()
def capture(scale: Scale, rows: Rows) -> None:
    """B11: time and memory of capturing many sizes of many pieces, against what was foretold."""
    model = build(scale.capture_layers, scale.shape, scale.device)
    ids = token_ids(max(scale.capture_sizes), scale.shape, scale.device)
    stitched = stitch(model, ids, scale.backend)
    setting: dict[str, object] = {"layers": scale.capture_layers, "sizes": len(scale.capture_sizes)}
    profiled = cProfile.Profile()
    start = time.perf_counter()
    profiled.enable()
    stitched.capture(scale.capture_sizes, progress=False)
    profiled.disable()
    total = time.perf_counter() - start
    report, memory = stitched.static_graphs.report, stitched.memory_report()
    if report is None or memory.estimate is None:
        raise PieceworkError("the capture left no report")
    pieces = sum(outcome.pieces for outcome in report.outcomes)
    note = f"{pieces} graphs, {format_bytes(report.nbytes)}"
    seconds = sum(each.seconds for each in report.outcomes)
    rows.add([Row(setting, "estimate, and replay source", total - seconds)])
    rows.add([Row(setting, "capture", seconds, note=note)])
    deviation = abs(memory.estimate.total / max(1, report.nbytes) - 1)
    text = f"deviation of the estimate ({format_bytes(memory.estimate.total)})"
    rows.targets([Target("B11", text, 0.1, deviation)])
    if scale.device == "cuda":
        text = "share of the time in the driver, which instantiates when a capture ends"
        share = _seconds_in(profiled, "capture_end") / total
        rows.targets([Target("B11", text, 0.5, share, at_most=False)])


def _seconds_in(profiled: cProfile.Profile, function: str) -> float:
    """Cumulated seconds in functions of that name."""
    stats = pstats.Stats(profiled).stats  # type: ignore[attr-defined]
    return sum(row[3] for (_, _, name), row in stats.items() if name == function)


#: What answers most comes first.
PARTS: Mapping[str, Callable[[Scale, Rows], None]] = {
    "whole": whole_steps,
    "staging": staging,
    "inductor": inductor,
    "steps": steps,
    "transformers": transformers_decode,
    "profile": profile,
    "capture": capture,
    "vllm": vllm_decode,
    "deep": partial(steps, deep=True),
}
