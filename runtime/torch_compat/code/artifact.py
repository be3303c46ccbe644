"""Inside a compiled artifact. In: what Inductor returned for a piece. Out: its innermost function, what it checks by itself, its text."""

from __future__ import annotations

import re
import types
from collections.abc import Callable

from piecework.code_objects import cells_of


def direct_entry(
    artifact: object, inputs: int, outputs: int, *, vouched: bool = False
) -> tuple[Callable[..., object] | None, str]:
    """The innermost function of an Inductor artifact, past wrappers that do nothing for it.

    The function takes one list, which it empties, and returns the outputs. Each wrapper between the artifact and it must
    be one that is known, and the metadata that AOTAutograd recorded must say that there is nothing to do before or after
    the call: no mutation to write back, no output to make an alias of an input, no tensor subclass, no random state, no
    effect token, no change of grad mode. Copies of misaligned inputs and CUDA graphs, where there are any, are part of
    what is returned.

    Args:
        inputs, outputs: how many the piece has.
        vouched: the same program was found clean before it was saved; a loaded artifact has no record of its own.

    Returns:
        The function and ""; or None and why the artifact must be called as it is.
    """
    try:
        return _Peeling(inputs, outputs, vouched).peel(artifact), ""
    except _MustStay as reason:
        return None, str(reason)


class _MustStay(Exception):
    """Why a wrapper can't be left out."""


class _Peeling:
    """Walks from an artifact to the function inside it, one known wrapper after the other."""

    def __init__(self, inputs: int, outputs: int, vouched: bool) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self.vouched = vouched
        self.metadata: object = None

    def peel(self, artifact: object) -> Callable[..., object]:
        current: object = getattr(artifact, "_compiled_fn", None)
        if current is None:
            raise _MustStay(f"{type(artifact).__name__} shows no inner function")
        for _ in range(12):
            if type(current).__name__ == "CompiledFxGraph":
                self._require_clean_metadata()
                return self._of_graph(current)
            current = self._inner(current)
        raise _MustStay("too many wrappers")

    def _inner(self, current: object) -> object:
        if type(current).__name__ == "SerializableCompiledFunction":
            self._remember(current.serialize_fn)  # type: ignore[attr-defined]
            return current.compiled_fn  # type: ignore[attr-defined]
        cells = cells_of(current) if isinstance(current, types.FunctionType) else {}
        # The code's own name: `functools.wraps` gives a wrapper that of what it wraps.
        code = current.__code__ if isinstance(current, types.FunctionType) else None
        name = type(current).__name__ if code is None else code.co_qualname
        if type(cells.get("self")).__name__ == "DisableContext" and "fn" in cells:
            return cells["fn"]
        if name == "aot_module_simplified.<locals>.forward":
            if cells.get("params_buffers_flat"):
                raise _MustStay("it holds parameters of its own")
            return cells["compiled_fn"]
        if name == "CacheCompiledArtifact._load_impl.<locals>.<lambda>":
            return cells["compiled_fn"]
        if name == "_create_runtime_wrapper.<locals>.runtime_wrapper":
            written = "_codegen_runtime_wrapper" in cells
            return (self._of_runtime_wrapper if written else self._of_plain_wrapper)(cells)
        if name == "FunctionalizedRngRuntimeWrapper.post_compile.<locals>.wrapper":
            self.metadata = cells["runtime_metadata"]  # it says whether there is random state
            return cells["compiled_fn"]
        if name == "EffectTokensWrapper.post_compile.<locals>.inner_fn":
            if cells.get("num_tokens") != 0:  # torch 2.11 wraps where there are none, too
                raise _MustStay(f"num_tokens is {cells.get('num_tokens')}")
            return cells["compiled_fn"]
        raise _MustStay(f"unknown wrapper {name}")

    def _of_runtime_wrapper(self, cells: dict[str, object]) -> object:
        written = cells.get("_codegen_runtime_wrapper")
        if not isinstance(written, types.FunctionType) or "_inner_compiled_fn" not in cells:
            raise _MustStay("a runtime wrapper of an unknown form")
        helpers = written.__globals__.keys() - {"torch", "_DisableAutocast_", "__builtins__"}
        # Marks for Dynamo on dynamic outputs: they speak to graphs traced after a graph break, and there is none here.
        helpers = {
            name for name in helpers if not name.startswith(("_mark_dynamic_", "_dyn_dims_"))
        }
        if helpers - {written.__name__}:
            raise _MustStay(
                f"the runtime wrapper does more than call: {', '.join(sorted(helpers))}"
            )
        return cells["_inner_compiled_fn"]

    def _of_plain_wrapper(self, cells: dict[str, object]) -> object:
        """The wrapper of torch 2.11, which looks at AOTAutograd's record in each call."""
        if cells.get("epilogue_args_idx") or cells.get("trace_joint") or cells.get("disable_amp"):
            raise _MustStay("the runtime wrapper does more than call")
        if "runtime_metadata" not in cells or "compiled_fn" not in cells:
            raise _MustStay("a runtime wrapper of an unknown form")
        self.metadata = cells["runtime_metadata"]
        return cells["compiled_fn"]

    def _remember(self, serialize: object) -> None:
        """Keep AOTAutograd's record, which is a part of what it would serialise."""
        record = serialize() if callable(serialize) else None
        self.metadata = getattr(record, "runtime_metadata", self.metadata)

    def _require_clean_metadata(self) -> None:
        meta = self.metadata
        if meta is None and self.vouched:
            return
        if meta is None:
            raise _MustStay("AOTAutograd's record of the piece can't be found")
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
            if not hasattr(meta, name):
                raise _MustStay(f"the record of the piece has no {name}")
            if getattr(meta, name):
                raise _MustStay(f"{name} is {getattr(meta, name)}")
        if getattr(meta, "grad_enabled_mutation", 0) is not None:
            raise _MustStay("it changes grad mode")
        if getattr(meta, "traced_tangents", ()):
            raise _MustStay("it is part of a backward pass")
        for kind in ("subclass_inp_meta", "subclass_fw_graph_out_meta"):
            if any(type(each).__name__ != "PlainTensorMeta" for each in getattr(meta, kind, (0,))):
                raise _MustStay("it takes or returns a tensor subclass")
        if len(meta.input_info) != self.inputs or meta.num_outputs != self.outputs:  # type: ignore[attr-defined]
            raise _MustStay("its inputs or outputs are not those of the piece")

    @staticmethod
    def _of_graph(graph: object) -> Callable[..., object]:
        call = getattr(graph, "current_callable", None)
        if not callable(call):
            raise _MustStay("the compiled graph shows no callable")
        if getattr(graph, "_compile_context", None) is not None:
            raise _MustStay("autotuning results are still to be written at its first call")
        return call


