"""Dynamic dimensions: which parameters have them, what a declaration may say, and how the first call's tensors are marked."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils import _pytree as pytree

from piecework.errors import ConfigError, InputError
from piecework.runtime.config.groups import DynamicShapesType
from piecework.runtime.trace.dynamic_dims import DynamicDims, dims_of, marked

if TYPE_CHECKING:
    from nowhere import Hidden


@dataclasses.dataclass
class Intermediate:
    tensors: dict[str, torch.Tensor]
    label: str = ""


def marks(tensor: torch.Tensor, kind: str = "dynamic") -> set[int]:
    return set(getattr(tensor, f"_dynamo_{kind}_indices", ()))


def refuses(error: type[Exception], match: str, dims: DynamicDims, call: dict[str, object]) -> None:
    with pytest.raises(error, match=match), marked(dims, call):
        pass


def test_annotated_parameters_are_dynamic_where_the_first_call_passes_tensors() -> None:
    def forward(
        self: object, x: torch.Tensor, y: Hidden, z: list[Hidden] | None, n: int, free=None
    ) -> None: ...

    dims = dims_of(forward)
    assert set(dims.dynamic) == {"x", "y", "z"}
    x, y, free = torch.randn(4, 8), torch.randn(4), torch.randn(4)
    with marked(dims, {"x": x, "y": y, "z": None, "n": 3, "free": free}):
        assert marks(x) == marks(y) == {0} and not marks(free)
    with marked(dims, {"x": x, "y": "text", "z": ["more"], "n": 3}):
        assert marks(x) == {0}


def example(
    self: object, x: torch.Tensor, y: torch.Tensor | None = None, *, n: int = 1
) -> None: ...


def test_a_declaration_replaces_what_annotations_say() -> None:
    dims = dims_of(example, {"y": [0, -1]}, {"x": -2})
    assert dict(dims.dynamic) == {"y": (0, -1)} and dict(dims.unbacked) == {"x": (-2,)}
    inferred = dims_of(example, None, {"x": 1})
    assert dict(inferred.dynamic) == {"x": (0,), "y": (0,)}


@pytest.mark.parametrize(
    ("declaration", "message"),
    [
        ({"x": 0, "w": 1, "v": 2}, "names 'w'.*no such parameter.*parameters: x, y, n"),
        ({"self": 0}, "names 'self'"),
        ({"x": "0"}, "must be a dimension or a list"),
        ({"x": True}, "must be a dimension or a list"),
        ({"x": []}, "must be a dimension or a list"),
        ({"x": [0, None]}, "must be a dimension or a list"),
        ({"x": [0, 0]}, "each once"),
        ({}, "nothing is dynamic"),
        (["x"], "must map parameter names"),
    ],
)
def test_a_wrong_declaration_is_an_error(declaration: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dims_of(example, declaration)


def test_nothing_to_infer_is_an_error_that_says_why() -> None:
    def forward(self: object, x, n: int) -> None: ...  # type: ignore[no-untyped-def]

    with pytest.raises(ConfigError, match=r"nothing is dynamic.*without annotation: x"):
        dims_of(forward)


# --- marks -------------------------------------------------------------------------------------------


def test_marks_end_with_the_block_also_on_an_exception() -> None:
    x, y = torch.randn(4, 8), torch.randn(3, 4)
    torch._dynamo.mark_dynamic(y, 0)
    before = {name: str(value) for name, value in vars(y).items()}
    dims = dims_of(example, {"x": [0, -1], "y": [0, 1]})
    with pytest.raises(ZeroDivisionError), marked(dims, {"x": x, "y": y}):
        assert marks(x) == marks(y) == {0, 1}
        _ = 1 / 0
    assert not vars(x)
    assert {name: str(value) for name, value in vars(y).items()} == before


def test_unbacked_wins_and_the_shape_type_decides_the_rest() -> None:
    x, y = torch.randn(4, 8), torch.randn(4)
    dims = dims_of(example, {"x": [0, 1], "y": 0}, {"x": -1})
    with marked(dims, {"x": x, "y": y}):
        assert (marks(x), marks(x, "unbacked"), marks(y)) == ({0}, {1}, {0})
    with marked(dims, {"x": x, "y": y}, DynamicShapesType.UNBACKED):
        assert (marks(x), marks(x, "unbacked"), marks(y, "unbacked")) == (set(), {0, 1}, {0})


def test_a_declaration_that_a_call_does_not_fit_is_an_error_and_an_absent_argument_is_not() -> None:
    for dim, rank in ((2, 2), (-3, 2), (0, 0)):
        x, dims = torch.randn([4] * rank), dims_of(example, {"x": dim})
        refuses(ConfigError, f"dimension {dim} of x .* has {rank} dim", dims, {"x": x})
        assert not vars(x)
    dims = dims_of(example, {"x": 0, "y": 0})
    with marked(dims, {"x": torch.randn(4), "y": None}), marked(dims, {"x": torch.randn(4)}):
        pass
    refuses(ConfigError, "passes a int without tensors", dims, {"x": torch.randn(4), "y": 3})
    scalar = {"x": torch.tensor(1.0)}
    refuses(InputError, "no tensor for a dynamic parameter", dims_of(example), scalar)


@pytest.mark.parametrize("size", [0, 1])
def test_a_size_that_a_backed_trace_fixes_is_an_error(size: int) -> None:
    arguments = {"x": torch.randn(4, size)}
    dims = dims_of(example, {"x": [0, 1]})
    refuses(InputError, f"x has size {size} in dynamic dimension 1", dims, arguments)
    for kind in (DynamicShapesType.UNBACKED, DynamicShapesType.BACKED_SIZE_OBLIVIOUS):
        with marked(dims, arguments, kind):
            pass
    with marked(dims_of(example, {"x": 0}, {"x": 1}), arguments):
        pass


# --- arguments that hold tensors ---------------------------------------------------------------------


def test_tensors_inside_arguments_are_marked_where_pytree_knows_their_class() -> None:
    def forward(self: object, x: Intermediate | list[dict[str, torch.Tensor]]) -> None: ...

    tensors, dims = {"a": torch.randn(4, 8), "b": torch.randn(4)}, dims_of(forward)
    refuses(InputError, "no tensor for a dynamic parameter", dims, {"x": Intermediate(tensors)})
    pytree.register_dataclass(Intermediate)
    for value in (Intermediate(tensors), [tensors], (tensors, None), tensors):
        with marked(dims, {"x": value}):
            assert marks(tensors["a"]) == marks(tensors["b"]) == {0}
        assert not vars(tensors["a"])
    single = {"x": Intermediate({"h": torch.randn(1, 8)})}
    refuses(InputError, r"x\.tensors\['h'\] has size 1", dims, single)


def test_star_arguments_are_marked() -> None:
    def forward(self: object, *tensors: torch.Tensor, **named: torch.Tensor) -> None: ...

    a, b = torch.randn(4, 2), torch.randn(4, 3)
    with marked(dims_of(forward), {"tensors": (a,), "named": {"b": b}}):
        assert marks(a) == marks(b) == {0}
