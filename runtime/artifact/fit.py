"""What of a model and of how it was compiled must be the same where it is loaded."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

from piecework.codegen.graph.schemas import every_node, overloads_of
from piecework.codegen.graph.structure import Structure
from piecework.codegen.graph.targets import function_path
from piecework.codegen.split.split import SplittingOp, SplittingOps
from piecework.errors import ArtifactError, Unidentifiable
from piecework.runtime import torch_compat
from piecework.runtime.artifact.values import operator_named
from piecework.runtime.config.compilation import CompilationConfig, RuntimeConfig
from piecework.runtime.pieces.layer_names import NAMESPACE
from piecework.runtime.store.digest import digest_of
from piecework.runtime.store.operators import operator_content
from piecework.runtime.store.surroundings import operator_facts
from piecework.runtime.trace.sizes import SizePolicy

_OPERATOR = "make the function an operator with torch.library.custom_op and register_fake"
#: What of a configuration says where and how fast to compile.
_NO_EFFECT = frozenset({"cache_dir", "debug_dump_path", "compile_workers"})


# --- how it was made ---------------------------------------------------------------------------------


def made_with(
    config: CompilationConfig,
    runtime_config: RuntimeConfig | None,
    splitting_ops: Sequence[SplittingOp] | None,
    sizes: SizePolicy | None,
    kept: Mapping[str, object] | None,
) -> dict[str, object]:
    """How a module was made, as JSON data: one that is made by the same data does the same.

    Raises:
        ArtifactError: the configuration holds code.
    """
    try:
        data: dict[str, object] = json.loads(config.model_dump_json())
        problem = "" if CompilationConfig(**data) == config else "it reads back as another one"
    except Exception as error:  # noqa: BLE001 - pydantic and codecs raise anything
        problem = str(error)
    if problem:
        raise ArtifactError(
            f"the configuration can't be written down: {problem}",
            where="config",
            hint="leave passes and other objects out of it, or name them as text",
        )
    return {
        "config": data,
        "runtime config": runtime_config and json.loads(runtime_config.model_dump_json()),
        "splitting ops": (
            None if splitting_ops is None else list(SplittingOps(splitting_ops).declared)
        ),
        "sizes": None if sizes is None else type(sizes).__name__,
        "kept": None if kept is None else dict(kept),
    }


def require_made_so(saved: Mapping[str, object], wanted: Mapping[str, object]) -> None:
    """Raise `ArtifactError` where an artifact was made with other settings than are wanted."""
    before, now = _flat(saved, wanted), _flat(wanted, wanted)
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise ArtifactError(
                f"the artifact was made with {name} {before.get(name)!r}, and {now.get(name)!r} is wanted",
                where=name,
                hint="give it a directory of its own, or leave it as it was",
            )


def _flat(facts: Mapping[str, object], fields: Iterable[str]) -> dict[str, object]:
    """``fields`` of ``facts``, those of configurations one by one, without what has no effect."""
    found: dict[str, object] = {}
    for name in fields:
        value = facts.get(name)
        if isinstance(value, dict):
            found |= {f"{name} {k}": each for k, each in value.items() if k not in _NO_EFFECT}
        else:
            found[name] = value
    return found


# --- modules and weights -----------------------------------------------------------------------------


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
    pairs = zip(map(list, saved), map(list, now), strict=False)
    first = next((pair for pair in pairs if pair[0] != pair[1]), None)
    if first is not None:
        (path, kind, mode), (at, other, now_in) = first
        what = f"a {other} ({now_in}) at {at or 'its root'}, where the saved one had {kind} ({mode}) at {path or 'its root'}"
    else:
        what = f"{len(now)} modules; the saved one had {len(saved)}"
    if first is not None or len(saved) != len(now):
        raise ArtifactError(
            f"the model has {what}",
            hint="build the model as it was saved, with the same train() or eval()",
        )


def files_of(classes: Iterable[type]) -> set[str]:
    """The files of the modules that define classes."""
    modules = (sys.modules.get(each.__module__) for each in classes)
    files = (getattr(each, "__file__", None) for each in modules)
    return {file for file in files if isinstance(file, str)}


def partition(tensors: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """A number per tensor, equal for those in one memory."""
    stores = [torch_compat.storage_id(each) for each in tensors]
    return tuple(map(stores.index, stores))


# --- operators ---------------------------------------------------------------------------------------


def require_portable(graph: torch.fx.GraphModule, structure: Structure | None, name: str) -> None:
    """Raise `ArtifactError` for a piece that is another in another process, or holds a tensor."""
    reason = operator_facts(graph)[1] or ("" if structure is None else structure.local)
    hint = _OPERATOR
    for node in graph.graph.find_nodes(op="get_attr"):
        if not isinstance(getattr(graph, str(node.target), None), torch.fx.GraphModule):
            reason = f"it holds the constant {node.target}, and an artifact holds no tensors"
            hint = "register it as a buffer of the model"
    if reason:
        raise ArtifactError(f"{name} can't be saved: {reason}", where=name, hint=hint)


def operators(graphs: Iterable[torch.fx.GraphModule]) -> dict[str, str]:
    """Operator that torch does not bring → what code depends on of it.

    Raises:
        ArtifactError: a graph calls a Python function, or an operator whose fake implementation
            can't be read.
    """
    found: dict[str, str] = {}
    for graph in graphs:
        for node in (each for each in every_node(graph) if each.op == "call_function"):
            for op in _overloads(node.target):
                if not torch_compat.is_torch_operator(op) and str(op) not in found:
                    found[str(op)] = _identity(op)
    return found


def _overloads(target: object) -> tuple[OpOverload, ...]:
    if isinstance(target, (OpOverload, OpOverloadPacket, HigherOrderOperator)):
        return overloads_of(target)
    path = function_path(target)
    if path is None or not (path.module in (None, "operator", "math") or path.root == "torch"):
        name = getattr(target, "__qualname__", target)
        why = f"the graph calls the Python function {name}, which may be another in another process"
        raise ArtifactError(why, hint=_OPERATOR)
    return ()


def _identity(op: OpOverload) -> str:
    """Its body may change: code calls it by its name. What decides its results' shapes may not."""
    if op.namespace == NAMESPACE:
        raise ArtifactError(
            f"{op} takes layer names as inputs, and is made anew in each process",
            hint="use the eager compiler, or keep layer names out of operators' arguments",
        )
    try:
        return digest_of(operator_content(op, with_body=False), str(op))
    except Unidentifiable as error:
        raise ArtifactError(error.message, where=str(op), hint=error.hint) from error


def require_same_operators(saved: Mapping[str, str]) -> None:
    """Raise `ArtifactError` for an operator that is missing, or has another schema or fake."""
    for name, digest in saved.items():
        op = operator_named(name)
        if not isinstance(op, OpOverload) or _identity(op) != digest:
            raise ArtifactError(
                f"operator {name} has another schema or fake implementation than when the model was saved",
                where=name,
                hint="compile the model again; with artifact=path this happens by itself",
            )
