"""A model that runs stitched: called like the model, with its source, graph and pieces to read.

The model's weights are shared, never copied; its Python code does not run again after the trace.
"""

from __future__ import annotations

import html
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.fx

from piecework.codegen import StitchedSource
from piecework.codegen.entry.emit import EntrySource
from piecework.codegen.split.split import SplittingOp as SplittingOpLike
from piecework.collector import collector_paused
from piecework.errors import (
    ArtifactError,
    BindError,
    InputError,
    StaticGraphError,
    short_errors,
    short_methods,
    tell,
)
from piecework.runtime import torch_compat
from piecework.runtime.artifact.model import (
    Artifact,
    Part,
    made_with,
    require_made_so,
    write_model,
)
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
from piecework.runtime.trace.errors import OPAQUE, tell_of_gradients, tell_of_training
from piecework.runtime.trace.one_trace import ModelTrace
from piecework.runtime.trace.sizes import SizePolicy
from piecework.runtime.traces.captured import Captures
from piecework.runtime.traces.observed import Observed, summary
from piecework.runtime.traces.traced_model import TracedModel
from piecework.runtime.traces.traces import Traces, inside, seen_into
from piecework.runtime.watch.weights import refit


@short_methods
class StitchedModule(Captures, Observed, SharedModule):
    """A compiled model; see `compile`.

    Attributes:
        model: the model that was given; it holds the weights.
        config: the configuration.
        runtime_config: the program's limits; None if they are not known.
        as_it_is: what a call runs while torch's compiler is switched off.
        kept: what another process needs to know to make ``around`` again, as JSON data.
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
        self._serve_by(self._prepare_and_call)
        self._example: tuple[tuple[object, ...], dict[str, object]] | None = None

    # --- use -------------------------------------------------------------------------------------

    def __call__(self, *args: object, **kwargs: object) -> Any:
        """Run the model, without gradients. Shapes may differ from the example's in dynamic dimensions only.

        Raises:
            InputError: the arguments break what the trace assumed, a weight was replaced or moved since it
                was bound, autocast is not as it was in the trace, or a ``torch.func`` transform is active.
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
        return f"StitchedModule({summary(self._traces)})"

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
        """The first call under a configuration that asks for captures: the last moment to say that there are none."""
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
        """Make the traces that batches of these sizes need, before a call waits for them."""
        self._traces.require("trace to make others beside")
        self._traces.add_ahead(sizes)

    def prepare(self, *args: object, **kwargs: object) -> None:
        """Trace, compile and stitch now, with these arguments as the example.

        While torch's compiler is switched off nothing is done but to remember them.
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

        A call notices weights that were replaced, moved or converted. Values changed in place
        (``load_state_dict``, an optimizer's step) are seen without this.

        Raises:
            BindError: a weight is missing, or has another dtype, device or shape than the trace had; what
                was bound stays bound then.
        """
        self._traces.rebind()

    def refit(self, state: Mapping[str, torch.Tensor]) -> None:
        """Copy new values into the model's weights, where they lie: nothing is bound or captured anew.

        All is checked before anything is copied. No call may run meanwhile.

        Args:
            state: parameters and buffers by their names in ``model``, all or some of them.

        Raises:
            BindError: the model has no such weight, or it has another shape or dtype.
        """
        copies = refit(self.model, state)
        with self._traces.changes.one("refit()"), torch.no_grad():
            for weight, new in copies():
                weight.copy_(new)

    def accept_settings(self) -> None:
        """Stop refusing calls over attributes that are not as they were while the model was traced.

        For who sets something for the trace alone: call it after setting it back.
        """
        self._traces.accept_settings()

    def use_edited(self, code: str) -> EditedSource:
        """Run an edited version of the stitching source from now on.

        Args:
            code: the edited text, with the signature and the names of the generated one.

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

        All traces go with it, and the one that serves a batch of one; no weight does.

        Args:
            path: the directory; an artifact that is there is replaced.
            key_file: a file with a secret (16 bytes or more) that signs the artifact; by default the one
                that ``PIECEWORK_CACHE_KEY_FILE`` names, if any.

        Raises:
            ArtifactError: something can't be told again in another process, or the directory not be written.
        """
        if self._together is not None:
            raise ArtifactError(
                "it serves a part of a model's calls, and others serve the rest",
                where=self._traces.backend.prefix,
                hint=f"{self._together}(model, path) saves all of them",
            )
        with self.saved() as part:
            write_model(path, part, key_file=key_file)

    @contextmanager
    def saved(self) -> Iterator[Part]:
        """What an artifact holds of this module, which does not change in the block."""

        self._traces.require("artifact")
        if self._around is not nullcontext and self.kept is None:
            raise ArtifactError(
                "the model was traced in a context of its caller's, which says nothing that another process could make it of",
                where=self._traces.backend.prefix,
                hint="compile it in each process: compiled pieces come from the cache",
            )
        with self._traces.changes.one("save()"), self._traces.lock:
            in_one_row = self._traces.sizes is not None and self._traces.sizes.rows_in_one
            if self._together is None or in_one_row:
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
        """Serve calls by the traces of an artifact; for ``piecework.load``."""
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
        self._again = None
        self._serve_by(self._prepare_and_call)

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
        """The emitted function behind a call, with the model's own parameters; it serves the first trace's sizes."""
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
        """The traces that serve calls, in the order in which they were made.

        There is one, unless calls came, or were asked for, that need another; `source`, `pieces` and the
        like show the first.
        """
        return self._traces.made

    def report(self) -> Report:
        """What the compilation did: pieces, unique pieces, seconds per phase."""
        return self._traces.require("report")[0].program.report()


torch_compat.keep_out_of_traces(StitchedModule.__call__, OPAQUE)  # type: ignore[arg-type]
