"""The private corners of torch that piecework uses: in, plain values; out, what torch makes of them.

It never patches torch; each function probes for what it needs and falls back to a public way.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import inspect
import os
import re
import tempfile
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized

import torch
from torch.utils import _pytree


def storage_at(pointer: int, device: torch.device, nbytes: int) -> torch.UntypedStorage:
    """A storage over memory that it does not own.

    The caller answers for the memory being there whenever the storage is read.

    Args:
        pointer: the address of the first byte; not zero.
        device: where the memory is, with its index on CUDA.
        nbytes: its length in bytes, more than zero.
    """
    construct = getattr(torch._C, "_construct_storage_from_data_pointer", None)
    if construct is not None:
        return construct(pointer, device, nbytes)
    return _public_storage_at(pointer, device, nbytes)


def _public_storage_at(pointer: int, device: torch.device, nbytes: int) -> torch.UntypedStorage:
    """The fall-back of ``storage_at`` by the buffer protocol (CPU) or the CUDA array interface."""
    if device.type == "cpu":
        window = (ctypes.c_char * nbytes).from_address(pointer)
        return torch.frombuffer(window, dtype=torch.uint8).untyped_storage()
    return torch.as_tensor(_CudaBytes(pointer, nbytes), device=device).untyped_storage()


class _CudaBytes:
    """Device memory as bytes, in the form of the CUDA array interface."""

    def __init__(self, pointer: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (pointer, False),
            "strides": None,
            "version": 3,
        }


def negative_view(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` seen with its sign turned, without a copy where torch has such a view."""
    view = getattr(torch, "_neg_view", None)
    return -tensor if view is None else view(tensor)


def flatten_tree(tree: object) -> tuple[list[object], _pytree.TreeSpec]:
    """The leaves of nested containers in order, and what puts them together again."""
    return _pytree.tree_flatten(tree)


def unflatten_tree(leaves: list[object], spec: _pytree.TreeSpec) -> object:
    """The containers of ``spec`` around ``leaves``."""
    return _pytree.tree_unflatten(leaves, spec)


def mark_unbacked(tensor: torch.Tensor, dim: int, *, shape_id: str | None = None) -> None:
    """Declare dimension ``dim`` of an example input unbacked: captured for every size, zero and one included.

    Args:
        shape_id: dimensions with one id become one symbol; where torch can't say so, they stay two symbols and the
            captured graph checks at run time that they are equal.
    """
    mark = torch._dynamo.decorators.mark_unbacked
    if shape_id is not None and "shape_id" in inspect.signature(mark).parameters:
        mark(tensor, dim, shape_id=shape_id)
    else:
        mark(tensor, dim)


def standalone_compile(
    graph: torch.fx.GraphModule,
    example_inputs: list[object],
    *,
    dynamic_shapes: str,
    config_patches: dict[str, object],
) -> Callable[..., object]:
    """Compile a flat graph with Inductor into an artifact of its own (``torch._inductor.standalone_compile``).

    Args:
        dynamic_shapes: ``"from_tracing_context"`` keeps the symbols of the capture, ``"from_example_inputs"`` takes
            sizes as they are.
    """
    from torch._inductor import standalone_compile as compile_one

    return compile_one(
        graph,
        example_inputs,
        dynamic_shapes=dynamic_shapes,
        options={"config_patches": config_patches},
    )


def inductor_key() -> str:
    """A digest of the installed Inductor's sources; torch's version where there is none."""
    try:
        from torch._inductor.codecache import torch_key
    except ImportError:
        return str(torch.__version__)
    return torch_key().hex()


def tracing_context() -> object:
    """Dynamo's tracing context while a backend runs; None outside."""
    return torch._guards.TracingContext.try_get()


