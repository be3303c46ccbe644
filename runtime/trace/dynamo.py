"""Dynamo, run once on a function and its arguments; nothing that the backend holds outlives the call."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence

import torch

from piecework.runtime import torch_compat
from piecework.runtime.trace.errors import capture_error, own_error
from piecework.runtime.trace.results import let_dynamo_ask, sizes_from_graph


def run_dynamo(
    function: types.FunctionType,
    args: Sequence[object],
    kwargs: Mapping[str, object],
    backend: Callable[..., object],
    choose_guards: Callable[..., object],
    dynamic: bool | None,
    extra: Mapping[str, object],
) -> object:
    """What ``function`` returns when Dynamo traces it whole and ``backend`` is given the graph.

    Args:
        function: called with ``args`` and ``kwargs``; of its own, since Dynamo keeps what it compiles with it.
        backend: called once while the tracing context is open; what it returns is called for the result.
        choose_guards: torch's ``guard_filter_fn``: sees all guards and says which are kept.
        dynamic: as `torch.compile` takes it.
        extra: settings of Dynamo beside those that each trace has.

    Raises:
        PieceworkError: what ``backend`` raised.
        CaptureError: Dynamo's refusal, or an error of the model's own.
    """
    lent = [
        backend
    ]  # torch keeps every backend that it was ever given, and must not keep a model with it
    compiled = torch.compile(
        function,
        backend=lambda gm, example_inputs: lent[0](gm, example_inputs),
        fullgraph=True,
        dynamic=dynamic,
        options={"guard_filter_fn": choose_guards},
    )
    settings = {
        # What Dynamo remembers of sizes that other captures had must not decide which dimensions of this one are dynamic.
        "automatic_dynamic_shapes": False,
        "specialize_float": True,
        # An argument may be a parameter; weights are marked one by one.
        "force_parameter_static_shapes": False,
        "replay_side_effects": False,  # a traced call leaves the user's objects alone
        "allow_rnn": True,  # a recurrent layer is one call
        **torch_compat.guard_settings(),
        **torch_compat.region_settings(),
        **extra,
    }
    own_symbols = torch_compat.own_symbol_per_dimension()
    torch_compat.forget_imports()
    let_dynamo_ask()
    try:
        with torch.no_grad(), torch._dynamo.config.patch(settings), own_symbols:
            return torch_compat.in_default_stance(lambda: compiled(*args, **kwargs))
    except Exception as error:
        own = own_error(error)
        if own is not None:
            raise own from own.__cause__ or error
        inner = torch_compat.backend_failure(error)
        if inner is not None:
            raise inner from None
        raise capture_error(error) from error
    finally:
        lent.clear()


def returning(values: list[object]) -> Callable[..., object]:
    """A function that returns ``values``; it holds nothing else, since Dynamo keeps it for a while."""
    return lambda *_: list(values)


def call_model(model, *args, **kwargs):  # type: ignore[no-untyped-def]
    return sizes_from_graph(model(*args, **kwargs))


def call_idle(model, *args, **kwargs):  # type: ignore[no-untyped-def]
    """The same with an operator that nobody needs: Dynamo asks no backend about a model that computes nothing."""
    return sizes_from_graph(model(*args, **kwargs)), torch.zeros(())
