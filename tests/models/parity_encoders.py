"""Compares encoders of text and images with `transformers` on PyTorch, both ways.

    make parity                    # compares, in an environment of its own
    make parity ARGS=--write       # and writes tests/models/family_golden.json

For every case of `encoder_cases`: the hidden states of all real tokens, or the logits,
of our function against those of `transformers` with the same weights, in a directory
that `save_pretrained` wrote; that directory pruned and written by us, loaded by
`transformers`. A difference above 1e-4 is a failure.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from flexhinm_jax import models
from flexhinm_jax.io import huggingface
from flexhinm_jax.models import images
from tests.models import encoder_cases, parity


def loaded(folder: Path) -> transformers.PreTrainedModel:
    """A directory as `transformers` reads it, by the class that it names."""
    config = json.loads((folder / "config.json").read_text())
    names = config.get("architectures") or ["AutoModel"]
    return parity.loaded(folder, getattr(transformers, names[0]))


def reference(case: dict[str, Any], folder: Path) -> transformers.PreTrainedModel:
    """A model of `transformers` with our random weights, saved and read again."""
    kinds = type(transformers.AutoConfig.for_model(case["model_type"]))
    config = kinds.from_dict(dict(case))
    names = case.get("architectures")
    maker = getattr(transformers, names[0]) if names else None
    model = maker(config) if maker else transformers.AutoModel.from_config(config)
    state = model.state_dict()
    model.save_pretrained(folder)
    shapes = {
        name: leaf.shape for name, leaf in huggingface.read(folder).params.items()
    }
    values = encoder_cases.values(
        {name: shape for name, shape in shapes.items() if shape}
    )
    counts = {name: np.int64(7) for name, shape in shapes.items() if not shape}
    huggingface.write(folder.with_name("ours"), values | counts, source=folder)
    assert len(state) == len(shapes)
    return loaded(folder.with_name("ours"))


def theirs(model: transformers.PreTrainedModel, case: dict[str, Any]) -> np.ndarray:
    with torch.no_grad():
        if encoder_cases.reads_images(case):
            pixels = torch.from_numpy(encoder_cases.pixels(case))
            return model(pixel_values=pixels).logits.numpy()
        tokens, mask = map(torch.from_numpy, encoder_cases.tokens(case))
        found = model(input_ids=tokens.long(), attention_mask=mask.long())
        return found.last_hidden_state.numpy()


def compare(case: dict[str, Any], folder: Path) -> tuple[dict[str, float], Any]:
    """Differences of a case, and what is kept of what `transformers` computed."""
    model = reference(case, folder / "saved")
    want = theirs(model, case)
    ours = models.load(folder / "ours", tokenizer=False)
    inputs = encoder_cases.inputs(case)
    real = encoder_cases.real(case)

    def apart(a: Any, b: Any) -> float:
        return float(np.abs(np.asarray(a) - np.asarray(b))[real].max())

    got = ours.apply(ours.params, *inputs)
    zeroed = parity.pruned(ours.apply, ours.params, inputs, ours.rules)
    sparse = ours.apply(zeroed, *inputs)
    huggingface.write(folder / "pruned", zeroed, source=ours.directory)
    found = {
        "outputs": apart(got, want),
        "pruned by us": apart(sparse, theirs(loaded(folder / "pruned"), case)),
        parity.MOVED: apart(sparse, want),
    }
    return found, encoder_cases.summary(case, want).astype(float).round(5).tolist()


PROCESSORS: dict[str, dict[str, Any]] = {
    "ViT": {"image_processor_type": "ViTImageProcessor", "size": 12},
    "DeiT": {
        "feature_extractor_type": "DeiTFeatureExtractor",
        "size": 16,
        "crop_size": 12,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    },
    "ConvNext": {
        "feature_extractor_type": "ConvNextFeatureExtractor",
        "size": 14,
        "crop_pct": 0.875,
    },
    "ConvNext, stretched": {
        "image_processor_type": "ConvNextImageProcessorFast",
        "size": {"shortest_edge": 384},
    },
}


def prepared_apart(config: dict[str, Any], folder: Path) -> float:
    """Largest difference of an image prepared by us and by `transformers`."""
    kind = config.get("image_processor_type") or config["feature_extractor_type"]
    kind = next(name for name in images.PROCESSORS if kind.startswith(name))
    (folder / images.CONFIG).write_text(json.dumps(config))
    maker = getattr(transformers, f"{kind}ImageProcessorPil")
    image = np.random.RandomState(0).randint(0, 256, (30, 21, 3), np.uint8)
    want = maker.from_pretrained(folder)(image, return_tensors="np").pixel_values
    np.save(folder / "images.npy", image[None])
    return float(np.abs(images.read(folder / "images.npy", folder, 3) - want).max())


def prepared() -> dict[str, dict[str, float]]:
    """Largest differences of images, by what prepared them."""
    found = {}
    for name, config in PROCESSORS.items():
        with tempfile.TemporaryDirectory() as folder:
            found[f"images prepared for {name}"] = {
                "pixels": prepared_apart(config, Path(folder))
            }
    return found


if __name__ == "__main__":
    cases, golden = encoder_cases.CASES, encoder_cases.GOLDEN
    sys.exit(parity.run(__doc__, cases, compare, golden, prepared))
