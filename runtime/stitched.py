"""A model that runs stitched. In: a model and example arguments. Out: a callable like the model, with its source, graph and pieces to read.

The model's weights are shared, never copied; its Python code does not run again after the capture.
"""

from __future__ import annotations

import html
import json
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.fx
from torch.utils import _pytree as pytree

from piecework.codegen import StitchedSource
from piecework.codegen.entry.emit import EntrySource
from piecework.codegen.split.split import SplittingOp as SplittingOpLike
from piecework.codegen.split.split import SplittingOps
from piecework.codegen.stitch.source import collector_paused
from piecework.errors import (
    ArtifactError,
    BindError,
    ConfigError,
    InputError,
    PieceworkError,
    RankError,
    StaticGraphError,
    full_tracebacks,
    short_errors,
    tell,
)
from piecework.runtime import torch_compat
from piecework.runtime.artifact.load import Artifact, require_made_so
from piecework.runtime.artifact.store import Place
from piecework.runtime.batch.descriptor import BatchDescriptor
from piecework.runtime.batch.mode import CUDAGraphMode
from piecework.runtime.batch.sizes import sizes_to_capture
from piecework.runtime.bind.refit import refit
from piecework.runtime.call.doubts import tell_of_gradients, tell_of_training
from piecework.runtime.call.edited import EditedSource
from piecework.runtime.call.entry import OPAQUE
from piecework.runtime.call.execution import Changes
from piecework.runtime.call.failures import add_piece_note
from piecework.runtime.call.shared_module import SharedModule
from piecework.runtime.config.compilation import CompilationConfig, DynamicShapesType, RuntimeConfig
from piecework.runtime.counters import counters
from piecework.runtime.model_tag import current_model_tag
from piecework.runtime.pieces.backend import PieceworkBackend, Trace
from piecework.runtime.pieces.program import Program, unique_pieces
from piecework.runtime.pieces.ranks import require_agreement, runs_alone
from piecework.runtime.pieces.report import Piece, Report
from piecework.runtime.trace.example_sizes import AllDimensions, KeptMarks, SizePolicy, shapes_of
from piecework.runtime.trace.tracing import Capture
from piecework.runtime.traced_model import TracedModel

MAX_TRACES = 8
"""How many traces one model may have; torch's own limit for a function."""

_log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from piecework.runtime.batch.coverage import CoverageRow
    from piecework.runtime.call.shadow import Shadow
    from piecework.runtime.graphs.plan.options import CaptureOptions
    from piecework.runtime.graphs.plan.phase import CaptureWatcher
    from piecework.runtime.graphs.serve.measured import Measurement
    from piecework.runtime.graphs.serve.metrics import Metrics
    from piecework.runtime.graphs.serve.model import CapturedModel
    from piecework.runtime.graphs.serve.report import CallRow, MemoryReport
    from piecework.runtime.observe.profile import Profile


