"""A model that runs stitched. In: a model and example arguments. Out: a callable like the model, with its source, graph and pieces to read.

The model's weights are shared, never copied; its Python code does not run again after the capture.
"""

from __future__ import annotations

import html
import os
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.fx

from piecework.codegen import StitchedSource
from piecework.codegen.entry.emit import EntrySource
from piecework.codegen.split.split import SplittingOp as SplittingOpLike
from piecework.collector import collector_paused
from piecework.errors import (
    ArtifactError,
    BindError,
    ConfigError,
    InputError,
    StaticGraphError,
    short_errors,
    short_methods,
    tell,
)
from piecework.runtime import torch_compat
from piecework.runtime.analysis.doubts import tell_of_gradients, tell_of_training
from piecework.runtime.artifact.fit import made_with, require_made_so
from piecework.runtime.artifact.load import Artifact
from piecework.runtime.batch.descriptor import BatchDescriptor
from piecework.runtime.batch.mode import CUDAGraphMode
from piecework.runtime.call.edited import EditedSource
from piecework.runtime.call.shared_module import SharedModule, model_name, require_model
from piecework.runtime.config.compilation import CompilationConfig, RuntimeConfig
from piecework.runtime.counters import counters
from piecework.runtime.model_tag import current_model_tag
from piecework.runtime.pieces.backend import PieceworkBackend
from piecework.runtime.pieces.program import Program
from piecework.runtime.pieces.report import Piece, Report
from piecework.runtime.store.folder import Place
from piecework.runtime.trace.errors import OPAQUE
from piecework.runtime.trace.one_trace import ModelTrace
from piecework.runtime.trace.sizes.example_sizes import SizePolicy
from piecework.runtime.traces import observed
from piecework.runtime.traces.captured import CapturedTraces
from piecework.runtime.traces.traced_model import TracedModel
from piecework.runtime.traces.traces import Traces, inside, seen_into
from piecework.runtime.watch.weights import refit

if TYPE_CHECKING:
    from piecework.runtime.artifact.save import Part
    from piecework.runtime.batch.coverage import Coverage
    from piecework.runtime.call.shadow import Shadow
    from piecework.runtime.graphs.plan.phase import CaptureWatcher
    from piecework.runtime.graphs.serve.measured import Measurement
    from piecework.runtime.graphs.serve.metrics import Metrics
    from piecework.runtime.graphs.serve.model import CapturedModel
    from piecework.runtime.graphs.serve.report import CallRow, MemoryReport
    from piecework.runtime.observe.profile import Profile


