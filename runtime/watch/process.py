"""The state of the process that a trace took for given: all that Dynamo's guard on torch's global state looks at, and torch's hooks for every module."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

import torch

from piecework.runtime import torch_compat

# The entry turns gradients off, looks at modes, and serves under the autocast of the trace alone; threads change no result.
_ENTRY = {"grad_mode", "num_threads", "torch_function", "torch_function_all_disabled"}
_AUTOCAST = "autocast_state"
_MOST = 8


class ProcessState:
    """torch's global state as it was."""

    def __init__(
        self, state: Mapping[str, object] | None = None, asks_autocast: bool = False
    ) -> None:
        self.asks_autocast = asks_autocast
        self.state = {**(torch_compat.global_state() if state is None else state)}
        self._good = [torch_compat.GlobalStateGuard()] if not self.difference() else []
        self.check: Callable[[], bool] = self._good[0].check if self._good else self.holds

    def holds(self) -> bool:
        """Whether the state is as it was in what counts; `check` of every call asks torch first."""
        for each in self._good:
            if each.check():
                self.check = each.check
                return True
        if self.difference():
            return False
        if len(self._good) < _MOST:  # it differs in what the graph is right about all the same
            self._good.append(torch_compat.GlobalStateGuard())
        return True

    def difference(self) -> str:
        """What is otherwise than it was; "" if nothing is."""
        now = torch_compat.global_state()
        for name, was in self.state.items():
            left_out = name in _ENTRY or (name == _AUTOCAST and not self.asks_autocast)
            if not left_out and now.get(name) != was:
                texts = [str(each).removeprefix("torch.") for each in (was, now.get(name))]
                return (
                    f"torch's {name} was {texts[0]} when the model was traced and is {texts[1]} now"
                )
        return ""

    def as_json(self) -> dict[str, object]:
        """The state as JSON data."""
        found: dict[str, object] = json.loads(json.dumps(self.state))
        return {"state": found, "asks_autocast": self.asks_autocast}


def hook_tables() -> list[dict[object, object]]:
    """torch's hooks for every module; Dynamo guards none of them."""
    held = vars(torch.nn.modules.module).items()
    return [each for k, each in held if k.startswith("_global_") and isinstance(each, dict)]
