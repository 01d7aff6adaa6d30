"""Convolutions, read as products with the patches under the window of the kernel.

Whatever the layout of the kernel, the inputs of its matrix are ordered by position
under the window first and by channel last: m consecutive inputs are channels of one
position, as N:M hardware wants them. Patches take the size of the kernel times the
image, so they are made for some images, or some rows of one, at a time.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jax import Array, lax
from jax import numpy as jnp

from flexhinm_jax.tracing import views
from flexhinm_jax.tracing.contractions import Chunk, Kind, Product, Stop, Tracked


def match_conv(eqn: Any, operands: list) -> Product | Stop:
    """The product of a convolution: a dot with patches, one stack entry per group."""
    p, shape = eqn.params, eqn.invars[1].aval.shape
    if isinstance(operands[0], Tracked):
        return Stop("convolved as the image, not as the kernel", Kind.PRODUCT)
    if p["batch_group_count"] != 1:
        return Stop("a convolution with batch groups", Kind.PRODUCT)
    lhs, rhs, out_spec = p["dimension_numbers"]
    w, groups = operands[1], p["feature_group_count"]
    split = (groups, shape[rhs[0]] // groups)
    out = views.regroup((w.view.dims[rhs[0]],), split)
    if out is None or not all(a.whole for a in out[0]):
        text = "feature groups of a convolution cut an axis of the leaf"
        return Stop(text, Kind.PRODUCT)
    if is_depthwise(groups, shape[rhs[1]]):
        text = "a depthwise convolution: one input channel per group"
        return Stop(text, Kind.PRODUCT)
    if groups > 1 and split[1] == 1:
        return Stop("a grouped convolution with one output per group", Kind.PRODUCT)
    space = tuple(eqn.outvars[0].aval.shape[d] for d in out_spec[2:])
    kernel = tuple(shape[d] for d in rhs[2:])
    window = Window(tuple(lhs), kernel, groups, space, window_params(p))
    inputs = tuple(w.view.dims[d] for d in rhs[1:])
    atoms, channels = len(views.flat(inputs)), len(inputs[0])

    def finish(y: Any) -> Any:
        y = y.transpose([*range(1, y.ndim - 1), 0, y.ndim - 1])  # [n, *space, g, o / g]
        y = y.reshape(*y.shape[:-2], -1)
        y = y.transpose([0, y.ndim - 1, *range(1, y.ndim - 1)])  # [n, o, *space]
        return y.transpose([int(d) for d in np.argsort(out_spec)])

    return Product(
        weight=w,
        batch=out[:1],
        out=out[1:],
        inputs=inputs,
        operand=operands[0],
        arrange=window.patches,
        free=(operands[0].shape[lhs[0]], *space),
        finish=finish,
        result=eqn.outvars[0].aval,
        reading=("conv", kernel, groups, *map(str, window_params(p).items()), str(lhs)),
        order=(*range(channels, atoms), *range(channels)),
        parts=window.parts,
        least_bytes=window.row_bytes(operands[0].shape),
        keep_positions=lambda keep: window.kept(keep, operands[0].shape),
    )


def is_depthwise(groups: int, channels: int) -> bool:
    """Whether a convolution sees one input channel per group, whatever its outputs."""
    return groups > 1 and channels == 1


def window_params(params: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a convolution that choose the patches."""
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
    return {name: params[name] for name in names}


