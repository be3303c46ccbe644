"""Classes that change after the trace. In: methods that the forward names or not, and torch's own changes. Out: refused where a call could come by; served elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import piecework
from piecework.errors import InputError

X = torch.randn(4, 8)


class Base(nn.Module):
    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


class Model(Base):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scaled(self.linear(x))


@pytest.mark.parametrize(
    ("name", "is_seen"),
    [("unknown", False), ("scaled", True), ("forward", True), ("__call__", True)],
)
@pytest.mark.parametrize("owner", [Base, Model])
def test_a_method_is_watched_where_a_call_may_come_by(
    owner: type, name: str, is_seen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model().eval()
    stitched = piecework.compile(model, (X,), config={"backend": "eager"})
    right = stitched(X)
    with monkeypatch.context() as here:
        here.setattr(owner, name, lambda self, x=None: x, raising=False)
        if is_seen and getattr(Model, name) is vars(owner)[name]:  # what a subclass has wins
            with pytest.raises(InputError, match=name):
                stitched(X)
        else:
            assert torch.equal(stitched(X), right)
    assert torch.equal(stitched(X), right)
