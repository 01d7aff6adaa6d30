"""Small decoders of every family, and what `transformers` says about them.

`decoder_golden.json` holds, for every case, the logits of `TOKENS` and the most likely
continuation of their beginning, computed by `transformers` with PyTorch. It is written
by `make parity ARGS=--write`; the weights are drawn again wherever they are needed.
"""

import json
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).with_name("decoder_golden.json")

PROMPT, STEPS = 4, 20
"""Tokens that are continued, and new ones."""
TOKENS = np.arange(1, 1 + PROMPT + STEPS)[None] * 7 % 19

COMMON = {
    "vocab_size": 19,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA = COMMON | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
QWEN2 = COMMON | {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "rope_theta": 1e6,
    "use_sliding_window": False,
    "sliding_window": 16,
}
QWEN3 = COMMON | {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "head_dim": 16,
    "rope_theta": 1e6,
}
MISTRAL = COMMON | {
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "sliding_window": None,
}

SMOLLM3 = COMMON | {
    "model_type": "smollm3",
    "architectures": ["SmolLM3ForCausalLM"],
    "num_hidden_layers": 4,
    "no_rope_layers": [1, 0, 1, 0],
    "rope_theta": 2e6,
    "tie_word_embeddings": False,
}
GEMMA3 = COMMON | {
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "num_hidden_layers": 3,
    "head_dim": 16,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 24,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
    "tie_word_embeddings": True,
}
MIXTRAL = COMMON | {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": None,
}
QWEN3_MOE = COMMON | {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_hidden_layers": 3,
    "head_dim": 16,
    "moe_intermediate_size": 24,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
    "mlp_only_layers": [1],
    "decoder_sparse_step": 1,
}

# Wavelengths of these small heads are few: `original_max_position_embeddings` is chosen
# so that every branch of a scaling has a pair of channels.
CASES: dict[str, dict] = {
    "llama 2": LLAMA | {"num_key_value_heads": 4},
    "llama 3": LLAMA
    | {
        "rope_theta": 5e5,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
    },
    "llama with biases": LLAMA
    | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "linear": LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.5}},
    "dynamic": LLAMA
    | {
        "max_position_embeddings": 12,
        "rope_scaling": {"type": "dynamic", "factor": 3.0},
    },
    "yarn": LLAMA
    | {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 8.0,
        },
    },
    "yarn with mscale": LLAMA
    | {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 16.0,
            "original_max_position_embeddings": 256,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
            "beta_fast": 16.0,
            "truncate": False,
        },
    },
    "mistral": MISTRAL,
    "qwen2": QWEN2 | {"tie_word_embeddings": True},
    "qwen2 with yarn": QWEN2
    | {
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 8,
        }
    },
    "qwen3": QWEN3 | {"tie_word_embeddings": True},
    "qwen3 with biases": QWEN3 | {"attention_bias": True},
    "mistral with a window": MISTRAL | {"sliding_window": 6},
    "qwen2 with late windows": QWEN2
    | {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 7},
    "smollm3": SMOLLM3,
    "gemma3": GEMMA3,
    "mixtral": MIXTRAL,
    "qwen3 with experts": QWEN3_MOE,
}


def steps(case: dict) -> int:
    """Tokens of the continuation: as many as the model has positions for."""
    return min(STEPS, case["max_position_embeddings"] - PROMPT)


def golden() -> dict[str, dict]:
    return json.loads(GOLDEN.read_text())
