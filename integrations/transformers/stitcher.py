"""stitch and unstitch: in, a causal LM of transformers; out, the same object, its decoder's forward replaced by a stitched one.

They never change weights, config or the LM head, and leave nothing behind when they refuse a model.
"""

from __future__ import annotations

import inspect
import logging
import os
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from piecework.errors import CaptureError, ConfigError, StaticGraphError, UsageError, short_errors
from piecework.integrations.transformers.flat.admission import forget_layers
from piecework.integrations.transformers.flat.way import FlatWay
from piecework.integrations.transformers.head import HeadForward, can_be_captured
from piecework.integrations.transformers.own.probe import is_encoder_decoder
from piecework.integrations.transformers.request.dry import dry_request
from piecework.integrations.transformers.way import Way
from piecework.integrations.transformers.ways import Served, chosen_way, served, way_of
from piecework.integrations.transformers.whole.pair import PairWay
from piecework.runtime import torch_compat
from piecework.runtime.artifact.load import Artifact
from piecework.runtime.batch.mode import CUDAGraphMode
from piecework.runtime.batch.sizes import default_capture_sizes
from piecework.runtime.compile import keep, require_stitching, take_if_it_fits
from piecework.runtime.config.compilation import CompilationConfig, RuntimeConfig
from piecework.runtime.config.elsewhere import where_it_goes
from piecework.runtime.graphs.serve.measured import Measurement
from piecework.runtime.stitched import StitchedModule
from piecework.runtime.store.folder import Place

_log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)
AUTO = "auto"
#: The largest number of tokens that ``capture="auto"`` tries.
AUTO_MAXIMUM = 64


@partial(short_errors, elsewhere=where_it_goes)
def stitch(
    model: Model,
    *,
    config: CompilationConfig | Mapping[str, object] | None = None,
    capture: Iterable[int] | Literal["auto"] | None = None,
    max_cache_len: int | None = None,
    max_num_seqs: int | None = None,
    artifact: Place | None = None,
    key_file: str | os.PathLike[str] | None = None,
    way: Literal["flat", "whole"] | None = None,
) -> Model:
    """Stitch the decoder of a causal LM, or decoder and encoder of an encoder-decoder, in place and return the model.

    The flat way: the decoder is captured with every token of a batch in one row, so that one stitched function serves prefill
    and decode of any batch. Attention stays the model's own implementation (``sdpa`` or ``eager``) behind the splitting
    op ``piecework::attention``; KV cache and masks never enter the graph. A decoder that can't be served so is served whole, if
    that is equal: its forward is captured as it is, attention in it, and what its cache holds comes and goes as tensors.
    ``generate()`` works as before. `how_served` says which way it is.

    Args:
        model: a causal LM of transformers in eval mode, on its final device and in its final dtype.
        config: a ``piecework.CompilationConfig``, or a dict of its fields; the default compiles pieces with Inductor.
        capture: numbers of tokens to capture static graphs for, of the pieces and of the head; attention runs between them. "auto"
            takes the usual steps up to ``AUTO_MAXIMUM``, measures them, and keeps those that were worth it.
            ``stitched_module(model).coverage()`` says how each batch runs, ``call_report()`` what ran, and with how much padding.
        max_cache_len: captures the decode steps of static caches of up to so many tokens whole too, attention among them, for the numbers of sequences
            in ``capture``. The keys and values of one cache at a time are moved into memory that the graphs read, as much as a `StaticCache` of
            ``max_num_seqs`` sequences takes. The mode is the configuration's ``cudagraph_mode``, FULL_AND_PIECEWISE if that is NONE. `how_served`
            counts the steps of static caches that ran outside these graphs.
        max_num_seqs: the most sequences of a decode step that is captured whole; by default the largest number in ``capture``.
        artifact: a directory that `save` writes. If what lies there fits the model, the configuration and this process, it
            is loaded, and nothing is run, traced or compiled; else the model is compiled and saved there, and a warning says why.
        key_file: a secret that signs and verifies the artifact; see ``StitchedModule.save``.
        way: "flat" or "whole": that way, or a refusal. By default the first of them that serves the model.

    While torch's compiler is switched off (``TORCH_COMPILE_DISABLE=1``, ``torch.compiler.set_stance``), the decoder runs as
    it is, and is compiled at the first forward after that.

    Raises:
        CaptureError: the model can't be stitched, and why; it is left as it was.
        ConfigError: ``config`` is neither, or names no such field; or a size can't be captured.
        StaticGraphError: a capture failed; the model is left as it was.
        UsageError: the model is stitched already.

    Example:
        >>> model = AutoModelForCausalLM.from_config(config).eval()
        >>> stitch(model).generate(input_ids, max_new_tokens=32)
    """
    chosen = None if config is None else CompilationConfig.given(config, "config")
    sizes = _sizes(capture)
    whole = _whole_steps(chosen, sizes, max_cache_len, max_num_seqs)
    decoder = _unstitched(model)

    taken: Way | None = None

    def take(found: Artifact) -> None:
        nonlocal taken
        taken = way_of(found, model, decoder, chosen, way)

    if artifact is not None:
        require_stitching(chosen)
        take_if_it_fits(artifact, key_file, take)
    loaded = taken is not None
    if taken is None:
        taken = chosen_way(model, decoder, chosen, way)
    if sizes is not None and taken.name != FlatWay.name:
        raise StaticGraphError(
            "a decoder that is served whole is not captured: its graphs would hold the memory of one cache",
            where=type(decoder).__name__,
            hint="leave capture out",
        )
    if artifact is not None and not loaded and taken.modules():
        keep(partial(taken.save, artifact, key_file), artifact)
    _serve_by(taken, model)
    try:
        if sizes is not None:
            _capture(model, sizes, whole, measured=capture == AUTO, config=chosen)
    except BaseException:
        unstitch(model)
        raise
    return model


