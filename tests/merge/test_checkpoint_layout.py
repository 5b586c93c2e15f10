"""Where tensors sit: names of real models, and names that say nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_core.checkpoint.layout import Role, place
from merge_core.config_keys import layer_count


@pytest.mark.parametrize(
    ("name", "layer", "role"),
    [
        ("model.embed_tokens.weight", None, Role.EMBED),
        ("model.layers.0.self_attn.q_proj.weight", 0, Role.ATTN),
        ("model.layers.31.self_attn.o_proj.bias", 31, Role.ATTN),
        ("model.layers.7.mlp.gate_proj.weight", 7, Role.MLP),
        ("model.layers.7.input_layernorm.weight", 7, Role.NORM),
        ("model.layers.7.post_attention_layernorm.weight", 7, Role.NORM),
        ("model.layers.7.self_attn.q_norm.weight", 7, Role.NORM),
        ("model.layers.3.block_sparse_moe.experts.5.w1.weight", 3, Role.MLP),
        ("model.norm.weight", None, Role.NORM),
        ("lm_head.weight", None, Role.HEAD),
        ("transformer.wte.weight", None, Role.EMBED),
        ("transformer.wpe.weight", None, Role.EMBED),
        ("transformer.h.11.ln_1.weight", 11, Role.NORM),
        ("transformer.h.11.attn.c_attn.weight", 11, Role.ATTN),
        ("transformer.h.11.mlp.c_fc.weight", 11, Role.MLP),
        ("transformer.ln_f.bias", None, Role.NORM),
        ("transformer.word_embeddings_layernorm.weight", None, Role.NORM),
        ("gpt_neox.layers.2.attention.query_key_value.weight", 2, Role.ATTN),
        ("gpt_neox.layers.2.attention.dense.weight", 2, Role.ATTN),
        ("gpt_neox.layers.2.mlp.dense_h_to_4h.weight", 2, Role.MLP),
        ("embed_out.weight", None, Role.HEAD),
        ("score.weight", None, Role.OTHER),
        ("model.layers.4.something", 4, Role.OTHER),
        ("model.layers.x.weight", None, Role.OTHER),
    ],
)
def test_real_names_are_placed(name: str, layer: int | None, role: Role) -> None:
    assert (place(name).layer, place(name).role) == (layer, role)


@given(st.text(max_size=64))
def test_any_name_has_a_place(name: str) -> None:
    assert place(name).role in Role


def test_layers_are_counted_from_the_config() -> None:
    assert layer_count({"num_hidden_layers": 32}) == 32
    assert layer_count({"n_layer": 12}) == 12
    assert layer_count({"text_config": {"num_hidden_layers": 26}}) == 26
    assert layer_count({"num_hidden_layers": True}) is None
    assert layer_count({"num_hidden_layers": -1, "text_config": []}) is None
