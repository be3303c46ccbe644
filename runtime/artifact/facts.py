"""What a trace read of the model, for another process and in it."""

from __future__ import annotations

from piecework.errors import ArtifactError
from piecework.runtime.watch.state import SavedState, TracedState
from piecework.runtime.watch.values import import_starts

_OTHER = "compile the model again; with artifact=path this happens by itself"


def saved_state(state: TracedState) -> SavedState:
    """``state`` for another process.

    Raises:
        ArtifactError: something holds no longer, or can be told in this process only.
    """
    changed = state.difference()
    if changed:
        raise ArtifactError(
            f"the model is not as it was traced: {changed}",
            hint="put it back, or compile the model again, and save then",
        )
    if state.global_hooks():
        raise ArtifactError(
            f"torch.nn.modules.module has {state.global_hooks()}, which belong to this process",
            hint="remove the hooks, compile the model again, and save then",
        )
    if state.plain.untold:
        raise ArtifactError(
            f"the trace relies on {state.plain.untold[0]}, which only this process can compare",
            hint="keep what the model computes with in attributes that are numbers, strings, functions or tensors",
        )
    return state.saved()


def established(saved: SavedState, model: object) -> TracedState:
    """``saved`` for a model of this process.

    Raises:
        ArtifactError: what the trace read is not so here.
    """
    try:
        import_starts(saved.values)
    except ImportError as error:
        raise ArtifactError(f"what the trace began at is not here: {error}", hint=_OTHER) from error
    found = saved.differences(model)
    if found:
        raise ArtifactError(
            f"the model is not the one that was saved: when it was traced, {found[0]}", hint=_OTHER
        )
    return TracedState.loaded(saved, model)
