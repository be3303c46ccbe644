"""The pytest plugin: `stitched_golden` compares emitted sources with goldens beside a test.

Every pytest run with piecework installed loads this module, so it imports nothing heavy until a test uses the fixture. In
continuous integration it never writes.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from piecework.golden.fixture import References, StitchedGolden

OPTION = "--piecework-update"
ONLY = "--piecework-only"
_OUTPUT = "piecework_references"
_KEY: pytest.StashKey[References] = pytest.StashKey()
_GOLDEN: pytest.StashKey[StitchedGolden] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("piecework").addoption(
        OPTION,
        action="store_true",
        default=False,
        help="write the goldens of stitched_golden that differ; the tests that wrote one still fail once",
    )
    parser.getgroup("piecework").addoption(
        ONLY, action="store_true", default=False, help="run only tests that use stitched_golden"
    )


def pytest_configure(config: pytest.Config) -> None:
    from piecework.golden.fixture import References
    from piecework.golden.snapshot import in_ci

    if config.getoption(OPTION) and in_ci():
        raise pytest.UsageError(
            f"{OPTION}: goldens are not written in continuous integration (the variable CI is set)"
        )
    config.stash[_KEY] = References()


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Goldens are named after tests, ``test_*.py`` among them; they are no test files."""
    return True if collection_path.name == "__stitched__" else None


@pytest.fixture
def stitched_golden(request: pytest.FixtureRequest) -> StitchedGolden:
    """Compare an emitted source with the golden beside the test.

    Call it with what `piecework.compile` returned, a `StitchedSource`, a stitching graph or the text itself; give ``name=`` to compare
    several in one test. The golden is ``__stitched__/<test file>/<test name>.py``.

    Example:
        >>> def test_my_model(stitched_golden):
        ...     stitched_golden(piecework.compile(MyModel(), (torch.randn(4, 64),)))
    """
    from piecework.golden.fixture import StitchedGolden

    golden = request.node.stash[_GOLDEN] = StitchedGolden(
        test_file=request.path,
        test_name=_test_name(request.node),
        node_id=request.node.nodeid,
        root=request.config.rootpath,
        update=bool(request.config.getoption(OPTION)),
        references=request.config.stash[_KEY],
    )
    return golden


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):  # type: ignore[no-untyped-def]
    """A golden that differs fails its test when the test is over."""
    result = yield
    golden = item.stash.get(_GOLDEN, None)
    if golden is not None and golden.differs:
        pytest.fail("\n\n".join(text for text, _ in golden.differs), pytrace=False)
    return result


def _test_name(item: pytest.Item) -> str:
    """``TestClass.test_name[parameters]``: unique in its file."""
    return item.nodeid.partition("::")[2].replace("::", ".")


# --- goldens that no test asks for -------------------------------------------------------------------


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Note every test that was found, before any is deselected."""
    partial = any("::" in argument for argument in config.args)
    references = config.stash[_KEY]
    for item in items:
        references.tests.setdefault(str(item.path), {})[_test_name(item)] = False
        references.partial.update([str(item.path)] if partial else [])
    if config.getoption(ONLY):
        ours = [i for i in items if "stitched_golden" in getattr(i, "fixturenames", ())]
        config.hook.pytest_deselected(items=[item for item in items if item not in {*ours}])
        items[:] = ours


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item):  # type: ignore[no-untyped-def]
    """A test that failed, was skipped or never ran may not have come to its golden."""
    outcome = yield
    report = outcome.get_result()
    if report.when == "call" and report.passed:
        item.config.stash[_KEY].tests[str(item.path)][_test_name(item)] = True
    golden = item.stash.get(_GOLDEN, None)
    if report.when == "call" and golden is not None:
        # Plain data: under xdist the report goes from a worker to the terminal.
        report.piecework_goldens = [summary for _, summary in golden.differs]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:  # type: ignore[no-untyped-def]
    """Under xdist: a worker is done; take over what it saw."""
    seen = getattr(node, "workeroutput", {}).get(_OUTPUT)
    if seen is not None:
        node.config.stash[_KEY].merge(seen)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    config = session.config
    references = config.stash[_KEY]
    if hasattr(config, "workeroutput"):
        config.workeroutput[_OUTPUT] = references.as_data()
        return
    if references.unreferenced() and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    from piecework.golden.snapshot import shown

    # What differs, once more and below every log, with the one command that accepts all of it.
    reports = terminalreporter.getreports("failed")
    failed = [report for report in reports if getattr(report, "piecework_goldens", ())]
    if failed:
        terminalreporter.section("goldens that differ")
        for summary in (each for report in failed for each in report.piecework_goldens):
            terminalreporter.line(summary)
        if not config.getoption(OPTION):
            names = " ".join(shlex.quote(report.nodeid) for report in failed)
            terminalreporter.line(f"To accept: pytest {names} {OPTION}")
    strays = config.stash[_KEY].unreferenced()
    if strays:
        terminalreporter.section("goldens that no test asks for")
        paths = [shown(path, config.rootpath) for path in strays]
        for line in (*paths, f"To remove them: rm {' '.join(paths)}"):
            terminalreporter.line(line)
