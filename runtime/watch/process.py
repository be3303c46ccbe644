"""The state of the process that a trace took for given: all that Dynamo's guard on torch's global state looks at, and the hooks of every module."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping

import torch

from piecework.runtime import torch_compat
from piecework.runtime.watch.places import Step

# The entry turns gradients off, looks at modes, and serves under the autocast of the trace alone; threads change no result.
_ENTRY = {"grad_mode", "num_threads", "torch_function", "torch_function_all_disabled"}
_AUTOCAST = "autocast_state"
_MOST = 8


class ProcessState:
    """torch's global state as it was.

    Args:
        state: what `torch_compat.global_state` says of it; None takes that of now.
        asks_autocast: the model's code asks for autocast, also where it is off.
    """

    def __init__(
        self, state: Mapping[str, object] | None = None, asks_autocast: bool = False
    ) -> None:
        self.asks_autocast = asks_autocast
        now = torch_compat.global_state()
        self.state = {**now} if state is None else {**state}
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
            if name in _ENTRY or (name == _AUTOCAST and not self.asks_autocast):
                continue
            if now.get(name) != was:
                was_text, now_text = (_text(name, each) for each in (was, now.get(name)))
                return (
                    f"torch's {name} was {was_text} when the model was traced and is {now_text} now"
                )
        return ""

    def as_json(self) -> dict[str, object]:
        """The state as JSON data."""
        found: dict[str, object] = json.loads(json.dumps(self.state))
        return {"state": found, "asks_autocast": self.asks_autocast}


def _text(name: str, value: object) -> str:
    return str(value).removeprefix("torch.") if name != _AUTOCAST else "another"


def _hooks() -> dict[str, Step]:
    """torch's hooks for every module, by the name of their table; Dynamo guards none of them."""
    held = vars(torch.nn.modules.module)
    tables = (name for name in held if name.startswith("_global_") and isinstance(held[name], dict))
    return {name: Step.of(held[name], None, "keys") for name in tables}


class ModuleHooks:
    """torch's hooks for every module, as they were."""

    def __init__(self) -> None:
        self._seen = _hooks()

    def steps(self) -> Iterator[Step]:
        """The look-ups whose results would change with the hooks."""
        for name, step in _hooks().items():
            yield from (step, Step.of(vars(torch.nn.modules.module), name))

    def difference(self) -> str:
        """Which of them are others; "" if none are."""
        for name, step in _hooks().items():
            if step.seen() != self._seen[name].seen():
                return (
                    f"torch.nn.modules.module.{name} has other hooks than when the model was traced"
                )
        return ""

    def present(self) -> str:
        """Which of them there were; "" if there were none."""
        return next((name for name, step in self._seen.items() if step.value), "")
