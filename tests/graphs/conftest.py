"""What tests of static graphs share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from piecework.runtime.graphs.plan.phase import frozen_garbage


@pytest.fixture(autouse=True, scope="session")
def imports_are_no_garbage() -> Iterator[None]:
    """Captures collect garbage; without this each would walk through all of torch."""
    with frozen_garbage():
        yield
