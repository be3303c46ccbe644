"""What an artifact was made in, and for. In: this process and a model. Out: plain data for the manifest; and the first thing that is otherwise here.

It compares and reads; it changes nothing and imports no compiler.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import sysconfig
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

from piecework.codegen.graph.schemas import every_node, overloads_of
from piecework.codegen.graph.structure import Structure
from piecework.codegen.graph.targets import function_path
from piecework.errors import ArtifactError, Unidentifiable
from piecework.runtime import torch_compat
from piecework.runtime.artifact.values import operator_named
from piecework.runtime.cache.collect import environment_factors, host_factors, installed_versions
from piecework.runtime.identity.piece_operators import operator_facts
from piecework.runtime.identity.values import digest_of
from piecework.runtime.pieces.disk import accelerators, own_sources

_RECOMPILE = "compile the model again; with artifact=path this happens by itself"
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_OWN = str(Path(__file__).resolve().parents[2]) + os.sep
_PYTHON = (sysconfig.get_path("stdlib") + os.sep, os.path.dirname(os.__file__) + os.sep)
#: Of torch's settings, those that the entry looks at by itself in each call.
_OF_CALLS = ("autocast", "inference mode", "torch's options", "default dtype")


def versions() -> dict[str, str]:
    """What the code of an artifact was made by."""
    return {
        **installed_versions(("torch", "piecework")),
        "torch": torch.__version__,
        "torch source": str(getattr(torch.version, "git_version", "")),
        "python build": sys.implementation.cache_tag or "",
        "piecework source": own_sources(),
    }


def machine(*graphs: torch.fx.GraphModule) -> dict[str, str]:
    """What the code of ``graphs`` runs on: this processor, and the GPUs that they compute on."""
    return host_factors() | accelerators(*graphs)


def _gpus() -> str:
    """CUDA's version and the kinds of GPUs here, as of `accelerators`; asked for those that need one only, since it starts CUDA."""
    if not torch.cuda.is_available():
        return ""
    each = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
    return " ".join([str(torch.version.cuda), *(f"sm_{major}{minor}" for major, minor in each)])


def processes() -> dict[str, int]:
    """This process among those that run one model together."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return {"rank": 0, "world": 1}
    return {"rank": distributed.get_rank(), "world": distributed.get_world_size()}


def require_same_environment(saved: Mapping[str, str]) -> None:
    """Raise `ArtifactError` where a variable that decides what is compiled is set otherwise."""
    for name, before, here in _differences(saved, environment_factors()):
        raise ArtifactError(
            f"{name} was {before} when the model was saved and is {here} now",
            where="environment",
            hint=_RECOMPILE,
        )


def require_same_versions(saved: Mapping[str, str]) -> None:
    """Raise `ArtifactError` for another torch, Python or piecework."""
    for name, before, here in _differences(saved, versions()):
        raise ArtifactError(
            f"the artifact was made with {name} {before}, and here is {here}",
            where="versions",
            hint=_RECOMPILE,
        )


def _differences(
    saved: Mapping[str, str], now: Mapping[str, str]
) -> Iterator[tuple[str, str, str]]:
    """What is not as it was: its name, what it was and what it is."""
    for name in sorted(saved.keys() | now.keys()):
        if saved.get(name) != now.get(name):
            yield name, saved.get(name, "not set"), now.get(name, "not set")


def require_machine(saved: Mapping[str, str]) -> None:
    """Raise `ArtifactError` for a machine that lacks an instruction, or has another accelerator."""
    now = host_factors() | ({"cuda": _gpus()} if "cuda" in saved else {})
    for name, before, here in _differences(saved, now):
        if name not in ("cpu_features", "cuda"):
            raise ArtifactError(
                f"the artifact was made for {name} {before}, and here is {here}", hint=_RECOMPILE
            )
        lacks = sorted(set(saved.get(name, "").split()) - set(now.get(name, "").split()))
        if lacks and name == "cuda":
            raise ArtifactError(
                f"the artifact was made for CUDA {before}, and here is {here or 'none'}",
                hint=_RECOMPILE,
            )
        if lacks:
            raise ArtifactError(
                f"the artifact's code uses instructions that this CPU lacks: {', '.join(lacks)}",
                where="cpu_features",
                hint=_RECOMPILE,
            )


def require_same_settings(saved: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raise `ArtifactError` where torch was set otherwise when the model was compiled."""
    for name, before, here in _differences(saved, now):
        if name not in _OF_CALLS:
            raise ArtifactError(
                f"torch's setting {name} was {before} when the model was compiled and is {here} now",
                hint=_RECOMPILE,
            )


# --- sources -----------------------------------------------------------------------------------------


def sources(code: Iterable[types.CodeType], classes: Iterable[type]) -> dict[str, str]:
    """Module → SHA-256 of its file, for the modules that the trace went through; torch's, Python's and ours count by version."""
    by_file: dict[str, str] = {}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if isinstance(file, str):
            by_file.setdefault(os.path.realpath(file), name)
    files = {os.path.realpath(each.co_filename) for each in code if is_foreign(each.co_filename)}
    names = {by_file[file] for file in files if file in by_file}
    names |= {each.__module__ for each in classes}
    found: dict[str, str] = {}
    for name in sorted(names):
        digest = _digest_of_module(name)
        if digest is not None:
            found[name] = digest
    return found


