"""Stitches a causal LM of transformers in place: its decoder's forward is replaced by a stitched one.

Weights, config and LM head are never changed, and nothing is left behind when a model is refused.
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

from piecework.errors import (
    ArtifactError,
    CaptureError,
    ConfigError,
    StaticGraphError,
    UsageError,
    short_errors,
)
from piecework.integrations.transformers.flat_admission import admit_flat
from piecework.integrations.transformers.flat_way import FlatWay, forget_layers
from piecework.integrations.transformers.request.state import dry_request
from piecework.integrations.transformers.settings import is_encoder_decoder, refuse_model
from piecework.integrations.transformers.way import FOUND, LOADER, Subject, require_like, save_ways
from piecework.integrations.transformers.whole_admission import admit_whole
from piecework.integrations.transformers.whole_way import WholeWay, encoder_of
from piecework.runtime import torch_compat
from piecework.runtime.artifact.model import Artifact
from piecework.runtime.artifact.values import from_bytes
from piecework.runtime.batch.mode import CUDAGraphMode
from piecework.runtime.batch.sizes import default_capture_sizes
from piecework.runtime.compile import compile as compile_model
from piecework.runtime.compile import keep, require_stitching, take_if_it_fits
from piecework.runtime.config.compilation import CompilationConfig, RuntimeConfig
from piecework.runtime.stitched import StitchedModule
from piecework.runtime.store.package import Place

_log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)
AnyWay = FlatWay | WholeWay
WAYS: dict[str, type[AnyWay]] = {each.name: each for each in (FlatWay, WholeWay)}
#: The most sequences of a decode step that is captured whole, and the longest cache.
Limits = tuple[int | None, int | None]
AUTO = "auto"
#: The largest number of tokens that ``capture="auto"`` tries.
AUTO_MAXIMUM = 64


@short_errors
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
    """Stitch the decoder of a causal LM, and the encoder beside it, in place; return the model.

    Flat: every token of a batch in one row, attention behind the splitting op, so that one function
    serves prefill and decode of any batch. Whole: its forward is captured as it is, and its cache's
    tensors come and go as arguments. While torch's compiler is off, the decoder runs as it is.

    Args:
        model: a causal LM of transformers in eval mode, on its final device and in its final dtype.
        config: a ``piecework.CompilationConfig``, or a dict of its fields.
        capture: numbers of tokens to capture static graphs for, of the pieces and of the head;
            "auto" measures the usual steps up to ``AUTO_MAXIMUM``, and keeps what was worth it.
        max_cache_len: captures decode steps of static caches of up to so many tokens whole too, for
            the numbers of sequences in ``capture``, in memory of the graphs' own.
        max_num_seqs: the most sequences of such a step; by default the largest of ``capture``.
        artifact: a file that `save` writes. What fits is loaded; else the model is compiled and
            saved there.
        key_file: a secret that signs and verifies the artifact; see ``StitchedModule.save``.
        way: "flat" or "whole": that way, or a refusal; by default the first that serves the model.

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
    limits = (max_num_seqs, max_cache_len)
    full = _full_mode(chosen, sizes, limits)
    subject = Subject(model, _unstitched(model), chosen)
    if way is not None and way not in WAYS:
        raise ConfigError(f"there is no way {way!r}", where="way", hint=" or ".join(WAYS))
    taken: AnyWay | None = None

    def take(found: Artifact) -> None:
        nonlocal taken
        taken = _loaded_way(found, subject, way)

    if artifact is not None:
        require_stitching(chosen)
        take_if_it_fits(artifact, key_file, take)
    loaded = taken is not None
    if taken is None:
        taken = _admitted_way(subject, way)
    if sizes is not None and isinstance(taken, WholeWay):
        raise StaticGraphError(
            "a decoder that is served whole is not captured: its graphs would hold the memory of one cache",
            where=type(subject.decoder).__name__,
            hint="leave capture out",
        )
    if artifact is not None and not loaded and taken.modules():
        keep(partial(save_ways, taken.ways(), artifact, key_file), artifact)
    _serve_by(taken, model)
    try:
        if sizes is not None and isinstance(taken, FlatWay):
            _capture(model, taken, sizes, full, limits, measured=capture == AUTO)
    except BaseException:
        unstitch(model)
        raise
    return model