def placeholder_source(node: torch.fx.Node) -> str:
    """Dynamo's name of where a graph input comes from, such as ``L['x'].size()[0]``; "" when unknown."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", "")
    return name() if callable(name) else str(name)


def dynamo_failure(error: BaseException) -> bool:
    """Whether Dynamo raised ``error`` because it could not capture the code."""
    return isinstance(error, torch._dynamo.exc.TorchDynamoException)


def backend_failure(error: BaseException) -> Exception | None:
    """The exception that a Dynamo backend raised and Dynamo wrapped, if ``error`` is such a wrapper."""
    if isinstance(error, torch._dynamo.exc.BackendCompilerFailed):
        return error.inner_exception
    return None


def symbol_of(size: object) -> str | None:
    """The expression of a size that is still symbolic; None for a number, also one that the trace fixed."""
    if not isinstance(size, torch.SymInt):
        return None
    expr = size.node.expr
    return None if expr.is_number else str(expr)


def with_symbol(value: object, symbol: str, size: int) -> object:
    """``value`` (a size or a fake tensor) with ``symbol`` replaced by ``size`` in every expression.

    Sizes without a symbol left become plain integers; strides and storage offset are kept.
    """
    if isinstance(value, torch.SymInt):
        return _size_with(value, symbol, size)
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return value
    sizes = [_size_with(each, symbol, size) for each in value.shape]
    strides = [_size_with(each, symbol, size) for each in value.stride()]
    offset = _size_with(value.storage_offset(), symbol, size)
    fixed = all(
        a is b for a, b in zip((*sizes, *strides), (*value.shape, *value.stride()), strict=True)
    )
    if fixed:
        return value
    empty = any(type(each) is int and each == 0 for each in sizes)
    reach = 0 if empty else 1 + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
    fake_mode = getattr(value, "fake_mode", None)
    with contextlib.nullcontext() if fake_mode is None else fake_mode:
        storage = torch.empty(offset + reach, dtype=value.dtype, device=value.device)
        return storage.as_strided(sizes, strides, offset)


def _size_with(value: object, symbol: str, size: int) -> object:
    if not isinstance(value, torch.SymInt):
        return value
    expr = value.node.expr
    replaced = expr.subs({each: size for each in expr.free_symbols if str(each) == symbol})
    if replaced.is_number:
        return int(replaced)
    if replaced == expr:
        return value
    return value.node.shape_env.create_symintnode(replaced, hint=None)


def storage_id(value: torch.Tensor) -> int:
    """A number that tensors share exactly when they share memory; holds for fake tensors too, while they live."""
    return int(value.untyped_storage()._cdata)


def statically_equal(left: object, right: object) -> bool:
    """Whether two sizes are equal for every value of their symbols; adds no guard."""
    if isinstance(left, int) and isinstance(right, int):
        return left == right
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(left == right))


def as_inductor_graph_pass(
    run: Callable[[torch.fx.Graph], object], identity: Callable[[], str]
) -> Callable[[torch.fx.Graph], None]:
    """``run`` in the form that Inductor's pass options take and its code cache knows by ``identity``."""
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class GraphPass(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            run(graph)

        def uuid(self) -> str:
            return identity()

    return GraphPass()


def auto_functionalized_ops() -> tuple[object, ...]:
    """The higher-order operators that stand for a call of a mutating operator in a functional graph."""
    higher_order = torch.ops.higher_order
    names = ("auto_functionalized", "auto_functionalized_v2")
    return tuple(getattr(higher_order, n) for n in names if hasattr(higher_order, n))


def has_inductor_option(name: str) -> bool:
    """Whether the installed Inductor has the option ``name``, such as ``max_autotune`` or ``cpp.threads``."""
    import torch._inductor.config as inductor_config

    try:
        getattr(inductor_config, name)
    except AttributeError:
        return False
    return True


def compile_fx(
    graph: torch.fx.GraphModule,
    example_inputs: list[object],
    *,
    own_shapes: bool,
    config_patches: dict[str, object],
) -> Callable[..., object]:
    """Compile a flat graph through ``torch._inductor.compile_fx``, on a copy of it.

    Args:
        own_shapes: take sizes as they are instead of keeping the symbols of the capture.
    """
    from torch._inductor.compile_fx import compile_fx as compile_one

    if not own_shapes:
        return compile_one(copy.deepcopy(graph), example_inputs, config_patches=config_patches)
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    context = torch._guards.TracingContext(FakeTensorMode(shape_env=ShapeEnv()))
    options: dict[str, object] = {"config_patches": config_patches}
    if "ignore_shape_env" in inspect.signature(compile_one).parameters:
        options["ignore_shape_env"] = True
    with torch._guards.tracing(context):
        return compile_one(copy.deepcopy(graph), example_inputs, **options)


@contextlib.contextmanager
def partition_wrapper(
    wrap: Callable[[Callable[..., object], int, int], Callable[..., object]] | None,
) -> Iterator[bool]:
    """While active, Inductor gives each partition of compiled or loaded code to ``wrap(function, index, count)``.

    What was set before is there again afterwards, also when the compilation raised. Yields whether this torch has
    such a hook; without one nothing is wrapped.
    """
    from torch._inductor import utils as inductor_utils

    holder = getattr(inductor_utils, "_unstable_customized_partition_wrapper", None)
    install = getattr(inductor_utils, "set_customized_partition_wrappers", None)
    if holder is None or install is None:
        yield False
        return
    before = holder.wrapper
    install(
        None
        if wrap is None
        else lambda function, place: wrap(function, place.partition_index, place.num_partitions)
    )
    try:
        yield True
    finally:
        install(before)


# --- what an entry looks at before each call -------------------------------------------------------


def autocast_probe() -> Callable[[], object]:
    """A function that is true while autocast is on for any device type."""
    probe = getattr(torch._C, "_is_any_autocast_enabled", None)
    if probe is not None:
        return probe
    return lambda: any(map(torch.is_autocast_enabled, ("cpu", "cuda")))


def dispatch_mode_probe() -> Callable[[], object]:
    """A function that is true while a ``TorchDispatchMode`` is active."""
    probe = getattr(torch._C, "_len_torch_dispatch_stack", None)
    if probe is not None:
        return probe
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    return _get_current_dispatch_mode


def function_mode_probe() -> Callable[[], object]:
    """A function that is true while a ``TorchFunctionMode`` is active."""
    probe = getattr(torch._C, "_len_torch_function_stack", None)
    if probe is not None:
        return probe
    from torch.overrides import _get_current_function_mode

    return _get_current_function_mode


def transform_probe() -> Callable[[], object]:
    """A function that is true inside a transform of ``torch.func`` (vmap, grad and the like)."""
    functorch = getattr(torch._C, "_functorch", None)
    probe = getattr(functorch, "peek_interpreter_stack", None)
    if probe is not None:
        return probe
    from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

    return retrieve_all_functorch_interpreters


def only_default_device_modes() -> bool:
    """True if every active ``TorchFunctionMode`` is the one behind ``torch.set_default_device``."""
    try:
        from torch.overrides import _get_current_function_mode_stack
        from torch.utils._device import DeviceContext
    except ImportError:
        return False
    return all(isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())


def registered_kernels() -> Sized | None:
    """A collection that grows when ``torch.library`` registers a kernel; None where there is none to look at."""
    found = getattr(torch.library, "_impls", None)
    return found if isinstance(found, Sized) else None


def kernel_table(name: str) -> str:
    """The dispatcher's table of operator ``ns::op.overload``, as text to compare; "" where torch can't show it."""
    dump = getattr(torch._C, "_dispatch_dump", None)
    return "" if dump is None else str(dump(name))


def custom_op_kernel(name: str, device_type: str) -> Callable[..., object] | None:
    """What a ``torch.library.custom_op`` runs for plain tensors on ``device_type``, with the wrappers around it; None for any other operator.

    It is looked up afresh, so that two results tell whether the kernel was replaced or disabled meanwhile.
    """
    definitions = getattr(getattr(torch, "_library", None), "custom_ops", None)
    definition = getattr(definitions, "OPDEFS", {}).get(name)
    kernels = getattr(definition, "_backend_fns", None)
    if not kernels or not hasattr(definition, "_disabled_kernel"):
        return None
    key = device_type if device_type in kernels else None
    if key in definition._disabled_kernel:
        return definition._init_fn
    return kernels.get(key)


def custom_op_function(kernel: Callable[..., object]) -> Callable[..., object]:
    """The user's function inside a result of `custom_op_kernel`."""
    return inspect.unwrap(_innermost(kernel))


def _innermost(function: Callable[..., object]) -> Callable[..., object]:
    """The function that ``CustomOpDef.register_kernel`` wrapped: its wrappers close over it as ``fn``."""
    seen = 0
    while isinstance(function, types.FunctionType) and seen < 4:
        inner = _cells(function).get("fn")
        if not callable(inner):
            return function
        if function.__module__ not in ("torch._library.custom_ops", *_DISABLED_BY):
            return function
        function, seen = inner, seen + 1
    return function


_DISABLED_BY = ("torch._compile", "torch._dynamo.eval_frame", "torch._dynamo.decorators")


def _cells(function: Callable[..., object]) -> dict[str, object]:
    """What a Python function closes over, by name; cells that are still empty are left out."""
    found: dict[str, object] = {}
    closure = getattr(function, "__closure__", None) or ()
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    for name, cell in zip(names, closure, strict=True):
        with contextlib.suppress(ValueError):
            found[name] = cell.cell_contents
    return found


def metadata_guard(tensors: Sequence[torch.Tensor]) -> Callable[[], bool]:
    """A function that is true while each tensor has the type, dtype, device, sizes and strides that it has now.

    It reads no data. Where torch has no fast check (the one behind Dynamo's guards), the tensors are compared one by one.
    """
    expected = [_metadata(tensor) for tensor in tensors]

    def compare() -> bool:
        return all(_metadata(t) == e for t, e in zip(tensors, expected, strict=True))

    fast: dict[bool, Callable[..., bool]] = {}

    def check() -> bool:
        # The fast check includes thread-local state that inference mode changes, hence one for each.
        known = fast.get(torch.is_inference_mode_enabled())
        if known is not None and known(*tensors):
            return True
        if not compare():
            return False
        made = _tensor_guards(tensors)
        if made is not None:
            fast[torch.is_inference_mode_enabled()] = made
        return True

    return check


def _metadata(tensor: torch.Tensor) -> tuple[object, ...]:
    return (type(tensor), tensor.dtype, tensor.device, tensor.shape, tensor.stride())


def _tensor_guards(tensors: Sequence[torch.Tensor]) -> Callable[..., bool] | None:
    guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
    make = getattr(guards, "TensorGuards", None)
    if make is None:
        return None
    try:
        check = make(
            *tensors,
            dynamic_dims_sizes=[list(tensor.shape) for tensor in tensors],
            dynamic_dims_strides=[list(tensor.stride()) for tensor in tensors],
        ).check
        return check if check(*tensors) else None
    except (TypeError, RuntimeError):
        return None


# --- symbols ---------------------------------------------------------------------------------------


def size_text(size: object, names: Mapping[str, str]) -> int | str:
    """A size as a number, or as Python text over ``names`` (torch's symbol → the name to write)."""
    if not isinstance(size, torch.SymInt):
        return int(size)  # type: ignore[call-overload,no-any-return]
    expr = size.node.expr
    return int(expr) if expr.is_number else _expr_text(expr, names)


def _expr_text(expr: object, names: Mapping[str, str]) -> str:
    from torch.utils._sympy.printers import PythonPrinter

    text = PythonPrinter().doprint(expr)
    return re.sub(r"\b[A-Za-z_]\w*\b", lambda word: names.get(word.group(), word.group()), text)


def symbols_of(size: object) -> tuple[str, ...]:
    """The symbols in a size, as torch calls them."""
    if not isinstance(size, torch.SymInt):
        return ()
    return tuple(sorted(str(symbol) for symbol in size.node.expr.free_symbols))


def symbol_range(size: object) -> tuple[int | None, int | None]:
    """The smallest and largest value that the trace allows a plain symbol; None where there is no bound."""
    if not isinstance(size, torch.SymInt):
        return None, None
    ranges = getattr(size.node.shape_env, "var_to_range", {})
    found = ranges.get(size.node.expr)
    if found is None:
        return None, None
    return tuple(int(b) if _is_finite(b) else None for b in (found.lower, found.upper))  # type: ignore[return-value]


def _is_finite(bound: object) -> bool:
    # Bounds that stand for "unlimited" are infinities, or integers close to the largest that torch can hold.
    if not getattr(bound, "is_Integer", isinstance(bound, int)):
        return False
    return abs(int(bound)) < 2**62  # type: ignore[call-overload,no-any-return]


def guards_on(sizes: Sequence[object], names: Mapping[str, str]) -> tuple[str, ...]:
    """Conditions over the symbols of ``sizes`` that the trace relied on beyond their ranges, as Python text."""
    env = next((s.node.shape_env for s in sizes if isinstance(s, torch.SymInt)), None)
    texts: dict[str, None] = {}
    for guard in getattr(env, "guards", ()):
        expr = env.simplify(guard.expr)
        known = all(str(symbol) in names for symbol in expr.free_symbols)
        if not known or not expr.free_symbols or _follows_from_ranges(env, expr):
            continue
        texts[_expr_text(expr, names)] = None
    return tuple(texts)


def _follows_from_ranges(env: object, expr: object) -> bool:
    from torch.utils._sympy.value_ranges import bound_sympy

    try:
        bounds = bound_sympy(expr, env.var_to_range)  # type: ignore[attr-defined]
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        return False
    return bool(bounds.is_singleton() and bounds.lower)


def is_traced_contiguous(fake: torch.Tensor) -> bool:
    """Whether the strides that the trace recorded are those of a contiguous tensor for every size."""
    expected: object = 1
    for size, stride in reversed(list(zip(fake.shape, fake.stride(), strict=True))):
        if _expr(stride) != expected and _expr(size) != 1:
            return False
        expected = expected * _expr(size)  # type: ignore[operator]
    return True


def _expr(size: object) -> object:
    return size.node.expr if isinstance(size, torch.SymInt) else size


# --- containers ------------------------------------------------------------------------------------


def spec_parts(spec: _pytree.TreeSpec) -> tuple[type | None, object, list[_pytree.TreeSpec]]:
    """Type, context and children of a structure; the type of a leaf is None."""
    if spec.is_leaf():
        return None, None, []
    children = spec.children() if hasattr(spec, "children") else spec.children_specs
    return spec.type, spec.context, list(children)


def rebuilder(kind: type) -> Callable[[list[object], object], object] | None:
    """What puts a container of a registered type together from its children and its context."""
    node = getattr(_pytree, "SUPPORTED_NODES", {}).get(kind)
    return getattr(node, "unflatten_fn", None)


# --- inside a compiled artifact --------------------------------------------------------------------


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
        cells = _cells(current) if isinstance(current, types.FunctionType) else {}
        name = getattr(current, "__qualname__", type(current).__name__)
        if type(cells.get("self")).__name__ == "DisableContext" and "fn" in cells:
            return cells["fn"]
        if name == "aot_module_simplified.<locals>.forward":
            if cells.get("params_buffers_flat"):
                raise _MustStay("it holds parameters of its own")
            return cells["compiled_fn"]
        if name == "CacheCompiledArtifact._load_impl.<locals>.<lambda>":
            return cells["compiled_fn"]
        if name == "_create_runtime_wrapper.<locals>.runtime_wrapper":
            return self._of_runtime_wrapper(cells)
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


def artifact_to_bytes(artifact: object) -> bytes | None:
    """A standalone Inductor artifact as bytes, kernels included; None if torch could not keep it."""
    save = getattr(artifact, "save", None)
    if save is None or not getattr(artifact, "is_saveable", lambda: True)():
        return None
    with tempfile.TemporaryDirectory(prefix="piecework-") as folder:
        path = os.path.join(folder, "artifact")
        save(path=path, format="binary")
        with open(path, "rb") as file:
            return file.read()


def artifact_from_bytes(data: bytes) -> Callable[..., object]:
    """What `artifact_to_bytes` kept, ready to call; raises whatever torch raises for bytes that it can't use."""
    from torch._inductor import CompiledArtifact

    with tempfile.TemporaryDirectory(prefix="piecework-") as folder:
        path = os.path.join(folder, "artifact")
        with open(path, "wb") as file:
            file.write(data)
        return CompiledArtifact.load(path=path, format="binary")


def shape_facts(values: Iterable[object]) -> str:
    """What the trace knows of the symbols in ``values`` (sizes and fake tensors): guards and ranges, as text.

    A compiler may rely on them, so compiled code is kept under them.
    """
    for value in values:
        sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
        for size in sizes:
            if isinstance(size, torch.SymInt):
                return _facts_of(size.node.shape_env)
    return ""


def _facts_of(shape_env: object) -> str:
    guards = sorted(str(guard.expr) for guard in getattr(shape_env, "guards", ()))
    asserts = sorted(
        f"{symbol}: {[str(each.expr) for each in found]}"
        for symbol, found in getattr(shape_env, "deferred_runtime_asserts", {}).items()
    )
    ranges = sorted(
        f"{symbol}: {found}" for symbol, found in getattr(shape_env, "var_to_range", {}).items()
    )
    return "\n".join((*guards, *asserts, *ranges))


def autocast_state() -> tuple[tuple[str, torch.dtype], ...]:
    """The device types for which autocast is on, with their dtypes."""
    kinds = [kind for kind in ("cpu", "cuda", "xpu") if kind != "xpu" or hasattr(torch, "xpu")]
    return tuple((k, torch.get_autocast_dtype(k)) for k in kinds if torch.is_autocast_enabled(k))


def with_children(children: list[object], spec: _pytree.TreeSpec) -> object:
    """A container of ``spec``'s kind around ``children`` that are put together already."""
    leaf = _pytree.tree_structure(0)
    shallow = _pytree.TreeSpec(spec.type, spec.context, [leaf for _ in children])
    return _pytree.tree_unflatten(children, shallow)


def has_standalone_compile() -> bool:
    """Whether this torch compiles a graph into an artifact of its own."""
    return hasattr(torch._inductor, "standalone_compile")


@contextlib.contextmanager
def watching_operators(
    note: Callable[[torch._ops.OpOverload, tuple[object, ...], dict[str, object]], None],
    values: Iterable[object],
) -> Iterator[None]:
    """While active, ``note(operator, args, kwargs)`` is called before each operator runs; nothing is computed on data.

    Args:
        note: told about every operator that reaches the dispatcher.
        values: fake values whose mode the block runs under; symbols that it makes are forgotten.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            note(func, args, kwargs or {})
            return func(*args, **(kwargs or {}))

    modes = (getattr(value, "fake_mode", None) for value in values)
    fake_mode = next((mode for mode in modes if mode is not None), None)
    forget = getattr(
        getattr(fake_mode, "shape_env", None),
        "ignore_fresh_unbacked_symbols",
        contextlib.nullcontext,
    )
    with forget(), fake_mode or contextlib.nullcontext(), torch.no_grad(), Watch():
        yield


def size_oblivious_tracing() -> contextlib.AbstractContextManager[object] | None:
    """A context in which backed dimensions are traced without fixing sizes 0 and 1; None where torch has none."""
    try:
        from torch.fx.experimental import _config
    except ImportError:
        return None
    if not hasattr(_config, "backed_size_oblivious"):
        return None
    return _config.patch(backed_size_oblivious=True)


def size_value(size: object, values: Mapping[str, int]) -> int | None:
    """The number that ``size`` has when its symbols have ``values``; None if a symbol is missing."""
    if not isinstance(size, torch.SymInt):
        return size if isinstance(size, int) else None
    found = _evaluated(size.node.expr, values)
    return None if found is None else int(found)


def recorded_guards(
    sizes: Sequence[object],
) -> list[tuple[str, str, Callable[[Mapping[str, int]], bool | None]]]:
    """The shape guards and ranges that the trace behind ``sizes`` recorded: text, origin, and a test.

    A test takes values by symbol and returns None if one that it needs is missing (a size that the data decides).
    """
    env = next((size.node.shape_env for size in sizes if isinstance(size, torch.SymInt)), None)
    found: list[tuple[str, str, Callable[[Mapping[str, int]], bool | None]]] = []
    for guard in getattr(env, "guards", ()):
        expr = env.replace(guard.expr)
        found.append((str(expr), str(getattr(guard, "sloc", "")), _test_of(expr)))
    for symbol, bounds in getattr(env, "var_to_range", {}).items():
        for text, bound, low in (("<=", bounds.lower, True), (">=", bounds.upper, False)):
            if getattr(bound, "is_Integer", False):
                test = _bound_test(str(symbol), int(bound), low)
                found.append((f"{bound} {text} {symbol}", "", test))
    return found


def _bound_test(symbol: str, bound: int, low: bool) -> Callable[[Mapping[str, int]], bool | None]:
    def test(values: Mapping[str, int]) -> bool | None:
        value = values.get(symbol)
        return None if value is None else (bound <= value if low else value <= bound)

    return test


def _test_of(expr: object) -> Callable[[Mapping[str, int]], bool | None]:
    def test(values: Mapping[str, int]) -> bool | None:
        found = _evaluated(expr, values)
        return None if found is None else bool(found)

    return test


def _evaluated(expr: object, values: Mapping[str, int]) -> object:
    """A symbolic expression or relation with numbers for its symbols; None if one is missing."""
    symbols = getattr(expr, "free_symbols", ())
    if any(str(each) not in values for each in symbols):
        return None
    return expr.subs({each: values[str(each)] for each in symbols})  # type: ignore[attr-defined]


def asks_for_restart(error: BaseException) -> bool:
    """Whether ``error`` is how a compiler asks Dynamo to trace again (with a number fixed, for one)."""
    restart = getattr(torch._dynamo.exc, "RestartAnalysis", None)
    return restart is not None and isinstance(error, restart)


def symbol_hints(size: object) -> dict[str, int]:
    """The symbols in a size and what the example inputs had for them; 2 where nothing is known."""
    if not isinstance(size, torch.SymInt):
        return {}
    env = size.node.shape_env
    known = getattr(env, "backed_var_to_val", None) or getattr(env, "var_to_val", None) or {}
    return {str(s): int(known.get(s, 2)) for s in size.node.expr.free_symbols}


def marked_dims(tensor: torch.Tensor) -> tuple[int, ...]:
    """Dimensions of an example input that are marked dynamic, unbacked or static."""
    names = ("_dynamo_dynamic_indices", "_dynamo_unbacked_indices", "_dynamo_static_indices")
    return tuple(sorted({dim for name in names for dim in getattr(tensor, name, None) or ()}))


def unmark_dynamic(tensor: torch.Tensor) -> tuple[int, ...]:
    """Take ``mark_dynamic``'s marks off ``tensor``; returns the dimensions that had one."""
    found = tuple(sorted(getattr(tensor, "_dynamo_dynamic_indices", None) or ()))
    for name in ("_dynamo_dynamic_indices", "_dynamo_dynamic_range"):
        vars(tensor).pop(name, None)
    return found


def dynamo_backend(name: str) -> Callable[..., object]:
    """The Dynamo backend that torch calls ``name``."""
    from torch._dynamo.backends.registry import lookup_backend

    return lookup_backend(name)


def is_opaque_to_inductor(op: torch._ops.OpOverload) -> bool:
    """Whether Inductor calls ``op`` as it is: it is no operator of torch, and nothing decomposes, lowers or orders it."""
    if op.namespace in ("aten", "prims", "prim", "inductor", "quantized", "_c10d_functional"):
        return False
    implicit = torch._C.DispatchKey.CompositeImplicitAutograd
    if op.has_kernel_for_dispatch_key(implicit):
        return False
    try:
        from torch._inductor.decomposition import decompositions
        from torch._inductor.lowering import fallbacks, lowerings
    except ImportError:
        return False
    if op in decompositions or (op in lowerings and op not in fallbacks):
        return False
    try:
        from torch._higher_order_ops.effects import has_effects
    except ImportError:
        return False
    needs = inspect.signature(has_effects).parameters
    return not (has_effects(op) if len(needs) == 1 else has_effects(op, (), {}))


def trace_artifact(name: str, text: Callable[[], str]) -> None:
    """Add a named text to torch's structured trace (``TORCH_TRACE``); nothing where there is no such trace."""
    trace = getattr(torch._logging, "trace_structured", None)
    if trace is not None:
        trace(
            "artifact",
            metadata_fn=lambda: {"name": name, "encoding": "string"},
            payload_fn=text,
        )


def timed_scope(name: str) -> contextlib.AbstractContextManager[object]:
    """A scope in Dynamo's compile-time events; an empty one where there are none."""
    try:
        from torch._dynamo.utils import dynamo_timed
    except ImportError:
        return contextlib.nullcontext()
    return dynamo_timed(name)


#: Matrix products that refuse operands of different dtypes or devices, by the names that generated code calls them.
_STRICT_KERNEL = re.compile(r"extern_kernels\.(?:mm|addmm|bmm|baddbmm)\(")


def strict_inputs(artifact: object, inputs: int) -> frozenset[int]:
    """Which inputs of an Inductor artifact are read by nothing but ATen's matrix products.

    Generated kernels read memory without looking at a dtype; ATen's products raise for an operand of another dtype or
    device. Told from the generated text; an input that is used in any way that is not known here is left out.
    """
    current = getattr(artifact, "_compiled_fn", None)
    for _ in range(12):
        if current is None or type(current).__name__ == "CompiledFxGraph":
            break
        cells = _cells(current) if isinstance(current, types.FunctionType) else vars(current)
        current = next(
            (cells[n] for n in ("fn", "compiled_fn", "_inner_compiled_fn") if n in cells), None
        )
    return _strict_inputs(str(getattr(current, "source_code", "")), inputs)


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
        harmless = line.startswith(("assert_size_stride(", "del ", "#")) or line.endswith("= args")
        if not harmless and not _STRICT_KERNEL.match(line):
            loose |= set(re.findall(r"\w+", line))
    return frozenset(i for i, name in enumerate(names) if name not in loose)


def data_dependent(error: BaseException) -> bool:
    """Whether ``error`` comes from a decision on a size that the trace was not told."""
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    seen: set[int] = set()
    stack: list[BaseException | None] = [error]
    while stack:
        each = stack.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, GuardOnDataDependentSymNode) or "data-dependent" in str(each):
            return True
        stack += [each.__cause__, each.__context__, getattr(each, "inner_exception", None)]
    return False


def inductor_sources(compiled: object) -> tuple[str, ...]:
    """The Python that Inductor generated for a compiled piece, found inside it; empty where this torch keeps none."""
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
    return tuple(dict.fromkeys(text for text in map(_source_of_graph, graphs) if text))


def _held_by(value: object) -> list[object]:
    """What a wrapper of a compiled function holds, where another wrapper or the function may be."""
    if isinstance(value, types.FunctionType):
        return list(_cells(value).values())
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


def without_compile_threads() -> contextlib.AbstractContextManager[object]:
    """Inductor without threads and processes of its own, for a forked process: it inherits pools whose threads are gone."""
    import torch._inductor.config as inductor_config

    return inductor_config.patch(compile_threads=1)
