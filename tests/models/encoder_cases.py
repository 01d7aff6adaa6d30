"""Small encoders of every family, of text and of images, and what they read."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from flexhinm_jax.models import encoder, resnet, vit
from flexhinm_jax.models.load import kinds

GOLDEN = Path(__file__).with_name("family_golden.json")

COMMON = {
    "vocab_size": 23,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 24,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
}
ROBERTA = COMMON | {"type_vocab_size": 1, "pad_token_id": 1}
IMAGES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 3,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "qkv_bias": True,
    "id2label": {str(k): f"class {k}" for k in range(5)},
}
RESNET = {
    "model_type": "resnet",
    "architectures": ["ResNetForImageClassification"],
    "num_channels": 3,
    "embedding_size": 8,
    "hidden_sizes": [16, 32],
    "depths": [2, 1],
    "layer_type": "bottleneck",
    "hidden_act": "relu",
    "id2label": {str(k): f"class {k}" for k in range(5)},
}

CASES: dict[str, dict[str, Any]] = {
    "bert": COMMON | {"model_type": "bert", "pad_token_id": 0},
    "roberta": ROBERTA | {"model_type": "roberta"},
    "xlm-roberta": ROBERTA
    | {"model_type": "xlm-roberta", "pad_token_id": 4, "hidden_act": "gelu_new"},
    "mpnet": COMMON
    | {
        "model_type": "mpnet",
        "relative_attention_num_buckets": 32,
        "max_position_embeddings": 150,  # beyond the farthest distance
    },
    "distilbert": {
        "model_type": "distilbert",
        "vocab_size": 23,
        "dim": 16,
        "n_layers": 2,
        "n_heads": 2,
        "hidden_dim": 32,
        "max_position_embeddings": 24,
        "activation": "gelu",
        "pad_token_id": 0,
    },
    "vit": IMAGES
    | {"model_type": "vit", "architectures": ["ViTForImageClassification"]},
    "vit, no biases": IMAGES
    | {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification"],
        "qkv_bias": False,
        "num_channels": 1,
    },
    "deit": IMAGES
    | {"model_type": "deit", "architectures": ["DeiTForImageClassification"]},
    "deit, distilled": IMAGES
    | {
        "model_type": "deit",
        "architectures": ["DeiTForImageClassificationWithTeacher"],
    },
    "resnet": RESNET,
    "resnet, basic": RESNET
    | {"layer_type": "basic", "hidden_sizes": [8, 16], "depths": [1, 2]},
    "resnet, strides": RESNET
    | {
        "downsample_in_first_stage": True,
        "downsample_in_bottleneck": True,
        "depths": [1, 1],
    },
}


def reads_images(case: dict[str, Any]) -> bool:
    return "num_channels" in case


def tokens(case: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """A long sentence, one of 7 tokens and one of 1, padded, and the mask."""
    random = np.random.RandomState(0)
    pad, length = case.get("pad_token_id", 1), case["max_position_embeddings"] - 5
    ids = random.choice([k for k in range(23) if k != pad], (3, length))
    mask = (np.arange(length) < np.array([[length - 3], [7], [1]])).astype(np.int32)
    return np.where(mask, ids, pad).astype(np.int32), mask


def pixels(case: dict[str, Any]) -> np.ndarray:
    """Images f32[2, channels, side, side]."""
    side = case.get("image_size", 20)
    shape = (2, case["num_channels"], side, side)
    return np.random.RandomState(1).normal(0, 1, shape).astype(np.float32)


def values(wanted: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Random parameters, the same everywhere, norms, biases and means too."""
    # The stream of RandomState is frozen, and two decimals are exact in a file.
    random = np.random.RandomState(2)
    params = {}
    for name, shape in sorted(wanted.items()):
        draw = random.normal(0, 0.1 if len(shape) == 4 else 0.3, shape)
        if name.endswith("running_var"):
            draw = 1 + np.abs(draw)
        elif len(shape) == 1 and name.endswith("weight"):
            draw = 1 + draw
        params[name] = draw.round(2).astype(np.float32)
    return params


def inputs(case: dict[str, Any]) -> tuple[np.ndarray, ...]:
    """What a case reads."""
    return (pixels(case),) if reads_images(case) else tokens(case)


def real(case: dict[str, Any]) -> Any:
    """Index of the outputs that mean something."""
    return slice(None) if reads_images(case) else tokens(case)[1] != 0


def summary(case: dict[str, Any], outputs: np.ndarray) -> np.ndarray:
    """What the golden file keeps: logits, or the means and some of the real tokens."""
    if reads_images(case):
        return outputs
    mask = tokens(case)[1]
    means = [row[keep != 0].mean(0) for row, keep in zip(outputs, mask, strict=True)]
    last = outputs[0, mask[0].sum() - 1]
    return np.stack([*means, outputs[0, 0], last, outputs[1, 6]])


def shapes(case: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Key -> shape of what a case reads."""
    config = kinds()[case["model_type"]].config.from_dict(case)
    rooms = {"vit": vit, "deit": vit, "resnet": resnet}
    return rooms.get(case["model_type"], encoder).shapes(config)


def write(folder: Path, case: dict[str, Any]) -> dict[str, np.ndarray]:
    """A model directory with `values`, and those."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(case))
    params = values(shapes(case))
    safetensors.numpy.save_file(params, folder / "model.safetensors", {"format": "pt"})
    return params
