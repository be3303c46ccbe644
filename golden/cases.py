"""Golden cases on disk. In: a folder of cases. Out: what each case emits, its graph and its inputs.

A case is a folder with a ``graph.py``; its goldens lie beside it. Nothing is compared or written here.

``graph.py`` defines either ``build() -> torch.fx.GraphModule`` (a stitching graph) with, optionally, ``options() -> LowerOptions``;
or ``stitched() -> StitchedModule`` for a captured model. ``inputs()`` gives a list of argument tuples: for the graph's
placeholders, weights included, in the first form; for the model in the second. A captured case may also define
``around(stitched, call)``, a context to run a call in, and ``TEXT_MADE_WITH``, the versions that its golden was made with: Dynamo's
names drift between releases, so under others the text is not compared and the other checks are.

A case may emit texts of other kinds than stitching source. A captured one always emits its entry; ``texts(stitched)`` (``texts()`` in a case
that has neither ``build`` nor ``stitched``) gives more by kind, such as the replay source of a captured size.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

import torch
import torch.fx

from piecework.codegen import LowerOptions, StitchedSource, generate_source
from piecework.errors import UsageError
from piecework.golden.captured import graph_arguments
from piecework.golden.text.snapshot import NEW_SUFFIX
from piecework.golden.text.texts import STITCHED, EmittedText, text_of

GRAPH_FILE = "graph.py"
ENTRY = "entry"
_GOLDEN = re.compile(r"expected(?:_([a-z][a-z0-9_]*))?\.py")


@dataclass(frozen=True, slots=True)
class Case:
    """A case by name, not loaded yet."""

    name: str
    directory: Path

    def golden(self, kind: str = STITCHED) -> Path:
        """Where the golden of one of its texts lies."""
        return self.directory / ("expected.py" if kind == STITCHED else f"expected_{kind}.py")

    def load(self) -> CaseTexts:
        """Import ``graph.py`` and emit.

        Raises:
            UsageError: ``graph.py`` defines none of ``build``, ``stitched`` and ``texts``, or names a kind that can't be a file's.
            PieceworkError: the graph cannot be emitted.
        """
        module = import_graph(self)
        torch.manual_seed(0)
        texts = getattr(module, "texts", None)
        if hasattr(module, "stitched"):
            stitched = module.stitched()
            loaded = self._captured(stitched, module)
            sources = {ENTRY: stitched.entry_source, **(texts(stitched) if texts else {})}
            return CaseTexts(loaded, self._more(sources), loaded.compared)
        if hasattr(module, "build"):
            return CaseTexts(self._built(module))
        if texts is None:
            raise UsageError(
                "a case must define build(), stitched() or texts()",
                where=f"{self.name}/{GRAPH_FILE}",
                hint="build() returns the stitching graph, a torch.fx.GraphModule",
            )
        return CaseTexts(None, self._more(texts()))

    def _more(self, sources: Mapping[str, object]) -> dict[str, EmittedText]:
        where = f"{self.name}/{GRAPH_FILE}"
        for kind in sources:
            if kind == STITCHED or kind_of(self.golden(kind)) != kind:
                raise UsageError(
                    f"{kind!a} can't be a kind of text",
                    where=where,
                    hint="use lower-case letters, digits and underscores, such as replay_8",
                )
        return {kind: text_of(source, where) for kind, source in sources.items()}

    def _built(self, module: ModuleType) -> LoadedCase:
        gm = module.build()
        options = module.options() if hasattr(module, "options") else LowerOptions()
        bound = tuple(node.name for node in _placeholders(gm) if node.name in options.bound)
        source = generate_source(gm, options)
        return LoadedCase(self, gm, source, source.code, bound, _inputs(module))

    def _captured(self, stitched: object, module: ModuleType) -> LoadedCase:
        from piecework.runtime.stitched import StitchedModule

        if not isinstance(stitched, StitchedModule):
            raise UsageError(
                "stitched() must return what piecework.compile returns",
                where=f"{self.name}/{GRAPH_FILE}",
            )
        source = stitched.source
        calls = _inputs(module)
        around = getattr(module, "around", None)
        return LoadedCase(
            self,
            stitched.split_gm,
            source,
            text_of(source, self.name).code,
            bound=tuple(row.name for row in source.module.bound),
            inputs=[graph_arguments(stitched, call, f"{self.name}/{GRAPH_FILE}") for call in calls],
            contexts=[partial(_as_stitched, around, stitched, call) for call in calls],
            compared=_made_with_installed(getattr(module, "TEXT_MADE_WITH", {})),
            calls=[partial(stitched, *call) for call in calls],
        )


@dataclass(frozen=True, slots=True)
class CaseTexts:
    """All texts of a case: its stitching source with what is needed to run it, and those of other kinds.

    ``compared`` is False if the goldens were made with other versions, so that the texts say nothing here.
    """

    stitched: LoadedCase | None
    more: Mapping[str, EmittedText] = field(default_factory=dict)
    compared: bool = True

    @property
    def by_kind(self) -> dict[str, EmittedText]:
        """Every text, stitching source first."""
        if self.stitched is None:
            return dict(self.more)
        names = tuple(row.name for row in self.stitched.source.module.bound)
        return {STITCHED: EmittedText(self.stitched.code, names), **self.more}


@dataclass(frozen=True, slots=True)
class LoadedCase:
    """The stitching source of a case.

    Attributes:
        gm: the stitching graph.
        source: what was emitted from it.
        code: the text to compare, free of line numbers of other files.
        bound: placeholders that the source holds as module-level names, in the order of its bound names.
        inputs: argument tuples for the placeholders of ``gm``.
        contexts: for each of them, what makes the context to run it in; empty if none is needed.
        compared: False if the golden was made with other versions, so that its text says nothing here.
        calls: for each of them, the same call of the captured model; empty if none was captured.
    """

    case: Case
    gm: torch.fx.GraphModule
    source: StitchedSource
    code: str
    bound: tuple[str, ...]
    inputs: Sequence[tuple[object, ...]]
    contexts: Sequence[Callable[[], AbstractContextManager[None]]] = ()
    compared: bool = True
    calls: Sequence[Callable[[], object]] = ()

    def context(self, number: int) -> AbstractContextManager[None]:
        """The context for ``inputs[number]``."""
        return self.contexts[number]() if self.contexts else nullcontext()


def discover(root: Path) -> list[Case]:
    """The cases under ``root``, by name.

    Raises:
        UsageError: ``root`` is no folder.
    """
    if not root.is_dir():
        raise UsageError(
            "there is no such folder of golden cases",
            where=str(root),
            hint="run in the root of the repository, or name the folder with --root",
        )
    found = sorted(path.parent for path in root.glob(f"*/{GRAPH_FILE}"))
    return [Case(directory.name, directory) for directory in found]


def kind_of(golden: Path) -> str | None:
    """The kind of text that a golden (or ``.new``) of a case holds, by its name; None if that is no golden's."""
    found = _GOLDEN.fullmatch(golden.name.removesuffix(NEW_SUFFIX))
    return None if found is None else found.group(1) or STITCHED


