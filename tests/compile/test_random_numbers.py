"""Compiling, capturing and printing draw nothing from the caller's random numbers, not even by a first import."""

from __future__ import annotations

from processes import python

CHILD = """
import random, torch, piecework
model, x = torch.nn.Linear(8, 4), torch.randn(3, 8)
before = random.getstate(), torch.get_rng_state()
stitched = piecework.compile(model, (x,), config=piecework.CompilationConfig(backend="eager"))
stitched.capture([1, 2, 4])
print(stitched.coverage(8), stitched.report(), stitched.measure([1, 2]))
assert random.getstate() == before[0], "Python's"
assert torch.equal(torch.get_rng_state(), before[1]), "torch's"
"""


def test_random_numbers_go_on_where_they_were() -> None:
    python("-c", CHILD)