def _admitted_way(subject: Subject, wanted: str | None) -> AnyWay:
    """The first way that takes the decoder, or the ``wanted`` one; raises `CaptureError`."""
    refuse_model(subject.decoder)
    refused: CaptureError | None = None
    if wanted != WholeWay.name:
        try:
            return admit_flat(subject)
        except CaptureError as error:
            if wanted is not None:
                raise
            refused = error
    try:
        way = admit_whole(subject)
    except CaptureError as error:
        if refused is None:
            raise
        raise CaptureError(
            f"it can't be served flattened: {_with_place(refused)}; nor whole: {error.message}",
            where=error.where or type(subject.decoder).__name__,
            hint=error.hint,
        ) from error
    way.not_flat = "" if refused is None else _with_place(refused)
    return way


def _with_place(error: CaptureError) -> str:
    """A refusal without its hint."""
    return error.message if error.where is None else f"{error.message} ({error.where})"


def _loaded_way(artifact: Artifact, subject: Subject, wanted: str | None = None) -> AnyWay:
    """The way that was saved, or `ArtifactError`, `CaptureError` and the model as it was."""
    kept = artifact.package.facts.get("kept")
    saved = kept.get("way") if isinstance(kept, dict) and kept.get("load") == LOADER else None
    if saved not in WAYS or wanted not in (None, saved):
        what = f"served the {saved} way" if saved in WAYS else "none of transformers'"
        raise ArtifactError(
            f"the artifact is of a decoder {what}",
            where=type(subject.model).__name__,
            hint="leave way out, or save it anew; piecework.load(path, model) loads what piecework.compile made",
        )
    refuse_model(subject.decoder)
    require_like(kept, subject)  # type: ignore[arg-type]
    first, *encoders = from_bytes(artifact.package.file(FOUND), FOUND)
    parts = iter(artifact.parts())
    way = WAYS[saved].from_found(first, parts, subject)
    for found in encoders:
        encoder = encoder_of(subject)
        if encoder is None:
            raise ArtifactError("the artifact is of a model with an encoder")
        way.encoder = WholeWay.from_found(found, parts, encoder)
    return way


def _serve_by(way: AnyWay, model: nn.Module) -> None:
    for each in way.ways():
        each.decoder.forward = StitchedForward(each)
    # generate() compiles a model for static caches by itself, where this gives it something to
    # compile.
    found = weakref.ref(model)
    model.get_compiled_call = lambda compile_config: found().__call__  # type: ignore[misc, union-attr]


def _sizes(capture: object) -> list[int] | None:
    if capture == AUTO:
        return list(default_capture_sizes(AUTO_MAXIMUM))
    if isinstance(capture, str) or not isinstance(capture, Iterable | None):
        hint = "give a list of sizes, or 'auto'"
        raise ConfigError(f"capture is {capture!r}", where="stitch", hint=hint)
    return None if capture is None else list(capture)


def _full_mode(
    config: CompilationConfig | None, sizes: Sequence[int] | None, limits: Limits
) -> CUDAGraphMode | None:
    """The mode in which decode steps are captured whole; None if none is to be."""
    asked = CUDAGraphMode.NONE if config is None else config.cudagraph_mode
    if any(number is not None and (type(number) is not int or number < 1) for number in limits):
        why = f"max_num_seqs and max_cache_len are positive numbers; got {limits}"
        raise ConfigError(why, where="stitch")
    most, length = limits
    wants_full = sizes is not None and asked.has_mode(CUDAGraphMode.FULL)
    if length is None and most is None and not wants_full:
        return None
    if length is None or sizes is None or asked is CUDAGraphMode.PIECEWISE:
        raise ConfigError(
            "decode steps are captured whole for the sizes in capture and static caches of up to "
            "max_cache_len tokens, in no cudagraph_mode of PIECEWISE",
            where="stitch",
            hint="give capture and max_cache_len, or neither max_cache_len nor max_num_seqs",
        )
    return CUDAGraphMode.FULL_AND_PIECEWISE if asked is CUDAGraphMode.NONE else asked