def unreferenced(root: Path, produced: Mapping[str, Collection[str]] | None = None) -> list[Path]:
    """Goldens that no case produces: folders without a graph, goldens outside of a case or by another name.

    Args:
        root: the folder of cases.
        produced: case → the kinds of text that it emits; of a case that is not in it every kind counts as emitted.
    """
    found: list[Path] = []
    for path in sorted(root.iterdir()):
        if path.name.startswith((".", "__")):
            continue
        if path.is_file():
            found += [path] if path.suffix in (".py", ".new") else []
        elif not (path / GRAPH_FILE).is_file():
            found.append(path)
        else:
            kinds = (produced or {}).get(path.name)
            for golden in sorted(path.glob("expected*")):
                kind = kind_of(golden)
                if kind is None or (kinds is not None and kind not in kinds):
                    found.append(golden)
    return found


def select(cases: Sequence[Case], names: Sequence[str]) -> list[Case]:
    """The cases named; all without names.

    Raises:
        UsageError: a name is no case.
    """
    known = {case.name: case for case in cases}
    for name in names:
        if name not in known:
            close = ", ".join(sorted(known)[:8])
            raise UsageError(f"there is no golden case {name!a}", hint=f"cases are {close} …")
    return [known[name] for name in names] if names else list(cases)


class _FromSource(SourceFileLoader):
    """Reads the text each time: Python's bytecode files don't tell two versions of one second and one length apart."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


def import_graph(case: Case) -> ModuleType:
    """Import ``graph.py`` once for as long as it does not change: operators that it registers can be registered only once.

    The module's name is in the emitted source if the graph calls its functions, so it depends on the case's name alone.
    """
    path = case.directory / GRAPH_FILE
    full_name = f"golden_case_{case.name}"
    stamp = (str(path.resolve()), path.stat().st_mtime_ns)
    known = sys.modules.get(full_name)
    if known is not None and getattr(known, "__piecework_stamp__", None) == stamp:
        return known
    loader = _FromSource(full_name, str(path))
    spec = importlib.util.spec_from_file_location(full_name, path, loader=loader)
    if spec is None or spec.loader is None:
        raise UsageError("a case cannot be imported", where=str(path))
    module = importlib.util.module_from_spec(spec)
    sys.modules[full_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[full_name]
        raise
    module.__dict__["__piecework_stamp__"] = stamp
    return module


@contextmanager
def _as_stitched(
    around: Callable[..., AbstractContextManager[None]] | None,
    stitched: object,
    call: tuple[object, ...],
) -> Iterator[None]:
    """A captured graph runs as its module runs it: without recording gradients, in the case's own context."""
    with torch.no_grad(), nullcontext() if around is None else around(stitched, call):
        yield


def _made_with_installed(versions: Mapping[str, str]) -> bool:
    """True if each package named is installed in the version named, as far as that goes (``2.13`` for any 2.13.x)."""
    for package, wanted in versions.items():
        try:
            installed = metadata.version(package)
        except metadata.PackageNotFoundError:
            return False
        if not f"{installed.partition('+')[0]}.".startswith(f"{wanted}."):
            return False
    return True


def _placeholders(gm: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return list(gm.graph.find_nodes(op="placeholder"))


def _inputs(module: ModuleType) -> list[tuple[object, ...]]:
    inputs: Callable[[], list[tuple[object, ...]]] | None = getattr(module, "inputs", None)
    return [] if inputs is None else inputs()
