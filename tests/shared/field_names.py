"""The field's names that users call, with their leading parameters, and the methods of some."""

from __future__ import annotations

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