def _capture(
    model: nn.Module,
    way: FlatWay,
    sizes: Sequence[int],
    full: CUDAGraphMode | None,
    limits: Limits,
    *,
    measured: bool,
) -> None:
    """Capture pieces and head for these numbers of tokens, and decode steps as ``full`` says."""
    entry = stitched_module(model)
    if entry.traces and way.device.type == "cpu":
        _log.warning(
            "static graphs on a CPU are a stand-in for testing, and slower than running uncaptured"
        )
    # Tokens meet in attention alone, which reads the request.
    options: dict[str, object] = {"mode": CUDAGraphMode.PIECEWISE, "pad": True}
    options["context_for"] = dry_request
    if full is not None and entry.traces:
        most, length = limits
        largest = max(sizes, default=1)
        most = min(most or largest, largest)
        runtime = RuntimeConfig(max_num_batched_tokens=max(sizes), max_num_seqs=most)
        static = way.static_decode(most, length or 1)
        options |= {"mode": full, "context_for": static.context_for, "runtime": runtime}
    if measured:
        found = entry.measure(sizes, **options)
        sizes = found.worth_capturing
        others = [f"{row.size} ({row.best})" for row in found.rows if row.size not in sizes]
        if others:
            text = "capture='auto' leaves out sizes that run faster in another way: %s"
            _log.warning(text, ", ".join(others))
    else:
        entry.capture(sizes, progress=False, **options)
    head = model.get_output_embeddings()  # type: ignore[operator]
    # A plain product with its class's own forward and nothing around it.
    plain = isinstance(head, nn.Linear) and "forward" not in vars(head)
    if sizes and entry.traces and plain and not head._forward_hooks and not head._forward_pre_hooks:
        forward = HeadForward(head, way.config)
        forward.stitched.capture(sizes, progress=False)
        head.forward = forward


class FlatHead(nn.Module):
    """A head on one row of hidden states, [tokens, hidden]."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head
        self._function = type(head).forward

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._function(self.head, hidden)


class HeadForward:
    """Stands in for the ``forward`` of a linear head: any batch, by graphs of one row of states."""

    def __init__(self, head: nn.Linear, config: CompilationConfig | None) -> None:
        self._original: Callable[[torch.Tensor], torch.Tensor] = head.forward
        example = head.weight.new_zeros(2, head.in_features)
        self.stitched: StitchedModule = compile_model(FlatHead(head), (example,), config=config)

    @torch.compiler.disable
    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() or torch_compat.compiler_off() is not None:
            return self._original(hidden)
        logits = self.stitched(hidden.reshape(-1, hidden.shape[-1]).contiguous())
        return logits.view(*hidden.shape[:-1], logits.shape[-1])


@short_errors
def save(model: nn.Module, path: Place, *, key_file: str | os.PathLike[str] | None = None) -> None:
    """Write what serves a stitched model, for `load`; if whole, the calls that came so far.

    Raises:
        ArtifactError: something can't be told again in another process, or be written.

    Example:
        >>> save(stitch(model), "bloom.artifact")
    """
    save_ways(_way_of(model).ways(), path, key_file)


@short_errors
def load(path: Place, model: Model, *, key_file: str | os.PathLike[str] | None = None) -> Model:
    """Stitch a causal LM in place by what `save` wrote: nothing is run, traced or compiled.

    Args:
        path, key_file: as in ``piecework.load``.
        model: of the same classes, configuration, source and weights' signature as the saved one.

    Raises:
        ArtifactError: it is missing, damaged, or made for another model or process.
        CaptureError, UsageError: as `stitch`.

    Example:
        >>> load("llama.artifact", other).generate(input_ids)  # in another process
    """
    decoder = _unstitched(model)
    found = Artifact.open(path, key_file)
    config = CompilationConfig.given(found.package.facts["config"], "config")
    _serve_by(_loaded_way(found, Subject(model, decoder, config)), model)
    return model


@short_errors
def unstitch(model: Model) -> Model:
    """Give a stitched model its own forward back, and return it; else a `UsageError`."""
    stitched = _way_of(model)
    model.__dict__.pop("get_compiled_call", None)
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is not None and isinstance(head.__dict__.get("forward"), HeadForward):
        del head.forward
    for way in stitched.ways():
        if inspect.ismethod(way.forward) and way.forward.__func__ is type(way.decoder).forward:
            del way.decoder.forward
        else:
            way.decoder.forward = way.forward
    forget_layers(stitched.decoder)
    return model


@short_errors
def stitched_module(model: nn.Module, entry: str = "input_ids") -> StitchedModule:
    """The stitched module behind a model, with its ``.source``, ``.pieces`` and ``.report()``.

    Args:
        entry: "input_ids", or "inputs_embeds" (compiled now if need be); of a decoder that is served
            whole what serves prompts, "decode" for one more token, "encoder" for that beside it.

    Raises:
        UsageError: the model is not stitched, or there is no such entry.
    """
    return _way_of(model).entry(entry)


@short_errors
def how_served(model: nn.Module) -> Served:
    """Which way a stitched model is served, why, by what, and what its own forward served."""
    way = _way_of(model)
    static = way.static if isinstance(way, FlatWay) else None
    outside = {} if static is None else dict(static.outside)
    return Served(way.name, way.not_flat, way.modules(), way.calls_as_they_are(), outside)


@dataclass(frozen=True, slots=True)
class Served:
    """How a stitched model is served."""

    way: str
    not_flat: str  # why the flat way did not take it, if it was asked
    modules: Mapping[str, StitchedModule]  # by the calls that they serve
    as_it_is: Mapping[str, int]  # calls that the model's own forward served, by reason
    outside: Mapping[str, int]  # steps of static caches outside full graphs, by reason

    def __str__(self) -> str:
        because = f": {self.not_flat}" if self.not_flat else ""
        lines = [f"{self.way}{because}"]
        lines += [f"  {kind}: {made!r}" for kind, made in self.modules.items()]
        lines += [f"  as it is, {n} calls: {why}" for why, n in self.as_it_is.items()]
        lines += [f"  outside full graphs, {n} steps: {why}" for why, n in self.outside.items()]
        return "\n".join(lines)


@short_errors
def sleep(model: nn.Module) -> None:
    """Give the static graphs of a stitched model and their memory back, the head's too; calls run
    uncaptured until `wake_up`.
    """
    for each in _captured_parts(model):
        each.sleep()
    way = _way_of(model)
    if isinstance(way, FlatWay) and way.static is not None:
        way.static.release()


@short_errors
def wake_up(model: nn.Module) -> None:
    """Capture again what was captured of a stitched model before `sleep`, or before its weights
    were rebound; raises as `stitch`.
    """
    for each in _captured_parts(model):
        each.wake_up()


def _captured_parts(model: nn.Module) -> list[StitchedModule]:
    head = model.get_output_embeddings()  # type: ignore[operator]
    forward = None if head is None else head.__dict__.get("forward")
    parts = list(_way_of(model).modules().values())
    if isinstance(forward, HeadForward):
        parts.append(forward.stitched)
    return [each for each in parts if each.was_captured]


class StitchedForward:
    """Stands in for a decoder's ``forward``: takes its arguments, and has them served."""

    def __init__(self, way: AnyWay) -> None:
        self.way = way
        self.__signature__ = inspect.signature(way.forward)
        self._names = tuple(self.__signature__.parameters)
        self._logged: str | None = None

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
        """Whether torch's compiler is off, but for what is compiled; logged once."""
        if self.way.is_compiled(given) and torch_compat.stance_name() != torch_compat.FORCE_EAGER:
            return False
        switch = torch_compat.compiler_off()
        if switch is not None and switch != self._logged:
            self._logged = switch
            name = type(self.way.decoder).__name__
            _log.warning("%s runs as it is, uncompiled: %s", name, switch)
        return switch is not None


