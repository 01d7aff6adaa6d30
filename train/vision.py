"""Trains an image classifier, prunes it and trains it on under its masks.

    python -m train.vision                                # digits, residual MLP
    python -m train.vision --config digits_vit --sparsity 0.75
    python -m train.vision --data ~/mnist --method hinm_gyro --out out/mnist

The images are scikit-learn's digits, or what `--data` names: a directory with the four
idx files of MNIST or Fashion-MNIST, or an .npz file. `--method` is a row of
`train.lab.recipes`. Writes metrics.jsonl, curves.png and summary.json into `--out`; the
dense model is kept there and used again as long as its configuration is the same.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flexhinm_jax.models.vision import create
from train.lab import data, programs, tasks, trainer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(trainer.Config):
    """A model and how it is trained; see `trainer.Config`.

    Attributes:
      model: a key of `models.vision.MODELS`.
      fields: fields of the module.
      shift: images are moved by up to this many pixels along both axes in training.
      split: seed of the split of the digits into training and test.
    """

    model: str = "mlp"
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    shift: int = 1
    split: int = 0


def task(config: Config, path: Path | None, seeds: tuple[int, ...]) -> tasks.Task:
    """The classification task, one lane per seed.

    Args:
      config: model and batches.
      path: images; see `data.images`.
      seeds: a lane each; a seed decides initialisation and batches.

    Raises:
      ValueError: bad files, or a model that does not fit the images.
    """
    images = data.images(path, config.split)
    model = create(config.model, images.classes, **config.fields)
    example = images.x_train[:2]
    init = lambda key: model.init(key, example)  # noqa: E731
    params, uses = tasks.started(init, model.apply, example, config.rules, seeds)

    def losses(params: Any, x: jax.Array, y: jax.Array) -> Any:
        """Negative log-likelihood and correctness of every image, for one lane."""
        logits: Any = model.apply(params, x)
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return nll, jnp.argmax(logits, -1) == y

    each = tasks.over_lanes(losses, len(seeds))

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        return jnp.mean(each(params, *batch)[0])

    def batch_at(step: int) -> Any:
        lanes = [_batch(images, config, seed, step) for seed in seeds]
        return tuple(np.stack(part) for part in zip(*lanes, strict=True))

    measure = jax.jit(tasks.over_lanes(losses, len(seeds), shared=True))

    def evaluate(params: Any) -> dict[str, np.ndarray]:
        x, y, size = images.x_test, images.y_test, 1024
        parts = [
            measure(params, x[k : k + size], y[k : k + size])
            for k in range(0, len(x), size)
        ]
        nll, right = (np.concatenate(part, axis=1) for part in zip(*parts, strict=True))
        return {"nll": nll.mean(1), "accuracy": right.mean(1, dtype=np.float32)}

    return tasks.Task(
        name=config.name,
        digest=f"{images.digest()} {seeds}",
        lanes=len(seeds),
        params=params,
        uses=uses,
        loss_fn=loss_fn,
        batch_at=batch_at,
        evaluate=evaluate,
    )


def _batch(images: data.Images, config: Config, seed: int, step: int) -> Any:
    """Batch `step` of one lane: its rows, each moved by a random shift."""
    rows = data.image_rows(len(images.x_train), config.batch_size, seed, step)
    x, y = images.x_train[rows], images.y_train[rows]
    if config.shift:
        far = config.shift
        rng = np.random.default_rng((seed, step, 1))
        down, right = rng.integers(0, 2 * far + 1, (2, len(x)))
        edge = images.x_train.min()
        space = ((0, 0), (far, far), (far, far), (0, 0))
        wide = np.pad(x, space, constant_values=edge)
        i = np.arange(len(x))[:, None, None]
        h = down[:, None, None] + np.arange(x.shape[1])[:, None]
        w = right[:, None, None] + np.arange(x.shape[2])
        x = wide[i, h, w]
    return x, y


def main() -> None:
    """Trains, prunes and trains on."""
    programs.run(
        programs.parser(__doc__, config="digits_mlp", resumes=True), Config, task
    )


if __name__ == "__main__":
    # The configurations know this file by its full name.
    from train import vision as known

    known.main()
