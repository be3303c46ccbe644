"""Inside a compiled artifact: its innermost function, what it checks by itself, its text."""

import re
import types
from collections.abc import Callable
from typing import Any

from piecework.code_objects import cells_of

#: Wrappers that AOTAutograd may put around a graph: which cell has what they wrap, and which must be
#: empty, so that they do nothing but what its record says.
_WRAPPERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "DisableContext.__call__.<locals>._fn": (("fn",), ()),
    "aot_module_simplified.<locals>.forward": (("compiled_fn",), ("params_buffers_flat",)),
    "CacheCompiledArtifact._load_impl.<locals>.<lambda>": (("compiled_fn",), ()),
    "SerializableCompiledFunction": (("compiled_fn",), ()),
    "_create_runtime_wrapper.<locals>.runtime_wrapper": (
        ("_inner_compiled_fn", "compiled_fn"),
        ("epilogue_args_idx", "trace_joint", "disable_amp"),
    ),
    "FunctionalizedRngRuntimeWrapper.post_compile.<locals>.wrapper": (("compiled_fn",), ()),
    "EffectTokensWrapper.post_compile.<locals>.inner_fn": (("compiled_fn",), ("num_tokens",)),
}


def direct_entry(
    artifact: object, inputs: int, outputs: int, *, vouched: bool = False
) -> tuple[Callable[..., object] | None, str]:
    """The innermost function of an Inductor artifact, past wrappers that do nothing; else why not.

    It takes one list, which it empties, and returns the outputs. Each wrapper must be a known one,
    and AOTAutograd's record say that there is nothing to do around the call: no mutation to write
    back, no alias, subclass, random state, effect token or change of grad mode. ``vouched``: a
    loaded artifact has no record, and was found clean before it was saved.
    """
    current, record = getattr(artifact, "_compiled_fn", None), None
    while type(current).__name__ != "CompiledFxGraph":
        code = getattr(current, "__code__", None)
        name = type(current).__name__ if code is None else code.co_qualname
        held = getattr(current, "__dict__", {}) if code is None else cells_of(current)  # type: ignore[arg-type]
        serialize = held.get("serialize_fn")
        kept = serialize() if callable(serialize) else None
        record = held.get("runtime_metadata") or getattr(kept, "runtime_metadata", None) or record
        inner, empty = _WRAPPERS.get(name, ((), ()))
        if any(held.get(each) for each in empty):
            return None, f"the wrapper {name} does more than call"
        current = next((held[each] for each in inner if each in held), None)
        if current is None:
            return None, f"the wrapper {name} is unknown"
    call = getattr(current, "current_callable", None)
    if not callable(call) or getattr(current, "_compile_context", None) is not None:
        return None, "autotuning results are still to be written at its first call"
    reason = "" if record is None and vouched else _work_of_wrappers(record, inputs, outputs)
    return (None, reason) if reason else (call, "")


def _work_of_wrappers(meta: object, inputs: int, outputs: int) -> str:
    """What AOTAutograd's record says is to be done around the call; "" if nothing."""
    if meta is None:
        return "AOTAutograd's record of the piece can't be found"
    must_be_empty = (
        "num_mutated_inp_runtime_indices",
        "num_outputs_aliased",
        "num_intermediate_bases",
        "mutated_graph_handled_indices_seen_by_autograd",
        "tokens",
        "is_rng_op_functionalized",
        "num_symints_saved_for_bw",
    )
    for name in must_be_empty:
        if value := getattr(meta, name, "not in the record"):
            return f"{name} is {value}"
    if getattr(meta, "grad_enabled_mutation", 0) is not None:
        return "it changes grad mode"
    if getattr(meta, "traced_tangents", ()):
        return "it is part of a backward pass"
    for kind in ("subclass_inp_meta", "subclass_fw_graph_out_meta"):
        if any(type(each).__name__ != "PlainTensorMeta" for each in getattr(meta, kind, (0,))):
            return "it takes or returns a tensor subclass"
    if len(meta.input_info) != inputs or meta.num_outputs != outputs:  # type: ignore[attr-defined]
        return "its inputs or outputs are not those of the piece"
    return ""


#: Matrix products that refuse operands of different dtypes or devices, as generated code calls them.
_STRICT_KERNEL = re.compile(r"extern_kernels\.(?:mm|addmm|bmm|baddbmm)\(")
_HARMLESS = ("assert_size_stride(", "assert_size_stride_grouped(", "del ", "#")


def strict_inputs(artifact: object, inputs: int) -> frozenset[int]:
    """Inputs that only ATen's matrix products read, which look at dtype and device themselves."""
    source = next(iter(inductor_sources(artifact)), "")
    found = re.search(
        r"\n    def call\(self, args\):\n(.*?)\n        return (.*)", source, re.DOTALL
    )
    lines = [line.strip() for line in found[1].splitlines()] if found else []
    unpacking = next((line for line in lines if line.endswith("= args")), "")
    names = re.findall(r"\w+", unpacking.removesuffix("= args"))
    if found is None or len(names) != inputs:
        return frozenset()
    loose: set[str] = set()
    for line in [*lines, found[2].partition("\n")[0]]:
        if not (line.startswith(_HARMLESS) or line == unpacking or _STRICT_KERNEL.match(line)):
            loose |= set(re.findall(r"\w+", line))
    return frozenset(i for i, name in enumerate(names) if name not in loose)


def inductor_sources(compiled: object) -> tuple[str, ...]:
    """Inductor's Python of a compiled piece; empty where this torch keeps none."""
    texts = (getattr(graph, "source_code", "") for graph in _graphs_in(compiled))
    return tuple(dict.fromkeys(text for text in texts if text))


def realign_inputs(compiled: object) -> None:
    """Let a compiled piece copy inputs that it took to be aligned and are not, such as ``ids[1:]``.

    Inductor leaves that out where a hook is set for its partitions; on a GPU it ends the process.
    """
    from torch._inductor.output_code import maybe_realign_inputs

    for graph in _graphs_in(compiled):
        maybe_realign_inputs(False, graph, graph.inputs_to_check, graph.mutated_input_idxs)  # type: ignore[attr-defined,arg-type]


def _graphs_in(compiled: object) -> list[Any]:
    """Inductor's graphs in what wrappers of a compiled function hold."""
    waiting, seen = [(compiled, 0)], {}
    for current, depth in waiting:
        if id(current) in seen or len(seen) > 2000:
            continue
        seen[id(current)] = current
        if depth < 10 and type(current).__name__ != "CompiledFxGraph":
            waiting += [(each, depth + 1) for each in _parts_of(current)]
    return [each for each in seen.values() if type(each).__name__ == "CompiledFxGraph"]


def _parts_of(value: object) -> list[object]:
    if isinstance(value, types.FunctionType):
        return list(cells_of(value).values())
    if isinstance(value, types.MethodType):
        return [value.__self__]
    if isinstance(value, (tuple, list)):
        return list(value) if len(value) < 20 else []
    if type(value).__module__.startswith(("torch._inductor", "torch._functorch", "functools")):
        parts = [getattr(value, "func", None), getattr(value, "__wrapped__", None)]
        return [*vars(value).values(), *parts] if hasattr(value, "__dict__") else parts
    return []
