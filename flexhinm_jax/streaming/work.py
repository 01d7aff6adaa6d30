"""The folder in which a streamed pruning run keeps its state until it is finished.

`OUT.partial` holds `job.json` (a fingerprint of what was asked), `budgets.json` (the
sparsity of every matrix, where that was allocated), `model` (the files of the output,
under names that no reader takes for complete), `states` (hidden states before the next
block), `solved` (finished matrices of that block) and one `block-NNNNN.json` per
finished block, which is written last.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import flexhinm_jax
from flexhinm_jax import atomic
from flexhinm_jax.io import fingerprint, huggingface, model_card, records, shards
from flexhinm_jax.pruning.allocate import Mode
from flexhinm_jax.pruning.report import Row, moved
from flexhinm_jax.sequential.cuts import Programs
from flexhinm_jax.sequential.finished import CONFIG, Finished, check_folder
from flexhinm_jax.sequential.job import Job
from flexhinm_jax.sequential.request import Request
from flexhinm_jax.sequential.share import Share
from flexhinm_jax.streaming.blocks import Blocks, BlockUses


def partial(out: Path) -> Path:
    """The folder of a run that writes OUT."""
    target = Path(os.path.realpath(out))
    return target.with_name(target.name + ".partial")


@dataclasses.dataclass(frozen=True)
class Spread:
    """How one sparsity is spread over the matrices.

    Attributes:
      mode: see `pruning.allocate`; "global" and "owl" begin with a pass of the dense
        model.
      exceptions: {regex: sparsity} on keys of the checkpoint, the first match wins; the
        other matrices make up for them. None is no exception.
    """

    mode: Mode = "uniform"
    exceptions: Mapping[str, float | None] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a run is asked to do.

    Attributes:
      blocks: the opened directory.
      uses: what is prunable in it.
      batches: i32[batch, length] each, the calibration text.
      share: which of them this process has.
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
    share: Share
    request: Request
    spread: Spread
    pack: bool
    programs: Programs
    targets: float | Mapping[str, float] | None = None
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    values: str | None = None

    @property
    def own(self) -> list[np.ndarray]:
        """The batches of this process."""
        return [self.batches[n] for n in self.share.numbers]

    def job(self, layer: int, params: Mapping[str, Any], hidden: Sequence[Any]) -> Job:
        """Checks a block and says how to prune it.

        Args:
          layer: which.
          params: its parameters; may be abstract.
          hidden: hidden states before it, one array per batch of this process; may be
            abstract.
        """
        return Job(
            self.blocks.apply(layer),
            params,
            [(h,) for h in hidden],
            self.uses.of(layer),
            dataclasses.replace(self.request, sparsity=self.targets),
        )


@dataclasses.dataclass(frozen=True)
class GoingOn:
    """A run has found what an equal one left unfinished.

    Attributes:
      folder: where that is.
    """

    folder: Path


class Work:
    """The folder of a run that is not finished.

    One process writes; others have a share of the batches and read what it wrote,
    after it said so: the folder is on a file system of all of them.

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
        self.setting, self.share = setting, setting.share
        self.out = Path(os.path.realpath(out))
        self.folder = partial(out)
        self.model = self.folder / "model"
        self.states = self.folder / "states"
        self.budgets = self.folder / "budgets.json"

    @staticmethod
    def check(out: Path) -> None:
        """Refuses a folder that was there before and is of no run, see `check_folder`.

        What is adopted is removed with all that it holds when OUT is there.
        """
        check_folder(partial(out))

    @staticmethod
    def taken(out: Path) -> int:
        """Bytes that the files of an earlier run take already."""
        return sum(p.stat().st_size for p in partial(out).rglob("*") if p.is_file())

    @contextlib.contextmanager
    def kept(
        self, states: int, tell: Callable[[GoingOn], None] = lambda told: None
    ) -> Iterator[None]:
        """Opens the folder, or begins it.

        That of a run that fails is kept if it holds anything of value.

        Args:
          states: bytes of the hidden states of this process that go to disk.
          tell: called where the folder is that of an earlier run, by the process that
            writes.

        Raises:
          FileExistsError: the folder is of no run, see `check`.
          InUse: another run writes OUT.
          ValueError: the folder is of another run.
          OSError: no space.
        """
        writes = self.share.writes
        with atomic.locked(self.out) if writes else contextlib.nullcontext():
            if writes:
                if self._begin(self.share.processes * states):
                    tell(GoingOn(self.folder))
            try:
                self.share.agreed(0)
                Finished(self.folder, record(self.setting), writes=writes)
                yield
            except BaseException:
                self.leave()
                raise

    def _begin(self, states: int) -> bool:
        """Makes the folder, or goes on with it; whether it was there."""
        index = self.setting.blocks.index
        shards.check_space(self.folder, index.size + states - self.taken(self.out))
        if self._is_left():
            shutil.rmtree(self.folder)
        again = (self.folder / CONFIG).exists()
        Finished(self.folder, record(self.setting))
        atomic.sweep(self.folder)
        self.model.mkdir(exist_ok=True)
        try:
            self.writer = shards.Writer(self.model, index)
        except OSError:
            self.leave()
            raise
        return again

    def _is_left(self) -> bool:
        """Whether a run was killed when OUT was there already."""
        if not self.record(0).exists() or self.model.exists():
            return False
        config = self.folder / CONFIG
        return config.is_file() and fingerprint.FIELD in records.read(config)

    def leave(self) -> None:
        """Removes the folder of a run that failed, unless it holds what is of value."""
        worth = [*self.folder.glob("block-*.json"), *self.folder.rglob("*.npz")]
        worth += [self.budgets] if self.budgets.exists() else []
        if self.share.writes and not worth:
            shutil.rmtree(self.folder, ignore_errors=True)

    def resumed(self) -> int:
        """Number of blocks that are done."""
        count = 0
        while self.record(count).exists():
            count += 1
        return self.share.agreed(count)

    def record(self, layer: int) -> Path:
        """The file that says that a block is done."""
        return self.folder / f"block-{layer:05d}.json"

    def rows(self, layer: int) -> tuple[list[Row], dict[str, float]]:
        """Rows of the report and errors of a block that is done."""
        record = records.read(self.record(layer))
        rows = [Row(**{**row, "shape": tuple(row["shape"])}) for row in record["rows"]]
        return rows, record["errors"]

    def solved(self, layer: int) -> Path:
        """Where the finished matrices of a block are kept."""
        return self.folder / "solved" / f"{layer:05d}"

    def finished(self, layer: int) -> Finished:
        """The finished matrices of a block."""
        config = fingerprint.record(layer=layer)
        return Finished(self.solved(layer), config, writes=self.share.writes)

    def done(self, layer: int, rows: list[Row], errors: dict[str, float]) -> None:
        """A block is written, and its hidden states too.

        Raises:
          ValueError: the processes have made different weights of equal sums.
        """
        record = {"rows": [dataclasses.asdict(row) for row in rows], "errors": errors}
        digest = zlib.crc32(json.dumps(record).encode()) >> 1
        if len(set(self.share.said(digest))) > 1:
            raise ValueError(
                f"block {layer} is not the same in all processes: their machines"
                " compute differently; start them on machines of one kind"
            )
        if self.share.writes:
            self.writer.flush()
            records.write(self.record(layer), record)
            shutil.rmtree(self.solved(layer))
        self.share.agreed(0)  # only now its states may be forgotten

    def moved(self, paths: Collection[str]) -> tuple[str, ...] | None:
        """Leaves of all blocks that are written with other values than they had.

        Args:
          paths: which to compare; outside of the blocks everything is copied.

        Returns:
          Their keys; None in a process that does not write.
        """
        if not self.share.writes:
            return None
        blocks = self.setting.blocks
        inside = {key for layer in range(blocks.count) for key in blocks.keys(layer)}
        keys = [key for key in paths if key in inside]
        before, after = (
            {key: source.read(key) for key in keys}
            for source in (blocks.index, self.writer)
        )
        return moved(keys, before, after)

    def finish(
        self, extra: Callable[[Any], Mapping[str, str]] | None, result: Any
    ) -> None:
        """Makes the folder OUT.

        Args:
          extra: result -> {file name: text} to write beside the model, its report and
            its card, or in place of these; or None.
          result: of the run.
        """
        if self.share.writes:
            report = {"errors": result.errors, **result.report.to_dict()}
            texts = model_card.texts(self.setting.blocks.index.directory, report)
            self._write(texts if extra is None else {**texts, **extra(result)})
        self.share.agreed(0)

    def _write(self, texts: Mapping[str, str]) -> None:
        """Copies what is left, and gives the folder its name."""
        blocks = self.setting.blocks
        pruned = {key for layer in range(blocks.count) for key in blocks.keys(layer)}
        for key in blocks.index.files:
            if key not in pruned:
                self.writer.copy(key)
        self.writer.flush()
        huggingface.copy_others(blocks.index.directory, self.model)
        model_card.write(self.model, texts)
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
        model=fingerprint.digest((json.dumps(blocks.contents, sort_keys=True), starts)),
        tokens=setting.batches,
        samples=sum(map(len, setting.batches)),
        length=setting.batches[0].shape[1],
        batch=len(setting.batches[0]),
        method=request.method,
        pattern=request.method.pattern,
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
