"""What every test shares: in, the collected tests; out, the same without the long ones nobody asked for.

It never changes what a test does.
"""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip nightly tests unless the marker expression names them (``-m nightly``)."""
    if "nightly" in (config.getoption("markexpr") or ""):
        return
    skip = pytest.mark.skip(reason="runs at night (select it with -m nightly)")
    for item in items:
        if item.get_closest_marker("nightly"):
            item.add_marker(skip)
