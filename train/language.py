"""Trains a byte-level decoder, prunes it and trains it on under its masks.

    python -m train.language                              # Python's standard library
    python -m train.language --sparsity 0.875 --method flexhinm_gyro
    python -m train.language --data book.txt --out out/book

The text is the source of Python's own standard library, split into training and
validation by file, or any file that `--data` names. Quality is in bits per byte of the
validation text. Writes metrics.jsonl, curves.png and summary.json into `--out`; the
dense model is kept there and used again as long as its configuration is the same.
"""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flexhinm_jax.models import decoder
from train.lab import data, programs, tasks, trainer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(trainer.Config):
    """A model and how it is trained; see `trainer.Config`.

    Attributes:
      model: sizes of the decoder.
      length: bytes per sequence.
      windows: sequences of the validation text that are evaluated.
    """

    model: decoder.DecoderConfig
    length: int = 128
    windows: int = 256


def nats(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Mean nats of the next byte, f32[].

    Args:
      logits: f32[batch, length, 256], of tokens[:, :-1].
      tokens: i32[batch, length + 1].
    """
    score = optax.softmax_cross_entropy_with_integer_labels
    return jnp.mean(score(logits, tokens[:, 1:]))


def task(config: Config, path: Path | None, seeds: tuple[int, ...]) -> tasks.Task:
    """The language task, one lane per seed.

    Args:
      config: model and batches.
      path: text; see `data.text`.
      seeds: a lane each; a seed decides initialisation and batches.

    Raises:
      ValueError: a missing, empty or too short file.
    """
    source = data.text(path, config.length)
    apply_fn = functools.partial(decoder.apply, config=config.model)
    init = functools.partial(decoder.init, config=config.model)
    example = jax.ShapeDtypeStruct((1, config.length), jnp.int32)
    params, uses = tasks.started(init, apply_fn, example, config.rules, seeds)
    valid = data.even_windows(source.valid, config.windows, config.length)
    lanes = len(seeds)

    def bits(params: Any, tokens: jax.Array) -> jax.Array:
        """Mean bits per byte of one lane."""
        logits = apply_fn(params, tokens[:, :-1])
        return nats(logits, tokens) / jnp.float32(math.log(2))

    each = tasks.over_lanes(bits, lanes)

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        return jnp.mean(each(params, batch))

    def batch_at(step: int) -> Any:
        size, length = config.batch_size, config.length
        found = [data.windows(source.train, size, length, s, step) for s in seeds]
        return np.stack(found)

    measure = jax.jit(tasks.over_lanes(bits, lanes, shared=True))

    def evaluate(params: Any) -> dict[str, np.ndarray]:
        size = min(16, len(valid))
        whole = valid[: len(valid) // size * size].reshape(-1, size, valid.shape[1])
        found = [np.asarray(measure(params, part)) for part in whole]
        return {"bits_per_byte": np.mean(found, 0)}

    return tasks.Task(
        name=config.name,
        digest=f"{source.digest} {seeds}",
        lanes=lanes,
        params=params,
        uses=uses,
        loss_fn=loss_fn,
        batch_at=batch_at,
        evaluate=evaluate,
    )


def main() -> None:
    """Trains, prunes and trains on."""
    flags = programs.parser(__doc__, config="bytes", resumes=True)
    programs.run(flags, Config, task)


if __name__ == "__main__":
    # The configurations know this file by its full name.
    from train import language as known

    known.main()
