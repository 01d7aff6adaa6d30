"""The picture of the README: one matrix under FlexHiNM at three sparsities.

python -m bench.picture                               # writes docs/regions.png
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

import flexhinm_jax as fh

matplotlib.use("agg")
from matplotlib import pyplot as plt  # noqa: E402

ROWS, COLUMNS, TILE = 64, 96, 16
COLOURS = {"pruned": "#e4e4e4", "kept, 2:4 column": "#5b9bd5", "dense": "#1f4e79"}
OUT = Path("docs/regions.png")


def weight() -> jax.Array:
    """Rows of four kinds that read different inputs, in no order."""
    keys = jax.random.split(jax.random.key(0), 3)
    kind = jax.random.permutation(keys[0], jnp.repeat(jnp.arange(4), ROWS // 4))
    taste = jnp.exp(1.2 * jax.random.normal(keys[1], (4, COLUMNS)))
    return taste[kind] * jax.random.normal(keys[2], (ROWS, COLUMNS))


def regions(w: jax.Array, sparsity: float) -> np.ndarray:
    """i32[rows, columns] in the order of the packed form: an index into `COLOURS`."""
    method = fh.Magnitude(fh.FlexHiNM(TILE))
    state = method.solve(jax.random.key(1), w, None, sparsity=sparsity)
    support = method.decide(state, w).support
    found, keep = support.regions, np.asarray(support.keep)
    assert found is not None
    tiles = []
    for t, rows in enumerate(np.asarray(found.out_order).reshape(-1, TILE)):
        tile = keep[rows][:, np.asarray(found.in_order[t])].astype(np.int32)
        tile[:, : int(found.dense_end[t])] = 2
        tiles.append(tile)
    return np.concatenate(tiles)


def main() -> None:
    """Draws."""
    w, sparsities = weight(), (0.35, 0.65, 0.85)
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.1), layout="constrained")
    for axis, sparsity in zip(axes, sparsities, strict=True):
        axis.imshow(
            regions(w, sparsity),
            cmap=ListedColormap(list(COLOURS.values())),
            vmin=0,
            vmax=2,
            interpolation="nearest",
        )
        for row in range(TILE, ROWS, TILE):
            axis.axhline(row - 0.5, color="black", linewidth=0.8)
        axis.set(title=f"{sparsity:.0%} pruned", xticks=[], yticks=[])
    patches = [Patch(facecolor=c, label=name) for name, c in COLOURS.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(OUT, dpi=110)
    print(f"wrote {OUT}")


if __name__ == "__main__":
    main()
