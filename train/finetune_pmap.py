"""Fine-tunes a pruned model under jax.pmap, with equal masks on every device.

    python -m train.finetune_pmap --devices 8              # virtual devices on a CPU
    python -m train.finetune_pmap --devices 2 --config bytes --method flexhinm_gyro

The dense model is trained on one device and pruned there, by the host, once; parameters
and masks are then copied to every device, and each takes its share of every batch.
Gradients are averaged, so all devices make the same update. At the end parameters and
masks of all devices are compared bit by bit.

`jax.pmap` is the older way to use several devices; new programs rather use `jax.jit`
with shardings. The step itself is the same: `fh.make_step(..., axis_name="devices")`.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import flexhinm_jax as fh
from flexhinm_jax.training.phases import At
from flexhinm_jax.training.run import NotFinite
from flexhinm_jax.training.sharding import split_batch
from train import language, vision
from train.lab import programs, results, tasks
from train.lab.recipes import Recipe
from train.lab.tasks import Task
from train.lab.trainer import Config, Trainer


def devices(count: int) -> list[Any]:
    """The first `count` devices, virtual ones on a CPU.

    Must run before JAX uses a device for the first time.

    Raises:
      ValueError: there are fewer, or `count` is not positive.
    """
    if count < 1:
        raise ValueError(f"--devices {count}: need at least one")
    # Has an effect on the CPU alone, and is refused once a device was used.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count)
    found = jax.local_devices()
    if len(found) < count:
        raise ValueError(
            f"--devices {count}: there are {len(found)} ({found[0].platform}); ask for "
            "fewer, or start with JAX_PLATFORMS=cpu and "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return found[:count]


def finetune(
    task: Task,
    config: Config,
    recipe: Recipe,
    sparsity: float,
    params: Any,
    key: jax.Array,
    on: list[Any],
    path: Path | None = None,
    report: Callable[[str], None] = lambda text: None,
) -> Any:
    """Prunes on the host and trains under pmap.

    Args:
      task: the task.
      config: how long and how fast.
      recipe: its method prunes once, at the start; open gates harden at the end.
      sparsity: the target.
      params: the dense model.
      key: PRNG key, consumed.
      on: devices.
      path: JSONL file for the records, or None.
      report: gets a line of text about the comparison of the devices.

    Returns:
      The training of the first device, hardened.

    Raises:
      ValueError: a batch that does not divide, or devices that disagree.
    """
    method, uses, steps = recipe.method, task.uses, config.steps
    if method is None:
        raise ValueError("the recipe 'dense' prunes nothing; choose another one")
    tx = config.optimizer(config.prune_rate, steps, task.lanes)
    solve_key, key = jax.random.split(key)
    states = fh.solve(method, solve_key, params, uses, None, sparsity)
    start = fh.init_training(method, params, uses, states, tx, key=key)
    step = fh.make_step(method, task.loss_fn, tx, uses, axis_name="devices")
    mapped = jax.pmap(step, axis_name="devices", devices=on, donate_argnums=0)

    def together(copies: Any, batch: Any) -> tuple[Any, Any]:
        copies, metrics = mapped(copies, batch)
        return copies, first(metrics)

    def before(copies: Any, at: At) -> Any:
        return dataclasses.replace(copies, progress=replicate(np.float32(at.part), on))

    def hard(copies: Any) -> tuple[Any, dict[str, Any]]:
        return replicate(fh.harden(method, first(copies), uses), on), {}

    last = max(1, int(recipe.pruning * steps))
    run = fh.Run(
        replicate(start, on),
        [
            fh.Phase(together, last, end=hard),
            fh.Phase(together, steps - last, progress=lambda _: 1.0),
        ],
        lambda step: (split_batch(task.batch_at(step), len(on), 1),),
        before=before,
        every=config.every,
    )
    results.follow(run, path, recipe.title, steps)
    copies = run.now()
    report(compared({"params": copies.params, "states": copies.states}))
    return first(copies)


def replicate(tree: Any, on: list[Any]) -> Any:
    """The same tree on every device, with a new first axis over them."""
    mesh = jax.sharding.Mesh(np.array(on), ("devices",))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("devices"))

    def copy(x: Any) -> jax.Array:
        x = jnp.asarray(x)
        return jax.device_put(jnp.broadcast_to(x, (len(on), *x.shape)), spread)

    return jax.tree.map(copy, tree)


def first(tree: Any) -> Any:
    """What the first device holds."""
    return jax.tree.map(lambda x: x[0], tree)


def compared(copies: Any) -> str:
    """Compares what the devices hold, bit by bit.

    Raises:
      ValueError: two devices differ; the message names the first such leaf.
    """
    count = 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(copies)[0]:
        count = leaf.shape[0]
        held = [np.asarray(s.data) for s in leaf.addressable_shards]
        for place, other in enumerate(held):
            if other.tobytes() != held[0].tobytes():
                raise ValueError(
                    f"device {place} differs from device 0 at "
                    f"{jax.tree_util.keystr(path)}; the devices did not train together"
                )
    return f"parameters and masks are equal bit by bit on {count} devices"


def main() -> None:
    """Trains, prunes, fine-tunes on all devices."""
    parser = programs.parser(__doc__, config="digits_mlp")
    parser.add_argument("--devices", type=int, default=8)
    args = parser.parse_args()
    before = time.perf_counter()
    try:
        on = devices(args.devices)
        config = programs.config(args.config, Config, **programs.changes(args))
        recipe = programs.recipe(args.method, config)
        make: Any = vision.task
        if isinstance(config, language.Config):
            make = language.task
        task = make(config, args.data, args.seeds)
        split_batch(task.batch_at(0), args.devices, 1)
        folder = args.out or Path("out") / f"pmap-{config.name}"
        dense = Trainer(task, config).dense(folder)
        training = finetune(
            task,
            config,
            recipe,
            args.sparsity,
            dense,
            jax.random.key(args.seeds[0]),
            on,
            folder / "metrics.jsonl",
            print,
        )
    except (ValueError, NotFinite) as error:
        raise SystemExit(f"error: {error}") from None
    rows = []
    for title, params in (("dense", dense), (recipe.title, training.params)):
        found = task.evaluate(params) | {"zeros": tasks.zeros(task, params)}
        rows.append([title, *map(programs.spread, found.values())])
    results.show(f"{config.name} on {args.devices} devices", ["", *found], rows)
    print(f"{time.perf_counter() - before:.0f} seconds; wrote {folder}/")


if __name__ == "__main__":
    main()