def _serve_by(way: Way, model: nn.Module) -> None:
    way.decoder.forward = StitchedForward(way)
    for each in _beside(way):
        each.decoder.forward = StitchedForward(each)
    # generate() compiles a model for static caches by itself, where this gives it something to compile.
    model.get_compiled_call = _as_it_is(model)


def _beside(way: Way) -> Sequence[Way]:
    """The ways of modules that are stitched beside the decoder: of an encoder."""
    return way.beside() if isinstance(way, PairWay) else ()


def _as_it_is(model: nn.Module) -> Callable[[object], Callable[..., object]]:
    """What stands in for transformers' ``get_compiled_call`` of a stitched model."""
    found = weakref.ref(model)

    def get_compiled_call(compile_config: object) -> Callable[..., object]:
        return found().__call__  # type: ignore[misc]

    return get_compiled_call


def _sizes(capture: object) -> list[int] | None:
    if capture is None:
        return None
    if capture == AUTO:
        return list(default_capture_sizes(AUTO_MAXIMUM))
    if isinstance(capture, str) or not isinstance(capture, Iterable):
        raise ConfigError(
            f"capture is {capture!r}", where="stitch", hint="give a list of sizes, or 'auto'"
        )
    return list(capture)


@dataclass(frozen=True, slots=True)
class _WholeSteps:
    """What decode steps are captured whole: in which mode, of caches how long, of how many sequences."""

    mode: CUDAGraphMode
    max_cache_len: int
    max_num_seqs: int


def _whole_steps(
    config: CompilationConfig | None,
    sizes: Sequence[int] | None,
    max_cache_len: int | None,
    max_num_seqs: int | None,
) -> _WholeSteps | None:
    """What was asked for; None if no decode step is to be captured whole.

    Raises:
        ConfigError: one thing without the other, or no number.
    """
    asked = CUDAGraphMode.NONE if config is None else config.cudagraph_mode
    for name, number in (("max_cache_len", max_cache_len), ("max_num_seqs", max_num_seqs)):
        if number is not None and (type(number) is not int or number < 1):
            raise ConfigError(f"{name} is a positive number; got {number!r}", where="stitch")
    if max_cache_len is None:
        if max_num_seqs is not None or (sizes is not None and asked.has_mode(CUDAGraphMode.FULL)):
            raise ConfigError(
                "a graph of a whole decode step holds attention and the memory of a cache",
                where="stitch",
                hint="give max_cache_len, the longest static cache that such graphs serve",
            )
        return None
    if sizes is None:
        raise ConfigError(
            "max_cache_len is for decode steps that are captured",
            where="stitch",
            hint="give capture, the numbers of tokens",
        )
    if asked is CUDAGraphMode.PIECEWISE:
        raise ConfigError(
            "cudagraph_mode is PIECEWISE, and max_cache_len is for whole decode steps",
            where="stitch",
            hint="leave one of them out",
        )
    mode = CUDAGraphMode.FULL_AND_PIECEWISE if asked is CUDAGraphMode.NONE else asked
    largest = max(sizes, default=1)
    return _WholeSteps(mode, max_cache_len, min(max_num_seqs or largest, largest))


