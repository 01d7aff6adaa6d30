"""What pruning takes on many accelerators: FLOP, bytes and seconds of a plan.

    make bench-placement                          # all parts; computes next to nothing
    make bench-placement ARGS="--only plan"       # the cost model alone

plan: SparseGPT 2:4 on 128 samples of 2048 tokens, for three models on 8 and 64
accelerators. Batches are divided, so Gram matrices are summed over all; solving is
divided by matrices and, where one takes too long, by its rows, which share nothing but
the factor of the Gram matrix. "in order": one product after the other, on the inputs
that the pruned weights before it give. "at once": all products on the inputs of the
dense model, every Gram matrix on the accelerator that solves it.
simulated: the two programs of the plan compiled for eight virtual devices at the shapes
of LLaMA-2-7B; what they send is counted in what the compiler made.
check: the same count of FLOP beside the measured seconds of one block on a CPU.

The figures of the hardware are those of data sheets; its shares that are reached are
assumptions. Both stand in `ACCELERATOR`.
"""

import dataclasses
import functools
import heapq
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import flexhinm_jax as fh
from bench import report
from bench.scale import llama
from bench.study import Row, Study, alone
from flexhinm_jax.models import decoder
from flexhinm_jax.pruning import statistics
from flexhinm_jax.pruning.solve import solve_matrix
from flexhinm_jax.types import Stats

PLAN = "Minutes of a plan on many accelerators"
SIMULATED = "Bytes that one of eight devices receives, from the compiled program"
CHECK = "The count of FLOP beside a measurement"

SAMPLES, LENGTH = 128, 2048
STEP_TOKENS = 4096  # of an accelerator at a time; each adds to the Gram matrices
BF16, F32 = 2, 4  # bytes


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """Figures of one accelerator: those of an H100 SXM, and assumed shares of them.

    Attributes:
      bf16: FLOP a second of dense products.
      f32: FLOP a second in float32, in which statistics are summed and solved.
      memory: bytes a second of its memory.
      near: bytes a second, each way, to others of its machine.
      far: bytes a second, each way, to those of other machines.
      machine: accelerators of a machine.
      product: share of the FLOP that products reach.
      factor: share of the FLOP that factorisations and triangular solves reach.
    """

    bf16: float = 989e12
    f32: float = 67e12
    memory: float = 3.35e12
    near: float = 450e9
    far: float = 50e9
    machine: int = 8
    product: float = 0.5
    factor: float = 0.1


ACCELERATOR = Accelerator()

