"""The stages of one compilation as numbered files (``debug_dump_path``), and a page that links them.

A dump changes nothing of what is compiled; one that can't go on says so once and stops.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import pprint
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.fx

from piecework.codegen import SplitItem, StitchedSource
from piecework.codegen.graph.origin import SymbolNames, origin_of_piece
from piecework.codegen.plan.render import environment
from piecework.codegen.split.splitting import operator_name
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


@dataclass(slots=True)
class RangeCell:
    """A piece's compiled form for one batch range: ``origin`` is ``compiled``, ``cache``, or the piece that it is shared with; ``code`` the file of what Inductor wrote."""

    batches: str
    seconds: float
    origin: str
    code: str = ""


@dataclass(slots=True)
class Step:
    """One submodule of the stitching graph, in order."""

    name: str
    modules: str  # the model's modules that it holds
    operators: str = ""  # what runs here outside the pieces; "" for a piece
    graph: str = ""  # the file of a piece's graph
    key: str = ""  # equal for equal programs; "" until the piece is compiled
    same_as: str = ""  # the equal piece before this one
    ranges: list[RangeCell] = field(default_factory=list)


def generated_sources(compiled: Any) -> tuple[str, ...]:
    """The Python that Inductor generated for a compiled form; empty where there is none."""
    held = compiled.runnable if compiled.artifact is None else compiled.artifact
    return torch_compat.inductor_sources(held)


class Dump:
    """The files of one compilation; made by `Dump.open`.

    Attributes:
        folder: where they are; None if nothing is dumped, and then every method returns at once.
    """

    def __init__(self, folder: Path | None, model: str = "") -> None:
        self.folder = folder
        self.model = model
        self._steps: dict[str, Step] = {}

    @classmethod
    def open(
        cls, config: CompilationConfig, name: str, *, rank: int | None = None, dp_rank: int = 0
    ) -> Dump:
        """Make the folder of one compilation: ``rank_<r>/<name>``, or the next free ``<name>_<n>``."""
        if config.debug_dump_path is None:
            return cls(None)
        replica = f"_dp_{dp_rank}" if dp_rank else ""
        place = Path(config.debug_dump_path) / f"rank_{_rank() if rank is None else rank}{replica}"
        try:
            folder = _new_folder(place, _file_name(name))
            (folder / "00_config.json").write_text(config_text(config), encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"the stages of this compilation can't be written to {config.debug_dump_path}: "
                f"{error.strerror or type(error).__name__}",
                where="debug_dump_path",
                hint="name a folder that can be made and written to, or leave it out",
            ) from error
        return cls(folder, name)

    def captured(self, graph: torch.fx.GraphModule) -> None:
        """Write the captured graph."""
        if self.folder is not None:
            self._write("01_captured.py", _readable(graph))

    def split(self, split_gm: torch.fx.GraphModule, items: Sequence[SplitItem]) -> None:
        """Write the stitching graph and the graph of each piece."""
        if self.folder is None:
            return
        self._write("02_split.py", _readable(split_gm))
        for item in items:
            name, modules = item.submod_name, _modules(item.graph)
            if item.is_splitting_graph:
                self._steps[name] = Step(name, modules, _operators(item))
                continue
            path = f"pieces/{_file_name(name)}/graph.py"
            self._write(path, _readable(item.graph))
            self._steps[name] = Step(name, modules, graph=path)

    def stitched(self, source: StitchedSource) -> None:
        """Write the plan of the emitted source, and the source exactly as it runs."""
        if self.folder is None:
            return
        self._write("03_plan.txt", pprint.pformat(source.module, width=120))
        self._write("04_stitched.py", source.code)

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
        if self.folder is None:
            return
        first: dict[str, str] = {}
        for name, backend in backends.items():
            if backend.structure is not None:
                same_as = first.setdefault(backend.structure.key, name)
                self._piece(name, backend, "" if same_as == name else same_as)
        failure = "" if error is None else f"{type(error).__name__}: {error}"
        self._write("times.json", self._times(phases, failure))
        if self.folder is None:
            return
        files = sorted(path.name for path in self.folder.iterdir() if path.is_file())
        stages = {name: _SAYS.get(name, "") for name in files if name != "index.html"}
        place = f"{self.folder.parent.name}/{self.folder.name}, torch {torch.__version__}"
        page = render_page(self.model, place, failure, stages, phases, list(self._steps.values()))
        self._write("index.html", page)

    # --- parts -----------------------------------------------------------------------------------

    def _piece(self, name: str, backend: Any, same_as: str) -> None:
        step = self._steps.get(name)
        if step is None or step.key or backend.structure is None:
            return  # not of this compilation, or written before
        step.key, step.same_as = backend.structure.key, same_as
        for compile_range, entry in backend.entries.items():
            batches = "all" if compile_range is None else str(compile_range)
            cell = RangeCell(batches, entry.seconds, "cache" if entry.cached else "compiled")
            if same_as or entry.reused:
                cell.origin = same_as or "reused"
            elif texts := generated_sources(entry.compiled):
                cell.code = (
                    f"pieces/{_file_name(name)}/{file_name('inductor_output', compile_range)}.py"
                )
                self._write(cell.code, "\n\n".join(texts))
            step.ranges.append(cell)

    def _times(self, phases: Mapping[str, float], failure: str) -> str:
        data = {
            "model": self.model,
            "torch": torch.__version__,
            "error": failure or None,
            "phases": dict(phases),
            "pieces": [asdict(step) for step in self._steps.values() if step.graph],
        }
        return json.dumps(data, indent=2) + "\n"

    def _write(self, path: str, text: str) -> None:
        """Write one file; the first that can't be written ends the dump, and not the compilation."""
        if self.folder is None:
            return
        target = self.folder / path
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            _log.warning(
                "the dump of %s stops: %s can't be written (%s)", self.model, target, error
            )
            self.folder = None


