"""The stages of one compilation as numbered files (``debug_dump_path``), and a page that links them.

A dump changes nothing of what is compiled; one that can't go on says so once and stops.
"""

import contextlib
import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.fx

from piecework.codegen.graph.origin import SymbolNames, origin_of_piece
from piecework.codegen.plan.render import filled
from piecework.codegen.split.splitting import SplitItem, operator_name
from piecework.errors import ConfigError
from piecework.runtime import torch_compat
from piecework.runtime.batch.ranges import file_name
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.config.text import to_json

_log = logging.getLogger(__name__)

_NOT_IN_A_NAME = re.compile(r"[^\w.-]+", re.ASCII)
_LONGEST_NAME = 80
_SAYS = {
    "00_config.json": "the configuration",
    "01_captured.py": "the captured graph",
    "02_split.py": "the stitching graph and its submodules",
    "03_plan.txt": "the plan of the source, statement by statement",
    "04_stitched.py": "the emitted source, as it runs",
    "times.json": "seconds per phase and piece",
}


class Step(NamedTuple):
    """One submodule of the stitching graph, in order."""

    name: str
    modules: str  # the model's modules that it holds
    operators: str = ""  # what runs here outside the pieces; "" for a piece
    graph: str = ""  # the file of a piece's graph
    key: str = ""  # equal for equal programs; "" until the piece is compiled
    same_as: str = ""  # the equal piece before this one
    # for each batch range: batches, seconds, origin, and the file of what Inductor wrote
    ranges: Sequence[Mapping[str, object]] = ()


class Dump:
    """The files of one compilation in ``folder``; without one every method returns at once."""

    def __init__(self, folder: Path | None, model: str = "") -> None:
        self.folder, self.model = folder, model
        self._steps: dict[str, Step] = {}

    @classmethod
    def open(
        cls, config: CompilationConfig, name: str, *, rank: int | None = None, dp_rank: int = 0
    ) -> Self:
        """The dump in ``rank_<r>/<name>``, or the first of ``<name>_<n>`` that is free."""
        if config.debug_dump_path is None:
            return cls(None)
        mine = torch_compat.own_rank() or os.environ.get("RANK", "0") if rank is None else rank
        place = _file_name(f"rank_{mine}_dp_{dp_rank}" if dp_rank else f"rank_{mine}")
        try:
            folder = _new_folder(Path(config.debug_dump_path, place), _file_name(name))
            (folder / "00_config.json").write_text(config_text(config), encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"the stages of this compilation can't be written to {config.debug_dump_path}: "
                f"{error.strerror or type(error).__name__}",
                where="debug_dump_path",
            ) from error
        return cls(folder, name)

    def split(self, split_gm: torch.fx.GraphModule, items: Sequence[SplitItem]) -> None:
        """Write the stitching graph and the graph of each piece."""
        self.write("02_split.py", lambda: readable(split_gm))
        for item in items if self.folder is not None else ():
            name, modules = item.submod_name, origin_of_piece(item.graph, SymbolNames()).module
            if item.is_splitting_graph:
                self._steps[name] = Step(name, modules, _operators(item))
            else:
                path = f"pieces/{_file_name(name)}/graph.py"
                self._steps[name] = Step(name, modules, graph=path)
                self.write(path, lambda graph=item.graph: readable(graph))  # type: ignore[misc]

    def discard(self) -> None:
        """Remove what was written: this compilation was a trial, and another takes its place."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder = None

    def finish(
        self,
        backends: Mapping[str, Any],
        phases: Mapping[str, float],
        error: BaseException | None = None,
    ) -> None:
        """Write what the compiler made of the pieces, the times, and the page."""
        first: dict[str, str] = {}
        for name, backend in backends.items() if self.folder is not None else ():
            same_as = first.setdefault(backend.structure.key, name)
            if not self._steps[name].key:  # else it was written before
                self._piece(name, backend, "" if same_as == name else same_as)
        failure = "" if error is None else f"{type(error).__name__}: {error}"
        steps = list(self._steps.values())
        times = {
            "model": self.model,
            "torch": torch.__version__,
            "error": failure or None,
            "phases": dict(phases),
            "pieces": [step._asdict() for step in steps if step.graph],
        }
        self.write("times.json", lambda: json.dumps(times, indent=2) + "\n")
        if self.folder is None:
            return
        files = sorted(path.name for path in self.folder.iterdir() if path.is_file())
        page = render_page(
            steps,
            model=self.model,
            place=f"{self.folder.parent.name}/{self.folder.name}, torch {torch.__version__}",
            failure=failure,
            stages={name: _SAYS.get(name, "") for name in files if name != "index.html"},
            phases=phases,
        )
        self.write("index.html", lambda: page)

    def _piece(self, name: str, backend: Any, same_as: str) -> None:
        ranges = []
        for compile_range, entry in backend.entries.items():
            origin, code = "cache" if entry.cached else "compiled", ""
            if same_as or entry.reused:
                origin = same_as or "reused"
            elif texts := generated_sources(entry.compiled):
                code = f"pieces/{_file_name(name)}/{file_name('inductor_output', compile_range)}.py"
                self.write(code, lambda texts=texts: "\n\n".join(texts))  # type: ignore[misc]
            batches = str(compile_range or "all")
            row = {"batches": batches, "seconds": entry.seconds, "origin": origin, "code": code}
            ranges.append(row)
        key = backend.structure.key
        self._steps[name] = self._steps[name]._replace(key=key, same_as=same_as, ranges=ranges)

    def write(self, path: str, text: Callable[[], str]) -> None:
        """Write one file; the first that can't be written ends the dump, not the compilation."""
        if self.folder is None:
            return
        target = self.folder / path
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text(), encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            why = f"{target} can't be written ({error})"
            _log.warning("the dump of %s stops: %s", self.model, why)
            self.folder = None