def _capture(
    model: nn.Module,
    sizes: Sequence[int],
    whole: _WholeSteps | None,
    *,
    measured: bool,
    config: CompilationConfig | None,
) -> None:
    """Capture the decoder's pieces, and the head, for these numbers of tokens."""
    entry = stitched_module(model)
    if entry.traces and next(model.parameters()).device.type == "cpu":
        _log.warning(
            "static graphs on a CPU are a stand-in for testing, and slower than running uncaptured"
        )
    # Tokens meet in attention alone, which reads the request.
    options: dict[str, object] = {"mode": CUDAGraphMode.PIECEWISE, "context_for": dry_request}
    options["pad"] = True
    way = _required(_decoder_of(model)).way
    if whole is not None and entry.traces and isinstance(way, FlatWay):
        static = way.static_decode(whole.max_num_seqs, whole.max_cache_len)
        limits = RuntimeConfig(max_num_batched_tokens=max(sizes), max_num_seqs=whole.max_num_seqs)
        options |= {"mode": whole.mode, "context_for": static.context_for, "runtime": limits}
    if measured:
        sizes = _worth(entry.measure(sizes, **options))
    else:
        entry.capture(sizes, progress=False, **options)
    head = model.get_output_embeddings()  # type: ignore[operator]
    if sizes and entry.traces and can_be_captured(head):
        forward = HeadForward(head, config)
        forward.stitched.capture(sizes, progress=False)
        head.forward = forward


def _worth(found: Measurement) -> tuple[int, ...]:
    """The sizes whose graphs were kept; the others are logged."""
    kept = found.worth_capturing
    others = [row for row in found.rows if row.size not in kept]
    if others:
        times = ", ".join(f"{row.size} ({row.best})" for row in others)
        _log.warning("capture='auto' leaves out sizes that run faster in another way: %s", times)
    return kept


@short_errors
def save(model: nn.Module, path: Place, *, key_file: str | os.PathLike[str] | None = None) -> None:
    """Write what a stitched model is served by, for `load` in another process: of a decoder that is served whole every kind of call that came so far.

    Args:
        path, key_file: as of ``StitchedModule.save``.

    Raises:
        ArtifactError: something can't be told again in another process, which is named; or the directory can't be written.
        UsageError: the model is not stitched.

    Example:
        >>> save(stitch(model), "bloom.artifact")
    """
    _required(_decoder_of(model)).way.save(path, key_file)


@partial(short_errors, elsewhere=where_it_goes)
def load(path: Place, model: Model, *, key_file: str | os.PathLike[str] | None = None) -> Model:
    """Stitch the decoder of a causal LM in place by what `save` wrote: nothing is run, traced or compiled.

    Args:
        path, key_file: as in ``piecework.load``.
        model: a model like the saved one: the same classes, configuration and source, weights of the same names, shapes, dtypes and devices.

    Raises:
        ArtifactError: the artifact is missing, damaged, or made for another model or process; the model is left as it was.
        CaptureError: the model can't be stitched, and why.
        UsageError: the model is stitched already.

    Example:
        >>> save(stitch(model), "llama.artifact")
        >>> load("llama.artifact", other).generate(input_ids)  # in another process
    """
    decoder = _unstitched(model)
    found = Artifact.open(path, key_file)
    config = CompilationConfig.given(found.folder.facts["config"], "config")
    _serve_by(way_of(found, model, decoder, config), model)
    return model


@short_errors
def unstitch(model: Model) -> Model:
    """Give a stitched model its own forward back, and return it.

    Raises:
        UsageError: the model is not stitched.
    """
    decoder = _decoder_of(model)
    stitched = _required(decoder)
    model.__dict__.pop("get_compiled_call", None)
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is not None and isinstance(head.__dict__.get("forward"), HeadForward):
        del head.forward
    for way in (stitched.way, *_beside(stitched.way)):
        if inspect.ismethod(way.forward) and way.forward.__func__ is type(way.decoder).forward:
            del way.decoder.forward
        else:
            way.decoder.forward = way.forward
    forget_layers(decoder)
    return model


@short_errors
def stitched_module(model: nn.Module, entry: str = "input_ids") -> StitchedModule:
    """The stitched module behind a stitched model, with its ``.source``, ``.pieces`` and ``.report()``.

    Args:
        model: a stitched model.
        entry: "input_ids", or "inputs_embeds" (compiled now if it was not needed before). Of a decoder that is served whole "input_ids"
            is what serves prompts, and "decode" what serves one more token of each sequence; `how_served` has them all. "encoder" is that of
            an encoder-decoder.

    Raises:
        UsageError: the model is not stitched, or there is no such entry.
    """
    return _required(_decoder_of(model)).way.entry(entry)


