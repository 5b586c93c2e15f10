"""The keys of config.json: those that a merged model keeps, and what some of them say of layers.

Kept is what language models compute with, as plain data: an allow-list, because a key that nobody here has
heard of may name code, a kernel or a path. What is dropped is reported when a recipe is checked, so that a
missing key of a new architecture is noticed before the merge.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NAMES = """
_remove_final_layer_norm activation activation_dropout activation_function add_bias_linear
add_cross_attention add_qkv_bias alibi apply_residual_connection_post_layernorm architectures attention_bias
attention_chunk_size attention_dropout attention_heads attention_in_multiplier attention_multiplier
attention_out_bias attention_out_multiplier attention_probs_dropout_prob attention_softmax_in_fp32
attention_types attention_window_size attn_layer_indices attn_layer_offset attn_layer_period
attn_logit_softcapping attn_pdrop attn_scale attn_temperature_tuning aux_loss_alpha bias
block_auto_adjust_ff_dim block_ffn_dim_multiplier block_multiple_of block_size block_sparse_stride
block_types bos_token_id chunk_size_feed_forward classifier_activation classifier_bias classifier_dropout
classifier_dropout_prob classifier_pooling clip_qkv cls_token_id conv1d_width conv_L_cache conv_bias
conv_kernel d_ff d_head d_kv d_model decoder_bias decoder_sparse_step decoder_start_token_id dense_act_fn
dim do_layer_norm_before dropout dropout_rate embd_pdrop embed_dropout embedding_dropout
embedding_multiplier embedding_size enable_bias eod_token_id eos_token_id expand expert_interval
expert_layer_offset expert_layer_period feed_forward_proj ffn_dim ffn_hidden_size final_logit_softcapping
first_k_dense_replace floor_scale full_attention_interval full_attn_alpha_factor full_attn_beta_factor
full_attn_idxs global_attn_every_n_layers global_rope_theta gradient_checkpointing head_dim hidden_act
hidden_activation hidden_dim hidden_dropout hidden_dropout_prob hidden_size id2label init_std
initializer_cutoff_factor initializer_factor initializer_range inner_group_num interleave_moe_layer_step
intermediate_size intermediate_size_mlp is_causal is_decoder is_encoder_decoder is_gated_act key_multiplier
kv_lora_rank label2id lambda_attention layer_norm_elementwise_affine layer_norm_eps layer_norm_epsilon
layer_types layerdrop layers_block_type legacy linear_attn_alpha_factor linear_attn_beta_factor
linear_conv_kernel_dim linear_key_head_dim linear_num_key_heads linear_num_value_heads linear_value_head_dim
lm_head_multiplier local_attention local_rope_theta logit_scale logits_scaling logits_soft_cap lora_rank
lru_width mamba_chunk_size mamba_conv_bias mamba_d_conv mamba_d_head mamba_d_ssm mamba_d_state mamba_dt_rank
mamba_expand mamba_n_groups mamba_n_heads mamba_norm_before_gate mamba_proj_bias mamba_rms_norm
max_position_embeddings max_relative_positions max_window_layers mlp_alpha_factor mlp_beta_factor mlp_bias
mlp_dropout mlp_layer_types mlp_multipliers mlp_only_layers model_max_length model_type
moe_intermediate_size moe_layer_freq moe_layers multi_query n_ctx n_embd n_group n_head n_head_kv n_heads
n_inner n_layer n_layers n_positions n_routed_experts n_shared_experts new_decoder_architecture no_bias
no_rope_layer_interval no_rope_layers norm_bias norm_eps norm_epsilon norm_rel_ebd norm_topk_prob norm_type
num_attention_heads num_decoder_layers num_experts num_experts_per_tok num_heads num_hidden_groups
num_hidden_layers num_key_value_heads num_kv_heads num_layers num_ln_in_parallel_attn num_local_experts
num_nextn_predict_layers original_max_position_embeddings output_router_logits pad_token_id parallel_attn
parallel_attn_mlp_res partial_rotary_factor pooler_dropout pooler_hidden_act pooler_hidden_size pos_att_type
position_biased_input position_buckets position_embedding_type pretraining_tp projectors_bias q_lora_rank
qa_dropout qk_head_dim qk_layernorm qk_nope_head_dim qk_rope_head_dim qkv_bias query_pre_attn_scalar
relative_attention relative_attention_max_distance relative_attention_num_buckets relu_activation
reorder_and_upcast_attn rescale_prenorm_residual resid_dropout resid_pdrop residual_dropout residual_in_fp32
residual_multiplier rms_norm_eps rope_interleave rope_interleaved rope_local_base_freq rope_parameters
rope_pct rope_scaling rope_theta rotary rotary_dim rotary_emb_base rotary_pct routed_scaling_factor
router_aux_loss_coef router_jitter_noise scale_attention_softmax_in_fp32 scale_attn_by_inverse_layer_idx
scale_attn_weights scale_decoder_outputs scale_depth scale_emb scale_embedding scoring_func sep_token_id
seq_classif_dropout seq_length share_att_key shared_expert_intermediate_size sinusoidal_pos_embds
sliding_window sliding_window_pattern sparse_pred_ignore_index sparse_prediction ssm_in_multiplier
ssm_multipliers ssm_out_multiplier state_size summary_activation summary_first_dropout summary_last_dropout
summary_proj_to_labels summary_type summary_use_proj swiglu_alpha swiglu_limit tie_word_embeddings
time_step_floor time_step_init_scheme time_step_max time_step_min time_step_rank time_step_scale topk_group
topk_method transformers_version type_vocab_size unk_token_id use_bias use_bidirectional_attention use_cache
use_conv_bias use_mrope use_parallel_residual use_qk_norm use_qkv_bias use_sliding_window v_head_dim
vocab_size window_size word_embed_proj_dim
"""

CONFIG_KEYS = frozenset(_NAMES.split())

NESTED = "text_config"
"""Where models that also see or hear keep the keys of their decoder."""

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""The keys of config.json that state the number of layers."""

