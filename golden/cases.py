"""Golden cases on disk: what each emits, its graph and its inputs.

A case is a folder with a ``graph.py``; its goldens lie beside it. ``graph.py`` defines either ``build()``, a stitching graph,
with, optionally, ``options() -> LowerOptions``; or ``stitched()``, what `piecework.compile` returns. ``inputs()`` gives a list of
argument tuples: for the graph's placeholders, weights included, in the first form; for the model in the second. A captured
case may also define ``around(stitched, call)``, a context to run a call in, and ``TEXT_MADE_WITH``, the versions that its
golden was made with: Dynamo's names drift, so under others the text is not compared. It always emits its entry;
``texts(stitched)`` (``texts()`` in a case that has neither) gives more texts by kind, such as a replay source.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from types import ModuleType

import torch
import torch.fx

from piecework.codegen import LowerOptions, StitchedSource, generate_source
from piecework.codegen.graph.origin import value_of
from piecework.codegen.graph.structure import attribute_of
from piecework.errors import UsageError
from piecework.golden.snapshot import NEW_SUFFIX
from piecework.golden.texts import STITCHED, EmittedText, text_of
from piecework.runtime.stitched import StitchedModule

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
        where = f"{self.name}/{GRAPH_FILE}"
        torch.manual_seed(0)
        texts = getattr(module, "texts", None)
        loaded = None
        sources: dict[str, object] = {}
        if hasattr(module, "stitched"):
            stitched = module.stitched()
            loaded = self._captured(stitched, module, where)
            sources = {ENTRY: stitched.entry_source, **(texts(stitched) if texts else {})}
        elif hasattr(module, "build"):
            loaded = self._built(module)
        elif texts is not None:
            sources = texts()
        else:
            raise UsageError(
                "a case must define build(), stitched() or texts()",
                where=where,
                hint="build() returns the stitching graph, a torch.fx.GraphModule",
            )
        for kind in sources:
            if kind == STITCHED or kind_of(self.golden(kind)) != kind:
                raise UsageError(
                    f"{kind!a} can't be a kind of text",
                    where=where,
                    hint="use lower-case letters, digits and underscores, such as replay_8",
                )
        by_kind = {kind: text_of(source, where) for kind, source in sources.items()}
        if loaded is not None:
            names = tuple(row.name for row in loaded.source.module.bound)
            by_kind = {STITCHED: EmittedText(loaded.code, names), **by_kind}
        compared = _made_with_installed(getattr(module, "TEXT_MADE_WITH", {}))
        return CaseTexts(loaded, by_kind, compared)

    def _built(self, module: ModuleType) -> LoadedCase:
        gm = module.build()
        options = module.options() if hasattr(module, "options") else LowerOptions()
        names = [node.name for node in gm.graph.find_nodes(op="placeholder")]
        bound = tuple(name for name in names if name in options.bound)
        source = generate_source(gm, options)
        calls = _inputs(module)
        contexts = [nullcontext] * len(calls)
        return LoadedCase(self, gm, source, source.code, bound, calls, contexts)

    def _captured(self, stitched: object, module: ModuleType, where: str) -> LoadedCase:
        if not isinstance(stitched, StitchedModule):
            raise UsageError("stitched() must return what piecework.compile returns", where=where)
        source = stitched.source
        calls = _inputs(module)
        around = getattr(module, "around", None)
        return LoadedCase(
            self,
            stitched.split_gm,
            source,
            text_of(source, self.name).code,
            bound=tuple(row.name for row in source.module.bound),
            inputs=[_graph_arguments(stitched, call, where) for call in calls],
            contexts=[partial(_as_stitched, around, stitched, call) for call in calls],
            calls=[partial(stitched, *call) for call in calls],
        )


@dataclass(frozen=True, slots=True)
class LoadedCase:
    """The stitching source of a case."""

    case: Case
    gm: torch.fx.GraphModule
    source: StitchedSource
    code: str  # free of line numbers of other files
    bound: tuple[str, ...]  # placeholders that are module-level names, in their order
    inputs: Sequence[tuple[object, ...]]  # for the placeholders of ``gm``
    # for each of them the context to run it in, and the same call of the captured model, if any
    contexts: Sequence[Callable[[], AbstractContextManager[None]]]
    calls: Sequence[Callable[[], object]] = ()


@dataclass(frozen=True, slots=True)
class CaseTexts:
    """All texts of a case by kind, stitching source first.

    ``compared`` is False if the goldens were made with other versions.
    """

    stitched: LoadedCase | None
    by_kind: Mapping[str, EmittedText]
    compared: bool


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


def kind_of(golden: Path) -> str | None:
    """The kind of text that a golden (or ``.new``) of a case holds, by its name."""
    found = _GOLDEN.fullmatch(golden.name.removesuffix(NEW_SUFFIX))
    return None if found is None else found.group(1) or STITCHED


def unreferenced(root: Path, produced: Mapping[str, Collection[str]]) -> list[Path]:
    """Goldens that no case produces: in no case, or of a kind that it does not emit.

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
            kinds = produced.get(path.name)
            for golden in sorted(path.glob("expected*")):
                kind = kind_of(golden)
                if kind is None or (kinds is not None and kind not in kinds):
                    found.append(golden)
    return found


