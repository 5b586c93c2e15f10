"""The keys of config.json that a merged model keeps: what decoder models compute with, as plain data.

An allow-list, because a key that nobody here has heard of may name code, a kernel or a path. What is dropped
is reported when a recipe is checked, so that a missing key of a new architecture is noticed before the merge.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NAMES = """
activation_function add_bias_linear add_cross_attention add_qkv_bias alibi
apply_residual_connection_post_layernorm architectures attention_bias attention_dropout attention_multiplier
attention_types attn_logit_softcapping attn_pdrop aux_loss_alpha bias block_sparse_stride bos_token_id
chunk_size_feed_forward classifier_dropout clip_qkv conv_L_cache d_ff d_head d_kv d_model
decoder_sparse_step do_layer_norm_before dropout embd_pdrop embedding_multiplier embedding_size enable_bias
eos_token_id expert_interval ffn_dim ffn_hidden_size final_logit_softcapping first_k_dense_replace
global_rope_theta gradient_checkpointing head_dim hidden_act hidden_activation hidden_dropout hidden_size
id2label init_std initializer_range intermediate_size is_causal is_decoder is_encoder_decoder kv_lora_rank
label2id lambda_attention layer_norm_elementwise_affine layer_norm_eps layer_norm_epsilon layer_types
layerdrop layers_block_type local_rope_theta logit_scale logits_scaling lora_rank max_position_embeddings
max_window_layers mlp_bias mlp_layer_types mlp_only_layers model_max_length model_type moe_intermediate_size
moe_layer_freq multi_query n_embd n_group n_head n_head_kv n_heads n_inner n_layer n_layers n_positions
n_routed_experts n_shared_experts new_decoder_architecture no_bias no_rope_layer_interval no_rope_layers
norm_eps norm_epsilon norm_topk_prob norm_type num_attention_heads num_experts num_experts_per_tok
num_hidden_layers num_key_value_heads num_kv_heads num_layers num_local_experts
original_max_position_embeddings output_router_logits pad_token_id parallel_attn parallel_attn_mlp_res
partial_rotary_factor pretraining_tp q_lora_rank qk_layernorm qk_nope_head_dim qk_rope_head_dim
query_pre_attn_scalar relu_activation reorder_and_upcast_attn resid_pdrop residual_multiplier rms_norm_eps
rope_interleaved rope_local_base_freq rope_parameters rope_pct rope_scaling rope_theta rotary rotary_dim
rotary_emb_base rotary_pct routed_scaling_factor router_aux_loss_coef router_jitter_noise
scale_attention_softmax_in_fp32 scale_attn_by_inverse_layer_idx scale_attn_weights scale_depth scale_emb
scoring_func sep_token_id seq_length shared_expert_intermediate_size sliding_window sliding_window_pattern
summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
tie_word_embeddings topk_group topk_method transformers_version unk_token_id use_bias
use_bidirectional_attention use_cache use_mrope use_parallel_residual use_qk_norm use_qkv_bias
use_sliding_window v_head_dim vocab_size word_embed_proj_dim
"""

CONFIG_KEYS = frozenset(_NAMES.split())

NESTED = "text_config"
"""Where models that also see or hear keep the keys of their decoder."""

LAYER_LISTS = frozenset(
    {"intermediate_size", "layer_types", "layers_block_type", "mlp_layer_types", "moe_layer_freq"}
    | {"no_rope_layers", "num_attention_heads", "num_key_value_heads"}
)
"""Keys that may hold a list with one value for each layer."""

LAYER_NUMBERS = frozenset({"mlp_only_layers"})
"""Keys that hold the numbers of some layers."""

LAYER_PATTERNS = frozenset(
    {"attention_types", "decoder_sparse_step", "expert_interval", "first_k_dense_replace"}
    | {"max_window_layers", "moe_layer_freq", "no_rope_layer_interval", "sliding_window_pattern"}
)
"""Keys by which a loader works out from a layer's number what it is."""

_SILENT = frozenset({"_name_or_path", "auto_map", "dtype", "torch_dtype"})
"""Dropped without a word, or written anew."""


def stated(config: Mapping[str, Any], key: str) -> Any:
    """What a config says, or else its nested one; None where neither says anything."""
    nested = config.get(NESTED)
    return config.get(key, nested.get(key) if isinstance(nested, Mapping) else None)


def dropped(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys of a donor's config that the merged model will not have and that may matter, sorted."""
    nested = config.get(NESTED)
    inner = nested.keys() - CONFIG_KEYS - _SILENT if isinstance(nested, Mapping) else set()
    outer = config.keys() - CONFIG_KEYS - _SILENT - ({NESTED} if isinstance(nested, Mapping) else set())
    return tuple(sorted({*outer, *(f"{NESTED}.{key}" for key in inner)}))
