"""`piecework golden`: the command line of the snapshot tool. In: arguments. Out: lines, JSON or a page, and an exit code of 0, 1 or 2.

It parses, calls `piecework.golden` and prints; nothing is decided here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from piecework.cli.console import DIFFERS, DONE, commands, console, print_json
from piecework.cli.options import AsJson
from piecework.errors import UsageError

if TYPE_CHECKING:
    from piecework.golden.check import CheckRun

golden_app = commands("golden", "Compare, update and review golden snapshots of emitted source.")

Names = Annotated[list[str] | None, typer.Argument(help="Names of cases; all by default.")]
Root = Annotated[
    Path | None,
    typer.Option("--root", help="Folder of cases. Default: golden/cases.", show_default=False),
]
Fast = Annotated[
    bool, typer.Option("--fast", help="Leave out the second process, with another hash seed.")
]


@golden_app.command(epilog="Example: piecework golden check attributes")
def check(
    names: Names = None, root: Root = None, fast: Fast = False, as_json: AsJson = False
) -> None:
    """Compare what every case emits with its golden, and check that the text runs, names and repeats right.

    Nothing is accepted. Where CI is set nothing is written; elsewhere each difference is left beside its golden as a .new file. Goldens of
    tests are compared by pytest: pytest --piecework-only.
    """
    from piecework.golden import snapshot
    from piecework.golden.check import check_cases

    _run(check_cases, names, root, fast, as_json, propose=not snapshot.in_ci())


@golden_app.command(epilog="Example: piecework golden update attributes")
def update(
    names: Names = None, root: Root = None, fast: Fast = False, as_json: AsJson = False
) -> None:
    """Write every golden that differs and say what changed.

    Exit code 1 if a golden changed, so that a run that should change nothing shows it. A text that fails another check is not written.
    """
    from piecework.golden import snapshot
    from piecework.golden.check import update_cases

    if snapshot.in_ci():
        raise UsageError(
            "goldens are not written in continuous integration (the variable CI is set)",
            hint="update them on your machine, review and commit them",
        )
    _run(update_cases, names, root, fast, as_json)


@golden_app.command(epilog="Example: piecework golden review")
def review(
    places: Annotated[
        list[Path] | None,
        typer.Argument(help="Goldens, .new files or folders. Default: all cases, and tests here."),
    ] = None,
    root: Root = None,
    accept: Annotated[
        list[Path] | None, typer.Option("--accept", help="Accept this one without asking.")
    ] = None,
    reject: Annotated[
        list[Path] | None, typer.Option("--reject", help="Reject this one without asking.")
    ] = None,
) -> None:
    """Decide on proposed goldens one by one: accept, reject or skip; capitals decide on all that follow.

    Cases are checked first, so that the proposals are up to date. Without a terminal the commands are printed instead.
    """
    from piecework.golden import review as terminal
    from piecework.golden import snapshot
    from piecework.golden.check import accept_golden, check_cases, default_root
    from piecework.golden.snapshot import shown

    if snapshot.in_ci():
        raise UsageError(
            "nothing is reviewed in continuous integration (the variable CI is set)",
            hint="review where you can look and answer; `piecework golden check` runs anywhere",
        )
    if accept or reject:
        for path in accept or ():
            accept_golden(snapshot.golden_of(path))
            _say(f"accepted {shown(snapshot.golden_of(path))}")
        for path in reject or ():
            snapshot.reject(snapshot.golden_of(path))
            _say(f"rejected {shown(snapshot.golden_of(path))}")
        return
    _import_from_here()
    cases = root or (None if places else default_root())
    broken: dict[Path, tuple[str, ...]] = {}
    if cases is not None:
        with _progress() as step:
            run = check_cases(cases, propose=True, two_seeds=False, progress=step)
        broken = {r.golden.resolve(): r.problems for r in run.broken}
    where = [_golden_place(place) for place in places] if places else [Path.cwd()]
    found = snapshot.pending([*where, *([cases] if cases is not None else [])])
    goldens = list({golden.resolve(): golden for golden in found}.values())
    if not goldens:
        _say("nothing to review")
        return
    proposals = [snapshot.proposed(golden) for golden in goldens]
    problems = {golden: broken.get(golden.resolve(), ()) for golden in goldens}
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        _say(f"{len(proposals)} proposed; this is not a terminal. To see and accept each:")
        for line in terminal.commands(proposals, problems, shown):
            _say(f"  {line}")
        raise typer.Exit(DIFFERS)
    outcome = terminal.review(proposals, problems, console().print, input, shown)
    _say(", ".join(f"{word} {len(goldens)}" for word, goldens in outcome.items()))
    raise typer.Exit(DIFFERS if outcome["skipped"] else DONE)


@golden_app.command(
    epilog="Example: piecework golden diff old/stitched.py new/stitched.py --html changes.html"
)
def diff(
    before: Annotated[
        Path, typer.Argument(help="Emitted source, or a folder that holds stitched.py.")
    ],
    after: Annotated[Path, typer.Argument(help="The one to compare it with.")],
    as_json: AsJson = False,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write a page with both side by side.")
    ] = None,
    context: Annotated[int, typer.Option("--context", min=0, help="Equal lines to show.")] = 3,
    summary: Annotated[bool, typer.Option("--summary", help="Leave out the text.")] = False,
) -> None:
    """Say what changed between two emitted sources: the meaning first, then the text.

    Exit code 0 if they are the same text, 1 if they differ.
    """
    from piecework.golden.diff import compare_sources
    from piecework.golden.review import summary_lines, unified_lines

    texts = _read(_source_file(before)), _read(_source_file(after))
    found = compare_sources(*texts, before_name=str(before), after_name=str(after))
    if html is not None:
        from piecework.golden.page import Entry, write_page

        write_page(html, [Entry(str(after), str(before), str(after), found)])
    if as_json:
        text = found.unified(str(before), str(after), context)
        print_json({**found.as_json(), "unified": text})
    else:
        out = console()
        lines = [*summary_lines(found)]
        if not summary and not found.same_text:
            lines += [Text(""), *unified_lines(found, str(before), str(after), context)]
        out.print(*lines, sep="\n")
        if html is not None:
            _say(f"page: {html}")
    raise typer.Exit(DONE if found.same_text else DIFFERS)


@golden_app.command(epilog="Example: piecework golden report -o report.html")
def report(
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")] = Path(
        "golden-report.html"
    ),
    names: Names = None,
    root: Root = None,
) -> None:
    """Write one page that shows every golden that differs from what its case emits, side by side.

    No golden or proposal is written. Exit code 1 if any differs.
    """
    from piecework.golden.check import check_cases
    from piecework.golden.page import entry_of, write_page
    from piecework.golden.snapshot import shown

    with _progress() as step:
        run = check_cases(_root(root), names or (), propose=False, two_seeds=False, progress=step)
    found = [(r.comparison, r.name) for r in run.changed]
    entries = [entry_of(comparison, name) for comparison, name in found if comparison]
    write_page(output, entries)
    _say(f"{len(entries)} of {len(run.results)} goldens differ; page: {shown(output)}")
    raise typer.Exit(DONE if run.passed else DIFFERS)


# --- printing ----------------------------------------------------------------------------------------


def _run(
    checked: Callable[..., CheckRun],
    names: list[str] | None,
    root: Path | None,
    fast: bool,
    as_json: bool,
    **options: bool,
) -> NoReturn:
    """Check or update cases, and end with what was found."""
    from piecework.golden.review import run_as_json, run_lines

    with _progress() as step:
        run = checked(_root(root), names or (), two_seeds=not fast, progress=step, **options)
    if as_json:
        print_json(run_as_json(run))
    else:
        console().print(*run_lines(run), sep="\n")
    raise typer.Exit(DONE if run.passed else DIFFERS)


def _say(text: str) -> None:
    console().print(Text(text))


@contextmanager
def _progress() -> Iterator[object]:
    """A status line on a terminal; nothing elsewhere."""
    out = Console(stderr=True)
    if not out.is_terminal:
        yield None
        return
    with out.status("golden cases") as status:
        yield lambda name: status.update(f"golden case {name}")


# --- arguments ---------------------------------------------------------------------------------------


def _import_from_here() -> None:
    """Let cases import packages of the working folder, as ``python -m`` does."""
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def _root(root: Path | None) -> Path:
    from piecework.golden.check import default_root

    _import_from_here()
    found = root or default_root()
    if found is None:
        raise UsageError(
            "there is no folder golden/cases here",
            hint="name a folder of cases with --root; goldens of tests are compared by pytest --piecework-only",
        )
    return found


def _golden_place(place: Path) -> Path:
    from piecework.golden.snapshot import proposal_of

    if place.is_dir():
        return place
    proposal = place if place.suffix == ".new" else proposal_of(place)
    if place.exists() or proposal.is_file():
        return proposal
    raise UsageError(
        "there is no such file or folder",
        where=str(place),
        hint="name a golden, or a folder with a stitched.py or expected.py",
    )


def _source_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in ("stitched.py", "expected.py"):
        if (path / name).is_file():
            return path / name
    raise UsageError(
        "this folder holds no emitted source",
        where=str(path),
        hint="name the file, or a folder with a stitched.py or expected.py",
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        hint = "name emitted source, such as a stitched.py"
        problem = f"this source cannot be read: {reason}"
        raise UsageError(problem, where=str(path), hint=hint) from error
