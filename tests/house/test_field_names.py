"""The field's names and their leading parameters, whatever room they live in: who knows vLLM's compilation package finds them."""

from __future__ import annotations

import inspect
from importlib import import_module
from types import ModuleType

import pytest
from processes import python

from piecework import codegen, runtime
from piecework.faces import homes
from piecework.runtime import graphs

# Parameters may be keyword-only and typed more tightly; further ones may follow.
SIGNATURES = {
    "CUDAPiecewiseBackend": "graph config graph_pool piecewise_compile_index total_piecewise_compiles sym_shape_indices "
    "compiled_graph_for_general_shape backend",
    "ConcreteSizeEntry": "runtime_shape need_to_compile use_cudagraph",
    "CUDAGraphWrapper": "runnable config runtime_mode cudagraph_options",
    "CUDAGraphOptions": "debug_log_enable gc_disable weak_ref_output",
    "PiecewiseBackend": "graph config piecewise_compile_index total_piecewise_compiles sym_shape_indices backend returns_tuple "
    "compiled_runnables submod_name",
    "PiecewiseCompileInterpreter": "module compile_submod_names config backend",
    "PieceworkBackend": "config prefix is_encoder",
    "CompilerManager": "config",
    "Range": "start end",
    "create_concrete_args": "graph size",
    "get_fake_args_from_graph": "graph",
    "make_compiler": "config",
    "make_copy_and_call": "sym_tensor_indices input_buffers callable_fn",
    "set_model_tag": "tag is_encoder",
    "set_on_compilation_complete": "callback",
    "wrap_with_cudagraph_if_needed": "piecewise_backend config is_first_graph is_last_graph",
}
METHODS = {
    "PiecewiseBackend": "compile_all_ranges load_all_ranges to_bytes",
    "PieceworkBackend": "configure_post_pass collect_standalone_compile_artifacts",
    "StandaloneCompiledArtifacts": "insert get get_loaded size_bytes num_artifacts num_entries submodule_names load_all",
    "ConcreteSizeEntry": "cudagraph output input_addresses num_finished_warmup",
    "CompilationConfig": "adjust_cudagraph_sizes_for_spec_decode bs_to_padded_graph_size compute_hash custom_op_log_check "
    "get_compile_ranges init_backend is_attention_compiled_piecewise is_custom_op_enabled post_init_cudagraph_sizes "
    "set_splitting_ops_for_v1 set_splitting_ops_for_attn_fusion splitting_ops_contain_attention",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_leading_parameters(name: str) -> None:
    found = [each for each in inspect.signature(getattr(runtime, name)).parameters]
    wanted = SIGNATURES[name].split()
    assert found[: len(wanted)] == wanted


@pytest.mark.parametrize(
    ("name", "method"),
    [(name, each) for name, listed in METHODS.items() for each in listed.split()],
)
def test_methods(name: str, method: str) -> None:
    assert hasattr(getattr(runtime, name), method)


@pytest.mark.parametrize("face", [runtime, graphs], ids=["runtime", "graphs"])
def test_a_face_hands_on_what_it_lists(face: ModuleType) -> None:
    """Also after every module is imported: a module of the same name would hide it."""
    found = homes(str(face.__file__))
    assert sorted(found) == sorted(face.__all__) and "coverage" in found
    for name, home in found.items():
        value = getattr(face, name)
        assert value is getattr(import_module(home), name) is not None
        if isinstance(value, type) or callable(value):
            assert value.__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'CudaGraph'"):
        face.CudaGraph  # noqa: B018


def test_a_mode_costs_no_graphs() -> None:
    program = (
        "import sys; from piecework.runtime.batch.mode import CUDAGraphMode; "
        "print([m for m in sys.modules if m.startswith('piecework.runtime.')])"
    )
    said = python("-c", program).stdout
    assert "piecework.runtime.graphs.device.cuda" not in said
    assert "piecework.runtime.batch.mode" in said


def test_codegen_has_its_own() -> None:
    for name in ("generate_execution_code", "compile_execution_fn", "split_graph", "SplitItem"):
        assert callable(getattr(codegen, name))