def _new_folder(place: Path, name: str) -> Path:
    """Make ``name`` in ``place``, or the first of ``name_1``, ``name_2``… that nobody has made."""
    place.mkdir(parents=True, exist_ok=True)
    for number in itertools.count():
        folder = place / (f"{name}_{number}" if number else name)
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise AssertionError("itertools.count ended")


def _file_name(name: str) -> str:
    """``name`` as the name of a file or folder that is neither hidden nor a path."""
    return _NOT_IN_A_NAME.sub("_", name)[:_LONGEST_NAME].strip("._") or "model"


def _rank() -> int:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank()
    return int(os.environ.get("RANK", "0")) if os.environ.get("RANK", "").isdecimal() else 0


def config_text(config: CompilationConfig) -> str:
    """``config`` as JSON; what no other process could read back is shown by its repr."""
    try:
        return to_json(config)
    except ConfigError as error:
        fields = {name: repr(getattr(config, name)) for name in type(config).model_fields}
        return json.dumps({"not_json_because": str(error), "repr": fields}, indent=2) + "\n"


def _readable(graph: torch.fx.GraphModule) -> str:
    return graph.print_readable(print_output=False, include_stride=True, include_device=True)


def _modules(graph: torch.fx.GraphModule) -> str:
    return origin_of_piece(graph, SymbolNames()).module


def _operators(item: SplitItem) -> str:
    """The names of the operators that run outside the pieces here."""
    calls = (node.target for node in item.graph.graph.nodes if node.op == "call_function")
    return ", ".join(
        dict.fromkeys(operator_name(each) or getattr(each, "__name__", "call") for each in calls)
    )


def render_page(
    model: str,
    place: str,
    failure: str,
    stages: Mapping[str, str],
    phases: Mapping[str, float],
    steps: Sequence[Step],
) -> str:
    """The page: stages with what they are, seconds per phase, a map of the steps, a table of the pieces; it needs no other file to be read."""
    keys = dict.fromkeys(step.key for step in steps if step.key)
    return (
        environment()
        .get_template("dump.html.jinja")
        .render(
            model=model,
            place=place,
            failure=failure,
            stages=stages,
            phases=phases,
            steps=steps,
            numbers={key: number for number, key in enumerate(keys, 1)},
        )
    )