def generated_sources(compiled: Any) -> tuple[str, ...]:
    """The Python that Inductor generated for a compiled form; empty where there is none."""
    held = compiled.runnable if compiled.artifact is None else compiled.artifact
    return torch_compat.inductor_sources(held)


def _new_folder(place: Path, name: str) -> Path:
    """Make ``name`` in ``place``, or the first of ``name_1``, ``name_2``… that nobody has made."""
    place.mkdir(parents=True, exist_ok=True)
    for number in itertools.count():
        folder = place / (f"{name}_{number}" if number else name)
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise AssertionError("itertools.count ended")


def _file_name(name: str) -> str:
    """``name`` as the name of a file or folder that is neither hidden nor a path."""
    return _NOT_IN_A_NAME.sub("_", name)[:_LONGEST_NAME].strip("._") or "model"


def config_text(config: CompilationConfig) -> str:
    """``config`` as JSON; what no other process could read back is shown by its repr."""
    try:
        return to_json(config)
    except ConfigError as error:
        shown = {"not_json_because": str(error), "repr": repr(config)}
        return json.dumps(shown, indent=2) + "\n"


def readable(graph: torch.fx.GraphModule) -> str:
    """``graph`` as text, with shapes."""
    return graph.print_readable(print_output=False, include_stride=True, include_device=True)


def _operators(item: SplitItem) -> str:
    """The names of the operators that run outside the pieces here."""
    calls = [node.target for node in item.graph.graph.nodes if node.op == "call_function"]
    names = [operator_name(each) or getattr(each, "__name__", "call") for each in calls]
    return ", ".join(dict.fromkeys(names))


def render_page(steps: Sequence[Step], **shown: object) -> str:
    """The page: stages, seconds, a map and a table of the steps; it needs no other file."""
    keys = dict.fromkeys(step.key for step in steps if step.key)
    numbers = {key: number for number, key in enumerate(keys, 1)}
    return filled("dump.html.jinja", steps=steps, numbers=numbers, **shown)
