"""One-shot pruning of a decoder in plain PyTorch and transformers, as papers do it.

    python -m bench.pipeline DIR sparsegpt 2:4 tokens.npy windows.npy

Block by block: the inputs of every linear layer are gathered with the block's dense
weights, the layers are pruned, and the block runs again to give the next its inputs.
Prints a JSON line: CPU seconds and peak memory of pruning (the model is read before),
and the perplexity of the pruned model. Nothing of this library is imported.
"""

import argparse
import json
import math
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from bench import formulas


class Caught(Exception):
    """The inputs of the first block are known."""


class Catcher(nn.Module):
    """Stands before the first block and keeps what it is called with."""

    def __init__(self, block: nn.Module):
        """Nothing is caught yet."""
        super().__init__()
        self.block, self.inputs, self.rest = block, [], {}

    def __getattr__(self, name: str) -> Any:
        """What the model asks of its block."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, hidden: torch.Tensor, **rest: Any) -> None:
        """Keeps the inputs and ends the pass."""
        self.inputs.append(hidden)
        self.rest = rest
        raise Caught


def first_inputs(model: Any, samples: torch.Tensor) -> tuple[list[torch.Tensor], dict]:
    """The hidden states before the first block, and its other arguments."""
    blocks = model.model.layers
    catcher = blocks[0] = Catcher(blocks[0])
    for sample in samples:
        try:
            model(sample[None], use_cache=False)
        except Caught:
            continue
    blocks[0] = catcher.block
    return catcher.inputs, catcher.rest


def prune(model: Any, samples: torch.Tensor, method: str, n: int, m: int) -> None:
    """Prunes all linear layers of all blocks in place."""
    formula = getattr(formulas, method)
    hidden, rest = first_inputs(model, samples)
    for block in model.model.layers:
        linear = [x for x in block.modules() if isinstance(x, nn.Linear)]
        grams = {x: torch.zeros(x.in_features, x.in_features) for x in linear}

        def gather(layer: nn.Module, args: tuple, grams: dict = grams) -> None:
            rows = args[0].reshape(-1, args[0].shape[-1])
            grams[layer].addmm_(rows.T, rows)

        hooks = [x.register_forward_pre_hook(gather) for x in linear]
        for each in hidden:
            block(each, **rest)
        for hook in hooks:
            hook.remove()
        for layer, gram in grams.items():
            layer.weight.data = formula(layer.weight.data, gram, n, m)
        hidden = [first(block(each, **rest)) for each in hidden]


def first(output: Any) -> torch.Tensor:
    """The hidden states of what a block returns."""
    return output[0] if isinstance(output, tuple) else output


def perplexity(model: Any, windows: torch.Tensor) -> float:
    """Of windows of inputs and their last target, each token but the first scored."""
    nats = 0.0
    for window in windows:
        logits = model(window[None, :-1], use_cache=False).logits[0]
        nats += float(nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
    return math.exp(nats / windows[:, 1:].numel())


def main() -> None:
    """Reads, prunes, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("method")
    parser.add_argument("pattern")
    parser.add_argument("samples", type=Path, help="int64[samples, length]")
    parser.add_argument("windows", type=Path, help="int64[windows, length + 1]")
    args = parser.parse_args()
    n, m = map(int, args.pattern.split(":"))
    samples, windows = (
        torch.from_numpy(np.load(x)) for x in (args.samples, args.windows)
    )
    with torch.inference_mode():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            args.model, dtype=torch.float32
        )
        prune(model.eval(), samples, args.method, n, m)
        seconds = time.process_time()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        score = perplexity(model, windows)
    print(json.dumps({"seconds": seconds, "peak GB": peak, "perplexity": score}))


if __name__ == "__main__":
    main()