def is_foreign(file: str) -> bool:
    """Whether a file is neither torch's, Python's nor ours."""
    path = os.path.realpath(file)
    if path.startswith((_TORCH, os.path.realpath(_TORCH) + os.sep)):
        return False
    if path.startswith(_OWN):
        return not path.startswith(_OWN + "runtime" + os.sep)
    return not path.startswith(_PYTHON) or "-packages" + os.sep in path


def _digest_of_module(name: str) -> str | None:
    file = getattr(sys.modules.get(name), "__file__", None)
    if name not in sys.modules:
        try:
            file = getattr(importlib.util.find_spec(name), "origin", None)
        except (ImportError, ValueError):
            return None
    if not isinstance(file, str) or not is_foreign(file):
        return None
    try:
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()
    except OSError:
        return ""


def require_same_sources(saved: Mapping[str, str]) -> None:
    """Raise `ArtifactError` where a file that the trace went through has another text."""
    for name, digest in saved.items():
        now = _digest_of_module(name)
        if now != digest:
            what = "is not here" if now is None else "has another text now"
            raise ArtifactError(
                f"the model's source changed: module {name} {what}", where=name, hint=_RECOMPILE
            )


# --- modules -----------------------------------------------------------------------------------------


def tree(roots: Sequence[tuple[str, torch.nn.Module]]) -> list[list[str]]:
    """Path, class and mode of every module."""
    return [
        [
            f"{prefix}{name}",
            f"{type(each).__module__}.{type(each).__qualname__}",
            "train" if each.training else "eval",
        ]
        for prefix, root in roots
        for name, each in root.named_modules()
    ]


def require_same_tree(saved: Sequence[Sequence[str]], now: Sequence[Sequence[str]]) -> None:
    """Raise `ArtifactError` for a model of other modules."""
    for before, here in zip(saved, now, strict=False):
        if list(before) != list(here):
            raise ArtifactError(
                f"the model has a {here[1]} ({here[2]}) at {here[0] or 'its root'}, where the saved one had {before[1]} "
                f"({before[2]}) at {before[0] or 'its root'}",
                hint="build the model as it was saved, with the same train() or eval()",
            )
    if len(saved) != len(now):
        raise ArtifactError(
            f"the model has {len(now)} modules; the saved one had {len(saved)}",
            hint="build the model as it was saved",
        )


# --- operators ---------------------------------------------------------------------------------------


def require_portable(graph: torch.fx.GraphModule, structure: Structure | None, name: str) -> None:
    """Raise `ArtifactError` for a piece whose graph means something else in another process."""
    reason = operator_facts(graph)[1]
    if structure is not None and not structure.portable and not reason:
        reason = "it holds an object or a Python function that is told apart by identity"
    if reason:
        raise ArtifactError(
            f"{name} can't be saved: {reason}",
            where=name,
            hint="make the function an operator with torch.library.custom_op and register_fake",
        )


def operators(graphs: Iterable[torch.fx.GraphModule]) -> dict[str, str]:
    """Operator that torch does not bring → what code depends on of it.

    Raises:
        ArtifactError: a graph calls a Python function, or an operator whose fake implementation can't be read.
    """
    found: dict[str, str] = {}
    for graph in graphs:
        for node in (each for each in every_node(graph) if each.op == "call_function"):
            for op in _overloads(node.target):
                if not torch_compat.is_torch_operator(op):
                    found[str(op)] = _identity(op)
    return found


def _overloads(target: object) -> tuple[OpOverload, ...]:
    if isinstance(target, (OpOverload, OpOverloadPacket, HigherOrderOperator)):
        return overloads_of(target)
    path = function_path(target)
    if path is None or not (path.module in (None, "operator", "math") or path.root == "torch"):
        raise ArtifactError(
            f"the graph calls the Python function {getattr(target, '__qualname__', target)}, which may be another in another process",
            hint="make it an operator with torch.library.custom_op and register_fake",
        )
    return ()


def _identity(op: OpOverload) -> str:
    if op.namespace == "piecework_named":
        raise ArtifactError(
            f"{op} takes layer names as inputs, and is made anew in each process",
            hint="use the eager compiler, or keep layer names out of operators' arguments",
        )
    # Its body may change: code calls it by its name. What decides its results' shapes may not.
    found = torch_compat.python_kernels(op)
    if op._schema.returns and found.fake is None:
        raise ArtifactError(
            f"the fake implementation of {op} can't be read, so nobody could tell that it changed",
            where=str(op),
            hint="register it with torch.library.custom_op and register_fake, or with piecework.splitting_op",
        )
    tags = sorted(str(each) for each in op.tags)
    try:
        fake = digest_of(found.fake, str(op))
    except Unidentifiable as error:
        raise ArtifactError(error.message, where=str(op), hint=error.hint) from error
    return digest_of([str(op._schema), tags, torch_compat.kinds_of_kernels(op), fake], str(op))


def require_same_operators(saved: Mapping[str, str]) -> None:
    """Raise `ArtifactError` for an operator that is missing, or has another schema or fake implementation."""
    for name, digest in saved.items():
        op = operator_named(name)
        if not isinstance(op, OpOverload) or _identity(op) != digest:
            raise ArtifactError(
                f"operator {name} has another schema or fake implementation than when the model was saved",
                where=name,
                hint=_RECOMPILE,
            )
