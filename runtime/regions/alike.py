"""Whether two modules are one program on other weights. In: two modules. Out: which object of the one stands for which of the other, and the numbers and texts that differ; or why they are not alike.

Everything that code can reach from a module is compared, whether the code reads it or not. What is not known to be comparable makes
two modules unlike. Nothing of the user's runs.
"""

from __future__ import annotations

import functools
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from piecework.runtime.bind.facts import is_fixed, is_its_dictionary, same

Path = tuple[object, ...]

_MAPPINGS = (dict, OrderedDict, defaultdict, types.MappingProxyType)
_SEQUENCES = (list, deque)
_LEAVES = (int, str)


@dataclass(frozen=True, slots=True)
class Differing:
    """A number or text that two modules have otherwise at one place.

    Attributes:
        path: attributes and keys from the module to it, as `Alike` counts them.
        name: the attribute or key that holds it.
        first, second: the values.
    """

    path: Path
    name: object
    first: object
    second: object


class Unlike(Exception):
    """Two modules are not one program."""


@dataclass(slots=True)
class Alike:
    """Two modules that differ in tensors' values, and in the numbers and texts that ``differing`` lists.

    Attributes:
        first, second: the modules.
        pairs: by identity of an object that the first module reaches: that object, and what stands for it in the second.
        differing: what they have otherwise.
    """

    first: torch.nn.Module
    second: torch.nn.Module
    pairs: dict[int, tuple[object, object]] = field(default_factory=dict)
    differing: list[Differing] = field(default_factory=list)
    _back: dict[int, int] = field(default_factory=dict)
    _memory: dict[int, int] = field(default_factory=dict)
    _memory_back: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, first: torch.nn.Module, second: torch.nn.Module) -> Alike:
        """Compare two modules.

        Raises:
            Unlike: they are not one program; the text says where.
        """
        made = cls(first, second)
        pending: list[tuple[Path, object, object]] = [((), first, second)]
        while pending:
            path, one, other = pending.pop()
            pending += [((*path, *key), x, y) for key, x, y in made._inner(path, one, other)]
        return made

    def counterpart(self, value: object) -> object:
        """What stands for an object of the first module in the second; the object itself if it is none of the first's."""
        found = self.pairs.get(id(value))
        return value if found is None else found[1]

    def own(self) -> Iterator[object]:
        """The objects of the first module that are another object in the second."""
        return (one for one, other in self.pairs.values() if one is not other)

    def _inner(
        self, path: Path, one: object, other: object
    ) -> Iterator[tuple[Path, object, object]]:
        """Compare two values, and give the pairs of what is in them."""
        if type(one) is not type(other):
            raise Unlike(f"{_text(path)} is a {_kind(one)} here and a {_kind(other)} there")
        if is_fixed(one) and not isinstance(one, types.FunctionType):
            if not same(one, other):
                if type(one) not in _LEAVES:
                    raise Unlike(f"{_text(path)} is {one!r} here and {other!r} there")
                self.differing.append(Differing(path, path[-1], one, other))
            return
        if not self._pair(path, one, other) or one is other:
            return
        if isinstance(one, torch.Tensor):
            yield from self._tensors(path, one, other)  # type: ignore[arg-type]
        elif isinstance(one, torch.nn.Module):
            yield from self._mappings(path, one.__dict__, other.__dict__)
        elif type(one) in _MAPPINGS:
            if type(one) is defaultdict and one.default_factory is not other.default_factory:  # type: ignore[attr-defined]
                raise Unlike(f"{_text(path)} has another default")
            yield from self._mappings(path, one, other)  # type: ignore[arg-type]
        elif type(one) in _SEQUENCES or isinstance(one, tuple):
            if len(one) != len(other):  # type: ignore[arg-type]
                raise Unlike(f"{_text(path)} has {len(one)} items here and {len(other)} there")  # type: ignore[arg-type]
            for index, (x, y) in enumerate(zip(one, other, strict=True)):  # type: ignore[call-overload]
                yield (index,), x, y
        elif type(one) in (set, frozenset):
            if not same(one, other):
                raise Unlike(f"{_text(path)} has other members")
        else:
            yield from self._others(path, one, other)

    def _others(
        self, path: Path, one: object, other: object
    ) -> Iterator[tuple[Path, object, object]]:
        """Functions, methods, partials and plain objects."""
        if isinstance(one, types.MethodType):
            yield ("__func__",), one.__func__, other.__func__  # type: ignore[attr-defined]
            yield ("__self__",), one.__self__, other.__self__  # type: ignore[attr-defined]
        elif isinstance(one, types.FunctionType):
            if one.__code__ is not other.__code__ or one.__globals__ is not other.__globals__:  # type: ignore[attr-defined]
                raise Unlike(f"{_text(path)} is another function")
            for name in ("__defaults__", "__kwdefaults__", "__dict__"):
                yield (name,), getattr(one, name), getattr(other, name)
            cells = one.__closure__ or (), other.__closure__ or ()  # type: ignore[attr-defined]
            for index, (x, y) in enumerate(zip(*cells, strict=True)):
                yield ("__closure__", index), x.cell_contents, y.cell_contents
        elif type(one) is functools.partial:
            for name in ("func", "args", "keywords"):
                yield (name,), getattr(one, name), getattr(other, name)
        elif is_plain(type(one)):
            yield from self._mappings(path, one.__dict__, other.__dict__)
        else:
            raise Unlike(f"{_text(path)} is a {_kind(one)}, which is not known to be comparable")

    def _pair(self, path: Path, one: object, other: object) -> bool:
        """Note that one object stands for the other; False if that was known."""
        known = self.pairs.get(id(one))
        if known is not None or id(other) in self._back:
            if known is None or known[1] is not other or self._back[id(other)] != id(one):
                raise Unlike(f"{_text(path)} is shared with something else than in the other")
            return False
        self.pairs[id(one)] = one, other
        self._back[id(other)] = id(one)
        return True

    def _mappings(
        self, path: Path, one: Mapping[Any, object], other: Mapping[Any, object]
    ) -> Iterator[tuple[Path, object, object]]:
        if len(one) != len(other):
            names = sorted(map(str, set(one).symmetric_difference(other)))
            raise Unlike(f"{_text(path)} has {', '.join(names)} in one of them only")
        for x, y in zip(one, other, strict=True):
            if not (is_fixed(x) and same(x, y)):
                raise Unlike(f"{_text(path)} has the key {x!r} here and {y!r} there")
            yield (x,), one[x], other[y]

    def _tensors(
        self, path: Path, one: torch.Tensor, other: torch.Tensor
    ) -> Iterator[tuple[Path, object, object]]:
        if type(one) not in _TENSORS or one.layout is not torch.strided:
            raise Unlike(f"{_text(path)} is a {_kind(one)}, which is not known to be comparable")
        for name, x, y in zip(_FACTS, _facts(one), _facts(other), strict=True):
            if x != y:
                raise Unlike(f"{_text(path)} has {name} {x} here and {y} there")
        memory = tuple(each.untyped_storage()._cdata for each in (one, other))
        ours = self._memory.setdefault(memory[0], memory[1])
        theirs = self._memory_back.setdefault(memory[1], memory[0])
        if (ours, theirs) != (memory[1], memory[0]):
            raise Unlike(f"{_text(path)} shares memory otherwise than in the other")
        yield ("__dict__",), one.__dict__, other.__dict__


_TENSORS = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
_FACTS = (
    *("dtype", "layout", "device", "shape", "strides", "storage offset", "requires_grad"),
    *("place in autograd", "gradient", "inference mode", "lazy conjugation", "lazy negation"),
)


def _facts(tensor: torch.Tensor) -> tuple[object, ...]:
    kind = (tensor.dtype, tensor.layout, tensor.device, tensor.shape, tensor.stride())
    place = (tensor.storage_offset(), tensor.requires_grad, tensor.is_leaf)
    grad = tensor.is_leaf and tensor.grad is not None
    return (*kind, *place, grad, tensor.is_inference(), tensor.is_conj(), tensor.is_neg())


def is_plain(kind: type) -> bool:
    """Whether all that an object of this class holds is in its dictionary, and the class is nobody's in C."""
    own = kind.__mro__[:-1]
    return is_its_dictionary(kind) and not any(
        each.__module__ in ("builtins", "torch._C") for each in own
    )


def _kind(value: object) -> str:
    return type(value).__qualname__


def _text(path: Path) -> str:
    hidden = ("_modules", "_parameters", "_buffers", "__dict__")
    return ".".join(str(key) for key in path if key not in hidden) or "the module"