# --- loading -------------------------------------------------------------------------------------------


def import_graph(case: Case) -> ModuleType:
    """Import ``graph.py`` once for as long as it does not change.

    The module's name is in the emitted source if the graph calls its functions, so it depends on the case's name alone.
    """
    path = case.directory / GRAPH_FILE
    full_name = f"golden_case_{case.name}"
    stamp = (str(path.resolve()), path.stat().st_mtime_ns)
    known = sys.modules.get(full_name)
    if known is not None and getattr(known, "__piecework_stamp__", None) == stamp:
        return known
    module = ModuleType(full_name)
    module.__file__ = str(path)
    sys.modules[full_name] = module
    try:
        # Not by an importer: bytecode files don't tell two versions of one second apart.
        exec(compile(path.read_bytes(), path, "exec", dont_inherit=True), vars(module))
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
    """A captured graph runs as its module runs it."""
    with torch.no_grad(), nullcontext() if around is None else around(stitched, call):
        yield


def _made_with_installed(versions: Mapping[str, str]) -> bool:
    """True if each package named is installed in that version (``2.13`` for any 2.13.x)."""
    for package, wanted in versions.items():
        try:
            installed = metadata.version(package)
        except metadata.PackageNotFoundError:
            return False
        if not f"{installed.partition('+')[0]}.".startswith(f"{wanted}."):
            return False
    return True


def _inputs(module: ModuleType) -> list[tuple[object, ...]]:
    inputs: Callable[[], list[tuple[object, ...]]] | None = getattr(module, "inputs", None)
    return [] if inputs is None else inputs()


def _graph_arguments(
    stitched: StitchedModule, call: Sequence[object], where: str
) -> tuple[object, ...]:
    """What ``stitched.split_gm`` takes when the model is called with ``call``."""
    model = stitched.model
    forward = model.forward if isinstance(model, torch.nn.Module) else model
    given = dict(inspect.signature(forward).bind(*call).arguments)
    placeholders = {
        node.name: value_of(node) for node in stitched.split_gm.graph.find_nodes(op="placeholder")
    }
    weights = {row.name: row.path for row in stitched.source.module.bound}
    sizes: dict[str, int] = {}
    for name, value in given.items():
        fake = placeholders.get(name)
        if isinstance(fake, torch.Tensor) and isinstance(value, torch.Tensor):
            sizes |= {str(s): n for s, n in zip(fake.shape, value.shape, strict=True)}
    values: list[object] = []
    for name, fake in placeholders.items():
        if name in weights and isinstance(model, torch.nn.Module):
            values.append(attribute_of(model, weights[name]))
        elif name in given:
            values.append(given[name])
        elif isinstance(fake, torch.SymInt) and str(fake) in sizes:
            values.append(sizes[str(fake)])
        else:
            raise UsageError(
                f"placeholder {name!a} is neither a weight, an argument nor the size of one",
                where=where,
                hint="give the model's arguments by position, one tensor each, from inputs()",
            )
    return tuple(values)
