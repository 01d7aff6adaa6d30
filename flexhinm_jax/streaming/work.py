"""The folder in which a streamed pruning run keeps its state until it is finished.

`OUT.partial` holds `job.json` (a fingerprint of what was asked), `budgets.json` (the
sparsity of every matrix, where that was allocated), `model` (the files of the output,
under names that no reader takes for complete), `states` (hidden states before the next
block), `solved` (finished matrices of that block) and one `block-NNNNN.json` per
finished block, which is written last.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import flexhinm_jax
from flexhinm_jax import atomic
from flexhinm_jax.io import fingerprint, huggingface, records, shards
from flexhinm_jax.pruning.allocate import Mode
from flexhinm_jax.pruning.report import Row
from flexhinm_jax.sequential.cuts import Programs
from flexhinm_jax.sequential.finished import Finished
from flexhinm_jax.sequential.job import Job
from flexhinm_jax.sequential.request import Request
from flexhinm_jax.streaming.blocks import Blocks, BlockUses

PARTIAL = ".partial"


@dataclasses.dataclass(frozen=True)
class Spread:
    """How one sparsity is spread over the matrices.

    Attributes:
      mode: see `pruning.allocate`; "global" and "owl" begin with a pass of the dense
        model.
      exceptions: {regex: sparsity} on keys of the checkpoint, the first match wins; the
        other matrices make up for them.
    """

    mode: Mode = "uniform"
    exceptions: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a run is asked to do.

    Attributes:
      blocks: the opened directory.
      uses: what is prunable in it.
      batches: i32[batch, length] each, the calibration text.
      request: method, sparsity, rules, target and key.
      spread: how one sparsity is spread over the matrices.
      pack: whether the packed form is written too.
      programs: what was compiled.
      targets: sparsity of every leaf, or one for all: what the sparsity of the request
        and the spread come to.
      more: what else decides about the result, by name.
      values: dtype of the packed values; None for that of the weights.
    """

    blocks: Blocks
    uses: BlockUses
    batches: list[np.ndarray]
    request: Request
    spread: Spread
    pack: bool
    programs: Programs
    targets: float | Mapping[str, float] | None = None
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    values: str | None = None

    def job(self, layer: int, params: Mapping[str, Any], hidden: Sequence[Any]) -> Job:
        """Checks a block and says how to prune it.

        Args:
          layer: which.
          params: its parameters; may be abstract.
          hidden: hidden states before it, one array per batch; may be abstract.
        """
        return Job(
            self.blocks.apply(layer),
            params,
            [(h,) for h in hidden],
            self.uses.of(layer),
            dataclasses.replace(self.request, sparsity=self.targets),
        )


class Work:
    """The folder of a run that is not finished.

    Attributes:
      folder: `OUT.partial`.
      model: what becomes OUT.
      states: hidden states on disk.
      budgets: file with the sparsity of every matrix, once that is known.
      writer: writes the weights.
    """

    writer: shards.Writer

    def __init__(self, out: Path, setting: Setting):
        """Names the folder; nothing is touched."""
        self.setting = setting
        self.out = Path(os.path.realpath(out))
        self.folder = self.out.with_name(self.out.name + PARTIAL)
        self.model = self.folder / "model"
        self.states = self.folder / "states"
        self.budgets = self.folder / "budgets.json"

    @staticmethod
    def taken(out: Path) -> int:
        """Bytes that the files of an earlier run take already."""
        folder = out.with_name(out.name + PARTIAL)
        return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())

    def kept(self, needed: int) -> "Work":
        """Opens the folder, or begins it; to be used as a context."""
        shards.check_space(self.folder, needed - self.taken(self.out))
        if self.record(0).exists() and not self.model.exists():
            shutil.rmtree(self.folder)  # killed when OUT was there and this was left
        Finished(self.folder, record(self.setting))
        self.model.mkdir(exist_ok=True)
        try:
            self.writer = shards.Writer(self.model, self.setting.blocks.index)
        except OSError:
            self.__exit__(OSError)
            raise
        return self

    def __enter__(self) -> "Work":
        """The folder."""
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        """Keeps the folder of a run that failed, if it holds anything of value."""
        del rest
        worth = [*self.folder.glob("block-*.json"), *self.folder.rglob("*.npz")]
        worth += [self.budgets] if self.budgets.exists() else []
        if kind is not None and not worth:
            shutil.rmtree(self.folder, ignore_errors=True)

    def resumed(self) -> int:
        """Number of blocks that are done."""
        count = 0
        while self.record(count).exists():
            count += 1
        return count

    def record(self, layer: int) -> Path:
        """The file that says that a block is done."""
        return self.folder / f"block-{layer:05d}.json"

    def rows(self, layer: int) -> tuple[list[Row], dict[str, float]]:
        """Rows of the report and errors of a block that is done."""
        found = records.read(self.record(layer))
        rows = [Row(**{**row, "shape": tuple(row["shape"])}) for row in found["rows"]]
        return rows, found["errors"]

    def solved(self, layer: int) -> Path:
        """Where the finished matrices of a block are kept."""
        return self.folder / "solved" / f"{layer:05d}"

    def done(self, layer: int, rows: list[Row], errors: dict[str, float]) -> None:
        """A block is written, and its hidden states too."""
        self.writer.flush()
        found = {"rows": [dataclasses.asdict(row) for row in rows], "errors": errors}
        records.write(self.record(layer), found)
        shutil.rmtree(self.solved(layer))

    def finish(self, extra: Mapping[str, str]) -> None:
        """Copies what is left, and makes the folder OUT."""
        blocks = self.setting.blocks
        pruned = {key for layer in range(blocks.count) for key in blocks.keys(layer)}
        for key in blocks.index.files:
            if key not in pruned:
                self.writer.copy(key)
        self.writer.flush()
        huggingface.copy_others(blocks.index.directory, self.model)
        for name, text in extra.items():
            (self.model / name).write_text(text)
        self.writer.finish()
        atomic.flush(self.model)
        atomic.swap(self.model, self.out)
        shutil.rmtree(self.folder)


def record(setting: Setting) -> dict[str, str]:
    """Everything that decides about the result, as text."""
    blocks, request = setting.blocks, setting.request
    # Headers and the start of every array: enough to know another checkpoint.
    starts = {key: _start(blocks.index.read(key)) for key in blocks.index.files}
    return fingerprint.record(
        version=flexhinm_jax.__version__,
        model=fingerprint.digest((json.dumps(blocks.given, sort_keys=True), starts)),
        tokens=setting.batches,
        method=request.method,
        sparsity=request.sparsity,
        allocate=setting.spread.mode,
        exceptions=dict(setting.spread.exceptions),
        rules=setting.uses.actions,
        key=str(fingerprint.key_words(request.key)),
        target=request.target,
        center=request.center,
        statistics=request.statistics,
        block=request.block,
        reconstruct=repr(request.reconstruct),
        dtype=blocks.dtype,
        pack=setting.values or setting.pack,
        **setting.more,
    )


def _start(x: np.ndarray) -> tuple[tuple[int, ...], np.ndarray]:
    return x.shape, np.array(x.reshape(-1)[:1024])
