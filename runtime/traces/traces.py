"""All traces of a model: the one that serves a call that another refused, and one more where sizes need it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING

import torch
from torch.utils import _pytree as pytree

from piecework.collector import seldom_full_collections
from piecework.errors import InputError, NotThereError, PieceworkError, full_tracebacks
from piecework.runtime import torch_compat
from piecework.runtime.call.execution import Changes
from piecework.runtime.call.failures import add_piece_note
from piecework.runtime.config.groups import DynamicShapesType, RuntimeConfig
from piecework.runtime.observe.progress import warn_of_another
from piecework.runtime.pieces.backend import PieceworkBackend
from piecework.runtime.pieces.compilation import Trace
from piecework.runtime.pieces.ranks import require_agreement
from piecework.runtime.trace.sizes import (
    AllDimensions,
    KeptMarks,
    SizePolicy,
)
from piecework.runtime.traces.traced_model import Call, TracedModel, trace_model

if TYPE_CHECKING:
    from piecework.runtime.graphs.plan.options import CaptureOptions

_log = logging.getLogger(__name__)


def not_yet(what: str) -> NotThereError:
    """Why there is no ``what`` before the first trace."""
    switch = torch_compat.compiler_off()
    if switch is not None:
        return NotThereError(
            f"there is no {what}: torch's compiler is switched off, and the model runs as it is",
            where=switch,
            hint="switch it on again, and compile the model or call it",
        )
    return NotThereError(
        f"there is no {what} yet: the model is compiled at its first call",
        hint="pass example arguments to piecework.compile, or call the module once",
    )


class Traces:
    """The traces of one model.

    Args:
        model: what is traced.
        new_backend: makes a backend for each graph that is tried.
        sizes: which dimensions are dynamic, if somebody declared it.
        around: entered for each trace; what it sets for the trace alone is no reason to refuse calls later.
        as_it_is: runs the model uncompiled.
        runtime_config: the program's limits, if they are known.

    Attributes:
        made: the traces, in the order in which they were made.
        backend: the one that the first trace gets, and that stands for it until then.
        sizes: which dimensions are dynamic; None: those that are marked, or all, and there is one trace.
        lock: held while a trace is made.
        changes: turns for those who change the model.
        on_trace: told of each trace that is made.
        missing: says why there is none of what takes a trace.
    """

    def __init__(
        self,
        model: Callable[..., object],
        new_backend: Callable[[], PieceworkBackend],
        sizes: SizePolicy | None,
        around: Callable[[], AbstractContextManager[object]],
        as_it_is: Callable[..., object],
        runtime_config: RuntimeConfig | None,
    ) -> None:
        self._model, self._as_it_is = model, as_it_is
        self._new_backend = new_backend
        self._declared = sizes
        self._around = around
        self._runtime_config = runtime_config
        self._hopeless: set[object] = set()
        self._by_themselves = 1
        self._said: str | None = None
        self.made: tuple[TracedModel, ...] = ()
        self.backend = new_backend()
        self.sizes: SizePolicy | None = None
        self.lock = threading.RLock()
        self.changes = Changes()
        self.on_trace: Callable[[TracedModel], object] | None = None
        self.missing: Callable[[str], NotThereError] = not_yet

    def require(self, what: str) -> tuple[TracedModel, ...]:
        """The traces; raises `BindError` if there is none, and so no ``what``."""
        if not self.made:
            raise self.missing(what)
        return self.made

    def switched_off(self) -> bool:
        """Whether torch's compiler is off, so that what is not compiled runs as it is; each switch is logged once."""
        switch = torch_compat.compiler_off()
        if switch is not None and switch != self._said:
            self._said = switch
            _log.warning("%s runs as it is, uncompiled: %s", self.backend.prefix, switch)
        return switch is not None

    # --- calls that were refused, or failed ----------------------------------------------------------

    def serve_refused(
        self, error: InputError, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[object, TracedModel | None]:
        """The result of a call that was refused, by another trace, which is given with it, or of the model as it is; else raise what was refused."""
        if torch_compat.traced_by_others((args, kwargs)):
            raise seen_into()
        refusing = next((each for each in self.made if each.refused(error)), None)
        if refusing is not None:
            return self._serve_by_another({refusing: error}, args, kwargs)
        if self._outdated(error):
            return self._as_it_is(*args, **kwargs), None
        raise error

    def comes_first(self, trace: TracedModel) -> bool:
        """Whether calls may try ``trace`` first: one without static graphs may serve a captured size too, uncaptured."""
        return trace.static is not None or all(each.static is None for each in self.made)

    def _outdated(self, error: InputError) -> bool:
        """Whether a call failed before anything ran, and runs as it is since torch's compiler is switched off."""
        return any(each.is_outdated(error) for each in self.made) and self.switched_off()

    def _serve_by_another(
        self,
        refusals: dict[TracedModel, InputError],
        args: tuple[object, ...],
        kwargs: dict[str, object],
    ) -> tuple[object, TracedModel | None]:
        """Serve a call that one trace refused by another; by one that is made now, if its sizes are why."""
        while True:
            for each in sorted(self.made, key=self.comes_first, reverse=True):
                if each in refusals:
                    continue
                try:
                    return each.call(*args, **kwargs), each
                except InputError as error:
                    if not each.refused(error):
                        if not self._outdated(error):
                            raise
                        return self._as_it_is(*args, **kwargs), None
                    refusals[each] = error.with_traceback(None)
            # What no trace could serve, such as a replaced weight, goes before sizes, which each of them has its own of.
            others = (error for error in refusals.values() if error.places is None)
            refused = next(others, refusals[self.made[0]])
            if not self._add_for(refused, len(refusals), args, kwargs):
                if self.switched_off():
                    return self._as_it_is(*args, **kwargs), None
                raise refused

    def told(
        self, error: Exception, args: Sequence[object], kwargs: Mapping[str, object]
    ) -> Exception:
        """``error`` of a call with what piecework knows of where it came from."""
        if torch_compat.stance_name() == torch_compat.FORCE_EAGER:
            return error
        # The emitted checks ask for sizes, and torch itself refuses those of nested tensors.
        if self.made and any(map(_is_nested, pytree.tree_leaves((args, kwargs)))):
            return InputError(
                "an argument is a nested tensor; compiled pieces take plain tensors",
                hint="pass a padded tensor, as to_padded_tensor makes, or call the model itself",
            )
        for each in self.made:
            changed = each.entry.weights.change()
            if changed is not None and not isinstance(error, PieceworkError):
                return changed
            add_piece_note(error, each.program.source)
        return error

    # --- all of them changed together ----------------------------------------------------------------

    def rebind(self) -> None:
        """Hold the weights that the model has now."""
        self.require("binding")
        with self.changes.one("rebind()"), self.lock:
            ready = [each.entry.rebound() for each in self.made]  # all of them, or none
            for each, execution in zip(self.made, ready, strict=True):
                each.entry.publish(execution)
                each.forget_given_up()

    def accept_settings(self) -> None:
        """Take what the model holds in Python now for as good as what it held in the traces."""
        self.require("trace to compare with")
        with self.changes.one("accept_settings()"), self.lock:
            for each in self.made:
                each.entry.accept_settings()

    # --- traces that come and go ---------------------------------------------------------------------

    def settle_sizes(self, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
        """Decide by the example arguments which dimensions are dynamic, where the configuration leaves it open."""
        if self.backend.config.dynamic_shapes_config.type is DynamicShapesType.AUTO:
            marks = KeptMarks(pytree.tree_leaves((tuple(args), dict(kwargs))))
            self.sizes = self._declared or (marks if marks.any else AllDimensions())

    def add(self, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
        """Trace and compile the model for calls like this one.

        Raises:
            PieceworkError: as ``piecework.compile``.
        """
        quiet = nullcontext() if full_tracebacks() else torch_compat.quiet_trial()
        with self._around(), quiet, seldom_full_collections():
            made = trace_model(
                self._model, args, kwargs, self.backends(), self.sizes, self._as_it_is
            )
        if self._around is nullcontext:
            made.entry.weights.unchanged()  # calls find the check ready
        else:
            made.entry.accept_settings()
        require_agreement(made.program, self._runtime_config)
        if self.on_trace is not None:
            self.on_trace(made)
        self.made = (*self.made, made)

    def backends(self) -> Callable[[], PieceworkBackend]:
        """What makes the backends of the next trace; the first one of all is `backend`."""
        shown = [] if self.made else [self.backend]
        one_of_several = Trace.ANOTHER if self.made else Trace.FIRST
        trace = Trace.ONLY if self.sizes is None else one_of_several

        def make() -> PieceworkBackend:
            backend = shown.pop() if shown else self._new_backend()
            backend.trace = trace
            backend.batch_of_first = self.made[0].program.batch_place() if self.made else None
            return backend

        return make

    def _add_for(
        self, refused: InputError, tried: int, args: Sequence[object], kwargs: Mapping[str, object]
    ) -> bool:
        """Trace the model for sizes that no trace serves; False if that is not why the call was refused, or can't be done."""
        sizes, places = self.sizes, refused.places
        if sizes is None or places is None or not torch_compat.may_recompile():
            return False
        if any(dim is not None and not sizes.may_differ(leaf, dim) for leaf, dim in places):
            return False
        with self.lock:
            if len(self.made) > tried:  # somebody else's call was first
                return True
            leaves = pytree.tree_leaves((args, kwargs))
            shapes = tuple(getattr(leaf, "shape", None) for leaf in leaves)
            most = self.backend.config.dynamic_shapes_config.max_traces
            if shapes in self._hopeless or self._by_themselves >= most:
                return False
            self._hopeless.add(shapes)  # unless it gets a trace now that serves it
            _log.info("tracing the model again: %s", refused)
            start = time.perf_counter()
            try:
                self.add(args, kwargs)
            except PieceworkError as error:
                refused.add_note(f"A trace for these sizes is not to be had: {error}")
                raise refused from error
            self._by_themselves += 1
            if self.made[-1].entry.accepts(args, kwargs):
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
        with self.lock:
            found = next((each for each in self.made if each.entry.accepts(*call)), None)
            if found is None:
                self.add(*call)
            return found or self.made[-1]

    def add_ahead(self, batches: Sequence[int]) -> None:
        """Make the traces that batches of these sizes need, where none serves them yet."""
        from piecework.runtime.graphs.plan.options import CaptureOptions

        options = CaptureOptions(runtime=self._runtime_config)
        for batch in batches if self.sizes is not None else ():
            self._serving(self.made[0].call_of(batch, options))

    def of_one(self, sizes: Sequence[int] | None, options: CaptureOptions) -> TracedModel | None:
        """The trace that serves a batch of one, if it is to be captured and the first trace does not serve it."""
        if sizes is None:
            sizes = self.backend.config.cudagraph_capture_sizes
        if self.sizes is None or (sizes is not None and 1 not in sizes):
            return None
        call = self.made[0].call_of_one(options)
        try:
            return None if call is None else self._serving(call)
        except PieceworkError:
            if sizes is not None:
                raise
            return None  # nobody asked for it

    def add_one(self) -> None:
        """Make the trace that serves a batch of one, where there can be one and the first trace is for larger ones."""
        from piecework.runtime.graphs.plan.options import CaptureOptions

        symbols = self.made[0].entry.made.plan.symbols
        if any(each.low is not None and each.low > 1 for each in symbols):
            # A graph without a batch has no batch of one, and an object of the user's can't be made up.
            with suppress(PieceworkError, TypeError):
                self.of_one(None, CaptureOptions(runtime=self._runtime_config))

    def adopt(self, made: tuple[TracedModel, ...], sizes: object) -> None:
        """Serve calls by traces that were made in another process.

        Args:
            sizes: the name of what said which of their dimensions are dynamic.

        Raises:
            RankError: another process would run something else.
        """
        if sizes == AllDimensions.__name__:
            self.sizes = AllDimensions()
        if self._declared is not None:
            self.sizes = self._declared
        for each in made:
            require_agreement(each.program, self._runtime_config)
        self.made = made

    def forget(self) -> None:
        """Be as before anything was compiled."""
        self.made, self.sizes = (), None


def inside(
    around: Callable[[], AbstractContextManager[object]], call: Callable[..., object]
) -> Callable[..., object]:
    """``call``, each time in a context of ``around``."""
    if around is nullcontext:
        return call

    def run(*args: object, **kwargs: object) -> object:
        with around():
            return call(*args, **kwargs)

    return run


def seen_into() -> InputError:
    """The refusal of a call that something traces."""
    return InputError(
        "torch.fx traces this call, as symbolic_trace, make_fx and torch.export do, and sees nothing of what is compiled",
        hint="trace the model itself; stitched.split_gm is its graph, and stitched.save keeps what is compiled for another process",
    )


def _is_nested(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_nested
