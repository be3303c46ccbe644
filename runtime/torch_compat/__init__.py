"""The private corners of torch that piecework uses: in, plain values; out, what torch makes of them.

It never patches torch; each function probes for what it needs and falls back to a public way.
"""

# ruff: noqa: F401  (what is imported here is what the package hands on)

from __future__ import annotations

from piecework.runtime.torch_compat.code.artifact import (
    direct_entry,
    inductor_sources,
    realign_inputs,
    strict_inputs,
)
from piecework.runtime.torch_compat.code.inductor import (
    artifact_from_bytes,
    artifact_to_bytes,
    as_inductor_graph_pass,
    auto_functionalized_ops,
    compile_fx,
    has_inductor_option,
    has_standalone_compile,
    inductor_key,
    is_opaque_to_inductor,
    partition_wrapper,
    standalone_compile,
    without_compile_threads,
)
from piecework.runtime.torch_compat.code.kernels import (
    custom_op_function,
    custom_op_kernel,
    kernel_table,
    registered_kernels,
)
from piecework.runtime.torch_compat.code.saved_code import (
    Generated,
    generated_code,
    graphs_from_bytes,
    graphs_to_bytes,
    kernel_file,
    load_kernel,
)
from piecework.runtime.torch_compat.code.vector_isa import (
    find_vector_isa,
    vector_bits,
    vector_isa_unknown,
)
from piecework.runtime.torch_compat.dictionaries import (
    dict_guard,
    dict_versions,
    guards_ready,
    import_guards,
)
from piecework.runtime.torch_compat.distributed import (
    collective_of,
    own_rank,
    ranks_of_group,
    shared_store,
)
from piecework.runtime.torch_compat.modes import (
    autocast_off,
    autocast_probe,
    autocast_state,
    dispatch_mode_probe,
    function_mode_probe,
    only_default_device_modes,
    transform_probe,
)
from piecework.runtime.torch_compat.operators import (
    is_torch_operator,
    kinds_of_kernels,
    python_kernels,
)
from piecework.runtime.torch_compat.switches import (
    FORCE_EAGER,
    compiler_off,
    in_default_stance,
    may_recompile,
    stance_holder,
    stance_name,
)
from piecework.runtime.torch_compat.tensors import (
    MemoryLike,
    abandon_capture,
    clear_cublas_workspaces,
    copy_each,
    fake_mode_of,
    is_lazy,
    is_same_view,
    memory_apart,
    memory_span,
    metadata_guard,
    negative_view,
    no_new_guards,
    storage_at,
    storage_id,
    storage_users,
    traits_of,
)
from piecework.runtime.torch_compat.trace.dynamo import (
    asks_for_restart,
    backend_failure,
    data_dependent,
    dynamo_backend,
    dynamo_failure,
    keep_out_of_traces,
    mark_unbacked,
    marked_dims,
    marks_of,
    one_trace_at_a_time,
    original_of,
    own_symbol_per_dimension,
    placeholder_source,
    quiet_trial,
    recurrent_layers_traced,
    size_oblivious_tracing,
    timed_scope,
    trace_artifact,
    traced_inputs,
    tracing_context,
    unmark_dynamic,
    watching_operators,
)
from piecework.runtime.torch_compat.trace.guards import (
    GUARDS_CLASS_VALUES,
    Guarded,
    GuardReader,
    Place,
    class_dict,
    failing_guard,
    guard_settings,
    identity_guard,
    kept_guards,
    leave_guards_untimed,
    ordered_places,
    trace_names,
    traced_code,
)
from piecework.runtime.torch_compat.trace.refake import (
    Refaked,
    free_symbols,
    size_expr,
)
from piecework.runtime.torch_compat.trace.shape_record import (
    hints_text,
    known_sizes,
    learn_again,
    learned_since,
    shape_env_of,
    sizes_text,
)
from piecework.runtime.torch_compat.trace.shapes import (
    asserted_symbols,
    example_of,
    guards_on,
    is_traced_contiguous,
    known_non_negative,
    number_at,
    raw_symbols,
    recorded_guards,
    size_value,
    statically_equal,
    symbol_hints,
    symbol_of,
    symbol_range,
    symbols_in,
    symbols_of,
    traced_item,
    traced_size,
    unbacked_symbols,
    with_symbol,
)
from piecework.runtime.torch_compat.trace.side_effects import (
    Write,
    no_replay,
    tensors_given_attributes,
    writes_of_trace,
)
from piecework.runtime.torch_compat.trace.watch import (
    OperatorWatch,
    places_guard,
    storage_mark,
    written_operands,
)
from piecework.runtime.torch_compat.trees import (
    flatten_tree,
    rebuilder,
    spec_parts,
    unflatten_tree,
    with_children,
)
