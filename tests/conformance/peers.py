"""Which peers' test has each behaviour. In: the names of this folder's tests. Out: docs/conformance.md, which `python tests/conformance/peers.py` writes.

Only names of peers' tests are here. What they check was read there, and every test in this folder is written anew.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "conformance.md"

DISPATCH = "vLLM test_cudagraph_dispatch.py"
MANAGER = "vLLM test_cudagraph_manager.py"
MODE = "vLLM test_cudagraph_mode.py"
ADDRESS = "vLLM test_cudagraph_input_address_check.py"
BREAKABLE = "vLLM test_breakable_cudagraph.py"
CONFIG = "vLLM test_config.py"
RANGES = "vLLM test_compile_ranges.py"
PARTITION = "vLLM test_graph_partition.py"
CODEGEN = "vLLM test_codegen.py"
NOOP = "vLLM test_noop_elimination.py"
SPLITS = "vLLM test_split_coalescing.py"
MANAGED = "vLLM test_pass_manager.py"
SIMPLE = "vLLM fullgraph/test_simple.py"
MULTIPLE = "vLLM fullgraph/test_multiple_graphs.py"
DECORATOR = "vLLM test_decorator.py"
WRAPPER = "vLLM test_wrapper.py"
DYNAMIC = "vLLM test_dynamic_shapes_compilation.py"
AOT = "vLLM test_aot_compile.py"
S_SPLIT = "SGLang test_backend_split_graph.py"
S_PASS = "SGLang test_inductor_pass.py"
S_MANAGER = "SGLang test_pass_manager.py"
S_PHASE = "SGLang test_compile_phase.py"
S_COUNTER = "SGLang test_compilation_counter.py"
S_CONFIG = "SGLang test_compilation_config.py"
S_BACKEND = "SGLang test_cuda_piecewise_backend.py"
S_BREAKABLE = "SGLang test_breakable_cuda_graph.py"
T_CLEANUP = "TensorRT-LLM test_piecewise_cuda_graph_cleanup.py"
T_RUNNER = "TensorRT-LLM test_piecewise_runner.py"
T_UTILS = "TensorRT-LLM test_piecewise_utils.py"
T_SIZES = "TensorRT-LLM test_cuda_graph_batch_sizes.py"
T_PHASE = "TensorRT-LLM test_phase_selective_forward.py"
T_COPY = "TensorRT-LLM test_remove_copy_pass.py"

# The peers' tests of each of our tests: (file, test) pairs.
BEHAVIOURS: dict[str, tuple[tuple[str, str], ...]] = {
    # dispatch
    "test_each_mode_has_its_keys": ((DISPATCH, "test_dispatcher"),),
    "test_a_mixed_batch_of_a_captured_size": ((DISPATCH, "test_dispatcher"),),
    "test_a_decode_batch_of_a_captured_size": ((DISPATCH, "test_dispatcher"),),
    "test_a_batch_without_a_key_runs_uncaptured_as_itself": ((DISPATCH, "test_dispatcher"),),
    "test_a_batch_that_no_full_graph_can_serve": ((DISPATCH, "test_dispatcher"),),
    "test_adapters_multiply_the_keys": ((DISPATCH, "test_dispatcher"),),
    "test_what_is_captured_is_grouped_by_mode_largest_first": (
        (DISPATCH, "test_get_capture_descs"),
    ),
    "test_pieces_are_captured_only_where_pieces_are_compiled": (
        (MODE, "test_cudagraph_compilation_combo"),
        (DISPATCH, "test_dispatcher"),
    ),
    "test_a_decode_batch_is_padded_up_to_a_full_graph": (
        (MANAGER, "test_uniform_decode_pads_up_to_full_graph"),
    ),
    "test_a_decode_batch_that_fits_exactly_is_not_padded": (
        (MANAGER, "test_uniform_decode_exact_match_is_not_over_padded"),
    ),
    "test_a_mixed_batch_never_runs_in_a_decode_graph": (
        (MANAGER, "test_mixed_batch_never_selects_a_uniform_decode_graph"),
    ),
    "test_a_mixed_batch_of_a_size_that_only_decode_batches_have_gets_a_graph": (
        (MANAGER, "test_mixed_batch_at_decode_only_token_count_still_gets_a_graph"),
    ),
    "test_a_decode_batch_beyond_every_size_runs_uncaptured": (
        (MANAGER, "test_uniform_decode_beyond_capture_ladder_falls_back"),
    ),
    "test_every_decode_graph_stays_reachable_where_drafts_share_a_token_count": (
        (MANAGER, "test_dynamic_spec_decode_shared_token_count_stays_reachable"),
    ),
    "test_sizes_that_the_width_divides_are_used_as_they_are": (
        (MANAGER, "test_divisor_query_len_dispatch_is_unchanged"),
    ),
    "test_a_graph_that_was_not_captured_gives_way_to_the_next": (
        (MANAGER, "test_memory_profile_dispatch_only_replays_captured_full_graphs"),
    ),
    "test_without_any_captured_graph_a_batch_runs_uncaptured_as_itself": (
        (MANAGER, "test_memory_profile_dispatch_without_captured_candidate_runs_eager"),
    ),
    "test_a_graph_for_queries_up_to_a_bound_serves_shorter_ones_and_no_longer_one": (
        (MANAGER, "test_varlen_decode_graph_takes_bounded_decode_batches_only"),
    ),
    "test_another_mode_starts_the_keys_over": ((MODE, "test_backend_and_cudagraph_mode_combo"),),
    "test_no_adapter_graph_serves_a_batch_with_adapters_where_none_was_captured": (
        (DISPATCH, "test_dispatcher"),
    ),
    # wrapper and forward context
    "test_it_captures_once_and_replays_after": (
        (DISPATCH, "TestCUDAGraphWrapper::test_capture_and_replay"),
        (T_RUNNER, "test_warmup_capture_replay_same_address"),
    ),
    "test_another_mode_passes_it_by": (
        (DISPATCH, "TestCUDAGraphWrapper::test_bypass_on_mode_mismatch"),
        (DISPATCH, "TestCUDAGraphWrapper::test_bypass_on_mode_none"),
        (BREAKABLE, "test_wrapper_falls_through_on_runtime_mode_mismatch"),
    ),
    "test_capture_replay_and_bypass_follow_the_dispatcher": (
        (DISPATCH, "TestCudagraphIntegration::test_capture_replay_bypass_logic"),
    ),
    "test_an_unseen_shape_is_not_captured_once_the_phase_is_over": (
        (DISPATCH, "TestCudagraphIntegration::test_capture_replay_bypass_logic"),
    ),
    "test_a_piecewise_wrapper_in_a_full_one": (
        (DISPATCH, "TestCudagraphIntegration::test_nested_wrappers"),
    ),
    "test_an_input_that_stays_where_it_was_replays": (
        (ADDRESS, "test_stable_input_address_replays_ok"),
    ),
    "test_an_input_that_moved_is_refused": (
        (ADDRESS, "test_unstable_input_address_raises_on_replay"),
        (T_RUNNER, "test_input_addresses_recorded_during_capture"),
    ),
    "test_an_input_that_moved_is_copied_by_default": (
        (ADDRESS, "test_unstable_input_address_raises_on_replay"),
    ),
    "test_entries_appear_with_a_capture_and_not_before": (
        (T_RUNNER, "test_entries_initially_empty"),
        (T_RUNNER, "test_entries_created_on_demand"),
    ),
    "test_a_call_without_a_descriptor_or_mode_runs_as_it_is": (
        (T_RUNNER, "test_eager_fallback_for_none_num_tokens"),
    ),
    "test_the_output_of_a_replay_lies_where_the_capture_put_it": (
        (T_RUNNER, "test_static_output_is_weak_ref"),
    ),
    "test_a_failed_capture_leaves_no_graph_and_can_be_tried_again": (
        (T_CLEANUP, "test_capture_failure_resets_graph_before_entry_commit"),
        (BREAKABLE, "test_exception_in_body_clears_active"),
    ),
    "test_clearing_forgets_every_graph": ((T_CLEANUP, "test_clear_continues_after_reset_failure"),),
    "test_a_graph_that_can_not_be_reset_keeps_no_other_one": (
        (T_CLEANUP, "test_clear_continues_after_reset_failure"),
    ),
    "test_what_is_wrapped_can_be_reached_through_nested_wrappers": (
        (BREAKABLE, "test_unwrap_recurses_through_nested_wrappers"),
    ),
    "test_an_unknown_mode_is_an_error": ((T_RUNNER, "test_set_current_phase_invalid_raises"),),
    "test_a_context_is_seen_inside_and_gone_after": (
        (S_PHASE, "test_flag_is_true_inside_context"),
        (S_PHASE, "test_flag_is_false_after_context_exits"),
        (BREAKABLE, "test_current_is_none_when_inactive"),
        (BREAKABLE, "test_thread_local_active_during_context"),
    ),
    "test_a_context_is_gone_after_an_exception": (
        (S_PHASE, "test_flag_restored_to_false_after_exception_inside_context"),
        (BREAKABLE, "test_exception_in_body_clears_active"),
    ),
    "test_the_inner_of_two_contexts_is_seen_and_the_outer_after_it": (
        (S_PHASE, "test_nested_inner_stream_overrides_outer_inside_inner"),
        (S_PHASE, "test_after_all_nested_contexts_exit_stream_is_none"),
    ),
    "test_another_thread_sees_no_capture_of_this_one": (
        (BREAKABLE, "test_active_state_isolated_across_threads"),
    ),
    "test_a_capture_inside_a_capture_is_an_error": ((BREAKABLE, "test_nested_capture_raises"),),
    # configuration, sizes, ranges
    "test_rules_for_custom_ops_that_are_well_formed": ((CONFIG, "test_custom_op"),),
    "test_rules_for_custom_ops_that_are_malformed_or_contradict": (
        (CONFIG, "test_custom_op"),
        (CONFIG, "test_reject_contradictory_custom_ops"),
    ),
    "test_a_copy_means_the_same": ((CONFIG, "test_copy_pass"),),
    "test_a_list_that_was_given_is_not_the_configurations": (
        (S_CONFIG, "test_split_ops_is_independent_copy_from_global"),
        (S_CONFIG, "test_add_split_op_does_not_affect_global_split_ops"),
    ),
    "test_pieces_are_cut_at_what_is_registered": (
        (CONFIG, "test_splitting_ops_dynamic"),
        (S_CONFIG, "test_split_ops_populated_from_global_split_ops"),
    ),
    "test_ops_that_were_named_stay_with_inductors_own_partition": (
        (CONFIG, "test_splitting_ops_dynamic"),
        (CONFIG, "test_moe_splitting_ops_deepep_ht_inductor_partition"),
    ),
    "test_fusing_attention_leaves_no_piece_and_no_piecewise_graph": (
        (CONFIG, "test_splitting_ops_dynamic"),
    ),
    "test_fusing_attention_and_cutting_at_it_contradict": ((CONFIG, "test_splitting_ops_dynamic"),),
    "test_fusing_attention_goes_with_inductors_own_partition": (
        (CONFIG, "test_splitting_ops_dynamic"),
    ),
    "test_settling_the_ops_twice_adds_nothing": (
        (CONFIG, "test_eager_tp_all_reduce_splitting_op"),
    ),
    "test_an_operator_is_named_with_or_without_its_overload": ((CONFIG, "test_should_split"),),
    "test_the_largest_capture_size": ((CONFIG, "test_cudagraph_sizes_post_init"),),
    "test_sizes_that_contradict_are_refused": ((CONFIG, "test_cudagraph_sizes_post_init"),),
    "test_nothing_to_capture_is_fine_where_nothing_is_captured": (
        (CONFIG, "test_cudagraph_sizes_post_init"),
    ),
    "test_a_cut_sequence_keeps_the_sizes_that_the_ranks_share": (
        (CONFIG, "test_cudagraph_capture_sizes_respect_sequence_parallelism"),
        (CONFIG, "test_cudagraph_sizes_post_init"),
    ),
    "test_the_most_requests_are_captured_off_the_steps_too": (
        (CONFIG, "test_default_cudagraph_capture_sizes_cover_off_stride_max_num_seqs"),
    ),
    "test_wide_decode_batches_do_not_raise_the_ceiling": (
        (CONFIG, "test_default_cudagraph_capture_size_respects_platform_ceiling"),
        (CONFIG, "test_default_cudagraph_capture_size_caps_tokens"),
        (CONFIG, "test_real_vllm_config_caps_widest_ngram_decode_batch"),
    ),
    "test_the_number_of_default_sizes_stays_small": (
        (CONFIG, "test_default_cudagraph_capture_sizes_keep_all_sizes_bounded"),
    ),
    "test_without_drafts_the_largest_is_twice_the_requests_up_to_the_ceiling": (
        (CONFIG, "test_default_cudagraph_capture_size_unchanged_without_speculation"),
    ),
    "test_one_draft_token_does_not_raise_the_ceiling": (
        (CONFIG, "test_single_speculative_token_does_not_raise_default_capture_size"),
    ),
    "test_every_width_of_drafts_has_sizes": (
        (CONFIG, "test_default_cudagraph_capture_sizes_cover_every_dynamic_decode_width"),
    ),
    "test_the_token_budget_bounds_the_sizes": (
        (CONFIG, "test_default_cudagraph_capture_size_still_clamped_by_token_budget"),
    ),
    "test_a_compile_size_that_would_be_padded_is_refused": (
        (CONFIG, "test_compile_sizes_padding_validation"),
    ),
    "test_compile_sizes_may_name_the_capture_sizes": (
        (CONFIG, "test_compile_sizes_padding_validation"),
    ),
    "test_where_nothing_is_captured_any_compile_size_is_reached": (
        (CONFIG, "test_compile_sizes_padding_validation"),
    ),
    "test_endpoints_cut_the_sizes_into_ranges": (
        (RANGES, "test_compile_config_get_compile_ranges"),
    ),
    "test_a_single_size_wins_over_the_range_around_it": ((RANGES, "test_compile_ranges"),),
    "test_mode_none_sees_no_graph": (
        (CONFIG, "test_no_compilation"),
        (CONFIG, "test_enforce_eager"),
    ),
    "test_each_range_is_compiled_once": ((RANGES, "test_compile_ranges"),),
    # cutting and writing out
    "test_indexing_stays_with_what_returned_the_sequence": (
        (PARTITION, "test_getitem_moved_to_producer_subgraph"),
    ),
    "test_no_sequence_crosses_a_cut_whoever_reads_it": (
        (PARTITION, "test_no_tuple_inputs_with_multiple_consumers"),
    ),
    "test_two_neighbours_share_a_submodule": (
        (S_SPLIT, "test_two_adjacent_split_ops_share_one_eager_submodule"),
        (PARTITION, "test_consecutive_ops_in_split"),
    ),
    "test_any_number_of_neighbours_share_a_submodule": (
        (S_SPLIT, "test_three_adjacent_split_ops_share_one_eager_submodule"),
    ),
    "test_what_stands_between_two_keeps_them_apart": (
        (S_SPLIT, "test_non_split_fx_node_breaks_split_op_adjacency"),
    ),
    "test_a_leading_operator_leaves_what_follows_apart": (
        (S_SPLIT, "test_leading_split_op_keeps_following_compiled_submodule_separate"),
    ),
    "test_a_trailing_operator_leaves_what_precedes_apart": (
        (S_SPLIT, "test_trailing_split_op_keeps_previous_compiled_submodule_separate"),
    ),
    "test_operators_and_pieces_alternate": (
        (T_UTILS, "test_no_dynamic_ops_returns_original"),
        (T_UTILS, "test_single_dynamic_op_produces_3_submodules"),
        (T_UTILS, "test_two_dynamic_ops_produces_5_submodules"),
        (T_UTILS, "test_dynamic_and_static_indices_are_disjoint"),
        (T_UTILS, "test_split_submodules_are_named_correctly"),
    ),
    "test_sizes_cross_a_cut_and_never_a_whole_shape": (
        (PARTITION, "test_sym_size_moved_across_split_boundary"),
        (PARTITION, "test_sym_size_with_torch_compile_and_mark_dynamic"),
    ),
    "test_a_device_is_never_written_as_its_repr": (
        (CODEGEN, "test_non_primitive_kwargs_lifted_to_consts"),
    ),
    "test_the_same_dtype_is_one_value_and_others_are_others": (
        (CODEGEN, "test_dtype_singleton_deduped"),
        (CODEGEN, "test_distinct_dtypes_get_distinct_slots"),
    ),
    "test_constants_keep_their_order_over_traces": (
        (CODEGEN, "test_consts_ordering_deterministic"),
    ),
    "test_plain_arguments_are_written_in_place": ((CODEGEN, "test_primitive_args_inlined"),),
    "test_constants_are_shared_by_the_submodules": (
        (CODEGEN, "test_consts_shared_across_split_submods"),
    ),
    "test_a_compiled_submodule_is_called_by_its_index": (
        (CODEGEN, "test_non_graphmodule_submod_uses_indexed_callable"),
    ),
    "test_values_are_deleted_after_their_last_use": (
        (CODEGEN, "test_del_emitted_for_intermediate_values"),
    ),
    "test_a_module_inside_a_submodule_that_is_written_out_is_called_by_its_index": (
        (CODEGEN, "test_with_submod_false_rejects_call_module"),
    ),
    "test_constants_inside_containers": ((CODEGEN, "test_node_ref_recurses_through_containers"),),
    "test_code_without_constants_still_runs": ((CODEGEN, "test_legacy_code_without_consts"),),
    # passes
    "test_views_and_slices_of_everything_go_and_the_rest_stays": ((NOOP, "test_noop_elimination"),),
    "test_a_slice_scatter_over_everything_goes": ((NOOP, "test_noop_elimination"),),
    "test_an_end_of_minus_one_drops_the_last_row_and_stays": (
        (NOOP, "test_non_noop_slice_preserved"),
    ),
    "test_equal_splits_become_one": ((SPLITS, "test_split_coalescing"),),
    "test_a_pass_sees_the_range_and_the_outer_one_after_it": (
        (S_PASS, "test_get_pass_context_returns_correct_shape_inside"),
        (S_PASS, "test_nested_inner_context_overrides_shape"),
    ),
    "test_the_range_is_gone_after_an_exception": (
        (S_PASS, "test_context_restored_after_exception_inside"),
    ),
    "test_hashes_of_sources_are_stable_and_differ": (
        (S_PASS, "test_hash_source_string_is_deterministic"),
        (S_PASS, "test_hash_source_different_functions_differ"),
        (S_PASS, "test_hash_source_returns_hex_string"),
    ),
    "test_hashes_of_settings_have_no_order": ((S_PASS, "test_hash_dict_key_order_independent"),),
    "test_a_function_as_a_pass": (
        (S_PASS, "test_call_invokes_the_wrapped_callable"),
        (S_PASS, "test_explicit_uuid_overrides_auto_hash"),
        (S_PASS, "test_two_callable_passes_with_different_fns_have_different_uuids"),
    ),
    "test_what_is_no_pass_is_refused": (
        (MANAGED, "test_bad_callable"),
        (S_MANAGER, "test_add_with_non_inductor_pass_raises_assertion_error"),
    ),
    "test_the_managers_identity_follows_its_passes_and_the_configuration": (
        (MANAGED, "test_pass_manager_uuid"),
        (S_MANAGER, "test_uuid_is_stable"),
        (S_MANAGER, "test_uuid_changes_when_pass_added"),
    ),
    "test_a_pass_runs_for_the_ranges_that_it_is_for": (
        (S_MANAGER, "test_applicable_pass_is_invoked"),
        (S_MANAGER, "test_inapplicable_pass_is_skipped"),
        (S_MANAGER, "test_shape_filtered_pass_runs_on_matching_shape"),
    ),
    "test_passes_run_in_the_order_that_they_were_given": (
        (S_MANAGER, "test_passes_invoked_in_registration_order"),
    ),
    "test_the_passes_that_are_always_there_run_whatever_is_added": (
        (S_MANAGER, "test_fix_functionalization_always_runs"),
    ),
    # captured models
    "test_without_an_operator_outside_there_is_one_graph": (
        (BREAKABLE, "test_capture_with_no_eager_break_records_one_graph"),
        (S_BREAKABLE, "test_no_break_capture_replay"),
    ),
    "test_graphs_and_live_operators_alternate": (
        (BREAKABLE, "test_add_eager_creates_alternating_graph_eager_graph"),
        (BREAKABLE, "test_decorator_breaks_when_invoked_inside_capture"),
        (S_BREAKABLE, "test_single_break"),
        (S_BREAKABLE, "test_multiple_breaks"),
    ),
    "test_each_size_has_its_graphs": (
        (SIMPLE, "test_simple_piecewise_compile"),
        (CONFIG, "test_use_cudagraphs"),
        (T_SIZES, "test_captured_graph_max_batch_size_consistency"),
    ),
    "test_a_replay_computes_what_the_model_does_for_every_input": (
        (BREAKABLE, "test_capture_replay_matches_eager_simple"),
        (S_BREAKABLE, "test_replay_updates_output"),
    ),
    "test_live_operators_run_in_order_at_every_replay": (
        (BREAKABLE, "test_replay_invokes_eager_segments_in_order"),
    ),
    "test_an_operator_runs_once_a_call_also_outside_of_graphs": (
        (BREAKABLE, "test_decorator_passthrough_outside_capture"),
    ),
    "test_an_operator_is_a_plain_function_outside_of_a_model": (
        (BREAKABLE, "test_decorator_passthrough_outside_capture"),
        (S_BREAKABLE, "test_eager_on_graph_outside_capture"),
        (S_CONFIG, "test_decorated_function_is_still_callable"),
    ),
    "test_an_operator_inside_an_operator_runs_inside_it": (
        (BREAKABLE, "test_nested_decorated_op_runs_inline"),
    ),
    "test_a_new_tensor_from_a_live_operator_reaches_the_next_graph": (
        (S_BREAKABLE, "test_eager_output_is_held_strongly_for_replay_bridge"),
        (T_RUNNER, "test_dynamic_out_buf_allocated_during_capture"),
    ),
    "test_a_batch_between_two_sizes_is_padded_and_cut": (
        (DISPATCH, "test_dispatcher"),
        (T_SIZES, "test_forward_uses_cuda_graph_for_valid_batch_sizes"),
    ),
    "test_a_batch_beyond_every_size_runs_uncaptured": (
        (T_SIZES, "test_forward_fallback_for_oversized_batch"),
    ),
    "test_each_captured_size_is_served_from_its_graph": (
        (T_SIZES, "test_forward_uses_cuda_graph_for_valid_batch_sizes"),
    ),
    "test_a_call_may_ask_to_run_uncaptured_and_only_that_call_does": (
        (T_PHASE, "test_phase_selective_forward_bypass_is_restored"),
        (T_PHASE, "test_phase_selective_forward_uses_compiled_by_default"),
    ),
    "test_a_result_is_not_overwritten_by_the_next_call": (
        (S_BREAKABLE, "test_replay_updates_output"),
    ),
    "test_an_exception_in_a_live_operator_leaves_the_graphs_usable": (
        (BREAKABLE, "test_exception_in_body_clears_active"),
    ),
    "test_two_threads_call_a_captured_model_and_get_their_own_results": (
        (BREAKABLE, "test_active_state_isolated_across_threads"),
    ),
    "test_releasing_the_graphs_leaves_a_model_that_runs": (
        (T_CLEANUP, "test_clear_continues_after_reset_failure"),
    ),
    "test_capturing_again_with_other_sizes_starts_over": (
        (T_SIZES, "test_various_batch_size_configurations"),
    ),
    "test_equal_outputs_of_a_dictionary_keep_their_structure": (
        (S_BREAKABLE, "TestCopyOutput::test_dict_copy"),
        (S_BREAKABLE, "TestCopyOutput::test_non_tensor_fallback"),
    ),
    # models
    "test_a_model_with_two_operators_outside_is_five_submodules": (
        (SIMPLE, "test_simple_piecewise_compile"),
    ),
    "test_a_subclass_may_leave_compilation_and_its_subclass_take_it_up": (
        (DECORATOR, "test_ignore_torch_compile_decorator"),
    ),
    "test_a_class_may_compile_under_a_condition": (
        (DECORATOR, "test_conditional_compile_enable_if"),
    ),
    "test_models_of_one_program_are_compiled_apart": (
        (MULTIPLE, "test_multi_graph_piecewise_compile"),
        (MULTIPLE, "test_ngram_gpu_uses_separate_compile_cache"),
    ),
    "test_results_with_and_without_compilation_are_equal": (
        (MULTIPLE, "test_multi_graph_piecewise_compile"),
    ),
    "test_a_branch_on_a_size_is_never_taken_for_a_size_of_the_other_side": (
        (DYNAMIC, "test_model_specialization_with_evaluate_guards"),
    ),
    "test_one_and_zero_are_served_where_the_model_serves_them": (
        (DYNAMIC, "test_model_specialization_with_evaluate_guards"),
    ),
    "test_each_kind_of_dynamic_shape_serves_every_batch": (
        (DYNAMIC, "test_dynamic_shapes_compilation"),
    ),
    "test_a_shape_that_the_trace_excludes_is_an_error_and_not_a_wrong_result": (
        (DYNAMIC, "test_model_specialization_with_evaluate_guards"),
    ),
    "test_whole_graph_modes_hand_the_graph_to_one_backend": ((CONFIG, "test_stock_torch_compile"),),
    "test_counters_start_at_zero_and_a_snapshot_is_a_copy": (
        (S_COUNTER, "test_all_counters_start_at_zero"),
        (S_COUNTER, "test_clone_is_independent"),
    ),
    "test_what_is_expected_is_the_change_within_the_block": (
        (S_COUNTER, "test_passes_on_exact_delta"),
        (S_COUNTER, "test_measures_in_block_delta_not_absolute"),
        (S_COUNTER, "test_no_kwargs_is_noop"),
    ),
    "test_another_change_is_an_error_that_names_the_counter": (
        (S_COUNTER, "test_raises_on_too_small_delta"),
        (S_COUNTER, "test_assertion_message_names_the_field"),
    ),
    # artifacts
    "test_it_starts_empty": ((AOT, "TestStandaloneCompiledArtifacts::test_init"),),
    "test_bytes_are_kept_under_their_hash_and_found_by_piece_and_shape": (
        (AOT, "TestStandaloneCompiledArtifacts::test_insert_new_artifact"),
        (AOT, "TestStandaloneCompiledArtifacts::test_get_artifact"),
    ),
    "test_equal_bytes_are_kept_once_whoever_has_them": (
        (AOT, "TestStandaloneCompiledArtifacts::test_insert_duplicate_artifact"),
        (AOT, "TestStandaloneCompiledArtifactsIntegration::test_deduplication"),
    ),
    "test_sizes_add_up": (
        (AOT, "TestStandaloneCompiledArtifacts::test_size_bytes"),
        (AOT, "TestStandaloneCompiledArtifacts::test_num_artifacts_and_entries"),
    ),
    "test_what_was_never_kept_is_an_error": (
        (AOT, "TestStandaloneCompiledArtifacts::test_get_nonexistent_artifact"),
    ),
    "test_loading_runs_once_for_each_artifact": (
        (AOT, "TestStandaloneCompiledArtifacts::test_load_all_success"),
        (AOT, "TestStandaloneCompiledArtifacts::test_load_all_already_loaded"),
        (AOT, "TestStandaloneCompiledArtifacts::test_get_loaded_artifact"),
    ),
    "test_a_pickle_has_the_bytes_and_not_what_was_loaded": (
        (AOT, "TestStandaloneCompiledArtifacts::test_getstate_setstate"),
        (AOT, "TestStandaloneCompiledArtifacts::test_pickle_roundtrip"),
        (AOT, "TestStandaloneCompiledArtifactsIntegration::test_add_pickle_unpickle"),
    ),
    "test_a_saved_model_loads_without_a_trace_or_a_compiler": (
        (AOT, "test_save_and_load"),
        (AOT, "test_cache_load_returns_tuple_consistency_tuple_output"),
    ),
    "test_loading_what_is_not_there_is_an_error": ((AOT, "test_force_aot_load"),),
    "test_what_the_trace_assumed_of_sizes_is_loaded_too": ((AOT, "test_shape_env"),),
    "test_a_loaded_model_never_compiles_behind_ones_back": ((AOT, "test_no_dynamo_cache_entry"),),
    "test_an_artifact_of_a_compile_call_is_made_once_and_loaded_after": (
        (AOT, "test_gpt2_cache_hit"),
    ),
    "test_a_slice_by_a_size_survives": ((AOT, "test_save_and_load_slice"),),
}

# Behaviours that a larger test elsewhere has already, or one that needs a compiler: (what, the peer's, our test).
ELSEWHERE: tuple[tuple[str, tuple[str, str], str], ...] = (
    (
        "a single size is compiled without symbols, a range with them",
        (RANGES, "test_compile_sizes_produce_static_shapes"),
        "tests/pieces/test_piece_ranges.py::test_a_single_size_is_concrete_and_other_symbols_stay",
    ),
    (
        "what was compiled for a range is not compiled again by the next model",
        (RANGES, "test_inductor_cache_compile_ranges"),
        "tests/pieces/test_piece_cache.py::test_one_more_batch_size_compiles_that_size_only",
    ),
    (
        "with the cache switched off nothing is written or read",
        (AOT, "test_disable_compile_cache_skips_aot_save"),
        "tests/pieces/test_piece_cache.py::test_the_cache_can_be_switched_off",
    ),
    (
        "partitions that Inductor cut are captured and run live operators between them",
        (SIMPLE, "test_simple_inductor_graph_partition"),
        "tests/compilers/test_partition.py::test_each_partition_is_captured_and_the_ops_between_run_live",
    ),
    (
        "an operator that writes two arguments and returns one is written in place again",
        ("vLLM test_functionalization.py", "test_fix_functionalization"),
        "tests/passes/test_passes.py::test_two_written_arguments_and_a_result",
    ),
    (
        "each of several buffers is written in place, an optional one that is absent stays None",
        (T_COPY, "test_remove_copy_for_mutates_args_restores_optional_none"),
        "tests/passes/test_passes.py::test_each_buffer_of_a_row_of_calls_is_written_in_place",
    ),
    (
        "what is compiled is logged as structured artifacts",
        ("vLLM test_structured_logging.py", "test_vllm_structured_logging_artifacts"),
        "tests/observe/test_observe_trace.py",
    ),
    (
        "ranks that would capture different things stop",
        ("vLLM test_pp_cudagraph_consensus.py", "the file"),
        "tests/pieces/test_ranks.py::test_ranks_that_would_do_different_things_stop_with_an_error",
    ),
)

# What is otherwise here, by design: (what peers do, the peer's test, why it is otherwise).
OTHERWISE: tuple[tuple[str, tuple[str, str], str], ...] = (
    (
        "the capturing call returns zeros",
        (DISPATCH, "TestCUDAGraphWrapper::test_capture_and_replay"),
        "the call that captures replays once, so that its result is right",
    ),
    (
        "keys of full graphs leave the number of requests open",
        (DISPATCH, "test_dispatcher"),
        "a full graph holds attention, which is captured for a number of requests; the key says for how many",
    ),
    (
        "a dispatcher without keys captures nothing",
        (DISPATCH, "test_get_capture_descs_empty_when_not_initialized"),
        "a dispatcher has its keys from the start; `initialize_cudagraph_keys` starts over",
    ),
    (
        "full graphs without compilation",
        (MODE, "test_cudagraph_compilation_combo"),
        "mode NONE traces nothing, so there is nothing to capture; `backend='eager'` captures without compiling",
    ),
    (
        "a batch of a longer query than a bounded graph's runs in pieces",
        (MANAGER, "test_varlen_decode_graph_takes_bounded_decode_batches_only"),
        "an axis is part of the keys of pieces too, since splitting operators may read it; such a batch runs uncaptured and says why",
    ),
    (
        "a wrapper without a mode takes every mode",
        (BREAKABLE, "test_wrapper_default_matches_any_non_none_mode"),
        "a wrapper has one mode, so that nesting decides what is captured",
    ),
    (
        "a call outside of the capture phase runs uncaptured with a warning",
        (S_BACKEND, "test_runtime_recompile_without_capture_stream_falls_back_to_eager"),
        "it is an error that names the shape: a serving engine should not run uncaptured unnoticed",
    ),
    (
        "a maximum off the steps is rounded down",
        (CONFIG, "test_cudagraph_sizes_post_init"),
        "the maximum that was asked for is a size itself: 257 captures 257",
    ),
    (
        "sizes above the largest batch are dropped",
        (CONFIG, "test_cudagraph_sizes_post_init"),
        "a size that no batch reaches is an error that names it",
    ),
    (
        "sequence parallelism falls back to full graphs",
        (CONFIG, "test_sequence_parallelism_requires_full_graph_compilation"),
        "sizes are filtered; which passes need the whole graph is the integration's to say",
    ),
    (
        "a larger ceiling on Blackwell",
        (CONFIG, "test_blackwell_cudagraph_default"),
        "defaults do not depend on the device; `max_cudagraph_capture_size` raises it",
    ),
    (
        "a size that the model branched on is an error of a guard, or the wrong branch",
        (WRAPPER, "test_torch_compile_wrapper"),
        "another trace is made for sizes on the other side, and none is used where its assumptions don't hold",
    ),
    (
        "sizes are read again in each submodule",
        (PARTITION, "test_sym_size_moved_across_split_boundary"),
        "sizes cross a cut as integers; what can't cross, a whole shape, is taken apart",
    ),
    (
        "a placeholder between two operators keeps them apart",
        (S_SPLIT, "test_placeholder_resets_split_op_adjacency"),
        "a placeholder runs nothing, so the two share a submodule",
    ),
    (
        "passes outside of a pass context are an error",
        (S_MANAGER, "test_call_without_pass_context_raises"),
        "outside of a context a pass compiles for every batch size",
    ),
    (
        "a plain function is no pass",
        (S_MANAGER, "test_add_with_plain_function_raises"),
        "a function is a pass whose identity is its code",
    ),
    (
        "results of submodules are indexed one by one",
        (CODEGEN, "test_getitem_in_stitching_graph"),
        "they are unpacked in one statement, which is faster and reads better",
    ),
    (
        "partition wrappers are set around each call of a loaded model",
        (AOT, "test_partition_wrapper_applied_on_aot_load"),
        "a piece keeps the partitions that it was compiled with, so that nothing global is set at a call",
    ),
    (
        "a break anywhere in Python code while a stream captures",
        (S_BREAKABLE, "test_break_graph_inserts_segment"),
        "graphs break at splitting operators alone, which the source shows",
    ),
    (
        "side streams inside a captured region",
        (BREAKABLE, "test_eager_attention_inside_multistream_overlap"),
        "what a model queues on other streams is joined by `capture(join=…)`",
    ),
    (
        "graphs of a communicator's own memory pool",
        (MANAGER, "test_full_capture_sets_graph_pool_id_before_cuda_graph"),
        "the engine that owns the communicator gives the pool, by `memory_of`",
    ),
)


def own_tests() -> Iterator[tuple[str, str, str]]:
    """The tests of this folder: (what the file is about, the file, the test)."""
    for path in sorted(HERE.glob("test_peers_*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        about = str(ast.get_docstring(tree)).split(" as peers")[0]
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                yield about, path.name, node.name


def page() -> str:
    """docs/conformance.md as it should be."""
    rows: dict[str, list[str]] = {}
    for about, file, name in own_tests():
        theirs = "; ".join(f"{peer} `{test}`" for peer, test in BEHAVIOURS[name])
        what = name.removeprefix("test_").replace("_", " ")
        rows.setdefault(f"{about}\n\n`tests/conformance/{file}`", []).append(
            f"| {what} | {theirs} |"
        )
    parts = [
        "# Peers' behaviour\n",
        "What the tests of vLLM, SGLang and TensorRT-LLM hold about piecewise compilation and static graphs, by the name of the behaviour. "
        "Every test here is written anew;\nonly names were taken over. They run in `make test`, on the eager compiler and on the CPU's "
        "stand-ins for graphs. `python tests/conformance/peers.py` writes this page.\n",
        f"{len(BEHAVIOURS)} behaviours have a test of their own here, {len(ELSEWHERE)} a larger one elsewhere, and {len(OTHERWISE)} are "
        "otherwise by design.\n",
    ]
    for title, found in rows.items():
        parts += [f"## {title}\n", "| behaviour | peers' test |\n|---|---|", *found, ""]
    parts += ["## Tested elsewhere\n", "| behaviour | peers' test | here |\n|---|---|---|"]
    parts += [f"| {what} | {peer} `{test}` | `{ours}` |" for what, (peer, test), ours in ELSEWHERE]
    parts += ["\n## Otherwise by design\n", "| peers | their test | here |\n|---|---|---|"]
    parts += [f"| {what} | {peer} `{test}` | {why} |" for what, (peer, test), why in OTHERWISE]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
