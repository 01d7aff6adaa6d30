"""Compares decoders with `transformers` on PyTorch, in both directions.

    make parity                    # compares, in an environment of its own
    make parity ARGS=--write       # and writes tests/models/decoder_golden.json

For every case of `decoder_cases`: logits and the most likely continuation of our
function against those of `transformers` with the same weights; a directory that
`save_pretrained` wrote, read by us; that directory pruned and written by us, loaded by
`transformers`. Exits with status 1 where logits differ by more than 1e-4 or a token
differs.
"""

import argparse
import functools
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

import flexhinm_jax as fh
from flexhinm_jax.io import huggingface
from flexhinm_jax.models import decoder, generation
from flexhinm_jax.models.decoder import DecoderConfig
from tests.models import decoder_cases, directories

TOLERANCE = 1e-4
MOVED = "pruning moved"  # a difference that there should be


def reference(case: dict, folder: Path) -> transformers.PreTrainedModel:
    """A model of `transformers` with our random weights, read as it reads any file."""
    kinds = transformers.AutoConfig.for_model(case["model_type"])
    type(kinds).from_dict(dict(case)).save_pretrained(folder)
    weights = directories.random_params(DecoderConfig.from_dict(case))
    directories.write_weights(folder / "model.safetensors", weights)
    return loaded(folder)


def loaded(
    folder: Path, reader: Any = transformers.AutoModelForCausalLM
) -> transformers.PreTrainedModel:
    """A directory as `transformers` reads it; what is missing there is an error."""
    model, told = reader.from_pretrained(
        folder,
        attn_implementation="eager",
        dtype=torch.float32,
        output_loading_info=True,
    )
    wrong = {name: keys for name, keys in told.items() if keys}
    assert not wrong, f"{folder}: {wrong}"
    return model.eval()


def their_logits(model: transformers.PreTrainedModel) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(decoder_cases.TOKENS)).logits[0].numpy()


def their_continuation(model: transformers.PreTrainedModel, steps: int) -> list[int]:
    prompt = torch.from_numpy(decoder_cases.TOKENS[:, : decoder_cases.PROMPT])
    made = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
    )
    return made[0, decoder_cases.PROMPT :].tolist()


def our_logits(params: dict, config: DecoderConfig) -> np.ndarray:
    tokens = jnp.asarray(decoder_cases.TOKENS, jnp.int32)
    return np.asarray(decoder.apply(params, tokens, config)[0])


def our_continuation(params: dict, config: DecoderConfig, steps: int) -> list[int]:
    prompt = jnp.asarray(decoder_cases.TOKENS[:, : decoder_cases.PROMPT], jnp.int32)
    made = generation.generate(params, prompt, config, steps=steps)
    return made.tokens[0].tolist()


def pruned(
    apply: Callable[..., Any], params: Any, inputs: tuple, rules: Any = None
) -> Any:
    """Half of every prunable weight is zero, in 2:4 groups."""
    method = fh.Magnitude(fh.NM(2, 4))
    how = {"rules": rules, "on_mismatch": "skip", "key": jax.random.key(0)}
    return fh.prune(apply, params, [inputs], method, **how).params


def compare(case: dict, folder: Path) -> tuple[dict, dict]:
    """Differences of a case, and what `transformers` computed."""
    steps = decoder_cases.steps(case)
    model = reference(case, folder / "ours")
    logits, tokens = their_logits(model), their_continuation(model, steps)
    config = DecoderConfig.from_dict(case)
    params = directories.random_params(config)
    found = {
        "logits": np.abs(our_logits(params, config) - logits).max(),
        "tokens": float(our_continuation(params, config, steps) != tokens),
    }

    model.save_pretrained(folder / "saved")
    saved = huggingface.read(folder / "saved")
    config = DecoderConfig.from_dict(saved.config)
    decoder.check({name: x.shape for name, x in saved.params.items()}, config)
    found["saved by them"] = np.abs(our_logits(saved.params, config) - logits).max()

    apply = functools.partial(decoder.apply, config=config)
    tokens = jnp.asarray(decoder_cases.TOKENS, jnp.int32)
    sparse = pruned(apply, saved.params, (tokens,))
    huggingface.write(folder / "pruned", sparse, source=saved)
    model = loaded(folder / "pruned")
    ours = our_logits(sparse, config)
    found["pruned by us"] = np.abs(ours - their_logits(model)).max()
    found[MOVED] = np.abs(ours - logits).max()
    return found, {"logits": logits.astype(float).round(5).tolist(), "tokens": tokens}


def run(
    about: str | None,
    cases: dict[str, dict],
    compare: Callable[[dict, Path], tuple[dict[str, float], Any]],
    golden: Path,
    more: Callable[[], dict[str, dict[str, float]]] = dict,
) -> int:
    """Compares every case and prints a line about it; status 1 where one is off.

    Args:
      about: docstring of the program.
      cases: name -> contents of a config.json.
      compare: (case, folder) -> differences by name, and what `transformers` computed.
      golden: file that --write writes this into.
      more: further differences, by name of their own cases.
    """
    parser = argparse.ArgumentParser(description=(about or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the golden file")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    found, known = {}, {}
    for name, case in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            found[name], known[name] = compare(case, Path(folder))
        print(name, *(f"{k} {v:.1e}" for k, v in found[name].items()), sep="; ")
    for name, differences in more().items():
        found[name] = differences
        print(name, *(f"{k} {v:.1e}" for k, v in differences.items()), sep="; ")
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    print(f"{versions}, jax {jax.__version__}; tolerance {TOLERANCE}")
    failed = [
        name
        for name, differences in found.items()
        if not all(v <= TOLERANCE for k, v in differences.items() if k != MOVED)
    ]
    if failed:
        print(f"FAILED: {', '.join(failed)}")
        return 1
    if args.write:
        text = json.dumps(known, separators=(",", ":"))
        golden.write_text(text + "\n")
        print(f"wrote {golden.name}, {len(text)} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(run(__doc__, decoder_cases.CASES, compare, decoder_cases.GOLDEN))
