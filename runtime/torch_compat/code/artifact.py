"""Inside a compiled artifact: its innermost function, what it checks by itself, its text."""

from __future__ import annotations

import re
import types
from collections.abc import Callable
from typing import Any

from piecework.code_objects import cells_of


def direct_entry(
    artifact: object, inputs: int, outputs: int, *, vouched: bool = False
) -> tuple[Callable[..., object] | None, str]:
    """The innermost function of an Inductor artifact, past wrappers that do nothing for it.

    The function takes one list, which it empties, and returns the outputs. AOTAutograd's record must say that the wrappers
    have nothing to do before or after the call: no mutation to write back, no output to make an alias of an input, no tensor
    subclass, no random state, no effect token, no change of grad mode. Copies of misaligned inputs and CUDA graphs, where
    there are any, are part of what is returned.
    """
    held = _held_in(getattr(artifact, "_compiled_fn", None))
    graphs = _of_kind(held, "CompiledFxGraph")
    # The record is held by wrappers that need it, and in what AOTAutograd would serialise.
    records = _of_kind(held, "ViewAndMutationMeta")
    kept = [each.serialize_fn() for each in _of_kind(held, "SerializableCompiledFunction")]
    records += [getattr(each, "runtime_metadata", None) for each in kept]
    record = next((each for each in records if each is not None), None)
    call = getattr(graphs[0], "current_callable", None) if len(graphs) == 1 else None
    if not callable(call):
        return None, f"{type(artifact).__name__} shows no inner function"
    if getattr(graphs[0], "_compile_context", None) is not None:
        return None, "autotuning results are still to be written at its first call"
    reason = "" if record is None and vouched else _work_of_wrappers(record, inputs, outputs)
    return (None, reason) if reason else (call, "")


def _work_of_wrappers(meta: object, inputs: int, outputs: int) -> str:
    """What AOTAutograd's record says that is to be done around the call; "" if nothing."""
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


#: Matrix products that refuse operands of different dtypes or devices, by the names that generated code calls them.
_STRICT_KERNEL = re.compile(r"extern_kernels\.(?:mm|addmm|bmm|baddbmm)\(")
_HARMLESS = ("assert_size_stride(", "assert_size_stride_grouped(", "del ", "#")


def strict_inputs(artifact: object, inputs: int) -> frozenset[int]:
    """Which inputs of an Inductor artifact are read by nothing but ATen's matrix products.

    Generated kernels read memory without looking at a dtype; ATen's products raise for an operand of another dtype or
    device. Told from the generated text; an input that is used in any way that is not known here is left out.
    """
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
    """The Python that Inductor generated for a compiled piece, found inside it; empty where this torch keeps none."""
    texts = (
        getattr(graph, "source_code", "")
        for graph in _of_kind(_held_in(compiled), "CompiledFxGraph")
    )
    return tuple(dict.fromkeys(text for text in texts if text))


def realign_inputs(compiled: object) -> None:
    """Let code in a compiled piece copy the inputs that it took to be aligned and are not, as ``ids[1:]`` would be.

    Inductor does that by itself, except where a hook is set for its partitions: it leaves out all that comes after. Kernels read
    16 bytes at once from an address that they take to be aligned; elsewhere that is an error which ends the process's use of the GPU.
    """
    from torch._inductor.output_code import maybe_realign_inputs

    for graph in _of_kind(_held_in(compiled), "CompiledFxGraph"):
        maybe_realign_inputs(False, graph, graph.inputs_to_check, graph.mutated_input_idxs)  # type: ignore[attr-defined,arg-type]


def _of_kind(values: list[object], name: str) -> list[Any]:
    return [each for each in values if type(each).__name__ == name]


def _held_in(compiled: object) -> list[object]:
    """What wrappers of a compiled function hold, and those in them, down to Inductor's graphs."""
    waiting, seen = [(compiled, 0)], {}
    for current, depth in waiting:
        if id(current) in seen or len(seen) > 2000:
            continue
        seen[id(current)] = current
        if depth < 10 and type(current).__name__ not in ("CompiledFxGraph", "ViewAndMutationMeta"):
            waiting += [(each, depth + 1) for each in _parts_of(current)]
    return list(seen.values())


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