MODELS: dict[str, dict[str, Any]] = {
    "LLaMA-2-7B": llama(4096, 11_008, 32, 32),
    "LLaMA-2-70B": llama(8192, 28_672, 80, 64) | {"num_key_value_heads": 8},
    # About the shape of GLM-4.5-Air.
    "100B, 8 of 128 experts": {
        "model_type": "qwen3_moe",
        "vocab_size": 151_552,
        "hidden_size": 4096,
        "intermediate_size": 10_944,
        "num_hidden_layers": 46,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 1408,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
}


@dataclasses.dataclass(frozen=True)
class Cut:
    """Matrices that read the same inputs: one Gram matrix, one factor.

    Attributes:
      stage: cuts of a block with the same one are solved on the same weights.
      rows: outputs of all of them.
      width: inputs.
      share: of the tokens that reach them.
    """

    stage: str
    rows: int
    width: int
    share: float = 1.0

    @property
    def forward(self) -> float:
        """FLOP of the products for one token of the text."""
        return 2 * self.share * self.rows * self.width

    @property
    def gram(self) -> float:
        """FLOP of X^T X for one token; of wide ones four bands, `statistics.upper`."""
        part = 0.625 if self.width >= statistics.MIN_BANDED_WIDTH else 1.0
        return 2 * self.share * part * self.width**2

    @property
    def factor(self) -> float:
        """FLOP of the Cholesky factor and its inverse, `gram.inverse_factor`."""
        return 4 / 3 * self.width**3

    @property
    def row(self) -> float:
        """FLOP of the updates of one row."""
        return float(self.width**2)

    @property
    def gram_bytes(self) -> int:
        """Bytes of the Gram matrix."""
        return F32 * self.width**2

    @property
    def weight_bytes(self) -> int:
        """Bytes of the matrices."""
        return BF16 * self.rows * self.width


def cuts(config: decoder.DecoderConfig, layer: int) -> list[Cut]:
    """The cuts of a block, from the shapes of its weights."""
    stages = ({"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"})
    stages += ({"down_proj"},)
    experts, shapes_of = config.experts, defaultdict(list)
    for key, shape in decoder.block_shapes(config, layer).items():
        kind = key.removesuffix(".weight").rpartition(".")[2]
        expert = re.search(r"experts\.\d+", key)
        for place, kinds in enumerate(stages):
            if len(shape) == 2 and kind in kinds:
                shapes_of[place, expert[0] if expert else ""].append(shape)
    share = 1.0 if experts is None else experts.chosen / experts.count
    return [
        Cut(f"{place}", sum(o for o, _ in shapes), shapes[0][1], share if name else 1.0)
        for (place, name), shapes in shapes_of.items()
    ]


@dataclasses.dataclass(frozen=True)
class Placed:
    """Which accelerator solves what.

    Attributes:
      parts: per accelerator (number of the cut, rows).
      loads: per accelerator its seconds.
    """

    parts: list[list[tuple[int, int]]]
    loads: list[float]

    @property
    def longest(self) -> float:
        """Seconds until the last is done."""
        return max(self.loads)

    @property
    def balance(self) -> float:
        """The longest over the mean."""
        return self.longest * len(self.loads) / sum(self.loads)


def seconds(cut: Cut, rows: int, chip: Accelerator) -> float:
    """Seconds of solving some rows of a cut: each part needs the factor."""
    factor = cut.factor / (chip.factor * chip.f32)
    return factor + rows * cut.row / (chip.product * chip.f32)


def placed(work: Sequence[Cut], count: int, chip: Accelerator = ACCELERATOR) -> Placed:
    """Divides cuts over accelerators, the longest first to the least loaded.

    A cut that the last accelerator waits for is divided by rows as long as that helps.
    """
    pieces = [1] * len(work)
    best = longest_first(work, pieces, count, chip)
    while True:
        last = best.parts[best.loads.index(best.longest)]
        k = max(last, key=lambda part: seconds(work[part[0]], part[1], chip))[0]
        pieces[k] += 1
        if pieces[k] > min(count, work[k].rows):
            return best
        other = longest_first(work, pieces, count, chip)
        if other.longest >= best.longest:
            return best
        best = other


def longest_first(
    work: Sequence[Cut], pieces: Sequence[int], count: int, chip: Accelerator
) -> Placed:
    """Divides cuts, each in so many pieces of its rows."""
    parts = []
    for k, (cut, n) in enumerate(zip(work, pieces, strict=True)):
        edges = [cut.rows * p // n for p in range(n + 1)]
        parts += [(k, b - a) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    parts.sort(key=lambda part: -seconds(work[part[0]], part[1], chip))
    heap = [(0.0, n) for n in range(count)]
    own: list[list[tuple[int, int]]] = [[] for _ in range(count)]
    for k, rows in parts:
        load, n = heap[0]
        own[n].append((k, rows))
        heapq.heapreplace(heap, (load + seconds(work[k], rows, chip), n))
    loads = dict((n, load) for load, n in heap)
    return Placed(own, [loads[n] for n in range(count)])


@dataclasses.dataclass(frozen=True)
class Costs:
    """What a plan takes.

    Attributes:
      forward: seconds of the products and of attention.
      gram: seconds of the sums, the longer of computing and of moving them in memory.
      sending: seconds.
      solving: seconds until the last accelerator is done.
      received: bytes that one accelerator receives.
      balance: of the solving, the longest over the mean.
      held: bytes of one accelerator: a block twice, the weights that wait for it, Gram
        matrices and hidden states.
    """

    forward: float
    gram: float
    sending: float
    solving: float
    received: float
    balance: float
    held: float

    @property
    def minutes(self) -> float:
        """In all, nothing overlapped."""
        return (self.forward + self.gram + self.sending + self.solving) / 60


def costs(name: str, count: int, in_order: bool, chip: Accelerator) -> Costs:
    """The plan for a model on so many accelerators.

    Args:
      name: of `MODELS`.
      count: accelerators.
      in_order: one stage of a block after the other; otherwise all at once.
      chip: figures.
    """
    config = decoder.DecoderConfig.from_dict(MODELS[name])
    blocks = [cuts(config, n) for n in range(config.num_hidden_layers)]
    every = [cut for block in blocks for cut in block]
    tokens = SAMPLES * LENGTH / count
    heads = config.num_attention_heads * config.head_size
    attention = 2 * LENGTH * heads * len(blocks)  # q k^T and its product with v, half
    forward = tokens * (sum(cut.forward for cut in every) + attention)
    grams = sum(cut.gram_bytes for cut in every)
    moved = 2 * grams * tokens / STEP_TOKENS
    summing = tokens * sum(cut.gram for cut in every) / (chip.product * chip.f32)
    others = (count - 1) / count
    if in_order:
        stages = [same for block in blocks for same in by_stage(block)]
        known: dict[Any, Placed] = {}
        plans = []
        for stage in stages:
            key = tuple(stage)
            if key not in known:
                known[key] = placed(stage, count, chip)
            plans.append(known[key])
        received = sum(map(receiving, stages, plans))
        # Every accelerator goes on with all of the pruned weights.
        received += others * sum(cut.weight_bytes for cut in every)
        solving = sum(plan.longest for plan in plans)
        balance = solving * count / sum(sum(plan.loads) for plan in plans)
        held = 2 * max(sum(cut.gram_bytes for cut in stage) for stage in stages)
    else:
        plan = placed(every, count, chip)
        own = [sum(every[k].gram_bytes for k, _ in parts) for parts in plan.parts]
        received, solving, balance = receiving(every, plan), plan.longest, plan.balance
        weights = [sum(BF16 * r * every[k].width for k, r in p) for p in plan.parts]
        held = max(own) + max(weights) + 2 * max(cut.gram_bytes for cut in every)
    block = max(sum(cut.weight_bytes for cut in block) for block in blocks)
    speed = chip.near if count <= chip.machine else chip.far
    hidden = BF16 * tokens * config.hidden_size
    return Costs(
        forward / (chip.product * chip.bf16),
        max(summing, moved / chip.memory),
        received / speed,
        solving,
        received,
        balance,
        2 * block + held + 2 * hidden,
    )


def by_stage(block: Sequence[Cut]) -> list[list[Cut]]:
    """The cuts of a block that are solved together, in order."""
    same = defaultdict(list)
    for cut in block:
        same[cut.stage].append(cut)
    return [same[name] for name in sorted(same)]


def receiving(work: Sequence[Cut], plan: Placed) -> float:
    """Bytes that reach one accelerator while Gram matrices are summed.

    A reduce-scatter gives everyone an equal part of the sums; then a cut that several
    solve goes to all of them.
    """
    count, every = len(plan.parts), sum(cut.gram_bytes for cut in work)
    own = max(sum(work[k].gram_bytes for k, _ in parts) for parts in plan.parts)
    return every * (count - 1) / count + max(0.0, own - every / count)


def plan(flags: Any) -> Iterator[Row]:
    """Every model on 8 and 64 accelerators."""
    del flags
    for name in MODELS:
        for count in (8, 64):
            for in_order in (True, False):
                cost = costs(name, count, in_order, ACCELERATOR)
                how = "in order" if in_order else "at once"
                more = {
                    "forward s": cost.forward,
                    "Gram s": cost.gram,
                    "sending s": cost.sending,
                    "solving s": cost.solving,
                    "received GB": cost.received / 1e9,
                    "longest / mean": cost.balance,
                    "held GB": cost.held / 1e9,
                }
                what = f"{name}, {count} accelerators, {how}"
                yield Row(PLAN, what, cost.minutes, more=more)


def summed(mesh: Mesh, x: Array) -> Array:
    """The Gram matrices of tokens that are divided over a mesh, [k, i, i] by k.

    Args:
      mesh: of one axis.
      x: [tokens, k, i], divided by tokens.
    """

    def own(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 1).astype(jnp.float32)
        return lax.psum_scatter(statistics.upper(x), "all", tiled=True)

    return jax.shard_map(own, mesh=mesh, in_specs=P("all"), out_specs=P("all"))(x)


def solved(mesh: Mesh, method: Any, w: Array, keys: Array, gram: Array) -> Array:
    """The pruned matrices [k, o, i] of a stack that is divided over a mesh by k."""

    def one(w: Array, key: Array, gram: Array) -> Array:
        h = statistics.symmetric(gram)
        count = jnp.ones((), jnp.float32)
        zero = jnp.zeros(h.shape[:1], jnp.float32)
        stats = Stats(sq_norm=jnp.diagonal(h), mean=zero, count=count, gram=h)
        state = solve_matrix(method, w, key, stats, None)
        return method.decide(state, w).weight

    over = P("all")
    run = jax.shard_map(
        jax.vmap(one),
        mesh=mesh,
        in_specs=(over, over, over),
        out_specs=over,
        check_vma=False,
    )
    return run(w, keys, gram)


SENT = re.compile(
    r"= (\S.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\("
)
SIZES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1}


#: Bytes received per byte of the result, on each of n devices.
RECEIVED = {
    "reduce-scatter": lambda n: n - 1,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}


def sent(text: str) -> dict[str, int]:
    """Collective -> bytes of its results on one device, from the text of a program."""
    sizes: Counter[str] = Counter()
    for result, name in SENT.findall(text):
        for kind, shape in re.findall(r"(\w+)\[([\d,]*)\]", result):
            size = math.prod(int(n) for n in shape.split(",") if n)
            sizes[name] += SIZES[kind] * size
    return dict(sizes)


def compiled(stacks: list[list[int]], count: int, tokens: int) -> list[dict[str, Any]]:
    """What the programs of some stacks send; nothing is run.

    Args:
      stacks: (matrices, rows, width) each; `count` divides the matrices.
      count: devices.
      tokens: of all of them.
    """
    mesh, out = Mesh(jax.devices()[:count], ("all",)), []
    like = functools.partial(
        jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, P("all"))
    )
    method = fh.SparseGPT(fh.NM(2, 4))
    for number, rows, width in stacks:
        x = like((tokens, number, width), jnp.bfloat16)
        h = like((number, width, width), jnp.float32)
        w = like((number, rows, width), jnp.float32)
        keys = like((number,), jax.random.key(0).dtype)
        programs = {
            "sums": jax.jit(functools.partial(summed, mesh)).lower(x),
            "solver": jax.jit(functools.partial(solved, mesh, method)).lower(
                w, keys, h
            ),
        }
        out.append({k: sent(p.compile().as_text() or "") for k, p in programs.items()})
    return out


def stacks_of(name: str) -> list[list[int]]:
    """(cuts, rows, width) of the cuts of a model that are alike."""
    config = decoder.DecoderConfig.from_dict(MODELS[name])
    every = [c for n in range(config.num_hidden_layers) for c in cuts(config, n)]
    alike = Counter((cut.rows, cut.width) for cut in every)
    return [[number, rows, width] for (rows, width), number in alike.items()]


def simulated(flags: Any) -> Iterator[Row]:
    """The programs of LLaMA-2-7B on eight virtual devices, compiled and not run."""
    del flags
    count, stacks = 8, stacks_of("LLaMA-2-7B")
    virtual = f"--xla_force_host_platform_device_count={count}"
    counted = alone(
        compiled, stacks, count, 8 * count, XLA_FLAGS=virtual, JAX_PLATFORMS="cpu"
    )
    for (number, rows, width), programs in zip(stacks, counted, strict=True):
        sums, solver = (
            sum(size * RECEIVED[name](count) for name, size in programs[k].items())
            for k in ("sums", "solver")
        )
        work = [Cut("", rows, width)] * number
        planned = receiving(work, placed(work, count))
        more = {
            "planned": planned,
            "solver": solver,
            "matrices of a device": number / count,
        }
        what = f"{number} x {rows} x {width}: sums ({', '.join(programs['sums'])})"
        yield Row(SIMULATED, what, sums, planned, more=more)


def check(flags: Any) -> Iterator[Row]:
    """GFLOP per CPU second of the block that `bench.scale` measured."""
    del flags
    rows = json.loads((report.RESULTS / "scale.json").read_text())["rows"]
    measured = next(row for row in rows if row["what"] == "block-sparsegpt")
    options = measured["data"]["options"]
    config = decoder.DecoderConfig.from_dict(options["config"])
    tokens = options["samples"] * options["length"]
    work = cuts(config, 0)
    flop = tokens * sum(cut.forward + cut.gram for cut in work)
    flop += sum(cut.factor + cut.rows * cut.row for cut in work)
    more = {"TFLOP": flop / 1e12, "CPU s": measured["seconds"]}
    speed = flop / 1e9 / measured["seconds"]
    yield Row(CHECK, "one block of LLaMA-2-7B, GFLOP a CPU second", speed, more=more)


STUDY = Study(
    "placement",
    "Plans for many accelerators",
    {"plan": plan, "simulated": simulated, "check": check},
    {
        PLAN: "The first figure is minutes. All are of a cost model with the figures of"
        " data sheets, none is measured.",
        SIMULATED: "The anchor is what the plan counts. Nothing is run.",
        CHECK: "How fast the counted work was done: near the speed of a core, or the"
        " count is wrong.",
    },
)

if __name__ == "__main__":
    STUDY.main(STUDY.parser(__doc__))