@dataclasses.dataclass(frozen=True)
class Window:
    """What a convolution sees of its image.

    Attributes:
      spec: axes of the image: images, features, space.
      kernel: spatial shape of the kernel.
      groups: number of feature groups.
      space: spatial shape of the result.
      params: from `window_params`.
    """

    spec: tuple[int, ...]
    kernel: tuple[int, ...]
    groups: int
    space: tuple[int, ...]
    params: dict[str, Any]

    def patches(self, image: Array) -> Array:
        """im2col of all images.

        Args:
          image: in the order of the program.

        Returns:
          [groups, n, *space, features / groups * prod(kernel)], features major.
        """
        return self._patches(image.transpose(self.spec), self.params)

    def rows(self, image: Array, at: Any, count: int, row: Any, rows: int) -> Array:
        """im2col of `count` images from `at` on, and there of some rows of the result.

        Args:
          image: in the order of the program.
          at: the first image.
          count: number of images.
          row: the first position along the first spatial axis of the result.
          rows: number of those positions.
        """
        x = lax.dynamic_slice_in_dim(image.transpose(self.spec), at, count, axis=0)
        if not self.space or rows == self.space[0]:
            return self._patches(x, self.params)
        p = {name: list(values) for name, values in self.params.items()}
        stride, step = p["window_strides"][0], p["rhs_dilation"][0]
        edges = [(0, 0, 0)] * x.ndim
        edges[2] = (*p["padding"][0], p["lhs_dilation"][0] - 1)
        x = lax.pad(x, jnp.zeros((), x.dtype), edges)
        length = (rows - 1) * stride + (self.kernel[0] - 1) * step + 1
        x = lax.dynamic_slice_in_dim(x, row * stride, length, axis=2)
        p["padding"][0], p["lhs_dilation"][0] = (0, 0), 1
        return self._patches(x, p)

    def _patches(self, x: Array, params: dict[str, Any]) -> Array:
        out = lax.conv_general_dilated_patches(
            x, filter_shape=self.kernel, precision=lax.Precision.HIGHEST, **params
        )
        n, space = out.shape[0], out.shape[2:]
        out = out.reshape(n, self.groups, -1, *space)
        return jnp.moveaxis(out, (1, 2), (0, -1))

    def kept(self, keep: Array, shape: Sequence[int]) -> Array:
        """The mask of an image over positions of the result, bool[n, *space].

        Positions that stay in place keep their mask; others see a token that counts
        under the window.

        Args:
          keep: broadcastable against the image.
          shape: of the image.
        """
        keep = keep.transpose(self.spec).any(axis=1, keepdims=True)
        sizes = [shape[d] for d in self.spec]
        p, in_place = self.params, self.space == tuple(sizes[2:])
        in_place &= all(n == 1 for n in (*p["window_strides"], *p["lhs_dilation"]))
        if not in_place and math.prod(keep.shape[2:]) > 1:
            wide = jnp.broadcast_to(keep, (keep.shape[0], 1, *sizes[2:]))
            ones = jnp.ones((1, 1, *self.kernel), jnp.float32)
            keep = lax.conv_general_dilated(wide.astype(jnp.float32), ones, **p) > 0
        elif not in_place:
            keep = keep.reshape(keep.shape[0], 1, *(1 for _ in self.space))
        return jnp.broadcast_to(keep[:, 0], (sizes[0], *self.space))

    def row_bytes(self, shape: Sequence[int]) -> int:
        """Bytes of the patches of one row of the result, for images of this shape."""
        width = math.prod(self.space[1:])
        return 4 * width * shape[self.spec[1]] * math.prod(self.kernel)

    def parts(self, product: Product, limit: int) -> Iterator[tuple[int, Any]]:
        """The tokens in chunks whose patches take at most `limit` bytes.

        Yields:
          (number of chunks, number of one -> `Chunk`): all images, or one and its
          rows, in equal chunks and a smaller one at the end.
        """
        images = product.operand.shape[self.spec[0]]
        height, width = (self.space or (1,))[0], math.prod(self.space[1:])
        row_bytes = self.row_bytes(product.operand.shape)
        together = max(1, limit // max(1, row_bytes * height))
        rows = height
        if row_bytes * height > limit:
            rows = max(1, limit // row_bytes)

        def chunk(at: Any, count: int, row: Any, rows: int) -> Chunk:
            first, tokens = (at * height + row) * width, count * rows * width

            def read(operand: Array) -> Array:
                patches = self.rows(operand, at, count, row, rows)
                return product.columns_of(patches, tokens)

            return Chunk(read, first, tokens)

        if rows == height:
            whole, left = divmod(images, together)
            if whole:
                yield whole, lambda k: chunk(k * together, together, 0, height)
            if left:
                yield 1, lambda _: chunk(whole * together, left, 0, height)
            return
        whole, left = divmod(height, rows)
        yield images * whole, lambda k: chunk(k // whole, 1, k % whole * rows, rows)
        if left:
            yield images, lambda k: chunk(k, 1, whole * rows, left)