@short_methods
class StitchedModule(SharedModule):
    """A compiled model; see `compile`.

    Attributes:
        model: the model that was given; it holds the weights.
        config: the configuration.
        runtime_config: the program's limits; None if they are not known.
        as_it_is: what a call runs while torch's compiler is switched off: the model, unless something stands around it.
        kept: what another process needs to know to make ``around`` again, as JSON data; None if that can't be told. Its "load" names what loads an artifact,
            and "save" what saves it, where other modules serve the same model.
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
        self.as_it_is = inside(around, model) if as_it_is is None else as_it_is
        self.config = config or CompilationConfig()
        counters.num_models_seen += 1
        tag = current_model_tag()
        new_backend = partial(
            PieceworkBackend,
            self.config,
            tag.prefix((runtime_config and runtime_config.model_name) or model_name(model)),
            tag.is_encoder,
            splitting_ops=splitting_ops,
            runtime_config=runtime_config,
            deferred=True,
        )
        self._splitting_ops = splitting_ops
        self._around = around
        self.kept = kept
        self._traces = Traces(model, new_backend, sizes, around, self.as_it_is, runtime_config)
        self._graphs = CapturedTraces(self._traces, runtime_config)
        self._serve_by(self._prepare_and_call)
        self._example: tuple[tuple[object, ...], dict[str, object]] | None = None

    # --- use -------------------------------------------------------------------------------------

    def __call__(self, *args: object, **kwargs: object) -> Any:
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
            told = self._traces.told(error, args, kwargs)
            if told is error:
                raise
            raise told from error
        return self._serve_otherwise(refused, args, kwargs)

    def forward(self, *args: object, **kwargs: object) -> Any:
        """As calling the module."""
        if not isinstance(args, tuple):  # torch.fx.symbolic_trace gives one proxy for all of them
            raise seen_into()
        return self(*args, **kwargs)

    @short_errors
    def _serve_otherwise(
        self, error: InputError, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> object:
        result, served = self._traces.serve_refused(error, args, kwargs)
        if served is not None and self._traces.comes_first(served):
            self._serve_by(served.call)
        return result

    def __repr__(self) -> str:
        """The model's name and what was made of it."""
        return f"StitchedModule({observed.summary(self._traces)})"

    def _repr_html_(self) -> str:
        """For notebooks: what `__repr__` says, the report, and the source to unfold."""
        if not self.traces:
            return f"<pre>{html.escape(repr(self))}</pre>"
        texts = {"Report": str(self.report()), "Source": self.source.code}
        folded = (
            f"<details><summary>{title}</summary><pre>{html.escape(text)}</pre></details>"
            for title, text in texts.items()
        )
        return f"<pre>{html.escape(repr(self))}</pre>{''.join(folded)}"

    def _serve_by(self, call: Callable[..., object]) -> None:
        """Let calls run ``call`` from now on; what a trace serves them by is its `Entry`'s business."""
        vars(self)["_call"] = call  # may be a module, and may happen often: not by __setattr__

    def _serve_by_captured(self) -> None:
        """Let a trace that has static graphs come first, where the one of the last call has none."""
        captured = [each.call for each in self.traces if each.static is not None]
        if captured and vars(self)["_call"] not in captured:
            self._serve_by(captured[0])

    def _prepare_and_call(self, *args: object, **kwargs: object) -> object:
        if self._traces.switched_off():
            return self.as_it_is(*args, **kwargs)
        if torch_compat.traced_by_others((args, kwargs)):
            raise seen_into()
        with self._traces.lock:
            if not self.traces:  # another thread may have been first
                traced, by_name = (args, kwargs) if self._example is None else self._example
                self.prepare(*traced, **by_name)
        return self._call(*args, **kwargs)

    def _first_call(self, *args: object, **kwargs: object) -> object:
        """The first call under a configuration that asks for captures: it is the last moment to say that there are none."""
        first = self.traces[0]
        if not any(each.static for each in self.traces):
            tell(
                StaticGraphError(
                    f"nothing is captured, and the configuration says {self._asks_for_captures()}",
                    where=self._traces.backend.prefix,
                    hint="call capture(sizes) on the stitched module before it serves",
                ),
                strict=self.config.strict,
            )
        self._serve_by(first.call)
        return first.call(*args, **kwargs)

    def trace_ahead(self, sizes: Sequence[int]) -> None:
        """Make the traces that batches of these sizes need, before a call waits for them.

        Raises:
            BindError: nothing is compiled yet.
            PieceworkError: the model can't be traced for one of them.
        """
        self._traces.require("trace to make others beside")
        self._traces.add_ahead(sizes)

    def prepare(self, *args: object, **kwargs: object) -> None:
        """Capture, compile and stitch now, tracing with these arguments.

        While torch's compiler is switched off nothing is done, which is logged; these arguments are traced with at the first
        call after that.
        """
        with self._traces.lock:
            if self.traces:
                raise BindError("this module is compiled already", hint="compile the model again")
            if self._traces.switched_off():
                self._example = (args, kwargs)
                return
            self._prepare(args, kwargs)
            self._example = None

    def _prepare(self, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        self._traces.settle_sizes(args, kwargs)
        tell_of_training(self.model, self.config.strict)
        tell_of_gradients((*args, *kwargs.values()), self.config.strict)
        self._traces.add(args, kwargs)
        self._serve_by(self._first_call if self._asks_for_captures() else self.traces[0].call)

    def _asks_for_captures(self) -> str:
        """What of the configuration means that something is captured, as text; "" for nothing."""
        config = self.config
        if config.cudagraph_mode is not CUDAGraphMode.NONE:
            return f"cudagraph_mode={config.cudagraph_mode.name}"
        if config.cudagraph_capture_sizes and not config.compile_sizes:  # which may stand for them
            return f"cudagraph_capture_sizes={list(config.cudagraph_capture_sizes)}"
        return ""

    def rebind(self) -> None:
        """Hold the weights that the model has now: call it after replacing a parameter or a submodule.

        A call notices weights that were replaced, moved or converted, and raises `InputError`; see
        `piecework.runtime.watch.weights` for how. Values changed in place (``load_state_dict``, an optimizer's step) are seen
        without this.

        Raises:
            BindError: there is nothing to rebind yet; a weight is missing, or has another dtype, device or shape than
                the trace had. What was bound stays bound then.

        Example:
            >>> model.load_state_dict(state, assign=True)
            >>> stitched.rebind()
        """
        self._traces.rebind()

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
        with self._traces.changes.one("refit()"), torch.no_grad():
            for weight, new in copies():
                weight.copy_(new)

    def accept_settings(self) -> None:
        """Stop refusing calls over attributes that are not as they were while the model was traced.

        For who sets something for the trace alone, as the transformers integration sets the attention implementation: call it
        after setting it back.

        Raises:
            BindError: the model is not compiled yet.
        """
        self._traces.accept_settings()

    def use_edited(self, code: str) -> EditedSource:
        """Run an edited version of the stitching source from now on.

        Args:
            code: the edited text; it must keep the signature and the names of the generated one.

        Returns:
            The text with its proof, or with its first difference from the graph: an edit may mean to differ.

        Raises:
            EmitError: the text breaks the contract; what ran before still runs.
        """
        first, *_ = self._traces.require("source to edit")
        with self._traces.changes.one("use_edited()"):
            edited = first.use_edited(code)
            self._serve_by(first.call)
        return edited

    def save(self, path: Place, *, key_file: str | os.PathLike[str] | None = None) -> None:
        """Write what was compiled to a directory, for ``piecework.load(path, model)`` in another process.

        Every trace that there is goes with it, and the one that serves a batch of one, which is made now if no trace does. No weight is written; an edited
        source is, marked as edited. An artifact that is there is replaced.

        Args:
            path: the directory.
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

        if self._together is not None:
            raise ArtifactError(
                "it serves a part of a model's calls, and others serve the rest",
                where=self._traces.backend.prefix,
                hint=f"{self._together}(model, path) saves all of them",
            )
        with self.saved() as part:
            save(path, part, key_file=key_file)

    @contextmanager
    def saved(self) -> Iterator[Part]:
        """What an artifact holds of this module, which does not change in the block.

        Raises:
            ArtifactError: nothing says in another process how it was made.
            BindError: the model is not compiled yet.
        """
        from piecework.runtime.artifact.save import Part

        self._traces.require("artifact")
        if self._around is not nullcontext and self.kept is None:
            raise ArtifactError(
                "the model was traced in a context of its caller's, which says nothing that another process could make it of",
                where=self._traces.backend.prefix,
                hint="compile it in each process: compiled pieces come from the cache",
            )
        with self._traces.changes.one("save()"), self._traces.lock:
            if self._together is None:
                self._traces.add_one()
            with collector_paused():
                yield Part(self.model, self.traces, self._made_with())

    @property
    def _together(self) -> object:
        """What saves this module and others that serve the same model; None for one that serves it alone."""
        return None if self.kept is None else self.kept.get("save")

    def _made_with(self) -> dict[str, object]:
        ops, sizes = self._splitting_ops, self._traces.sizes
        return made_with(self.config, self.runtime_config, ops, sizes, self.kept)

    def take(self, artifact: Artifact) -> None:
        """Serve calls by the traces of an artifact; for ``piecework.load``.

        Raises:
            ArtifactError: it does not fit this module's model.
            RankError: another process would run something else.
        """
        traces = self._traces
        with traces.lock:
            made = artifact.traces(self.model, self.config, traces.backends, self.as_it_is)
            traces.adopt(made, artifact.folder.facts.get("sizes"))
            self._serve_by(made[0].call)

    def require_made_so(
        self, artifact: Artifact, args: Sequence[object], kwargs: Mapping[str, object]
    ) -> None:
        """Raise `ArtifactError` if an artifact was made with another configuration than this module has."""
        self._traces.settle_sizes(args, kwargs)
        require_made_so(artifact.folder.facts, self._made_with())

    def accepts(self, *args: object, **kwargs: object) -> bool:
        """Whether a trace that there is serves a call with these arguments; runs nothing but the emitted checks."""
        return any(each.entry.accepts(args, kwargs) for each in self.traces)

    def forget(self) -> None:
        """Be as before anything was compiled; for an artifact that was taken and does not serve."""
        self._traces.forget()
        self._graphs.again = None
        self._serve_by(self._prepare_and_call)

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
        self._graphs.capture(
            sizes, memory_budget=memory_budget, progress=progress, estimate=estimate, **options
        )
        self._serve_by_captured()
        return self

    @property
    def was_captured(self) -> bool:
        """Whether `wake_up` knows what to capture."""
        return self._graphs.again is not None

    def sleep(self) -> None:
        """Give the static graphs and their memory back, until `wake_up`. Calls run uncaptured meanwhile; one that is in a graph finishes there.

        Weights stay where they are.

        Example:
            >>> stitched.sleep()
            >>> train(model)  # in place
            >>> stitched.wake_up()
        """
        self._graphs.sleep()

    def wake_up(self) -> None:
        """Capture again what the last `capture` did, after `sleep`, or after a `rebind` that gave the graphs up.

        Raises:
            BindError: nothing was captured before.
            StaticGraphError: as `capture`.
        """
        self._graphs.wake_up()
        self._serve_by_captured()

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
            >>> print(stitched.measure([1, 2, 4, 8]))
        """
        found = self._graphs.measure(sizes, seconds, options)
        self._serve_by_captured()
        return found

    @property
    def static_graphs(self) -> CapturedModel:
        """The static graphs, after `capture`: coverage, memory, replay source.

        Those of the first trace that has some; a batch of one may have a trace, and static graphs, of its own (`traces`).
        """
        return self._graphs.all()[0]

    def dispatch(
        self,
        num_tokens: int,
        uniform_decode: bool = False,
        has_lora: bool = False,
        num_active_loras: int = 0,
        *,
        valid_modes: Collection[CUDAGraphMode] | None = None,
        invalid_modes: Collection[CUDAGraphMode] | None = None,
        axes: Mapping[str, Hashable] | None = None,
        query_len: int | None = None,
    ) -> tuple[CUDAGraphMode, BatchDescriptor]:
        """What a batch runs as now, for an engine that pads state of its own to the captured size and says both in the forward context.

        Args:
            num_tokens: the batch's own size.
            The others are those of `CudagraphDispatcher.dispatch`; asked is the trace that serves this size.

        Returns:
            Mode and descriptor; NONE and the batch's own size where nothing is captured.

        Example:
            >>> mode, shape = stitched.dispatch(3)
            >>> with set_forward_context(metadata_for(shape), cudagraph_runtime_mode=mode, batch_descriptor=shape):
            ...     stitched(x)
        """
        return self._graphs.dispatch(
            num_tokens,
            uniform_decode,
            has_lora,
            num_active_loras,
            valid_modes=valid_modes,
            invalid_modes=invalid_modes,
            axes=axes,
            query_len=query_len,
        )

    def coverage(self, max_num_batched_tokens: int | None = None) -> Coverage:
        """How each batch size runs: captured, padded or uncaptured, and why; a list of rows that prints as a table.

        Args:
            max_num_batched_tokens: the largest batch to list; by default one more than the largest captured size.

        Raises:
            BindError: nothing is captured.
            ConfigError: ``max_num_batched_tokens`` is no positive whole number.
        """
        largest = max_num_batched_tokens
        if largest is not None and not (isinstance(largest, int) and largest > 0):
            raise ConfigError(
                f"the largest batch to list must be a positive whole number; got {largest!r}",
                where="max_num_batched_tokens",
            )
        return self._graphs.coverage(largest)

    def call_report(self) -> list[CallRow]:
        """What the calls since `capture` ran as, how many, and why; all of them where nothing is captured."""
        return sorted(self._graphs.calls(), key=lambda row: -row.calls)

    def memory_report(self) -> MemoryReport:
        """What the static graphs were expected to take, and take."""
        return self._graphs.memory_report()

    def metrics(self, *, name: str | None = None, profile: Profile | None = None) -> Metrics:
        """What calls ran as, their padding, what graphs hold, traces, and the process's counters; ``prometheus()`` of it is the text.

        It reads what is counted anyway. Counts begin anew with each `capture`.

        Args:
            name: tells this model from others of the process; by default its class's.
            profile: what `profile` gave, for the time of each piece.

        Raises:
            ConfigError: ``name`` is no text, or ``profile`` no profile.

        Example:
            >>> text = stitched.metrics().prometheus()
        """
        return observed.metrics(self._traces, name, profile)

    def named_pieces(self) -> AbstractContextManager[None]:
        """Show pieces and operators by name and layer in ``torch.profiler`` for the block; costs nothing outside it.

        Example:
            >>> with torch.profiler.profile() as profile, stitched.named_pieces():
            ...     stitched(x)
        """
        return observed.named_pieces(self._traces)

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
        return observed.profile(self._traces, lambda: self(*args, **kwargs), profiled_calls)

    def shadow(self, *, every: int = 1) -> AbstractContextManager[Shadow]:
        """Run the uncompiled graph of each piece beside it for the block, on the same inputs, and compare; calls get what the pieces computed.

        Calls run uncaptured meanwhile, whatever is captured: graphs are left as they are and serve again after the block. The model can't
        be changed in the block (`rebind`, `capture`, …).

        Args:
            every: compare each call of so many, the first one among them.

        Returns:
            What is found so far: the ``first`` piece that differs, all ``differences``, how many ``calls``, and pieces that are ``left_out``
            since running them twice could show.

        Raises:
            BindError: the model is not compiled yet, or no piece of it can be run twice.
            ConfigError: ``every`` is no positive number.
            ArtifactError: the model was loaded from an artifact without graphs.

        Example:
            >>> with stitched.shadow() as found:
            ...     stitched(x)
            >>> print(found)
        """
        return observed.shadow(self._traces, every)

    # --- what was made ---------------------------------------------------------------------------

    @property
    def source(self) -> StitchedSource:
        """The emitted source, exactly what runs."""
        return self._traces.require("source")[0].program.source

    @property
    def entry_source(self) -> EntrySource:
        """The emitted source of ``check_inputs`` and of the function behind a call, exactly what runs."""
        return self._traces.require("entry_source")[0].entry.source

    @property
    def entry(self) -> Callable[..., object]:
        """The emitted function itself, with the model's own parameters; a call through it saves one Python call.

        It serves the sizes of the first trace only.
        """
        return self._traces.require("entry")[0].entry.call

    @property
    def program(self) -> Program:
        """Everything that the compilation made."""
        return self._traces.require("program")[0].program

    @property
    def backend(self) -> PieceworkBackend:
        """What compiled the pieces and emitted the source."""
        return self.traces[0].backend if self.traces else self._traces.backend

    @property
    def captured(self) -> ModelTrace:
        """What the trace gave."""
        return self._traces.require("capture")[0].entry.captured

    @property
    def split_gm(self) -> torch.fx.GraphModule:
        """The stitching graph."""
        return self._traces.require("split_gm")[0].program.split_gm

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The compiled pieces, in order of execution."""
        return self._traces.require("pieces")[0].program.pieces()

    @property
    def traces(self) -> tuple[TracedModel, ...]:
        """The traces that serve calls, each with its entry, source and static graphs, in the order in which they were made.

        There is one, unless calls came whose sizes need a trace of their own: 0 or 1 where the first one has more, or arguments
        that are one tensor. What this module shows of itself (`source`, `pieces`, …) is the first one's.
        """
        return self._traces.made

    def report(self) -> Report:
        """What the compilation did: pieces, unique pieces, seconds per phase."""
        return self._traces.require("report")[0].program.report()


torch_compat.keep_out_of_traces(StitchedModule.__call__, OPAQUE)  # type: ignore[arg-type]