#: Matrix products that refuse operands of different dtypes or devices, by the names that generated code calls them.
_STRICT_KERNEL = re.compile(r"extern_kernels\.(?:mm|addmm|bmm|baddbmm)\(")

_HARMLESS = ("assert_size_stride(", "assert_size_stride_grouped(", "del ", "#")


def strict_inputs(artifact: object, inputs: int) -> frozenset[int]:
    """Which inputs of an Inductor artifact are read by nothing but ATen's matrix products.

    Generated kernels read memory without looking at a dtype; ATen's products raise for an operand of another dtype or
    device. Told from the generated text; an input that is used in any way that is not known here is left out.
    """
    return _strict_inputs(source_of_artifact(artifact), inputs)


def source_of_artifact(artifact: object) -> str:
    """The module that Inductor generated for an artifact; "" where it can't be found."""
    current = getattr(artifact, "_compiled_fn", None)
    for _ in range(12):
        if current is None or type(current).__name__ == "CompiledFxGraph":
            break
        cells = cells_of(current) if isinstance(current, types.FunctionType) else vars(current)
        current = next(
            (cells[n] for n in ("fn", "compiled_fn", "_inner_compiled_fn") if n in cells), None
        )
    return str(getattr(current, "source_code", ""))


def _strict_inputs(source: str, inputs: int) -> frozenset[int]:
    found = re.search(r"\n    def call\(self, args\):\n(.*?)\n        return ", source, re.DOTALL)
    if found is None:
        return frozenset()
    lines = [line.strip() for line in found.group(1).splitlines()]
    unpacking = [line for line in lines if line.endswith("= args")]
    names = (
        [each.strip() for each in unpacking[0].removesuffix("= args").split(",")]
        if unpacking
        else []
    )
    names = [name for name in names if name]
    if len(names) != inputs:
        return frozenset()
    loose: set[str] = set()
    returned = source[found.end() :].partition("\n")[0]
    for line in [*lines, returned]:
        harmless = line.startswith(_HARMLESS) or line.endswith("= args")
        if not harmless and not _STRICT_KERNEL.match(line):
            loose |= set(re.findall(r"\w+", line))
    return frozenset(i for i, name in enumerate(names) if name not in loose)


def inductor_sources(compiled: object) -> tuple[str, ...]:
    """The Python that Inductor generated for a compiled piece, found inside it; empty where this torch keeps none."""
    texts = map(_source_of_graph, _compiled_graphs(compiled))
    return tuple(dict.fromkeys(text for text in texts if text))


def realign_inputs(compiled: object) -> None:
    """Let code in a compiled piece copy the inputs that it took to be aligned and are not, as ``ids[1:]`` would be.

    Inductor does that by itself, except where a hook is set for its partitions: it leaves out all that comes after. Kernels read
    16 bytes at once from an address that they take to be aligned; elsewhere that is an error which ends the process's use of the GPU.
    """
    from torch._inductor.output_code import maybe_realign_inputs

    for graph in _compiled_graphs(compiled):
        maybe_realign_inputs(False, graph, graph.inputs_to_check, graph.mutated_input_idxs)  # type: ignore[attr-defined,arg-type]


def _compiled_graphs(compiled: object) -> list[object]:
    """Inductor's graphs inside a compiled piece."""
    graphs = []
    waiting, seen = [(compiled, 0)], set()
    while waiting:
        current, depth = waiting.pop(0)
        if id(current) in seen or len(seen) > 2000:
            continue
        seen.add(id(current))
        if type(current).__name__ == "CompiledFxGraph":
            graphs.append(current)
        elif depth < 10:
            waiting += [(each, depth + 1) for each in _held_by(current)]
    return graphs


def _held_by(value: object) -> list[object]:
    """What a wrapper of a compiled function holds, where another wrapper or the function may be."""
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


def _source_of_graph(graph: object) -> str:
    text = getattr(graph, "source_code", None)
    if isinstance(text, str) and text:
        return text
    code = getattr(getattr(graph, "current_callable", None), "__code__", None)
    try:
        with open(getattr(code, "co_filename", ""), encoding="utf-8") as file:
            return file.read()
    except OSError:
        return ""  # the folder that Inductor wrote to is gone
