"""Compiling by Inductor: its artifact, its bytes, and what the installed Inductor can do."""

import contextlib
import copy
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

Options = dict[str, object]


def standalone_compile(
    graph: torch.fx.GraphModule, inputs: list[object], *, dynamic_shapes: str, options: Options
) -> Callable[..., object]:
    """Compile a flat graph into an artifact by ``torch._inductor.standalone_compile``."""
    from torch._inductor import standalone_compile as compile_one

    patches = {"config_patches": options}
    return compile_one(graph, inputs, dynamic_shapes=dynamic_shapes, options=patches)


def compile_fx(
    graph: torch.fx.GraphModule, inputs: list[object], *, own_shapes: bool, options: Options
) -> Callable[..., object]:
    """Compile a flat graph through ``torch._inductor.compile_fx``, on a copy of it."""
    from torch._inductor.compile_fx import compile_fx as compile_one

    graph = copy.deepcopy(graph)
    if not own_shapes:
        return compile_one(graph, inputs, config_patches=options)
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    context = torch._guards.TracingContext(FakeTensorMode(shape_env=ShapeEnv()))
    with torch._guards.tracing(context):
        return compile_one(graph, inputs, config_patches=options, ignore_shape_env=True)


def has_inductor_option(name: str) -> bool:
    """Whether the installed Inductor has an option such as ``max_autotune`` or ``cpp.threads``."""
    import torch._inductor.config as inductor_config

    return hasattr(inductor_config, name)


def inductor_key() -> str:
    """A digest of the installed Inductor's sources."""
    from torch._inductor.codecache import torch_key

    return torch_key().hex()


def as_inductor_graph_pass(
    run: Callable[[torch.fx.Graph], object], identity: Callable[[], str | None]
) -> Callable[[torch.fx.Graph], None]:
    """``run`` as a pass that Inductor's code cache knows by ``identity``; None: not at all."""
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class GraphPass(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            run(graph)

        def uuid(self) -> str | None:
            return identity()

    return GraphPass()


def is_opaque_to_inductor(op: torch._ops.OpOverload) -> bool:
    """Whether Inductor calls ``op`` as it is: nothing decomposes, lowers or orders it."""
    if op.namespace in ("aten", "prims", "prim", "inductor", "quantized", "_c10d_functional"):
        return False
    implicit = torch._C.DispatchKey.CompositeImplicitAutograd
    if op.has_kernel_for_dispatch_key(implicit):
        return False
    from torch._higher_order_ops.effects import has_effects
    from torch._inductor.decomposition import decompositions
    from torch._inductor.lowering import fallbacks, lowerings
    from torch._library.simple_registry import singleton
    from torch._subclasses.functional_tensor import FunctionalTensorMode

    if op in decompositions or (op in lowerings and op not in fallbacks):
        return False
    # Tracing replaces it by its body, as it does with ``torch.library.triton_op``.
    rules = singleton.find(op._schema.name).torch_dispatch_rules
    return rules.find(FunctionalTensorMode) is None and not has_effects(op)


@contextlib.contextmanager
def partition_wrapper(
    wrap: Callable[[Callable[..., object], int, int], Callable[..., object]],
) -> Iterator[None]:
    """While active, Inductor gives each partition of code to ``wrap(function, index, count)``."""
    from torch._inductor import utils

    before = utils._unstable_customized_partition_wrapper.wrapper
    utils.set_customized_partition_wrappers(
        lambda function, place: wrap(function, place.partition_index, place.num_partitions)
    )
    try:
        yield
    finally:
        utils.set_customized_partition_wrappers(before)


def without_compile_threads() -> contextlib.AbstractContextManager[object]:
    """Inductor without pools, for a forked process: it inherits some whose threads are gone."""
    import torch._inductor.config as inductor_config

    return inductor_config.patch(compile_threads=1)


def artifact_to_bytes(artifact: object) -> bytes | None:
    """An Inductor artifact with its kernels as bytes; None if torch could not keep it."""
    save = getattr(artifact, "save", None)
    if save is None or not getattr(artifact, "is_saveable", lambda: True)():
        return None
    with tempfile.TemporaryDirectory(prefix="piecework-") as folder:
        path = os.path.join(folder, "artifact")
        save(path=path, format="binary")
        with open(path, "rb") as file:
            return file.read()


def artifact_from_bytes(data: bytes) -> Callable[..., object]:
    """What `artifact_to_bytes` kept, ready to call; raises whatever torch raises."""
    from torch._inductor import CompiledArtifact

    with tempfile.TemporaryDirectory(prefix="piecework-") as folder:
        path = os.path.join(folder, "artifact")
        with open(path, "wb") as file:
            file.write(data)
        return CompiledArtifact.load(path=path, format="binary")


def vector_isa_is_known() -> bool:
    """Whether Inductor knows the vector instructions; else it builds a test for each."""
    from torch._inductor import config, cpu_vec_isa

    told = config.cpp.vec_isa_ok is not None or config.cpp.simdlen is not None
    told = told or os.getenv("ATEN_CPU_CAPABILITY") is not None
    return told or bool(cpu_vec_isa.valid_vec_isa_list.cache_info().currsize)


def vector_isa_test() -> Callable[[], bool]:
    """Whether a program with the CPU's strongest instructions builds; in any thread."""
    from torch._inductor import codecache  # noqa: F401 - the test imports it

    named = _vector_isas()
    return lambda: bool(named) and bool(named[0])


def take_vector_isa() -> None:
    """Have Inductor take what the CPU names, of each width the strongest, which has the others."""
    from torch._inductor import config, cpu_vec_isa

    named = _vector_isas()
    first = [
        a for i, a in enumerate(named) if a.bit_width() not in {b.bit_width() for b in named[:i]}
    ]
    with (
        config.patch({"cpp.vec_isa_ok": True}),
        mock.patch.object(cpu_vec_isa, "supported_vec_isa_list", first),
    ):
        cpu_vec_isa.valid_vec_isa_list()


def _vector_isas() -> list[Any]:
    """The sets of instructions that Inductor knows and the CPU names, the strongest first."""
    from torch._inductor import cpu_vec_isa

    known, sets = set(cpu_vec_isa.x86_isa_checker()), cpu_vec_isa.supported_vec_isa_list
    return [each for each in sets if known.issuperset(str(each).split())]
