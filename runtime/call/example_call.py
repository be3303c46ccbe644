"""Makes a call of zeros that a trace would accept, to trace again with other sizes."""

from collections.abc import Mapping, Sequence
from typing import assert_never

import torch

from piecework.codegen.entry import plan as ep
from piecework.codegen.plan.size_text import evaluate
from piecework.runtime import torch_compat


def example_call(
    parameters: Sequence[ep.Parameter], symbols: Mapping[str, int]
) -> tuple[tuple[object, ...], dict[str, object]]:
    """Positional and keyword arguments in which each symbol has the given number."""
    maker = _Maker(symbols)
    args: list[object] = []
    kwargs: dict[str, object] = {}
    for parameter in parameters:
        value = maker.value(parameter.node)
        match parameter.kind:
            case "*":
                args += value  # type: ignore[operator]
            case "**":
                kwargs.update(value)  # type: ignore[call-overload]
            case "k":
                kwargs[parameter.name] = value
            case _:
                args.append(value)
    return tuple(args), kwargs


class _Maker:
    def __init__(self, symbols: Mapping[str, int]) -> None:
        self._symbols = symbols
        self._leaves: dict[int, object] = {}

    def value(self, node: ep.Node) -> object:
        match node:
            case ep.Leaf(index, _, assumption):
                found = self._leaves[index] = self._leaf(assumption)
                return found
            case ep.Items():
                pairs = zip(node.keys, map(self.value, node.children), strict=True)
                return dict(pairs) if node.kind is dict else node.kind(each for _, each in pairs)
            case ep.Tree():
                leaves = [self.value(child) for child in node.children]
                return torch_compat.unflatten_tree(leaves, node.structure)  # type: ignore[arg-type]
            case _:
                assert_never(node)

    def _leaf(self, assumption: object) -> object:
        match assumption:
            case ep.TensorInput():
                return self._tensor(assumption)
            case ep.UnusedTensor(dtype, device, rank):
                return torch.zeros([2] * rank, dtype=dtype, device=device)
            case ep.SameObject(index):
                return self._leaves[index]
            case ep.IntegerInput(symbol):
                return self._number(symbol)
            case ep.FixedValue(value):
                return value
        raise TypeError(type(assumption).__name__)

    def _tensor(self, tensor: ep.TensorInput) -> torch.Tensor:
        shape = [self._number(size) for size in tensor.sizes]
        made = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
        if tensor.strides is not None and None not in tensor.strides:
            strides = [self._number(each) for each in tensor.strides]  # type: ignore[arg-type]
            made = torch.empty_strided(
                shape, strides, dtype=tensor.dtype, device=tensor.device
            ).zero_()
        if tensor.kind is torch.nn.Parameter:
            return torch.nn.Parameter(made, requires_grad=bool(tensor.requires_grad))
        return made.requires_grad_(bool(tensor.requires_grad))

    def _number(self, size: ep.Size) -> int:
        return size if isinstance(size, int) else int(evaluate(size, self._symbols))  # type: ignore[call-overload]
