"""Where a model keeps its weights. In: a model and the weights that a capture found in it. Out: what to look at to know that they are still the bound ones.

It holds the model's own dictionaries and tensors; it changes none of them and copies no weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from piecework.codegen.entry_plan import HeldWeight
from piecework.errors import BindError, InputError
from piecework.runtime import torch_compat


@dataclass(frozen=True, slots=True)
class Traced:
    """A weight as the trace saw it."""

    path: str
    dtype: torch.dtype
    device: torch.device
    shape: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, path: str, tensor: torch.Tensor) -> Traced:
        return cls(path, tensor.dtype, tensor.device, tensor.shape, tensor.stride())

    def difference(self, tensor: object) -> str:
        """How ``tensor`` differs from what was traced; "" if it does not."""
        if not isinstance(tensor, torch.Tensor):
            return f"is a {type(tensor).__qualname__} now"
        if type(tensor) not in _PLAIN:
            return f"is a {type(tensor).__qualname__} now, a tensor subclass"
        for what, expected, actual in (
            ("dtype", self.dtype, tensor.dtype),
            ("device", self.device, tensor.device),
            ("shape", tuple(self.shape), tuple(tensor.shape)),
            ("stride", self.stride, tensor.stride()),
        ):
            if expected != actual:
                return f"has {what} {actual}; the trace had {expected}"
        return ""


_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


@dataclass(slots=True)
class _Step:
    """One look-up on the way to a weight: ``owner[key]`` must be ``value``."""

    owner: dict[str, object]
    key: str
    value: object
    path: str
    holder: str


@dataclass(slots=True)
class BoundWeights:
    """The weights that emitted code holds, and how to find them again in the model.

    Attributes:
        roots: modules reachable from the model, with the prefix of their paths.
        traced: the weights as traced, in order of the graph's inputs.
        tensors: the bound tensors, in the same order.
    """

    roots: Sequence[tuple[str, torch.nn.Module]]
    traced: tuple[Traced, ...]
    tensors: list[torch.Tensor]
    _steps: dict[tuple[int, str], _Step] = field(default_factory=dict)
    _metadata: Callable[[], bool] = field(default=lambda: True)

    @classmethod
    def of(
        cls,
        roots: Sequence[tuple[str, torch.nn.Module]],
        weights: Sequence[tuple[str, torch.Tensor]],
    ) -> BoundWeights:
        """Find each of ``weights`` (path, tensor) under ``roots``."""
        traced = tuple(Traced.of(path, tensor) for path, tensor in weights)
        found = cls(roots, traced, [tensor for _, tensor in weights])
        found._look()
        return found

    def _look(self) -> None:
        self._steps = {}
        names = self._names()
        for tensor in self.tensors:
            ways = names.get(id(tensor)) or [_search(self.roots, tensor)]
            for step in (step for way in ways for step in way):
                self._steps.setdefault((id(step.owner), step.key), step)
        for prefix, root in self.roots:
            path = f"{prefix}training"
            step = _Step(root.__dict__, "training", root.training, path, f"{prefix}model")
            self._steps.setdefault((id(step.owner), step.key), step)
        self._metadata = torch_compat.metadata_guard(self.tensors)

    def _names(self) -> dict[int, list[list[_Step]]]:
        """Every way to every parameter and buffer, by identity: a tied weight has several."""
        ways: dict[int, list[list[_Step]]] = {}
        for prefix, root in self.roots:
            for named in (root.named_parameters, root.named_buffers):
                for path, tensor in named(remove_duplicate=False):
                    ways.setdefault(id(tensor), []).append(_walk(root, path, prefix))
        return ways

    # --- what the entry needs --------------------------------------------------------------------

    def held(self) -> tuple[HeldWeight, ...]:
        """The checks to emit."""
        return tuple(HeldWeight(step.holder, step.key, step.path) for step in self._steps.values())

    def namespace(self, names: Sequence[tuple[str, str]]) -> dict[str, object]:
        """Values of the names (of owner and value, one pair per row of `held`) that the emitted checks use."""
        found: dict[str, object] = {}
        for (owner, value), step in zip(names, self._steps.values(), strict=True):
            found[owner] = step.owner
            found[value] = step.value
        return found

    def metadata_unchanged(self) -> bool:
        """Whether dtype, device, sizes and strides of the bound tensors are those of the trace."""
        return self._metadata()

    def current(self) -> list[torch.Tensor]:
        """The weights that the model holds now.

        Raises:
            BindError: one is missing, or differs from the trace in more than its values.
        """
        found = []
        for weight, bound in zip(self.traced, self.tensors, strict=True):
            tensor = self._find(weight.path, bound)
            difference = weight.difference(tensor)
            if difference:
                raise BindError(
                    f"weight {weight.path} {difference}",
                    hint="compiled pieces are made for one dtype, device and shape: compile the model again",
                )
            assert isinstance(tensor, torch.Tensor)
            found.append(tensor)
        self._require_same_sharing(found)
        return found

    def _find(self, path: str, bound: torch.Tensor) -> object:
        for prefix, root in self.roots:
            if path.startswith(prefix):
                steps = _walk(root, path.removeprefix(prefix), prefix)
                if steps:
                    return steps[-1].value
        way = _search(self.roots, bound)
        if way or not self.roots or not self._had_way(path):
            return way[-1].value if way else bound
        raise BindError(
            f"weight {path} is no longer there", hint="put it back, or compile the model again"
        )

    def _had_way(self, path: str) -> bool:
        return any(step.path == path for step in self._steps.values())

    def _require_same_sharing(self, now: Sequence[torch.Tensor]) -> None:
        """Raise if two names of one traced tensor have become two tensors: the graph reads only one of them."""
        for weight, bound, tensor in zip(self.traced, self.tensors, now, strict=True):
            for path, value in self._other_names(bound):
                if value is not tensor and path != weight.path:
                    raise BindError(
                        f"{path} and {weight.path} were one tensor when the model was traced and are two now",
                        hint="tie them again (most models have tie_weights()), or compile the model again",
                    )

    def _other_names(self, bound: torch.Tensor) -> list[tuple[str, object]]:
        steps = [step for step in self._steps.values() if step.value is bound]
        return [(step.path, step.owner.get(step.key)) for step in steps]

    def rebind(self) -> None:
        """Take what the model holds now.

        Raises:
            BindError: as `current`; nothing has changed then.
        """
        self.tensors = self.current()
        self._look()

    def explain(self) -> InputError:
        """What changed, for a call that found something changed."""
        for step in self._steps.values():
            if step.owner.get(step.key) is step.value:
                continue
            if step.key == "training" and step.owner.get("training") is not step.value:
                mode = "train" if step.value else "eval"
                return InputError(
                    f"the model was traced with {step.path}={step.value} and has {step.owner.get('training')} now",
                    hint=f"call {mode}() on the model, or compile it again",
                )
            return InputError(
                f"{step.path} was replaced since the weights were bound",
                hint="call rebind() on the stitched module after loading, replacing or moving weights",
            )
        for weight, tensor in zip(self.traced, self.tensors, strict=True):
            difference = weight.difference(tensor)
            if difference:
                return InputError(
                    f"weight {weight.path} {difference}",
                    hint="compiled pieces are made for one dtype, device and shape: compile the model again",
                )
        return InputError(
            "the weights changed since they were bound", hint="call rebind() on the stitched module"
        )


def _walk(root: torch.nn.Module, path: str, prefix: str) -> list[_Step]:
    """The look-ups along a dotted path; empty if it leads nowhere."""
    *modules, last = path.split(".")
    steps: list[_Step] = []
    module, walked = root, prefix
    for name in modules:
        children: dict[str, object] = module.__dict__["_modules"]
        child = children.get(name)
        if not isinstance(child, torch.nn.Module):
            return []
        steps.append(_Step(children, name, child, f"{walked}{name}", f"{walked}modules"))
        module, walked = child, f"{walked}{name}."
    held = module.__dict__
    for holder, values in (
        ("parameters", held["_parameters"]),
        ("buffers", held["_buffers"]),
        ("attributes", held),
    ):
        if isinstance(values.get(last), torch.Tensor):
            step = _Step(values, last, values[last], f"{walked}{last}", f"{walked}{holder}")
            return [*steps, step]
    return []


def _search(roots: Sequence[tuple[str, torch.nn.Module]], tensor: torch.Tensor) -> list[_Step]:
    """The look-ups that lead to a tensor that is a plain attribute of a module."""
    for prefix, root in roots:
        for name, module in root.named_modules():
            for key, value in module.__dict__.items():
                if value is tensor:
                    return _walk(root, f"{name}.{key}".lstrip("."), prefix)
    return []