def _decoder_of(model: nn.Module) -> nn.Module:
    """The module that turns tokens into hidden states, below the LM head."""
    where = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        why = "this is not a transformers model"
        hint = "use piecework.compile(model) with a splitting_op of your own"
        raise CaptureError(why, where=where, hint=hint)
    for candidate in (model.get_decoder(), model.base_model, getattr(model, "model", None)):
        if isinstance(candidate, PreTrainedModel) and candidate.get_output_embeddings() is None:
            return candidate
    hint = "stitch the decoder module itself"
    if is_encoder_decoder(model):
        hint = (
            "piecework.compile(model.get_encoder(), args) stitches the encoder; "
            "give generate() its result as encoder_outputs"
        )
    raise CaptureError("it has no decoder of transformers' without a head", where=where, hint=hint)


def _unstitched(model: nn.Module) -> nn.Module:
    """The decoder of a model that is not stitched."""
    decoder = _decoder_of(model)
    if isinstance(vars(decoder).get("forward"), StitchedForward):
        raise UsageError(
            "the model is stitched already", where="stitch", hint="call unstitch(model) first"
        )
    return decoder


def _way_of(model: nn.Module) -> AnyWay:
    """How a stitched model is served."""
    decoder = _decoder_of(model)
    forward = vars(decoder).get("forward")
    if not isinstance(forward, StitchedForward):
        raise UsageError(
            "the model is not stitched", where=type(decoder).__name__, hint="call stitch(model)"
        )
    return forward.way