LAYER_LISTS = frozenset(
    {"intermediate_size", "layer_types", "layers_block_type", "mlp_layer_types", "moe_layer_freq"}
    | {"no_rope_layers", "num_attention_heads", "num_key_value_heads"}
)
"""Keys that may hold a list with one value for each layer."""

LAYER_NUMBERS = frozenset({"attn_layer_indices", "full_attn_idxs", "mlp_only_layers", "moe_layers"})
"""Keys that hold the numbers of some layers."""

LAYER_PATTERNS = frozenset(
    {"attention_types", "decoder_sparse_step", "expert_interval", "first_k_dense_replace"}
    | {"max_window_layers", "moe_layer_freq", "no_rope_layer_interval", "sliding_window_pattern"}
    | {"attn_layer_period", "block_types", "expert_layer_period", "full_attention_interval"}
    | {"global_attn_every_n_layers", "interleave_moe_layer_step"}
)
"""Keys by which a loader works out from a layer's number what it is."""

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id")
"""Keys that name tokens by their ids."""

CHANGED = frozenset(
    {"tie_word_embeddings", "vocab_size", *LAYER_COUNTS, *TOKEN_IDS} | LAYER_LISTS | LAYER_NUMBERS
)
"""Keys whose values a merge may have to change, of the config or of the nested one."""

_SILENT = frozenset({"_attn_implementation_autoset", "_name_or_path", "auto_map", "dtype", "torch_dtype"})
"""Dropped without a word, or written anew."""


def stated(config: Mapping[str, Any], key: str) -> Any:
    """What a config says, or else its nested one; None where neither says anything."""
    nested = config.get(NESTED)
    return config.get(key, nested.get(key) if isinstance(nested, Mapping) else None)


def layer_count(config: Mapping[str, Any]) -> int | None:
    """The number of layers that config.json states, or None where it states none that makes sense."""
    nested = config.get(NESTED)
    for source in (config, nested if isinstance(nested, Mapping) else {}):
        for key in LAYER_COUNTS:
            value = source.get(key)
            if type(value) is int and 0 < value < 1_000_000:
                return value
    return None


def dropped(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys of a donor's config that the merged model will not have and that may matter, sorted."""
    nested = config.get(NESTED)
    inner = nested.keys() - CONFIG_KEYS - _SILENT if isinstance(nested, Mapping) else set()
    outer = config.keys() - CONFIG_KEYS - _SILENT - ({NESTED} if isinstance(nested, Mapping) else set())
    return tuple(sorted({*outer, *(f"{NESTED}.{key}" for key in inner)}))
