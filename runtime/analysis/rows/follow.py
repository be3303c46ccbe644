"""A graph run node by node on fake values. In: a graph and who is told. Out: its results, with the bodies of higher-order operators run in place.

A higher-order operator whose body can't be run in place is an error; the caller refuses the graph.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.fx
from torch._ops import HigherOrderOperator


class Watcher(Protocol):
    """Who is told."""

    node: torch.fx.Node | None

    def constant(self, value: object) -> object: ...

    def is_same(self, value: object) -> bool: ...

    def joined(self, value: Any, other: Any, why: str | None) -> None: ...


class Follower(torch.fx.Interpreter):
    """Runs a graph; the modes that watch operators are the caller's.

    Attributes:
        node: the one that runs.
    """

    def __init__(self, module: torch.fx.GraphModule, walk: Watcher) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.extra_traceback = False
        self.node: torch.fx.Node | None = None
        self._walk = walk
        self._autocasts: list[Any] = []

    def run(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().run(*args, **kwargs)
        finally:
            while self._autocasts:
                self._autocasts.pop().__exit__(None, None, None)

    def run_node(self, n: torch.fx.Node) -> Any:
        self.node = self._walk.node = n
        return super().run_node(n)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._walk.constant(super().get_attr(target, args, kwargs))

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        if isinstance(module, torch.fx.GraphModule):
            return self._body(module, args)
        raise NotImplementedError(f"calls module {target}")

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if isinstance(target, HigherOrderOperator):
            return self._higher_order(target.name(), args, kwargs)
        result = super().call_function(target, args, kwargs)
        name = getattr(target, "__name__", "")
        if name == "_enter_autocast":
            self._autocasts.append(result)
        elif name == "_exit_autocast" and self._autocasts:
            self._autocasts.pop()
        return result

    def _body(self, module: torch.fx.GraphModule, args: Any) -> Any:
        inner = Follower(module, self._walk)
        try:
            return inner.run(*args)
        finally:
            self.node = self._walk.node = inner.node

    def _higher_order(self, name: str, args: Any, kwargs: Any) -> Any:
        match name:
            case "wrap" | "tag_activation_checkpoint":
                return self._body(args[0], args[1:])
            case "wrap_with_autocast":
                device, dtype, enabled, cache, body, *rest = args
                with torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache):
                    return self._body(body, rest)
            case "wrap_with_set_grad_enabled":
                with torch.set_grad_enabled(args[0]):
                    return self._body(args[1], args[2:])
            case "invoke_subgraph":
                return self._body(args[0], args[2:])
            case "cond":
                return self._cond(*args)
        raise NotImplementedError(f"the body of {name} is not looked into")

    def _cond(self, condition: Any, yes: Any, no: Any, operands: Any = ()) -> Any:
        why = None if self._walk.is_same(condition) else "cond depends on rows"
        value, other = self._body(yes, operands), self._body(no, operands)
        self._walk.joined(value, other, why)
        return value