@short_errors
def how_served(model: nn.Module) -> Served:
    """Which way a stitched model is served, why, by which stitched modules, and what its own forward served instead.

    Raises:
        UsageError: the model is not stitched.

    Example:
        >>> print(how_served(stitch(model)))
    """
    return served(_required(_decoder_of(model)).way)


@short_errors
def sleep(model: nn.Module) -> None:
    """Give the static graphs of a stitched model and their memory back, the head's too; calls run uncaptured until `wake_up`.

    Raises:
        UsageError: the model is not stitched.
    """
    for each in _captured_parts(model):
        each.sleep()
    way = _required(_decoder_of(model)).way
    if isinstance(way, FlatWay) and way.serving.static is not None:
        way.serving.static.release()


@short_errors
def wake_up(model: nn.Module) -> None:
    """Capture again what was captured of a stitched model before `sleep`, or before its weights were rebound.

    Raises:
        UsageError: the model is not stitched.
        StaticGraphError: as `stitch`.
    """
    for each in _captured_parts(model):
        each.wake_up()


def _captured_parts(model: nn.Module) -> list[StitchedModule]:
    stitched = _required(_decoder_of(model))
    head = model.get_output_embeddings()  # type: ignore[operator]
    forward = None if head is None else head.__dict__.get("forward")
    parts = [
        *stitched.way.modules().values(),
        *([forward.stitched] if isinstance(forward, HeadForward) else []),
    ]
    return [each for each in parts if each.was_captured]


class StitchedForward:
    """Stands in for a decoder's ``forward``: takes its arguments, and has them served.

    Args:
        way: how.
    """

    def __init__(self, way: Way) -> None:
        self.way = way
        self.__signature__ = inspect.signature(way.forward)
        self._names = tuple(self.__signature__.parameters)
        self._said: str | None = None

    def __reduce_ex__(self, _protocol: object) -> object:
        raise UsageError(
            "a stitched model can't be copied or pickled, for its compiled pieces belong to this one",
            where=type(self.way.decoder).__name__,
            hint="unstitch(model) first; save_pretrained works as it is",
        )

    @torch.compiler.disable
    def __call__(self, *args: object, **kwargs: object) -> object:
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        if self.switched_off(given):
            return self.way.forward(*args, **kwargs)
        return self.way.serve(given)

    def switched_off(self, given: Mapping[str, object]) -> bool:
        """Whether torch's compiler is off, so that the decoder runs as it is; each switch is logged once.

        What is compiled already keeps running, as with ``torch.compile``, except in the stance ``force_eager``.
        """
        if self.way.is_compiled(given) and torch_compat.stance_name() != torch_compat.FORCE_EAGER:
            return False
        switch = torch_compat.compiler_off()
        if switch is not None and switch != self._said:
            self._said = switch
            name = type(self.way.decoder).__name__
            _log.warning("%s runs as it is, uncompiled: %s", name, switch)
        return switch is not None


def _decoder_of(model: nn.Module) -> nn.Module:
    """The module that turns tokens into hidden states, below the LM head."""
    if not isinstance(model, PreTrainedModel):
        raise CaptureError(
            "this is not a transformers model",
            where=type(model).__name__,
            hint="use piecework.compile(model) with a splitting_op of your own",
        )
    found = model.get_decoder()
    for candidate in (found, model.base_model, getattr(model, "model", None)):
        if isinstance(candidate, PreTrainedModel) and candidate.get_output_embeddings() is None:
            return candidate
    if is_encoder_decoder(model):
        raise CaptureError(
            f"its decoder is a {type(found).__name__}, which is no decoder of transformers' without a head",
            where=type(model).__name__,
            hint="piecework.compile(model.get_encoder(), args) stitches the encoder; give generate() its result as encoder_outputs",
        )
    raise CaptureError(
        "no decoder was found below its head",
        where=type(model).__name__,
        hint="stitch the decoder module itself",
    )


def _unstitched(model: nn.Module) -> nn.Module:
    """The decoder of a model that is not stitched."""
    decoder = _decoder_of(model)
    if _stitched_forward(decoder) is not None:
        raise UsageError(
            "the model is stitched already", where="stitch", hint="call unstitch(model) first"
        )
    return decoder


def _stitched_forward(decoder: nn.Module) -> StitchedForward | None:
    forward = decoder.__dict__.get("forward")
    return forward if isinstance(forward, StitchedForward) else None


def _required(decoder: nn.Module) -> StitchedForward:
    stitched = _stitched_forward(decoder)
    if stitched is None:
        raise UsageError(
            "the model is not stitched", where=type(decoder).__name__, hint="call stitch(model)"
        )
    return stitched
