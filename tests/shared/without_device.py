"""Compiles our own kernels, and Inductor's for the pieces of a small Llama, for an NVIDIA GPU that isn't there.

    python tests/shared/without_device.py 90

It replaces torch's view of the device, so it runs in a process of its own. Nothing is launched.
"""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

import torch
import triton
from small_llms import build
from torch._dynamo import device_interface
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

import piecework
from piecework.codegen.graph.origin import value_of
from piecework.integrations.transformers import stitch, stitched_module
from piecework.runtime.graphs.stage import kernel as staging

TOKENS = 8


def compiled(function, signature: dict, constants: dict, target: GPUTarget):
    """One kernel of ours, as Triton's launcher would have it compiled."""
    signature = {name: signature.get(name, "constexpr") for name in function.arg_names}
    values = {(function.arg_names.index(name),): value for name, value in constants.items()}
    return triton.compile(ASTSource(function, signature, values), target=target)


def our_kernels(target: GPUTarget) -> dict[str, object]:
    engine = importlib.import_module("piecework.examples.engine")
    found = {}
    for words in (("*i64",), ("*i64", "*i32", "*i16", "*u8")):
        count = len(words)
        signature = {f"s{slot}": words[min(slot, count - 1)] for slot in range(staging.SLOTS)}
        signature |= {"targets": words, "count": "i32", "padded": "i32"}
        constants = {"OUTER": (1,) * count, "INNER": (4,) * count, "PADS": (0,) * count}
        name = f"staging of {count} inputs"
        found[name] = compiled(staging._stage, signature, {**constants, "BLOCK": 1024}, target)
    places = dict.fromkeys(("positions", "owners", "tables"), "*i64")
    for dtype in ("bf16", "fp32"):
        rows = dict.fromkeys(("query", "keys", "values", "out"), f"*{dtype}")
        sizes = {"GROUP": 2, "KV_HEADS": 2, "DIM": 48, "LANES": 64, "BLOCK": 16}
        signature = {**rows, **places, "width": "i32"}
        found[f"attention in {dtype}"] = compiled(engine.attend, signature, sizes, target)
    return found


def llama_pieces() -> list[tuple[str, torch.fx.GraphModule]]:
    """Pieces of a decoder by name, traced on the CPU: one of each structure."""
    model = stitch(build("llama"), config=piecework.CompilationConfig(backend="eager"))
    with torch.no_grad():
        model(torch.arange(1, 1 + TOKENS)[None])
    made = stitched_module(model)
    names = made.traces[0].program.source.submod_names
    pieces = {name: getattr(made.split_gm, name) for name in names}
    return list({each.code: (name, each) for name, each in pieces.items()}.values())


def pretend(capability: int) -> None:
    """Let torch and Triton see one device, on which nothing can be launched."""
    limits = {"max_shared_mem": 232448, "multiprocessor_count": 108, "warpSize": 32}
    seen = SimpleNamespace(
        name="pretended", gcnArchName="none", major=capability // 10, minor=capability % 10,
        multi_processor_count=108, regs_per_multiprocessor=65536, warp_size=32,
        max_threads_per_multi_processor=2048, max_threads_per_block=1024, total_memory=1 << 36,
        L2_cache_size=1 << 25, shared_memory_per_block_optin=232448,
        shared_memory_per_multiprocessor=233472, clock_rate=1,
    )  # fmt: skip
    torch.version.cuda = "13.0"
    told = {
        **{"is_available": True, "device_count": 1, "current_device": 0, "is_bf16_supported": True},
        **dict.fromkeys(("get_device_properties", "_get_device_properties"), seen),
        **dict.fromkeys(("_exchange_device", "_maybe_exchange_device", "get_raw_stream"), 0),
        **dict.fromkeys(("_lazy_init", "set_rng_state", "set_device", "synchronize"), None),
        **{"is_initialized": True, "is_triton_capable": True, "raise_if_triton_unavailable": None},
        **{"get_device_capability": (seen.major, seen.minor), "get_rng_state": torch.zeros(1)},
        "get_compute_capability": capability,
    }
    answers = {
        name: staticmethod(lambda *args, value=value, **kwargs: value)
        for name, value in told.items()
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer.__func__)
    torch._C._cuda_getCurrentRawStream = lambda index: 0
    torch.utils._triton.has_triton.cache_clear()
    kind = device_interface.CudaInterface
    answers["Worker"] = type("Worker", (kind.Worker,), dict(answers))
    interface = type("Interface", (kind,), answers)
    for name in ("cuda", "cuda:0"):
        device_interface.register_interface_for_device(name, interface)
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", capability, 32),
            get_active_torch_device=lambda: torch.device("cuda", 0),
            get_current_device=lambda: 0,
            get_current_stream=lambda device=None: 0,
            utils=SimpleNamespace(get_device_properties=lambda device: limits),
        )
    )


def inductors_kernels(pieces) -> dict[str, object]:
    """Each Triton kernel of Inductor's for these pieces in bfloat16, by the piece and its number."""
    from torch._inductor import compile_fx, config
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.runtime import triton_helpers, triton_heuristics

    found: dict[str, object] = {}
    where = ""

    def keep(tuner) -> None:
        for result in tuner.compile_results:
            found[f"{where} {len(found)}"] = result.kernel
        tuner.launchers = []

    triton_heuristics.CachingAutotuner._make_launchers = keep
    # Else what is kept is torch's own launcher of the kernel, without its text.
    static = triton_heuristics.StaticTritonCompileResult
    static.can_statically_launch = staticmethod(lambda *args, **kwargs: None)
    triton_helpers.set_driver_to_gpu = lambda: None
    with config.patch(compile_threads=1, force_disable_caches=True):
        for name, piece in pieces:
            where = name
            # To torch's operators on the CPU first: indexing in Python asks for the device itself.
            values = [value_of(node) for node in piece.graph.find_nodes(op="placeholder")]
            with FakeTensorMode() as mode:
                graph = make_fx(piece, select_decomp_table())(*(like(v, "cpu") for v in values))
                given = [like(value, "cuda") for value in values]
                FakeTensorProp(move(graph), mode).propagate_dont_convert_inputs(*given)
            compile_fx.compile_fx_inner(graph, given)
    return found


def like(value: object, device: str) -> object:
    """The like of a traced input, for a batch of so many tokens."""
    if not isinstance(value, torch.Tensor):
        return TOKENS
    size = [each if isinstance(each, int) else TOKENS for each in value.shape]
    dtype = torch.bfloat16 if value.is_floating_point() else value.dtype
    return torch.empty(size, dtype=dtype, device=device)


def move(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The graph, making what it makes on the device, and returning a tuple."""
    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
    output = graph.graph.output_node()
    if not isinstance(output.args[0], (tuple, list)):
        output.args = ((output.args[0],),)
    graph.recompile()
    return graph


def main(capability: int) -> None:
    found = our_kernels(GPUTarget("cuda", capability, 32))
    pieces = llama_pieces()
    pretend(capability)
    found |= inductors_kernels(pieces)
    for name, kernel in found.items():
        assert f".target sm_{capability}" in kernel.asm["ptx"] and kernel.asm["cubin"], name
        print(f"{name}: {len(kernel.asm['cubin'])} bytes for sm_{capability}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
