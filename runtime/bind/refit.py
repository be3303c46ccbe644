"""New values for the weights of a model. In: a model and tensors by name. Out: what is to be copied where, all of it checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from piecework.errors import BindError, ConfigError, did_you_mean
from piecework.runtime import torch_compat
from piecework.runtime.bind.reachable import own_tensors
from piecework.runtime.bind.weights import unfit


def refit(
    model: object, state: Mapping[str, torch.Tensor]
) -> Callable[[], list[tuple[torch.Tensor, torch.Tensor]]]:
    """Check ``state``; what is returned gives each weight with its new value, to be copied in this order while nobody calls.

    Raises:
        ConfigError: ``state`` is no mapping.
        BindError: as `StitchedModule.refit`.
    """
    if not isinstance(model, torch.nn.Module):
        raise BindError(
            "a function has no weights by name",
            where="refit",
            hint="write to the tensors that it uses, in place",
        )
    if not isinstance(state, Mapping):
        raise ConfigError(
            f"new weights come as a dict of tensors; got a {type(state).__qualname__}",
            hint="pass trained.state_dict()",
        )
    held = dict(own_tensors(model))
    tied: dict[int, str] = {}
    for name, new in state.items():
        if not isinstance(new, torch.Tensor):
            raise BindError(
                f"the new weight must be a tensor; got a {type(new).__qualname__}", where=name
            )
        old = held.get(name)
        if old is None:
            raise BindError(
                "the model has no such weight",
                where=name,
                hint=did_you_mean(name, held) or "names are those of model.state_dict()",
            )
        if new.is_meta and not old.is_meta:
            raise BindError(
                "the new weight is on the meta device, which holds no data",
                where=name,
                hint="load it where it has data, on the CPU for one",
            )
        difference = unfit(old, new)
        if difference:
            raise BindError(
                difference, where=name, hint="compile the model again for weights of another kind"
            )
        first = tied.setdefault(id(old), name)
        if new is not state[first] and not torch.equal(new, state[first]):
            raise BindError(
                f"it and {first} are one weight, and their new values differ",
                where=name,
                hint="give one of them",
            )
    own = {torch_compat.storage_id(each) for each in held.values()}

    def copies() -> list[tuple[torch.Tensor, torch.Tensor]]:
        found = []
        for name, new in state.items():
            place = torch_compat.storage_id(new)
            # A value that is another weight of the model may be written before it is read.
            of_another = place in own and place != torch_compat.storage_id(held[name])
            found.append((held[name], new.clone() if of_another else new))
        return found

    return copies
