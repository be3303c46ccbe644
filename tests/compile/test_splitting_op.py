"""piecework.splitting_op: registration, fakes, implementations per device, and what is refused."""

from __future__ import annotations

import pytest
import torch

import piecework
from piecework.errors import SplitError
from piecework.runtime.splitting_op import registry


def test_it_is_called_like_the_function_and_is_an_operator() -> None:
    @piecework.splitting_op("splitting_op_test::scale", mutates_args=("out",))
    def scale(x: torch.Tensor, out: torch.Tensor, by: float = 2.0) -> None:
        out.copy_(x * by)

    out = torch.empty(3)
    scale(torch.ones(3), out, by=3.0)
    assert out.tolist() == [3.0] * 3
    torch.ops.splitting_op_test.scale(torch.ones(3), out)
    assert out.tolist() == [2.0] * 3
    assert scale.overload._schema.is_mutable
    assert "splitting_op_test::scale" in registry.names()
    assert registry.find(scale.overload) is scale


def test_the_operator_passes_torchs_own_checks() -> None:
    @piecework.splitting_op("splitting_op_test::add_into", mutates_args=("out",))
    def add_into(x: torch.Tensor, out: torch.Tensor) -> None:
        out.add_(x)

    torch.library.opcheck(add_into.overload, (torch.ones(3), torch.zeros(3)))


def test_a_kernel_per_device() -> None:
    @piecework.splitting_op("splitting_op_test::where_am_i", mutates_args=("out",))
    def anywhere(x: torch.Tensor, out: torch.Tensor) -> None:
        out.fill_(1)

    @anywhere.register_kernel("cpu")
    def on_cpu(x: torch.Tensor, out: torch.Tensor) -> None:
        out.fill_(2)

    out = torch.zeros(1)
    anywhere(torch.ones(1), out)
    assert out.item() == 2
    assert anywhere.implementation_for("cpu") is on_cpu
    assert anywhere.implementation_for("cuda") is anywhere.implementation


def test_defining_the_same_function_again_replaces_it() -> None:
    def define(value: float):  # type: ignore[no-untyped-def]
        @piecework.splitting_op("splitting_op_test::again", mutates_args=("out",))
        def again(out: torch.Tensor) -> None:
            out.fill_(value)

        return again

    define(1.0)
    out = torch.zeros(1)
    define(2.0)(out)
    assert out.item() == 2.0


def test_a_name_taken_by_another_function_is_refused() -> None:
    @piecework.splitting_op("splitting_op_test::taken", mutates_args=("out",))
    def first(out: torch.Tensor) -> None:
        out.zero_()

    with pytest.raises(SplitError, match="already registered"):

        @piecework.splitting_op("splitting_op_test::taken", mutates_args=("out",))
        def second(out: torch.Tensor) -> None:
            out.zero_()


@pytest.mark.parametrize("name", ["plain", "a::b::c", "::x", "a::", "a b::c", "a::b.c"])
def test_a_malformed_name_is_refused(name: str) -> None:
    with pytest.raises(SplitError, match="not of the form"):
        piecework.splitting_op(name)


def test_an_unannotated_function_is_refused() -> None:
    with pytest.raises(SplitError, match="annotate every parameter"):

        @piecework.splitting_op("splitting_op_test::unannotated")
        def unannotated(x) -> None:  # type: ignore[no-untyped-def]
            pass


def test_mutates_args_must_name_parameters() -> None:
    with pytest.raises(SplitError, match="mutates_args names 'nothing'"):

        @piecework.splitting_op("splitting_op_test::wrong_out", mutates_args=("nothing",))
        def wrong(x: torch.Tensor) -> None:
            pass
