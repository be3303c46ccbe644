# piecework stitching source, format 1
#
# model: LlamaModel
# pieces: 2, unique: 2, compiler: eager
# splitting ops: piecework::attention (1 submodule)
#
# __vllm_submods__:
#   [0] submod_0  0ac89424
#   [1] submod_2  cfde328a
#
# __vllm_consts__:
#   [0] function attention

import torch

# piecework.attention.default: its own implementation, past the dispatcher
attention = __vllm_consts__[0]


def execution_fn(s0, input_ids, position_ids, *, __vllm_submods__):
    # sizes: s0 = input_ids.shape[1]
    # model.embed_tokens … model.layers.0.self_attn
    #   -> f32[1, s0, 16], f32[1, 1, s0, 8], f32[1, 2, s0, 8], f32[1, 1, s0, 8], f32[1, s0, 2, 8]
    inputs_embeds, value_states, q_embed, k_embed, out = __vllm_submods__[0](
        s0,
        position_ids,
        input_ids,
        model_embed_tokens_weight,
        model_rotary_emb_inv_freq,
        model_layers_0_input_layernorm_weight,
        model_layers_0_self_attn_q_proj_weight,
        model_layers_0_self_attn_k_proj_weight,
        model_layers_0_self_attn_v_proj_weight,
    )
    # model.layers.0.self_attn  modeling_llama.py
    attention(
        q_embed,
        k_embed,
        value_states,
        out,
        layer_name="layers.0.self_attn",
        scaling=0.3535533905932738,
    )
    del value_states, q_embed, k_embed
    # model.layers.0.self_attn … model.norm  -> f32[1, s0, 16]
    (hidden_states_10,) = __vllm_submods__[1](
        s0,
        out,
        model_layers_0_self_attn_o_proj_weight,
        inputs_embeds,
        model_layers_0_post_attention_layernorm_weight,
        model_layers_0_mlp_gate_proj_weight,
        model_layers_0_mlp_up_proj_weight,
        model_layers_0_mlp_down_proj_weight,
        model_norm_weight,
    )
    del inputs_embeds, out
    return (hidden_states_10,)


# Bound names, held by this module instead of being passed per call:
#   model_embed_tokens_weight: f32[32, 16] = model.embed_tokens.weight
#   model_rotary_emb_inv_freq: f32[4] = model.rotary_emb.inv_freq
#   model_layers_0_input_layernorm_weight: f32[16] = model.layers.0.input_layernorm.weight
#   model_layers_0_self_attn_q_proj_weight: f32[16, 16] = model.layers.0.self_attn.q_proj.weight
#   model_layers_0_self_attn_k_proj_weight: f32[8, 16] = model.layers.0.self_attn.k_proj.weight
#   model_layers_0_self_attn_v_proj_weight: f32[8, 16] = model.layers.0.self_attn.v_proj.weight
#   model_layers_0_self_attn_o_proj_weight: f32[16, 16] = model.layers.0.self_attn.o_proj.weight
#   model_layers_0_post_attention_layernorm_weight: f32[16] = model.layers.0.post_attention_layernorm.weight
#   model_layers_0_mlp_gate_proj_weight: f32[24, 16] = model.layers.0.mlp.gate_proj.weight
#   model_layers_0_mlp_up_proj_weight: f32[24, 16] = model.layers.0.mlp.up_proj.weight
#   model_layers_0_mlp_down_proj_weight: f32[16, 24] = model.layers.0.mlp.down_proj.weight
#   model_norm_weight: f32[16] = model.norm.weight
