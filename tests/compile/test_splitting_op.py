"""piecework.splitting_op: registration, fakes, implementations per device, and what is refused."""

from __future__ import annotations

import pytest
import torch
from models import EAGER

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


def test_a_kernel_that_comes_later_is_taken_through_torch_compile() -> None:
    double = piecework.splitting_op("later::double")(doubles)
    double.register_fake(torch.empty_like)
    torch._dynamo.reset()
    run = torch.compile(lambda x: double(x) + 1, backend="piecework", options={"backend": "eager"})
    assert torch.equal(run(torch.ones(3)), torch.full((3,), 3.0))
    double.register_kernel("cpu")(lambda x: x * 9)
    assert torch.equal(run(torch.ones(3)), torch.full((3,), 10.0))


def doubles(x: torch.Tensor) -> torch.Tensor:
    return x * 2


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


def test_mutates_args_must_name_parameters() -> None:
    with pytest.raises(SplitError, match=r"no operator schema for .*nothing"):

        @piecework.splitting_op("splitting_op_test::wrong_out", mutates_args=("nothing",))
        def wrong(x: torch.Tensor) -> None:
            pass


HANDS_BACK = {
    "an argument": lambda x: x,
    "a view": lambda x: x[:, :6],
    "a view of one row": lambda x: x[:, :2].contiguous(),
    "an argument, of one row": lambda x: x if len(x) == 1 else x.clone(),
}


@pytest.mark.parametrize("by", ["piecework", "torch"])
@pytest.mark.parametrize("what", HANDS_BACK)
def test_what_hands_an_argument_back_is_refused_where_it_is_written_to(what: str, by: str) -> None:
    name = f"splitting_op_test::hands_back_{list(HANDS_BACK).index(what)}_{by}"

    def hand_back(x: torch.Tensor) -> torch.Tensor:
        return HANDS_BACK[what](x)

    define = (
        piecework.splitting_op(name)
        if by == "piecework"
        else torch.library.custom_op(name, mutates_args=())
    )
    op = define(hand_back)
    op.register_fake(lambda x: x.new_empty(x.shape[0], hand_back(x).shape[1]))

    def written(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = x * 2
        given = op(hidden)
        given.add_(1)
        return hidden, given

    def read(x: torch.Tensor) -> torch.Tensor:
        return op(x * 2) + 1

    x = torch.randn(4, 6)
    stitched, only_read = (
        piecework.compile(each, (x,), config=EAGER, splitting_ops=[name])
        for each in (written, read)
    )
    for count in (4, 1):
        x = torch.randn(count, 6)
        if "one row" in what and count > 1:
            torch.testing.assert_close(stitched(x), written(x))
            continue
        with pytest.raises(
            SplitError, match=r"returned an argument, .* and the model writes to it"
        ):
            stitched(x)
        if by == "piecework":  # torch's own refuse that by themselves
            torch.testing.assert_close(only_read(x), read(x))
