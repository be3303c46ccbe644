"""What every test shares: in, the collected tests; out, the same without the long ones nobody asked for, each with a compile cache of its own."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip nightly tests unless the marker expression names them (``-m nightly``)."""
    if "nightly" in (config.getoption("markexpr") or ""):
        return
    skip = pytest.mark.skip(reason="runs at night (select it with -m nightly)")
    for item in items:
        if item.get_closest_marker("nightly"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def own_compile_cache(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A fresh cache directory, so that what one test compiled is never another test's hit."""
    folder = tmp_path_factory.mktemp("compile_cache")
    folder.chmod(0o700)
    monkeypatch.setenv("PIECEWORK_CACHE_DIR", str(folder))
    return folder


@pytest.fixture
def warned() -> Iterator[list[str]]:
    """What piecework warns of during the test."""
    texts: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("piecework")
    logger.addHandler(handler)
    yield texts
    logger.removeHandler(handler)
