"""Where a model keeps its weights, and whether they are still the bound ones. In: a model and the weights that a capture found in it. Out: a check for every call, and the weights of now.

It holds the model's own dictionaries and tensors; it changes none of them and copies no weight.

How a change is noticed, cheapest first, because looking at every dictionary of a model takes as long as several kernels:

- A parameter, buffer or submodule that is assigned (``load_state_dict(assign=True)`` too): torch's registration hooks tell
  at once, and the next call looks at everything.
- A weight that is moved, converted or resized, by ``.to()`` or through ``.data``: every call compares dtype, device, sizes
  and strides, in one call into torch. Weights that only matrix products of ATen read are left out: the products refuse
  another dtype or device, compiled code compares sizes and strides, and `explain` then tells which weight it was.
- A dictionary of a module that is written past `torch.nn.Module` (``torch.func.functional_call`` does): every call looks at
  the first and last weight, at all buffers and at the training flag, and at a few others in turn.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle

import torch
from torch.nn.modules import module as registration

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


_IN_TURN = 4  # how many dictionary entries a call looks at in turn


@dataclass(slots=True)
class _Step:
    """One look-up on the way to a weight: ``owner[key]`` must be ``value``."""

    owner: dict[str, object]
    key: str
    value: object
    path: str


@dataclass(eq=False)
class BoundWeights:
    """The weights that emitted code holds, and how to find them again in the model.

    Attributes:
        roots: modules reachable from the model, with the prefix of their paths.
        traced: the weights as traced, in order of the graph's inputs.
        tensors: the bound tensors, in the same order.
        unchanged: whether the model still holds them, as they were traced; for every call.
    """

    roots: Sequence[tuple[str, torch.nn.Module]]
    traced: tuple[Traced, ...]
    tensors: list[torch.Tensor]
    _steps: dict[tuple[int, str], _Step] = field(default_factory=dict)
    _strict: frozenset[str] = frozenset()
    _owners: set[int] = field(default_factory=set)
    _touched: bool = False
    unchanged: Callable[[], bool] = field(default=lambda: True, repr=False)

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
        found.watch()
        return found

    def _look(self) -> None:
        self._steps = {}
        names = self._names()
        for tensor in self.tensors:
            ways = names.get(id(tensor)) or [_search(self.roots, tensor)]
            for step in (step for way in ways for step in way):
                self._steps.setdefault((id(step.owner), step.key), step)
        for prefix, root in self.roots:
            step = _Step(root.__dict__, "training", root.training, f"{prefix}training")
            self._steps.setdefault((id(step.owner), step.key), step)
        self._owners = {id(module) for _, root in self.roots for module in root.modules()}
        self._touched = False
        self.unchanged = self._check()

    def _check(self) -> Callable[[], bool]:
        """The check of every call; see the module's docstring."""
        rows = [(step.owner, step.key, step.value) for step in self._steps.values()]
        tensors = [row for row in rows if isinstance(row[2], torch.Tensor)]
        always = [row for row in rows if row[1] == "training" or _is_buffer(row)]
        always += [*tensors[:1], *tensors[-1:]]
        turns = cycle([rows[i : i + _IN_TURN] for i in range(0, len(rows), _IN_TURN)] or [[]])
        loose = [
            t for w, t in zip(self.traced, self.tensors, strict=True) if w.path not in self._strict
        ]
        metadata = torch_compat.metadata_guard(loose)
        thorough = torch_compat.metadata_guard(self.tensors)

        def unchanged() -> bool:
            if self._touched:
                return self._look_again(rows, thorough)
            for owner, key, value in always:
                if owner.get(key) is not value:
                    return False
            for owner, key, value in next(turns):
                if owner.get(key) is not value:
                    return False
            return metadata()

        return unchanged

    def _look_again(
        self, rows: Sequence[tuple[dict[str, object], str, object]], metadata: Callable[[], bool]
    ) -> bool:
        """The full look, after something was assigned somewhere in the model."""
        if all(owner.get(key) is value for owner, key, value in rows) and metadata():
            self._touched = False
            return True
        return False

    def trust(self, paths: frozenset[str]) -> None:
        """Leave weights out of the per-call comparison that nothing reads but operators which compare by themselves."""
        self._strict = paths
        self.unchanged = self._check()

    def watch(self) -> None:
        """Have torch tell about assignments to the model's modules, for as long as this lives."""
        seen = weakref.ref(self)

        def assigned(module: torch.nn.Module, name: str, value: object) -> None:
            weights = seen()
            if weights is not None and id(module) in weights._owners:
                weights._touched = True

        for register in (
            registration.register_module_parameter_registration_hook,
            registration.register_module_buffer_registration_hook,
            registration.register_module_module_registration_hook,
        ):
            weakref.finalize(self, register(assigned).remove)

    def _names(self) -> dict[int, list[list[_Step]]]:
        """Every way to every parameter and buffer, by identity: a tied weight has several."""
        ways: dict[int, list[list[_Step]]] = {}
        for prefix, root in self.roots:
            for named in (root.named_parameters, root.named_buffers):
                for path, tensor in named(remove_duplicate=False):
                    ways.setdefault(id(tensor), []).append(_walk(root, path, prefix))
        return ways

    def fetch(self) -> list[torch.Tensor]:
        """The weights of now, for a stitched function that takes them in every call."""
        return self.tensors if self.unchanged() else self.current()

    # --- the weights of now ------------------------------------------------------------------------

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
        return self.change() or InputError(
            "the weights changed since they were bound", hint="call rebind() on the stitched module"
        )

    def change(self) -> InputError | None:
        """The first thing that is not as it was bound, if any."""
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
        return None


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
        steps.append(_Step(children, name, child, f"{walked}{name}"))
        module, walked = child, f"{walked}{name}."
    held = module.__dict__
    for values in (held["_parameters"], held["_buffers"], held):
        if isinstance(values.get(last), torch.Tensor):
            step = _Step(values, last, values[last], f"{walked}{last}")
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


def _is_buffer(row: tuple[dict[str, object], str, object]) -> bool:
    return isinstance(row[2], torch.Tensor) and not isinstance(row[2], torch.nn.Parameter)