class StitchedModule(SharedModule):
    """A compiled model; see `compile`.

    Attributes:
        model: the model that was given; it holds the weights.
        config: the configuration.
        runtime_config: the program's limits; None if they are not known.
        as_it_is: what a call runs while torch's compiler is switched off: the model, unless something stands around it.
        kept: what another process needs to know to make ``around`` again, as JSON data; None if that can't be told.
    """

    def __init__(
        self,
        model: Callable[..., object],
        *,
        splitting_ops: Sequence[SplittingOpLike] | None = None,
        config: CompilationConfig | None = None,
        sizes: SizePolicy | None = None,
        around: Callable[[], AbstractContextManager[object]] = nullcontext,
        runtime_config: RuntimeConfig | None = None,
        as_it_is: Callable[..., object] | None = None,
        kept: Mapping[str, object] | None = None,
    ) -> None:
        require_model(model)
        super().__init__(model)
        self.runtime_config = runtime_config
        self.as_it_is = _inside(around, model) if as_it_is is None else as_it_is
        self.config = config or CompilationConfig()
        counters.num_models_seen += 1
        tag = current_model_tag()
        self._new_backend = partial(
            PieceworkBackend,
            self.config,
            tag.prefix((runtime_config and runtime_config.model_name) or _model_name(model)),
            tag.is_encoder,
            splitting_ops=splitting_ops,
            runtime_config=runtime_config,
            deferred=True,
        )
        self._empty = self._new_backend()
        self._splitting_ops = splitting_ops
        self._declared = sizes
        self._around = around
        self.kept = kept
        self._sizes: SizePolicy | None = None
        self._traces: tuple[TracedModel, ...] = ()
        self._hopeless: set[object] = set()
        self._capture_again: Callable[[], object] | None = None
        self._tracing = threading.RLock()
        self._changes = Changes()
        self._on_trace: Callable[[TracedModel], object] | None = None
        self._serve_by(self._prepare_and_call)
        self._example: tuple[tuple[object, ...], dict[str, object]] | None = None
        self._said: str | None = None

    # --- use -------------------------------------------------------------------------------------

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Run the model. Shapes may differ from the example's in dynamic dimensions only.

        Under a grad mode that is on, it runs with it off. Under a dispatch or function mode, or after a splitting op was
        given another kernel, it runs through the dispatcher and the public artifacts. While torch's compiler is switched
        off, what is not compiled runs as it is (`piecework.runtime.torch_compat.switches`).

        Raises:
            InputError: the arguments break what the trace assumed, a weight was replaced or moved since it was bound,
                autocast is not as it was in the trace, or a ``torch.func`` transform or forward-mode differentiation is active.
        """
        try:
            return self._call(*args, **kwargs)
        except InputError as error:
            # Its traceback would keep the frames of this call alive, and so what it was called with.
            refused = error.with_traceback(None)
        except Exception as error:
            told = self._told(error)
            if told is error:
                raise
            raise told from error
        return self._serve_otherwise(refused, args, kwargs)

    def forward(self, *args: object, **kwargs: object) -> object:
        """As calling the module."""
        return self(*args, **kwargs)

    @short_errors
    def _serve_otherwise(
        self, error: InputError, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> object:
        """Serve a call that was refused, by another trace or as the model is; else raise what was refused."""
        refusing = next((each for each in self._traces if each.refused(error)), None)
        if refusing is not None:
            return self._call_another({refusing: error}, args, kwargs)
        if self._outdated(error):
            return self.as_it_is(*args, **kwargs)
        raise error

    def _outdated(self, error: InputError) -> bool:
        """Whether a call failed before anything ran, and runs as it is since torch's compiler is switched off."""
        return any(each.is_outdated(error) for each in self._traces) and self._switched_off()

    def _call_another(
        self,
        refusals: dict[TracedModel, InputError],
        args: tuple[object, ...],
        kwargs: dict[str, object],
    ) -> object:
        """Serve a call that one trace refused by another; by one that is made now, if its sizes are why."""
        while True:
            for each in (trace for trace in self._traces if trace not in refusals):
                try:
                    result = each.call(*args, **kwargs)
                except InputError as error:
                    if not each.refused(error):
                        if not self._outdated(error):
                            raise
                        return self.as_it_is(*args, **kwargs)
                    refusals[each] = error.with_traceback(None)
                else:
                    self._serve_by(each.call)
                    return result
            # What no trace could serve, such as a replaced weight, goes before sizes, which each of them has its own of.
            others = (error for error in refusals.values() if error.places is None)
            refused = next(others, refusals[self._traces[0]])
            if not self._trace_another(refused, len(refusals), args, kwargs):
                if self._switched_off():
                    return self.as_it_is(*args, **kwargs)
                raise refused

    def __repr__(self) -> str:
        """The model's name and what was made of it."""
        name = self._empty.prefix or _model_name(self.model)
        if not self._traces:
            return f"StitchedModule({name}, not compiled yet)"
        program = self.program
        cuts = sum(item.is_splitting_graph for item in program.items)
        parts = [
            name,
            _count(len(program.backends), "piece", unique_pieces(program.backends)),
            _count(cuts, "cut") if cuts else "",
            program.compiler,
        ]
        if len(self._traces) > 1:
            parts.append(f"{len(self._traces)} traces")
        captured = sorted({n for each in self._traces if each.static for n in each.static.sizes})
        parts.append(f"captured for {', '.join(map(str, captured))}" if captured else "")
        return f"StitchedModule({', '.join(filter(None, parts))})"

    def _repr_html_(self) -> str:
        """For notebooks: what `__repr__` says, the report, and the source to unfold."""
        if not self._traces:
            return f"<pre>{html.escape(repr(self))}</pre>"
        texts = {"Report": str(self.report()), "Source": self.source.code}
        folded = (
            f"<details><summary>{title}</summary><pre>{html.escape(text)}</pre></details>"
            for title, text in texts.items()
        )
        return f"<pre>{html.escape(repr(self))}</pre>{''.join(folded)}"

    def __reduce_ex__(self, protocol: object) -> object:
        """Refused: compiled pieces belong to this process, and a copy would share the weights of ``model``.

        Raises:
            BindError: always.
        """
        raise BindError(
            "a stitched module can't be copied or pickled: it holds compiled code and the weights of its model",
            hint="copy or pickle the model, and compile it again: what was compiled once comes from the cache",
        )

    def _serve_by(self, call: Callable[..., object]) -> None:
        """Let calls run ``call`` from now on; what a trace serves them by is its `Entry`'s business."""
        vars(self)["_call"] = call  # may be a module, and may happen often: not by __setattr__

    def _prepare_and_call(self, *args: object, **kwargs: object) -> object:
        if self._switched_off():
            return self.as_it_is(*args, **kwargs)
        with self._tracing:
            if not self._traces:  # another thread may have been first
                traced, by_name = (args, kwargs) if self._example is None else self._example
                self.prepare(*traced, **by_name)
        return self._call(*args, **kwargs)

    def _first_call(self, *args: object, **kwargs: object) -> object:
        """The first call under a configuration that asks for captures: it is the last moment to say that there are none."""
        first = self._traces[0]
        if not any(each.static for each in self._traces):
            tell(
                StaticGraphError(
                    f"nothing is captured, and the configuration says cudagraph_mode={self.config.cudagraph_mode.name}",
                    where=self._empty.prefix,
                    hint="call capture(sizes) on the stitched module before it serves",
                ),
                strict=self.config.strict,
            )
        self._serve_by(first.call)
        return first.call(*args, **kwargs)

    def _switched_off(self) -> bool:
        """Whether torch's compiler is off, so that what is not compiled runs as it is; each switch is logged once."""
        switch = torch_compat.compiler_off()
        if switch is not None and switch != self._said:
            self._said = switch
            _log.warning("%s runs as it is, uncompiled: %s", self._empty.prefix, switch)
        return switch is not None

    def _told(self, error: Exception) -> Exception:
        """``error`` with what piecework knows of where it came from."""
        if torch_compat.stance_name() == torch_compat.FORCE_EAGER:
            return error
        for each in self._traces:
            changed = each.entry.weights.change()
            if changed is not None and not isinstance(error, PieceworkError):
                return changed
            add_piece_note(error, each.program.source)
        return error

    @short_errors
    def prepare(self, *args: object, **kwargs: object) -> None:
        """Capture, compile and stitch now, tracing with these arguments.

        While torch's compiler is switched off nothing is done, which is logged; these arguments are traced with at the first
        call after that.
        """
        with self._tracing:
            if self._traces:
                raise BindError("this module is compiled already", hint="compile the model again")
            if self._switched_off():
                self._example = (args, kwargs)
                return
            self._prepare(args, kwargs)
            self._example = None

    def _prepare(self, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        with self._tracing:
            if self.config.dynamic_shapes_config.type is DynamicShapesType.AUTO:
                self._sizes = self._declared or _policy_of(args, kwargs)
            tell_of_training(self.model, self.config.strict)
            tell_of_gradients(args, kwargs, self.config.strict)
            self._trace(args, kwargs)
        captures = self.config.cudagraph_mode is not CUDAGraphMode.NONE
        self._serve_by(self._first_call if captures else self._traces[0].call)

    def _trace(self, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
        quiet = nullcontext() if full_tracebacks() else torch_compat.quiet_trial()
        with self._around(), quiet:
            made = TracedModel(
                self.model, args, kwargs, self._backends(), self._sizes, self.as_it_is
            )
        if self._around is not nullcontext:
            made.entry.accept_settings()
        require_agreement(made.program, self.runtime_config)
        if self._on_trace is not None:
            self._on_trace(made)
        self._traces = (*self._traces, made)

    def _backends(self) -> Callable[[], PieceworkBackend]:
        """What makes the backends of the next trace; the first one of all is the one that `backend` has shown so far."""
        shown = [] if self._traces else [self._empty]
        if self._sizes is None:
            trace = Trace.ONLY
        else:
            trace = Trace.ANOTHER if self._traces else Trace.FIRST

        def make() -> PieceworkBackend:
            backend = shown.pop() if shown else self._new_backend()
            backend.trace = trace
            return backend

        return make

    def _trace_another(
        self, refused: InputError, tried: int, args: Sequence[object], kwargs: Mapping[str, object]
    ) -> bool:
        """Trace the model for sizes that no trace serves; False if that is not why the call was refused, or can't be done."""
        sizes, places = self._sizes, refused.places
        if sizes is None or places is None or not torch_compat.may_recompile():
            return False
        if any(dim is not None and not sizes.may_differ(leaf, dim) for leaf, dim in places):
            return False
        with self._tracing:
            if len(self._traces) > tried:  # somebody else's call was first
                return True
            weights = [each.entry.weights.identities() for each in self._traces]
            shapes = shapes_of(args, kwargs, set().union(*weights))
            if shapes in self._hopeless or len(self._traces) >= MAX_TRACES:
                return False
            self._hopeless.add(shapes)  # unless it gets a trace now
            _log.info("tracing the model again: %s", refused)
            try:
                self._trace(args, kwargs)
            except PieceworkError as error:
                refused.add_note(f"A trace for these sizes is not to be had: {error}")
                raise refused from error
            return True

    @short_errors
    def rebind(self) -> None:
        """Hold the weights that the model has now: call it after replacing a parameter or a submodule.

        A call notices weights that were replaced, moved or converted, and raises `InputError`; see
        `piecework.runtime.bind.weights` for how. Values changed in place (``load_state_dict``, an optimizer's step) are seen
        without this.

        Raises:
            BindError: there is nothing to rebind yet; a weight is missing, or has another dtype, device or shape than
                the trace had. What was bound stays bound then.

        Example:
            >>> model.load_state_dict(state, assign=True)
            >>> stitched.rebind()
        """
        self._require_traced("binding")
        with self._changes.one("rebind()"), self._tracing:
            ready = [each.entry.rebound() for each in self._traces]  # all of them, or none
            for each, execution in zip(self._traces, ready, strict=True):
                each.entry.publish(execution)

    @short_errors
    def refit(self, state: Mapping[str, torch.Tensor]) -> None:
        """Copy new values into the model's weights, where they lie: pieces and static graphs go on with them, nothing is bound or captured anew.

        All of it is checked before anything is copied. No call may run meanwhile: it would see some old weights and some new ones.

        Args:
            state: parameters and buffers by their names in ``model``, all or some of them.

        Raises:
            BindError: the model has no weight of such a name, it has another shape or dtype, or one weight has two names and two
                new values; nothing is changed then.

        Example:
            >>> stitched.refit(trained.state_dict())
        """
        copies = refit(self.model, state)
        with self._changes.one("refit()"), torch.no_grad():
            for weight, new in copies():
                weight.copy_(new)

    def accept_settings(self) -> None:
        """Stop refusing calls over attributes that are not as they were while the model was traced.

        For who sets something for the trace alone, as the transformers integration sets the attention implementation: call it
        after setting it back.

        Raises:
            BindError: the model is not compiled yet.
        """
        self._require_traced("trace to compare with")
        with self._changes.one("accept_settings()"), self._tracing:
            for each in self._traces:
                each.entry.accept_settings()

    @short_errors
    def use_edited(self, code: str) -> EditedSource:
        """Run an edited version of the stitching source from now on.

        Args:
            code: the edited text; it must keep the signature and the names of the generated one.

        Returns:
            The text with its proof, or with its first difference from the graph: an edit may mean to differ.

        Raises:
            EmitError: the text breaks the contract; what ran before still runs.
        """
        first, *_ = self._require_traced("source to edit")
        with self._changes.one("use_edited()"):
            edited = first.use_edited(code)
            self._serve_by(first.call)
        return edited

    @short_errors
    def save(self, path: Place, *, key_file: str | os.PathLike[str] | None = None) -> None:
        """Write what was compiled to a directory or URL, for ``piecework.load(path, model)`` in another process.

        Every trace that there is goes with it, and the one that serves a batch of one, which is made now if no trace does. No weight is written; an edited
        source is, marked as edited. An artifact that is there is replaced.

        Args:
            path: the directory; or a URL that fsspec knows, such as ``s3://bucket/model``, where it is one object.
            key_file: a file with a secret (16 bytes or more) that signs the artifact; by default the one that
                ``PIECEWORK_CACHE_KEY_FILE`` names, if any.

        Raises:
            ArtifactError: something can't be told again in another process, which is named; or the directory can't be written.
            BindError: the model is not compiled yet.

        Example:
            >>> piecework.compile(model, (x,)).save("model.artifact")
            >>> stitched = piecework.load("model.artifact", model)  # in another process
        """
        from piecework.runtime.artifact.save import save
        from piecework.runtime.graphs.plan.options import CaptureOptions

        self._require_traced("artifact")
        if self._around is not nullcontext and self.kept is None:
            raise ArtifactError(
                "the model was traced in a context of its caller's, which says nothing that another process could make it of",
                where=self._empty.prefix,
                hint="compile it in each process: compiled pieces come from the cache",
            )
        with self._changes.one("save()"), self._tracing:
            symbols = self._traces[0].entry.made.plan.symbols
            if any(each.low is not None and each.low > 1 for each in symbols):
                # A graph without a batch has no batch of one, and an object of the user's can't be made up.
                with suppress(PieceworkError, TypeError):
                    self._trace_of_one(None, CaptureOptions(runtime=self.runtime_config))
            with collector_paused():
                save(path, self.model, self._traces, self.made_with(), key_file=key_file)

    def made_with(self) -> dict[str, object]:
        """How this module was made, as JSON data: another one that is made so does the same.

        Raises:
            ArtifactError: the configuration holds code.
        """
        from piecework.runtime.artifact.save import config_data

        ops = self._splitting_ops
        runtime = self.runtime_config
        return {
            "config": config_data(self.config),
            "runtime config": None if runtime is None else json.loads(runtime.model_dump_json()),
            "splitting ops": None if ops is None else list(SplittingOps(ops).declared),
            "sizes": None if self._sizes is None else type(self._sizes).__name__,
            "kept": None if self.kept is None else dict(self.kept),
        }

    def take(self, artifact: Artifact) -> None:
        """Serve calls by the traces of an artifact; for ``piecework.load``.

        Raises:
            ArtifactError: it does not fit this module's model.
            RankError: another process would run something else.
        """
        with self._tracing:
            made = artifact.traces(self.model, self.config, self._backends, self.as_it_is)
            if artifact.folder.facts.get("sizes") == AllDimensions.__name__:
                self._sizes = AllDimensions()
            if self._declared is not None:
                self._sizes = self._declared
            for each in made:
                require_agreement(each.program, self.runtime_config)
            self._traces = made
            self._serve_by(made[0].call)

    def require_made_so(
        self, artifact: Artifact, args: Sequence[object], kwargs: Mapping[str, object]
    ) -> None:
        """Raise `ArtifactError` if an artifact was made with another configuration than this module has."""
        if self.config.dynamic_shapes_config.type is DynamicShapesType.AUTO:
            self._sizes = self._declared or _policy_of(args, kwargs)
        require_made_so(artifact.folder.facts, self.made_with())

    def accepts(self, *args: object, **kwargs: object) -> bool:
        """Whether a trace that there is serves a call with these arguments; runs nothing but the emitted checks."""
        return any(each.entry.accepts(args, kwargs) for each in self._traces)

    def forget(self) -> None:
        """Be as before anything was compiled; for an artifact that was taken and does not serve."""
        self._traces, self._sizes, self._capture_again = (), None, None
        self._serve_by(self._prepare_and_call)

    @short_errors
    def capture(
        self,
        sizes: Iterable[int] | None = None,
        *,
        memory_budget: int | None = None,
        progress: bool | CaptureWatcher = True,
        estimate: bool = True,
        **options: object,
    ) -> StitchedModule:
        """Capture the pieces, the whole forward, or both as static graphs, per batch size, and serve later calls from them.

        A call is padded to the next captured size, replayed by emitted source (``static_graphs.source_for``), and trimmed; a
        batch that no graph covers runs as before. Batches are padded only where every operator is known to keep rows apart, splitting
        ops by what they say of themselves (``splitting_op(..., rows=...)``); else only batches of a captured size are replayed.

        Args:
            sizes: batch sizes; by default the configuration's ``cudagraph_capture_sizes``, or the usual steps.
            memory_budget: bytes that the captures may take; sizes that don't fit are dropped.
            progress: print the memory report and a progress bar; or a watcher of one's own.
            estimate: measure a few captures first, for the memory report.
            options: fields of `piecework.runtime.graphs.plan.options.CaptureOptions`, such as ``mode="FULL_AND_PIECEWISE"``;
                ``runtime`` is what the model was compiled with by default.

        Returns:
            This module. While torch's compiler is switched off and nothing is compiled, nothing is captured either.

        Raises:
            StaticGraphError: the graph can't be captured, or a capture failed; what was captured before it serves. Or a splitting
                op of this model calls it: a capture would write to the state of the request that is running.
            KeyboardInterrupt: Ctrl-C, likewise.

        Example:
            >>> stitched = piecework.compile(model, (x,)).capture([1, 2, 4, 8])
            >>> print(stitched.static_graphs.source_for(3))
        """
        from piecework.runtime.graphs.plan.options import CaptureOptions

        if not self._traces and self._switched_off():
            return self
        first, *_ = self._require_traced("graph to capture")
        sizes = sizes_to_capture(sizes)
        if memory_budget is not None and (type(memory_budget) is not int or memory_budget < 0):
            raise ConfigError(
                f"a memory budget is a number of bytes; got {memory_budget!r}",
                where="memory_budget",
            )
        if type(progress) is not bool and not hasattr(progress, "started"):
            raise ConfigError(f"progress is True, False or a watcher; got {progress!r}")
        runtime = options.setdefault("runtime", self.runtime_config)
        if runtime is not None:
            options["runtime"] = RuntimeConfig.given(runtime, "runtime")
        for each in self._traces:
            each.entry.require_idle("capture()")
        wish = CaptureOptions.given(options)
        wanted = None if sizes is None else list(sizes)
        with self._changes.one("capture()"):
            self._capture_again = partial(
                self.capture,
                sizes,
                memory_budget=memory_budget,
                progress=False,
                estimate=False,
                **options,  # type: ignore[arg-type]
            )
            single = self._trace_of_one(wanted, wish)
            if single is not None:
                captured = single.capture_graphs(
                    [1],
                    wish,
                    memory_budget=memory_budget,
                    progress=progress,
                    estimate=estimate,
                    fixed=first.batch_of_one(),
                )
                wanted = None if wanted is None else [size for size in wanted if size != 1]
                memory_budget = memory_budget and memory_budget - captured.graphs.nbytes
            if wanted != []:
                first.capture_graphs(
                    wanted,
                    wish,
                    memory_budget=memory_budget,
                    progress=progress,
                    estimate=estimate,
                )
        return self

    @property
    def was_captured(self) -> bool:
        """Whether `wake_up` knows what to capture."""
        return self._capture_again is not None

    def sleep(self) -> None:
        """Give the static graphs and their memory back, until `wake_up`. Calls run uncaptured meanwhile; one that is in a graph finishes there.

        Weights stay where they are.

        Example:
            >>> stitched.sleep()
            >>> train(model)  # in place
            >>> stitched.wake_up()
        """
        with self._changes.one("sleep()"), self._tracing:
            platforms = [each.static.graphs.platform for each in self._traces if each.static]
            for each in self._traces:
                each.give_up_graphs()
            for platform in platforms:
                platform.release_cached_memory()

    @short_errors
    def wake_up(self) -> None:
        """Capture again what the last `capture` did, after `sleep`, or after a `rebind` that gave the graphs up.

        Raises:
            BindError: nothing was captured before.
            StaticGraphError: as `capture`.
        """
        if self._capture_again is None:
            raise self._nothing_captured()
        self._capture_again()

    @short_errors
    def measure(
        self, sizes: Iterable[int] | None = None, *, seconds: float = 0.3, **options: object
    ) -> Measurement:
        """Capture, time each size eager, stitched and captured in one interleaved run, and keep the graphs that were worth it.

        A graph that was slower than another way by more than 2% is given up; sizes for which the model itself was the fastest are run
        stitched, and the measurement says so. Calls are made with zeros, in the context of a run on dummy inputs, and what they write
        is put back. On a CPU static graphs are a stand-in for testing, and mostly slower than running uncaptured.

        Args:
            sizes, options: as for `capture`.
            seconds: how long each size is timed.

        Raises:
            StaticGraphError: as `capture`.

        Example:
            >>> rich.print(stitched.measure([1, 2, 4, 8]).table())
        """
        from piecework.runtime.graphs.serve.measured import CAPTURED, Measurement

        if not isinstance(seconds, (int, float)) or not seconds > 0:
            raise ConfigError(f"seconds must be a positive number; got {seconds!r}")
        options.setdefault("progress", False)
        if not all(runs_alone(each.program, self.runtime_config) for each in self._traces):
            raise RankError(
                "a model that several processes run together is not measured: each would call it as often as its own clock says",
                hint="measure one share of the model alone, and capture the sizes that are worth it on all ranks",
            )
        self.capture(sizes, **options)  # type: ignore[arg-type]
        rows = [row for each in self._traces for row in each.measure(seconds=seconds)]
        found = Measurement(tuple(sorted(rows, key=lambda row: row.size)), self._device())
        worth = found.worth_capturing
        if any(row.best != CAPTURED for row in rows):
            for each in self._traces:
                each.give_up_graphs()
            self._capture_again = None
            if worth:
                self.capture(worth, **options)  # type: ignore[arg-type]
        return found

    def _device(self) -> str:
        held = (each.static.graphs for each in self._traces if each.static)
        return next((graphs.platform.device.type for graphs in held), "cpu")

    def _trace_of_one(
        self, sizes: Sequence[int] | None, options: CaptureOptions
    ) -> TracedModel | None:
        """The trace that serves a batch of one, if it is to be captured and the first trace does not serve it."""
        if sizes is None:
            sizes = self.config.cudagraph_capture_sizes
        if self._sizes is None or (sizes is not None and 1 not in sizes):
            return None
        call = self._traces[0].call_of_one(options)
        if call is None:
            return None
        with self._tracing:
            found = next((each for each in self._traces if each.entry.accepts(*call)), None)
            if found is not None:
                return found
            try:
                self._trace(*call)
            except PieceworkError:
                if sizes is not None:
                    raise
                return None  # nobody asked for it
            return self._traces[-1]

    @property
    def static_graphs(self) -> CapturedModel:
        """The static graphs, after `capture`: coverage, memory, replay source.

        Those of the first trace that has some; a batch of one may have a trace, and static graphs, of its own (`traces`).
        """
        return self._captured()[0]

    def _captured(self) -> list[CapturedModel]:
        found = [each.static for each in self._traces if each.static is not None]
        if not found:
            raise self._nothing_captured()
        return found

    def _nothing_captured(self) -> BindError:
        return BindError(
            "nothing is captured",
            where=None if self._traces else torch_compat.compiler_off(),
            hint="call wake_up()" if self.was_captured else "call capture(sizes) first",
        )

    def dispatch(
        self, num_tokens: int, uniform_decode: bool = False, **kind: Any
    ) -> tuple[CUDAGraphMode, BatchDescriptor]:
        """What a batch runs as now, for an engine that pads state of its own to the captured size and says both in the forward context.

        Args:
            num_tokens, uniform_decode, kind: as for `CudagraphDispatcher.dispatch`; asked is the trace that serves this size.

        Returns:
            Mode and descriptor; NONE and the batch's own size where nothing is captured.

        Example:
            >>> mode, shape = stitched.dispatch(3)
            >>> with set_forward_context(metadata_for(shape), cudagraph_runtime_mode=mode, batch_descriptor=shape):
            ...     stitched(x)
        """
        for each in self._traces:
            if each.static is not None and each.static.serves(num_tokens):
                return each.static.dispatcher.dispatch(num_tokens, uniform_decode, **kind)
        return CUDAGraphMode.NONE, BatchDescriptor(num_tokens)

    def coverage(self, max_num_batched_tokens: int | None = None) -> list[CoverageRow]:
        """How each batch size runs: captured, padded or uncaptured, and why."""
        rows = [row for each in self._captured() for row in each.coverage(max_num_batched_tokens)]
        return sorted(rows, key=lambda row: row.first)

    def call_report(self) -> list[CallRow]:
        """What the calls since `capture` ran as, how many, and why."""
        rows = [row for each in self._captured() for row in each.calls()]
        return sorted(rows, key=lambda row: -row.calls)

    def memory_report(self) -> MemoryReport:
        """What the static graphs were expected to take, and take."""
        first, *others = (each.memory_report() for each in self._captured())
        for other in others:
            first = replace(
                first, held={**other.held, **first.held}, dropped=(*first.dropped, *other.dropped)
            )
        return first

    def metrics(self, *, name: str | None = None, profile: Profile | None = None) -> Metrics:
        """What calls ran as, their padding, what graphs hold, traces, and the process's counters; ``prometheus()`` of it is the text.

        It reads what is counted anyway. Counts begin anew with each `capture`; calls of a model that nothing is captured of are
        not counted, for counting them would be the larger part of what stitching costs.

        Args:
            name: tells this model from others of the process; by default its class's.
            profile: what `profile` gave, for the time of each piece.

        Raises:
            ConfigError: ``name`` is no text, or ``profile`` no profile.

        Example:
            >>> text = stitched.metrics().prometheus()
        """
        from piecework.runtime.graphs.serve.metrics import Metrics, ModelMetrics
        from piecework.runtime.observe.profile import Profile

        if name is not None and not isinstance(name, str):
            raise ConfigError(f"a model's name is a text; got {name!r}", where="name")
        if profile is not None and not isinstance(profile, Profile):
            raise ConfigError(
                f"profile takes what profile(...) returned; got a {type(profile).__qualname__}",
                where="profile",
            )
        traces = self._traces
        phases: dict[str, float] = {}
        for each in traces:
            for phase, seconds in dict(each.program.phases).items():
                phases[phase] = phases.get(phase, 0.0) + seconds
        held = {
            (mode.name, descriptor.describe()): size
            for each in traces
            if each.static is not None
            for (mode, descriptor), size in each.static.graphs.bytes_by_descriptor().items()
        }
        model = ModelMetrics(
            name=name or self._empty.prefix or _model_name(self.model),
            calls=tuple(row for each in traces for row in each.calls()),
            graph_bytes=held,
            traces=len(traces),
            phase_seconds=phases,
            stages=() if profile is None else profile.rows,
        )
        return Metrics((model,), counters.snapshot())

    @contextmanager
    def named_pieces(self) -> Iterator[None]:
        """Show pieces and operators by name and layer in ``torch.profiler`` for the block; costs nothing outside it.

        Example:
            >>> with torch.profiler.profile() as profile, stitched.named_pieces():
            ...     stitched(x)
        """
        with self._named("piece to name"):
            yield

    @contextmanager
    def _named(self, what: str, *, by_layer: bool = True) -> Iterator[None]:
        with ExitStack() as stack:
            for each in self._require_traced(what):
                stack.enter_context(each.named_pieces(by_layer=by_layer))
            yield

    @short_errors
    def profile(self, *args: object, profiled_calls: int = 20, **kwargs: object) -> Profile:
        """Where a forward spends its time: a row for each piece and each operator that is called straight, by torch's profiler.

        Args:
            args, kwargs: the model's.
            profiled_calls: how many forwards are timed, without the profiler and with it.

        Raises:
            BindError: the model is not compiled yet.
            ConfigError: ``profiled_calls`` is no positive number.

        Example:
            >>> print(stitched.profile(x))
        """
        from piecework.runtime.observe.profile import profile_calls

        stages = {}
        for each in self._require_traced("piece to profile"):
            stages |= each.stages()
        if type(profiled_calls) is not int or profiled_calls < 1:
            raise ConfigError(
                f"profiled_calls must be a positive number; got {profiled_calls!r}",
                where="profiled_calls",
            )
        named = self._named("piece to profile", by_layer=False)
        return profile_calls(lambda: self(*args, **kwargs), named, stages, profiled_calls)

    @contextmanager
    def shadow(
        self, *, rtol: float | None = None, atol: float | None = None, every: int = 1
    ) -> Iterator[Shadow]:
        """Run the uncompiled graph of each piece beside it for the block, on the same inputs, and compare; calls get what the pieces computed.

        Calls run uncaptured meanwhile, whatever is captured: graphs are left as they are and serve again after the block. The model can't
        be changed in the block (`rebind`, `capture`, …).

        Args:
            rtol, atol: what an output may differ by: ``atol + rtol * its largest value``. By default by the least precise dtype in the piece,
                1e-4 and 1e-5 for float32; integers have to be equal.
            every: compare each call of so many, the first one among them.

        Returns:
            What is found so far: the ``first`` piece that differs, all ``differences``, how many ``calls``, and pieces that are ``left_out``
            since running them twice could show.

        Raises:
            BindError: the model is not compiled yet, or no piece of it can be run twice.
            ConfigError: a tolerance is no number from 0, or ``every`` no positive number.
            ArtifactError: the model was loaded from an artifact without graphs.

        Example:
            >>> with stitched.shadow() as found:
            ...     stitched(x)
            >>> print(found)
        """
        from piecework.runtime.call.shadow import Shadow

        found = Shadow(rtol, atol, every)
        self._require_traced("piece to compare")
        with self._changes.one("shadow()"), ExitStack() as stack:
            with self._tracing:
                for each in self._traces:
                    stack.enter_context(each.shadowed(found))
                found.require_some()
                self._on_trace = lambda made: stack.enter_context(made.shadowed(found))
            try:
                yield found
            finally:
                with self._tracing:
                    self._on_trace = None
                    stack.close()

    # --- what was made ---------------------------------------------------------------------------

    @property
    def source(self) -> StitchedSource:
        """The emitted source, exactly what runs."""
        return self._require_traced("source")[0].program.source

    @property
    def entry_source(self) -> EntrySource:
        """The emitted source of ``check_inputs`` and of the function behind a call, exactly what runs."""
        return self._require_traced("entry_source")[0].entry.source

    @property
    def entry(self) -> Callable[..., object]:
        """The emitted function itself, with the model's own parameters; a call through it saves one Python call.

        It serves the sizes of the first trace only.
        """
        return self._require_traced("entry")[0].entry.call

    @property
    def program(self) -> Program:
        """Everything that the compilation made."""
        return self._require_traced("program")[0].program

    @property
    def backend(self) -> PieceworkBackend:
        """What compiled the pieces and emitted the source."""
        return self._traces[0].backend if self._traces else self._empty

    @property
    def captured(self) -> Capture:
        """What the trace gave."""
        return self._require_traced("capture")[0].entry.captured

    @property
    def split_gm(self) -> torch.fx.GraphModule:
        """The stitching graph."""
        return self._require_traced("split_gm")[0].program.split_gm

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The compiled pieces, in order of execution."""
        return self._require_traced("pieces")[0].program.pieces()

    @property
    def traces(self) -> tuple[TracedModel, ...]:
        """The traces that serve calls, each with its entry, source and static graphs, in the order in which they were made.

        There is one, unless calls came whose sizes need a trace of their own: 0 or 1 where the first one has more, or arguments
        that are one tensor. What this module shows of itself (`source`, `pieces`, …) is the first one's.
        """
        return self._traces

    def report(self) -> Report:
        """What the compilation did: pieces, unique pieces, seconds per phase."""
        return self._require_traced("report")[0].program.report()

    def _require_traced(self, what: str) -> tuple[TracedModel, ...]:
        if not self._traces:
            raise self._not_yet(what)
        return self._traces

    def _not_yet(self, what: str) -> BindError:
        switch = torch_compat.compiler_off()
        if switch is not None:
            return BindError(
                f"there is no {what}: torch's compiler is switched off, and the model runs as it is",
                where=switch,
                hint="switch it on again, and compile the model or call it",
            )
        return BindError(
            f"there is no {what} yet: the model is compiled at its first call",
            hint="pass example arguments to piecework.compile, or call the module once",
        )


torch_compat.keep_out_of_traces(StitchedModule.__call__, OPAQUE)  # type: ignore[arg-type]


def _count(number: int, what: str, different: int | None = None) -> str:
    text = f"{number} {what}{'' if number == 1 else 's'}"
    return text if different in (None, number) else f"{text} ({different} different)"


def require_model(model: object) -> None:
    """Refuse what can't be called as a model, or is stitched already.

    Raises:
        ConfigError: it is no callable, a class, or a stitched module.
    """
    if isinstance(model, type):
        raise ConfigError(
            f"{model.__qualname__} is a class, not a model",
            hint=f"pass an instance: {model.__qualname__}(...)",
        )
    if isinstance(model, StitchedModule):
        raise ConfigError("the model is stitched already", hint="call it, or compile its .model")
    if not callable(model):
        raise ConfigError(f"a model must be callable; got a {type(model).__qualname__}")


def _policy_of(args: Sequence[object], kwargs: Mapping[str, object]) -> SizePolicy:
    marks = KeptMarks(pytree.tree_leaves((tuple(args), dict(kwargs))))
    return marks if marks.any else AllDimensions()


def _inside(
    around: Callable[[], AbstractContextManager[object]], model: Callable[..., object]
) -> Callable[..., object]:
    """``model`` as its traces see it."""
    if around is nullcontext:
        return model

    def run(*args: object, **kwargs: object) -> object:
        with around():
            return model(*args, **kwargs)

    return run


def _model_name(model: Callable[..., object]) -> str:
    if isinstance(model, torch.nn.Module):
        return type(model).__name__
    return str(getattr(model, "__qualname__", type(model).__name__)).rpartition("<locals>.")[2]
