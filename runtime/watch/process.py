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


def module_hooks() -> Iterator[Step]:
    """The look-ups of torch's hooks for every module; Dynamo guards none of them."""
    held = vars(torch.nn.modules.module)
    for name, value in held.items():
        if name.startswith("_global_") and isinstance(value, dict):
            yield Step.of(held, name, name)
            yield Step.of(value, None, name, "keys")


class ModuleHooks:
    """torch's hooks for every module, as they were."""

    def __init__(self) -> None:
        self._seen = {step.path: (step, step.seen()) for step in module_hooks() if step.key is None}

    def difference(self) -> str:
        """Which of them are others; "" if none are."""
        for path, (step, seen) in self._seen.items():
            if step.again().seen() != seen:
                return (
                    f"torch.nn.modules.module.{path} has other hooks than when the model was traced"
                )
        return ""

    def present(self) -> str:
        """Which of them there are; "" if there are none."""
        return next((path for path, (step, _) in self._seen.items() if step.value), "")
