"""The pytest plugin. In: tests that ask for `stitched_golden`. Out: emitted sources compared with goldens that lie beside the tests.

Every pytest run with piecework installed loads this module, so it imports nothing but pytest until a test uses the fixture. In
continuous integration it never writes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from piecework.golden.fixture import StitchedGolden
    from piecework.golden.references import References

OPTION = "--piecework-update"
_OUTPUT = "piecework_references"
_KEY: pytest.StashKey[References] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("piecework").addoption(
        OPTION,
        action="store_true",
        default=False,
        help="write the goldens of stitched_golden that differ; the tests that wrote one still fail once",
    )


def pytest_configure(config: pytest.Config) -> None:
    from piecework.golden.references import References
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

    return StitchedGolden(
        test_file=request.path,
        test_name=_test_name(request.node),
        node_id=request.node.nodeid,
        root=request.config.rootpath,
        update=bool(request.config.getoption(OPTION)),
        references=request.config.stash[_KEY],
    )


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
        references.collected(item.path, _test_name(item), partial)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item):  # type: ignore[no-untyped-def]
    """A test that failed, was skipped or never ran may not have come to its golden; one that passed has."""
    outcome = yield
    report = outcome.get_result()
    if report.when == "call" and report.passed:
        item.config.stash[_KEY].ran(item.path, _test_name(item))


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
    strays = config.stash[_KEY].unreferenced()
    if strays:
        terminalreporter.section("goldens that no test asks for")
        for path in strays:
            terminalreporter.line(_shown(path, config.rootpath))
        names = " ".join(_shown(path, config.rootpath) for path in strays)
        terminalreporter.line(f"To remove them: rm {names}")


def _shown(path: Path, root: Path) -> str:
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
