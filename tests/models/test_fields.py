"""A configuration of any contents is read, or refused by name."""

import pytest

from flexhinm_jax.models.load import kinds

SIZES = {
    "vocab_size": 16,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
}
IMAGES = {"image_size": 16, "patch_size": 8, "num_channels": 3}
IMAGES |= {"hidden_sizes": [8, 8], "depths": [1, 1], "embedding_size": 8}
DISTILBERT = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}
MORE = (
    "architectures attention_bias decoder_sparse_step head_dim hidden_act id2label"
    " layer_types max_window_layers mlp_only_layers moe_intermediate_size mlp_bias"
    " no_rope_layer_interval no_rope_layers num_experts num_experts_per_tok num_labels"
    " num_local_experts original_max_position_embeddings pad_token_id"
    " query_pre_attn_scalar quantization_config rope_local_base_freq rope_parameters"
    " rope_scaling rope_theta sliding_window sliding_window_pattern tie_word_embeddings"
).split()
YARN = {"rope_type": "yarn", "factor": 2.0}
ODD = [None, "", "8", -1, 0, 1.5, True, [], [1], ["a"], [[1]], {}, {"a": 1}]
ODD += [
    YARN | {"factor": "2"},
    YARN | {"mscale": "a", "mscale_all_dim": "b"},
    {"rope_type": "yarn", "original_max_position_embeddings": "4"},
    {"full_attention": YARN, "sliding_attention": {"rope_theta": [1]}},
    {"full_attention": None, "sliding_attention": None},
]


@pytest.mark.parametrize("kind", list(kinds()))
@pytest.mark.parametrize("windows", [False, True])
def test_odd_values_are_refused_by_name(kind, windows):
    whole = SIZES | IMAGES | DISTILBERT | {"model_type": kind}
    whole |= {"pad_token_id": 1, "use_sliding_window": windows}
    read = kinds()[kind].config.from_dict
    hash(read(whole))
    for name in [*whole, *MORE]:
        given = {key: value for key, value in whole.items() if key != name}
        for contents in (given, *(given | {name: odd} for odd in ODD)):
            try:
                hash(read(contents))
            except ValueError as error:
                assert str(error)


@pytest.mark.parametrize(
    ("kind", "field", "value", "message"),
    [
        ("mixtral", "intermediate_size", None, "intermediate_size is missing"),
        ("qwen3_moe", "num_hidden_layers", "2", "num_hidden_layers must be an integer"),
        ("mistral", "sliding_window", "4k", "sliding_window must be an integer > 0"),
        ("smollm3", "no_rope_layers", [1], "no_rope_layers must have a number for"),
        ("smollm3", "no_rope_layers", "11", "no_rope_layers must be a list of integer"),
        ("gemma3_text", "sliding_window_pattern", 0, "sliding_window_pattern must be"),
        ("roberta", "pad_token_id", "1", "pad_token_id must be an integer, got '1'"),
        ("vit", "id2label", 3, "id2label must be an object, got 3"),
    ],
)
def test_the_field_is_named(kind, field, value, message):
    whole = SIZES | IMAGES | {"model_type": kind, field: value}
    with pytest.raises(ValueError, match=message):
        kinds()[kind].config.from_dict(whole)


def test_a_field_without_use_is_not_looked_at():
    decoder = kinds()["llama"].config
    plain = decoder.from_dict(SIZES | {"model_type": "llama"})
    assert plain == decoder.from_dict(
        SIZES | {"model_type": "llama", "sliding_window": "wide"}
    )
    roberta = kinds()["roberta"].config
    null = roberta.from_dict(SIZES | {"model_type": "roberta", "pad_token_id": None})
    assert null.first_position == 2
