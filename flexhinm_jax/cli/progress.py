"""How far a run has come, for people."""

import math

from flexhinm_jax.cli.console import bytes_text
from flexhinm_jax.sequential.cuts import Layer
from flexhinm_jax.sequential.trained import Trained
from flexhinm_jax.streaming import learned, streaming
from flexhinm_jax.streaming.blocks import Blocks
from flexhinm_jax.streaming.memory import Budget


def plan_text(plan: Budget, shape: tuple[int, ...]) -> str:
    """The plan of memory for people."""
    lines = [f"planned memory for {shape[0]} samples of {shape[1]} tokens:"]
    lines += [f"  {name:<28}{bytes_text(value):>10}" for name, value in plan.rows()]
    if plan.limit is not None:
        lines.append(f"  {'limit':<28}{bytes_text(plan.limit):>10}")
    return "\n".join(lines)


def budgets_text(allocated: streaming.Allocated, blocks: Blocks) -> str:
    """The sparsity of every block, in one paragraph."""
    shown = []
    for layer in range(blocks.count):
        keys = [key for key in blocks.keys(layer) if key in allocated.sparsity]
        sizes = [math.prod(blocks.index.shape(key)) for key in keys]
        pairs = zip(keys, sizes, strict=True)
        removed = sum(allocated.sparsity[key] * size for key, size in pairs)
        shown.append(f"{removed / sum(sizes):.3f}" if keys else "dense")
    return f"sparsity of the blocks: {' '.join(shown)}"


def layer_text(layer: Layer) -> str:
    """One line about a finished matrix."""
    at = "".join(f"[{':' if i is None else i}]" for i in layer.at)
    return (
        f"{layer.done}/{layer.total} {layer.path}{at}: error {layer.error:.4f},"
        f" {layer.seconds:.1f} s, {bytes_text(layer.held)} held"
    )


def window_text(window: Trained) -> str:
    """One line about a window that was reconstructed."""
    return (
        f"{window.window}: outputs off by {window.before:.4f}, after training by"
        f" {window.after:.4f} (of their squares), {window.seconds:.1f} s"
    )


def block_text(block: streaming.Block) -> str:
    """One line about a finished block."""
    left = f"{duration(block.left)} left"
    return (
        f"block {block.layer + 1}/{block.total}: error {block.error:.4f},"
        f" {block.seconds:.1f} s, peak {bytes_text(block.peak)}, {left}"
    )


def judged_text(told: learned.Judged) -> str:
    """One line about a look at the masks of a block."""
    loss = "" if math.isnan(told.loss) else f" loss {told.loss:.4f},"
    return (
        f"block {told.layer + 1}/{told.total}, step {told.step} of {told.steps}:{loss}"
        f" held back {told.value:.4f}"
    )


def duration(seconds: float) -> str:
    """Hours and minutes, or seconds below two minutes."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"
