"""A model that runs stitched: called like the model, with its source, graph and pieces to read.

The model's weights are shared, never copied; its Python code does not run again after the trace.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.fx
from torch.utils import _pytree as pytree

from piecework import errors
from piecework.codegen.entry.source import EntrySource
from piecework.codegen.split.splitting import SplittingOp as SplittingOpLike
from piecework.codegen.stitch.source import StitchedSource
from piecework.collector import collector_paused, seldom_full_collections
from piecework.runtime import torch_compat
from piecework.runtime.artifact.model import (
    Artifact,
    Part,
    made_with,
    require_made_so,
    write_models,
)
from piecework.runtime.batch.mode import CUDAGraphMode
from piecework.runtime.call.edited import EditedSource, check_edited
from piecework.runtime.call.shared_module import SharedModule, model_name, require_model
from piecework.runtime.config.compilation import CompilationConfig, RuntimeConfig
from piecework.runtime.config.groups import DynamicShapesType
from piecework.runtime.counters import counters
from piecework.runtime.model_tag import compilation_complete, current_model_tag, use_model_tag
from piecework.runtime.observe.progress import warn_of_another
from piecework.runtime.pieces.backend import PieceworkBackend
from piecework.runtime.pieces.program import Program, Trace
from piecework.runtime.pieces.ranks import require_agreement
from piecework.runtime.pieces.report import Piece, Report
from piecework.runtime.store.package import Place
from piecework.runtime.trace.dynamic_dims import unmarked_afterwards
from piecework.runtime.trace.errors import OPAQUE, tell_of_gradients, tell_of_training
from piecework.runtime.trace.sizes import AllDimensions, KeptMarks, SizePolicy
from piecework.runtime.traces.captured import Captures
from piecework.runtime.traces.observed import Observed
from piecework.runtime.traces.traced_model import Call, TracedModel, trace_model
from piecework.runtime.watch.weights import refit

if TYPE_CHECKING:
    from piecework.runtime.graphs.plan.options import CaptureOptions

_log = logging.getLogger(__name__)


@errors.short_methods
class StitchedModule(Captures, Observed, SharedModule):
    """A compiled model; see `compile`.

    It has one trace, unless calls need another: what one refuses is served by another, or by one that
    is made for it.

    Attributes:
        model: the model that was given; it holds the weights.
        config: the configuration.
        runtime_config: the program's limits; None if they are not known.
        as_it_is: what a call runs while torch's compiler is off, or a torch mode is active.
        kept: what another process needs to know to make ``around`` again, as JSON data.
        traces: those that serve calls, in the order of making; `source` and the like show the first.
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
        self.kept = kept
        self.traces: tuple[TracedModel, ...] = ()
        counters.num_models_seen += 1
        self._tag = tag = current_model_tag()
        self._new_backend = partial(
            PieceworkBackend,
            self.config,
            tag.prefix((runtime_config and runtime_config.model_name) or model_name(model)),
            tag.is_encoder,
            splitting_ops=splitting_ops,
            runtime_config=runtime_config,
            deferred=True,
        )
        self._first_backend = self._new_backend()
        self._splitting_ops, self._around = splitting_ops, around
        self._declared_sizes, self._sizes = sizes, None
        self._lock = threading.RLock()  # held while a trace is made
        self._turn, self._changing = threading.Lock(), (0, "")
        self._on_trace: Callable[[TracedModel], object] | None = None
        self._hopeless: set[object] = set()
        self._by_themselves = 1
        self._logged: str | None = None
        self._serve_by(self._prepare_and_call)

    # --- calls -----------------------------------------------------------------------------------

    def __call__(self, *args: object, **kwargs: object) -> Any:
        """Run the model, without gradients. Shapes may differ from the example's in dynamic dimensions only.

        Raises:
            InputError: the arguments break what the trace assumed, a weight was replaced or moved since it
                was bound, autocast is not as it was in the trace, or a ``torch.func`` transform is active.
        """
        try:
            return self._call(*args, **kwargs)
        except errors.InputError as error:
            # Its traceback would keep the frames of this call alive, and so what it was called with.
            refused = error.with_traceback(None)
        except Exception as error:
            for each in self.traces:
                each.add_note(error)
            raise
        return self._serve_refused(refused, args, kwargs)

    forward = __call__

    @errors.short_errors
    def _serve_refused(
        self, refused: errors.InputError, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> object:
        """The result of a call that a trace refused: by another, a new one, or the model as it is."""
        refusals = {refused.refused_by: refused}
        if not any(each.entry in refusals for each in self.traces):
            raise refused
        while not self._switched_off():
            for each in sorted(self.traces, key=self._comes_first, reverse=True):
                if each.entry in refusals:
                    continue
                try:
                    result = each.call(*args, **kwargs)
                except errors.InputError as error:
                    if error.refused_by is not each.entry:
                        raise
                    refusals[each.entry] = error.with_traceback(None)
                else:
                    if self._comes_first(each):
                        self._serve_by(each.call)
                    return result
            # What no trace could serve, such as a replaced weight, goes before sizes, which each of them has its own of.
            lasting = (error for error in refusals.values() if error.places is None)
            refused = next(lasting, refusals[self.traces[0].entry])
            if not self._add_for(refused, len(refusals), args, kwargs):
                raise refused
        return self.as_it_is(*args, **kwargs)

    def _comes_first(self, trace: TracedModel) -> bool:
        """Whether calls may try ``trace`` first, as those without static graphs run uncaptured."""
        return trace.static is not None or all(each.static is None for each in self.traces)

    def _serve_by(self, call: Callable[..., object]) -> None:
        """Let calls run ``call`` from now on."""
        vars(self)["_call"] = call  # may be a module, and may happen often: not by __setattr__

    def _serve_by_captured(self) -> None:
        """Let a trace that has static graphs come first."""
        captured = [each.call for each in self.traces if each.static is not None]
        if captured and vars(self)["_call"] not in captured:
            self._serve_by(captured[0])

    def _prepare_and_call(self, *args: object, **kwargs: object) -> object:
        """The first call."""
        if torch_compat.watching_mode() or self._switched_off():
            return self.as_it_is(*args, **kwargs)
        with self._lock:
            if not self.traces:  # another thread may have been first
                self.prepare(*args, **kwargs)
        return self._call(*args, **kwargs)

    def _switched_off(self) -> bool:
        """Whether torch's compiler is off; each switch is logged once."""
        switch = torch_compat.compiler_off()
        if switch is not None and switch != self._logged:
            self._logged = switch
            _log.warning("%s runs as it is, uncompiled: %s", self.backend.prefix, switch)
        return switch is not None

    # --- traces ----------------------------------------------------------------------------------

    def prepare(self, *args: object, **kwargs: object) -> None:
        """Trace, compile and stitch now, by example arguments; not while torch's compiler is off."""
        with self._lock:
            if self.traces:
                raise errors.BindError(
                    "this module is compiled already", hint="compile the model again"
                )
            if self._switched_off():
                return
            if torch_compat.watching_mode():
                raise errors.CaptureError(
                    "a torch mode is active, and what it does would be traced into the model",
                    hint="compile outside of it; a call under a mode runs the model itself",
                )
            with _tracing_shapes(self.config.dynamic_shapes_config.type, (args, kwargs)):
                self._settle_sizes(args, kwargs)
                tell_of_training(self.model, self.config.strict)
                tell_of_gradients((*args, *kwargs.values()), self.config.strict)
                self._add(args, kwargs)
            config = self.config
            # Sizes to capture may stand for those to compile.
            sizes = config.cudagraph_capture_sizes and not config.compile_sizes
            captures = config.cudagraph_mode is not CUDAGraphMode.NONE or sizes
            self._serve_by(self._uncaptured if captures else self.traces[0].call)
        compilation_complete()

    def _uncaptured(self, *args: object, **kwargs: object) -> object:
        """The first call under a configuration that asks for captures: says that there are none."""
        if not any(each.static for each in self.traces):
            error = errors.StaticGraphError(
                "nothing is captured, and the configuration has a cudagraph_mode or cudagraph_capture_sizes",
                where=self.backend.prefix,
                hint="call capture(sizes) on the stitched module before it serves",
            )
            errors.tell(error, strict=self.config.strict)
        self._serve_by(self.traces[0].call)
        return self._call(*args, **kwargs)

    def _settle_sizes(self, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
        """Decide by the example which dimensions are dynamic, where the configuration does not."""
        if self.config.dynamic_shapes_config.type is DynamicShapesType.AUTO:
            marks = KeptMarks(pytree.tree_leaves((tuple(args), dict(kwargs))))
            self._sizes = self._declared_sizes or (marks if marks.any else AllDimensions())

    def _add(self, args: Sequence[object], kwargs: Mapping[str, object]) -> TracedModel:
        """Trace and compile the model for calls like this one."""
        quiet = nullcontext() if errors.full_tracebacks() else torch_compat.quiet_trial()
        with self._around(), quiet, seldom_full_collections():
            made = trace_model(
                self.model, args, kwargs, self._backends(), self._sizes, self.as_it_is
            )
        if self._around is nullcontext:
            made.entry.now.weights.unchanged()  # calls find the check ready
        else:
            made.entry.accept_settings()
        require_agreement(made.program, self.runtime_config)
        if self._on_trace is not None:
            self._on_trace(made)
        self.traces = (*self.traces, made)
        return made

    def _backends(self) -> Callable[[], PieceworkBackend]:
        """What makes the backends of the next trace, one for each graph that is tried."""
        shown = [] if self.traces else [self._first_backend]
        one_of_several = Trace.ANOTHER if self.traces else Trace.FIRST

        def make() -> PieceworkBackend:
            with use_model_tag(self._tag):
                backend = shown.pop() if shown else self._new_backend()
            backend.trace = Trace.ONLY if self._sizes is None else one_of_several
            backend.batch_of_first = self.traces[0].program.batch_place if self.traces else None
            return backend

        return make

    def _add_for(
        self,
        refused: errors.InputError,
        tried: int,
        args: Sequence[object],
        kwargs: Mapping[str, object],
    ) -> bool:
        """Trace the model for sizes that no trace serves; False where that can't help."""
        sizes, places = self._sizes, refused.places
        if sizes is None or places is None or not torch_compat.may_recompile():
            return False
        if any(dim is not None and not sizes.may_differ(leaf, dim) for leaf, dim in places):
            return False
        with self._lock:
            if len(self.traces) > tried:  # somebody else's call was first
                return True
            leaves = pytree.tree_leaves((args, kwargs))
            shapes = tuple(getattr(leaf, "shape", None) for leaf in leaves)
            most = self.config.dynamic_shapes_config.max_traces
            if shapes in self._hopeless or self._by_themselves >= most:
                return False
            self._hopeless.add(shapes)  # unless it gets a trace now that serves it
            _log.info("tracing the model again: %s", refused)
            start = time.perf_counter()
            try:
                made = self._add(args, kwargs)
            except errors.PieceworkError as error:
                refused.add_note(f"A trace for these sizes is not to be had: {error}")
                raise refused from error
            self._by_themselves += 1
            if made.entry.accepts(args, kwargs):
                self._hopeless.discard(shapes)
            warn_of_another(
                "the model was traced and compiled",
                refused.message,
                time.perf_counter() - start,
                "piecework.compile(..., sizes=[...]) makes such traces ahead",
            )
            return True

    def _serving(self, call: Call) -> TracedModel:
        """The trace that serves ``call``; made now where none does."""
        args, kwargs = call
        with self._lock:
            found = next((each for each in self.traces if each.entry.accepts(args, kwargs)), None)
            return found or self._add(args, kwargs)

    def trace_ahead(self, sizes: Sequence[int]) -> None:
        """Make the traces that batches of these sizes need, before a call waits for them."""
        from piecework.runtime.graphs.plan.options import CaptureOptions

        first, *_ = self._require("trace to make others beside")
        options = CaptureOptions(runtime=self.runtime_config)
        for batch in sizes if self._sizes is not None else ():
            self._serving(first.call_of(batch, options))

    def _trace_of_one(
        self, sizes: Sequence[int] | None, options: CaptureOptions
    ) -> TracedModel | None:
        """The trace that serves a batch of one, if ``sizes`` has it and the first trace does not."""
        if sizes is None:
            sizes = self.config.cudagraph_capture_sizes
        if self._sizes is None or (sizes is not None and 1 not in sizes):
            return None
        first = self.traces[0]
        plan = first.entry.plan()
        serves_one = all((each.low or 0) < 2 for each in plan.symbols)
        # Without checks, nothing tells which trace serves a call.
        if serves_one or first.program.batch.symbol is None or not plan.checks:
            return None
        try:
            found = self._serving(first.call_of(1, options))
            return None if found is first else found
        except errors.PieceworkError:
            if sizes is not None:
                raise
            return None  # nobody asked for it

    # --- changes ---------------------------------------------------------------------------------

    @contextmanager
    def _change(self, what: str) -> Iterator[None]:
        """Change the model after other threads; `BindError` if this one is changing it already."""
        thread, other = self._changing
        if thread == threading.get_ident():
            raise errors.BindError(
                f"{what} was called from inside {other} of the same model",
                hint="call it after that has returned",
            )
        with self._turn:
            self._changing = threading.get_ident(), what
            try:
                yield
            finally:
                self._changing = 0, ""

    def rebind(self) -> None:
        """Hold the weights that the model has now: call it after replacing a parameter or a submodule.

        A call notices weights that were replaced, moved or converted. Values changed in place
        (``load_state_dict``, an optimizer's step) are seen without this.

        Raises:
            BindError: a weight is missing, or has another dtype, device or shape than the trace had; what
                was bound stays bound then.
        """
        self._require("binding")
        with self._change("rebind()"), self._lock:
            ready = [each.entry.rebound() for each in self.traces]  # all of them, or none
            for each, execution in zip(self.traces, ready, strict=True):
                each.entry.publish(execution)

    def refit(self, state: Mapping[str, torch.Tensor]) -> None:
        """Copy new values into the model's weights, where they lie: nothing is bound or captured anew.

        All is checked before anything is copied. No call may run meanwhile.

        Args:
            state: parameters and buffers by their names in ``model``, all or some of them.

        Raises:
            BindError: the model has no such weight, or it has another shape or dtype.
        """
        copies = refit(self.model, state)
        with self._change("refit()"), torch.no_grad():
            for weight, new in copies():
                weight.copy_(new)

    def accept_settings(self) -> None:
        """Stop refusing calls over attributes that are not as they were while the model was traced.

        For who sets something for the trace alone: call it after setting it back.
        """
        self._require("trace to compare with")
        with self._change("accept_settings()"), self._lock:
            for each in self.traces:
                each.entry.accept_settings()

    def use_edited(self, code: str) -> EditedSource:
        """Run an edited version of the stitching source from now on.

        Args:
            code: the edited text, with the signature and the names of the generated one.

        Returns:
            The text with its proof, or with its first difference from the graph: an edit may mean to differ.

        Raises:
            EmitError: the text breaks the contract; what ran before still runs.
        """
        first, *_ = self._require("source to edit")
        with self._change("use_edited()"):
            edited = check_edited(first.program.source, first.program.split_gm, code)
            first.entry.edit(edited)
            self._serve_by(first.call)
        return edited

    # --- artifacts -------------------------------------------------------------------------------

    def save(self, path: Place, *, key_file: str | os.PathLike[str] | None = None) -> None:
        """Write what was compiled to a file, for ``piecework.load(path, model)`` in another process.

        All traces go with it, and the one that serves a batch of one; no weight does.

        Args:
            path: the file; an artifact that is there is replaced.
            key_file: a file with a secret (16 bytes or more) that signs the artifact; by default the one
                that ``PIECEWORK_CACHE_KEY_FILE`` names, if any.

        Raises:
            ArtifactError: something can't be told again in another process, or the file not be written.
        """
        if self._saves_together:
            raise errors.ArtifactError(
                "it serves a part of a model's calls, and others serve the rest",
                where=self.backend.prefix,
                hint=f"{self._saves_together}(model, path) saves all of them",
            )
        with self.saved() as part:
            write_models(path, [part], key_file=key_file)

    @contextmanager
    def saved(self) -> Iterator[Part]:
        """What an artifact holds of this module, which does not change in the block."""
        from piecework.runtime.graphs.plan.options import CaptureOptions

        self._require("artifact")
        if self._around is not nullcontext and self.kept is None:
            raise errors.ArtifactError(
                "the model was traced in a context of its caller's, which says nothing that another process could make it of",
                where=self.backend.prefix,
                hint="compile it in each process: compiled pieces come from the cache",
            )
        with self._change("save()"), self._lock:
            in_one_row = self._sizes is not None and self._sizes.rows_in_one
            if in_one_row or not self._saves_together:
                # A graph without a batch has no batch of one, and an object of the user's can't be made up.
                with suppress(errors.PieceworkError, TypeError):
                    self._trace_of_one(None, CaptureOptions(runtime=self.runtime_config))
            with collector_paused():
                yield Part(self.model, self.traces, self._made_with())

    @property
    def _saves_together(self) -> object:
        """What saves this module with others of the same model; None for one that serves it alone."""
        return None if self.kept is None else self.kept.get("save")

    def _made_with(self) -> dict[str, object]:
        ops, sizes = self._splitting_ops, self._sizes
        return made_with(self.config, self.runtime_config, ops, sizes, self.kept)

    def take(self, artifact: Artifact) -> None:
        """Serve calls by the traces of an artifact; for ``piecework.load``."""
        with self._lock:
            made = artifact.traces(self.model, self.config, self._backends, self.as_it_is)
            if artifact.package.facts.get("sizes") == AllDimensions.__name__:
                self._sizes = AllDimensions()
            self._sizes = self._declared_sizes or self._sizes
            for each in made:
                require_agreement(each.program, self.runtime_config)
            self.traces = made
            self._serve_by(made[0].call)

    def require_made_so(
        self, artifact: Artifact, args: Sequence[object], kwargs: Mapping[str, object]
    ) -> None:
        """Raise `ArtifactError` if an artifact was made with another configuration."""
        self._settle_sizes(args, kwargs)
        require_made_so(artifact.package.facts, self._made_with())

    def take_for(
        self, artifact: Artifact, args: Sequence[object], kwargs: Mapping[str, object]
    ) -> None:
        """As `take`, if it fits the configuration and these arguments; else all stays as it is."""
        try:
            self.require_made_so(artifact, args, kwargs)
            self.take(artifact)
            if self.accepts(*args, **kwargs):
                return
            hint = "it was saved for arguments of other kinds or sizes"
            raise errors.ArtifactError("no trace in it serves the example arguments", hint=hint)
        except errors.ArtifactError:
            self.traces, self._sizes = (), None
            self._serve_by(self._prepare_and_call)
            raise

    def accepts(self, *args: object, **kwargs: object) -> bool:
        """Whether a trace serves a call with these arguments; runs nothing but the emitted checks."""
        return any(each.entry.accepts(args, kwargs) for each in self.traces)

    # --- what was made ---------------------------------------------------------------------------

    def _require(self, what: str) -> tuple[TracedModel, ...]:
        """The traces; raises `NotThereError` if there is none, and so no ``what``."""
        if not self.traces:
            raise self._missing(what)
        return self.traces

    def _missing(self, what: str) -> errors.NotThereError:
        """Why there is no ``what``."""
        return errors.NotThereError(
            f"there is no {what} yet: the model is compiled at its first call",
            where=torch_compat.compiler_off(),  # while torch's compiler is off, it runs as it is
            hint="pass example arguments to piecework.compile, or call the module once",
        )

    @property
    def source(self) -> StitchedSource:
        """The emitted source, exactly what runs."""
        return self._require("source")[0].program.source

    @property
    def entry_source(self) -> EntrySource:
        """The emitted source of ``check_inputs`` and of the function behind a call."""
        return self._require("entry_source")[0].entry.source

    @property
    def entry(self) -> Callable[..., object]:
        """The emitted function behind a call, for the first trace's sizes."""
        return self._require("entry")[0].entry.call

    @property
    def program(self) -> Program:
        """Everything that the compilation made."""
        return self._require("program")[0].program

    @property
    def backend(self) -> PieceworkBackend:
        """What compiled the pieces and emitted the source."""
        return self.traces[0].backend if self.traces else self._first_backend

    @property
    def split_gm(self) -> torch.fx.GraphModule:
        """The stitching graph."""
        return self._require("split_gm")[0].program.split_gm

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The compiled pieces, in order of execution."""
        return self._require("pieces")[0].program.pieces

    def report(self) -> Report:
        """What the compilation did: pieces, unique pieces, seconds per phase."""
        return self._require("report")[0].program.report()

    def __repr__(self) -> str:
        """The model's name and what was made of it."""
        return f"StitchedModule({self._summary()})"

    def _repr_html_(self) -> str:
        """For notebooks: what `__repr__` says, the report, and the source to unfold."""
        from html import escape  # of no use to those who load a model

        texts = {"Report": str(self.report()), "Source": self.source.code} if self.traces else {}
        folded = (
            f"<details><summary>{title}</summary><pre>{escape(text)}</pre></details>"
            for title, text in texts.items()
        )
        return f"<pre>{escape(repr(self))}</pre>{''.join(folded)}"


torch_compat.keep_out_of_traces(StitchedModule.__call__, OPAQUE)  # type: ignore[arg-type]


@contextmanager
def _tracing_shapes(kind: DynamicShapesType, arguments: object) -> Iterator[None]:
    """Trace with ``kind`` of symbols; unbacked ones for marked dimensions, else the first."""
    with ExitStack() as stack:
        if kind is DynamicShapesType.BACKED_SIZE_OBLIVIOUS:
            stack.enter_context(torch_compat.size_oblivious_tracing())
        elif kind is DynamicShapesType.UNBACKED:
            tensors = [t for t in pytree.tree_leaves(arguments) if isinstance(t, torch.Tensor)]
            stack.enter_context(unmarked_afterwards(tensors))
            marked = any(torch_compat.marks_of(tensor) for tensor in tensors)
            for tensor in tensors:
                first = (0,) if tensor.dim() else ()
                for dim in torch_compat.unmark_dynamic(tensor) if marked else first:
                    torch_compat.unbacked_mark(tensor, dim).put_on(tensor)
        yield


def _inside(
    around: Callable[[], AbstractContextManager[object]], call: Callable[..., object]
) -> Callable[..., object]:
    """``call``, each time in a context of ``around``."""

    def run(*args: object, **kwargs: object) -> object:
        with around():
            return call(*args, **kwargs)

    return call if around is nullcontext else run
