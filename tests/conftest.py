"""What every test shares: in, the collected tests; out, the same without the long ones nobody asked for, each with a compile cache of its own."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

# Two workers on two cores: a second thread of a small product waits for a core, and keeps the other busy meanwhile.
os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # a bare machine with a GPU runs tests/gpu, which draw nothing
    settings = None
else:
    # How long an example takes says how busy the machine is.
    timeless = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
    # What runs before a change is merged draws the same examples each time; the nightly runs draw new ones.
    settings.register_profile("merge", derandomize=True, database=None, **timeless)
    settings.register_profile("nightly", print_blob=True, **timeless)
# Ten seconds and more, of what a shorter test beside them shows as well; by the beginning of their names.
LONG = (
    "tests/trace/test_every_size.py::test_what_inductor_compiles_is_tried[feed forward]",
    "tests/trace/test_every_size.py::test_what_inductor_compiles_is_tried[heads]",
    "tests/compile/test_inference_mode.py::test_every_combination[True]",
    "tests/graphs/test_compile_without_device.py::test_every_kernel_compiles[90]",
    "tests/house/test_benchmarks.py::test_a_benchmark_runs[decode_step]",
    "tests/house/test_benchmarks.py::test_a_benchmark_runs[host_overhead]",
    "tests/house/test_site.py::test_every_snippet_runs_by_itself[transformers]",
    "tests/pieces/test_layer_names.py::test_any_number_of_named_layers_costs",
    "tests/pieces/test_parallel.py::test_a_failing_a_dying_and_a_hanging_worker",
    "tests/pieces/test_parallel.py::test_a_piece_that_fails_in_a_worker_fails_as",
    "tests/pieces/test_piece_ranges.py::test_inductor_compiles_sizes_and_ranges",
    "tests/pieces/test_ranks.py::test_a_rank_that_is_killed",
    "tests/pieces/test_ranks.py::test_ranks_that_would_do_different_things",
    "tests/watch/test_rebind.py::test_weights_that_only_products_read",
)
# Texts are laid out for 80 columns of a plain terminal, whatever the terminal or the service around the tests says of itself.
os.environ.update(COLUMNS="80", TERM="xterm")
for said in (
    *("LINES", "COLORTERM", "FORCE_COLOR", "NO_COLOR", "PY_COLORS"),
    *("TTY_COMPATIBLE", "TTY_INTERACTIVE", "GITHUB_ACTIONS"),
):
    os.environ.pop(said, None)
torch.manual_seed(0)  # for the tensors that test modules make as they are imported
# pytest listens to each logger that does not propagate, and torch writes out all it traces for whoever listens to this one.
logging.getLogger("torch.__trace").propagate = True


def pytest_configure(config: pytest.Config) -> None:
    nightly = "nightly" in (config.getoption("markexpr") or "")
    if settings is None:
        return
    settings.load_profile("nightly" if nightly else "merge")
    if not nightly:
        # It also draws constants out of the modules that are imported so far: another order of tests, other examples.
        with contextlib.suppress(ImportError):  # older releases do not
            from hypothesis.internal.conjecture import providers

            providers._get_local_constants = providers.Constants


@pytest.hookimpl(tryfirst=True)  # before -m chooses by the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip nightly tests unless the marker expression names them (``-m nightly``).

    Of a test's parameter sets under ``sample(n)`` the first and every n-th after it run in a merge, the others are nightly.
    """
    seen: Counter[str] = Counter()
    for item in items:
        if item.nodeid.startswith(LONG):
            item.add_marker(pytest.mark.nightly)
        sample = item.get_closest_marker("sample")
        if sample is None or item.get_closest_marker("nightly"):
            continue
        function = item.nodeid.partition("[")[0]
        if seen[function] % sample.args[0]:
            item.add_marker(pytest.mark.nightly)
        seen[function] += 1
    if "nightly" in (config.getoption("markexpr") or ""):
        return
    skip = pytest.mark.skip(reason="runs at night (select it with -m nightly)")
    for item in items:
        if item.get_closest_marker("nightly"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def as_if_nothing_ran_before() -> None:
    """The same tensors for each test; and the collector looks at what it makes, not at torch and all before it."""
    torch.manual_seed(0)
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


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
