"""Block by block gives what the whole model in memory gives."""

import functools
import json
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("safetensors")
import flexhinm_jax as fh  # noqa: E402
from flexhinm_jax.io import huggingface, packed, shards  # noqa: E402
from flexhinm_jax.kernels import unpack  # noqa: E402
from flexhinm_jax.models import decoder  # noqa: E402
from flexhinm_jax.sequential.cuts import Layer, Programs  # noqa: E402
from flexhinm_jax.streaming import streaming  # noqa: E402
from flexhinm_jax.streaming.memory import Ahead, Budget  # noqa: E402
from flexhinm_jax.types import PackedWeight  # noqa: E402
from tests import compiled  # noqa: E402
from tests.models import decoder_cases  # noqa: E402
from tests.models.directories import make_decoder_directory  # noqa: E402

KEY = jax.random.key(3)
METHOD = fh.Refit(fh.Wanda(fh.NM(2, 4)))
#: Few shapes, so that little is compiled; the slow tests have more.
CONFIG = {
    "model_type": "qwen2",
    "vocab_size": 260,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
}
GROUPED = CONFIG | {"num_key_value_heads": 1, "intermediate_size": 24}
TOKENS = np.random.default_rng(0).integers(0, 256, (6, 12))
OUTSIDE = {"embed_tokens|lm_head": "skip"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder") / "model"
    make_decoder_directory(folder, CONFIG, 0, 2)
    return folder


@pytest.fixture(scope="module", autouse=True)
def programs():
    """Equal programs are compiled once for all tests of this file."""
    made = Programs(Ahead())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "Programs", lambda solver: made)
        yield made


in_memory_too = compiled.walks_share_programs
OPTIONS = {"key": KEY, "target": "resid", "batch": 2}
LIMITS = {"memory_limit": "memory", "batch": "batch", "dtype": "dtype"}


def pruned(source, out, tokens, method, **options):
    """`stream` with every option by its name."""
    taken = {k: options.pop(k) for k in (*LIMITS, "pack", "overwrite") if k in options}
    limits = {name: taken[k] for k, name in LIMITS.items() if k in taken}
    output = {k: taken[k] for k in ("pack", "overwrite") if k in taken}
    spread = {"mode": options.pop("allocate", "uniform")}
    spread["exceptions"] = options.pop("exceptions", {})
    progress = options.pop("progress", None)
    return streaming.stream(
        source,
        out,
        tokens,
        streaming.Request(method=method, **options),
        spread=streaming.Spread(**spread),
        limits=streaming.Limits(**limits),
        output=streaming.Output(**output),
        progress=progress,
    )


@pytest.fixture
def stream(model, tmp_path):
    def run(source=model, method=METHOD, tokens=TOKENS, **options):
        options = OPTIONS | options
        return pruned(source, tmp_path / "out", tokens, method, **options)

    return run


class Run:
    """An uninterrupted run and what it told."""

    def __init__(self, model, out, programs):
        self.out, self.records, self.compiled = out, [], []
        self.plan: Any = None

        def progress(done):
            if isinstance(done, Budget):
                self.plan = done
                return
            self.records.append(done)
            if isinstance(done, streaming.Block):
                known = programs.compiler.known
                traces = sum(f._cache_size() for f in known.values())
                count = len(known), traces, len(programs.solver.known)
                self.compiled.append(count)

        self.result = pruned(model, out, TOKENS, METHOD, progress=progress, **OPTIONS)
        self.files = files(out)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory, programs):
    return Run(model, tmp_path_factory.mktemp("whole") / "out", programs)


def files(folder):
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def in_memory(model, method, **options):
    checkpoint = huggingface.read(model)
    params = checkpoint.params
    config = decoder.DecoderConfig.from_dict(checkpoint.config)
    apply_fn = functools.partial(decoder.apply, config=config)
    batches = [jnp.asarray(t, jnp.int32) for t in TOKENS.reshape(3, 2, 12)]
    rules = options.pop("rules", {}) | OUTSIDE
    return fh.prune_sequential(
        apply_fn, params, batches, method, key=KEY, rules=rules, **options
    )


def assert_same(out, want):
    got = huggingface.read(out).params
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype
        np.testing.assert_array_equal(got[name], np.asarray(want[name]), name)


@pytest.mark.slow
def test_blocks_that_differ_stream_too(stream, tmp_path):
    """A window, a layer with other positions, experts: blocks of several kinds."""
    small = {"vocab_size": 260, "hidden_size": 16, "head_dim": 8}
    gemma = small | {"intermediate_size": 16, "num_attention_heads": 2}
    cases = (
        decoder_cases.GEMMA3 | gemma,
        decoder_cases.QWEN3_MOE | small | {"moe_intermediate_size": 8},
    )
    for case in cases:
        source = tmp_path / case["model_type"]
        make_decoder_directory(source, case)
        stream(source, overwrite=True)
        config = decoder.DecoderConfig.from_dict(case)
        want = in_memory(source, METHOD, target="resid", rules=decoder.rules(config))
        assert_same(tmp_path / "out", want.params)
        kept = huggingface.read(source).params
        for name, leaf in huggingface.read(tmp_path / "out").params.items():
            router = name.endswith("mlp.gate.weight")
            inside = ".layers." in name and leaf.ndim == 2
            changed = not np.array_equal(leaf, kept[name])
            assert changed == (inside and not router), name


def test_streaming_gives_what_the_whole_model_gives(model, whole):
    want = in_memory(model, METHOD, target="resid")
    assert_same(whole.out, want.params)
    rows = whole.result.report.rows
    assert [r.path for r in rows] == [r.path for r in want.report.rows]
    assert [p.name for p in whole.out.parent.iterdir()] == ["out"]
    for name in ("tokenizer.json", "generation_config.json", shards.INDEX):
        assert whole.files[name] == (model / name).read_bytes()
    assert b"weight matrices are zero" in whole.files["README.md"]
    assert json.loads(whole.files["report.json"])["errors"] == whole.result.errors


@pytest.mark.parametrize(
    ("statistics", "target"), [("block", "resid"), ("dense", "seq")]
)
def test_other_statistics_are_those_of_the_whole_model(
    model, stream, tmp_path, statistics, target
):
    options = {"statistics": statistics, "target": target}
    want = in_memory(model, METHOD, **options)
    stream(memory_limit=1 << 30, **options)
    assert_same(tmp_path / "out", want.params)


@pytest.mark.parametrize("target", ["asym", "seq"])
def test_blocks_are_reconstructed_as_in_the_whole_model(
    model, stream, tmp_path, target
):
    """Killed behind a window and in the middle of one, under a limit of memory."""
    how = fh.Reconstruct(steps=6, rate=0.01, target=target)
    moments = iter([(Layer, 9), (fh.Trained, 1)])

    def told(kind, number):
        def kill(done):
            nonlocal number
            number -= isinstance(done, kind)
            if isinstance(done, kind) and not number:
                raise Killed

        return kill

    options = {"reconstruct": how, "target": "seq", "memory_limit": 1 << 30}
    for kind, number in moments:
        with pytest.raises(Killed):
            stream(progress=told(kind, number), **options)
    seen = []
    stream(progress=seen.append, **options)
    windows = [x for x in seen if isinstance(x, fh.Trained)]
    assert [w.window for w in windows[-2:]] == ["model.layers.1", "model.layers.2"]
    assert all(w.after < w.before for w in windows)
    got = huggingface.read(tmp_path / "out").params
    stream(overwrite=True, **options)
    assert_same(tmp_path / "out", got)
    want = in_memory(model, METHOD, reconstruct=how).params
    for name, x in want.items():
        # There the last window ends where least is alive, behind the last norm.
        if name != "model.norm.weight" and "layers.2" not in name:
            np.testing.assert_allclose(got[name], x, atol=1e-4, err_msg=name)


def test_leaves_that_do_not_fit_stay_dense_when_that_is_asked(stream, tmp_path):
    method = fh.Wanda(fh.Transposable(2, 4))
    folder = tmp_path / "odd"
    params = make_decoder_directory(folder, CONFIG | {"intermediate_size": 18}, 0, 2)
    with pytest.raises(ValueError, match="multiple of m=4"):
        stream(folder, method)
    result = stream(folder, method, on_mismatch="skip")
    after = huggingface.read(tmp_path / "out").params
    for name in params:
        if "mlp" in name:
            np.testing.assert_array_equal(after[name], np.asarray(params[name]))
            assert "does not fit" in result.report.skipped[name]
    assert len(result.report.rows) == 3 * 4


def test_equal_blocks_are_compiled_once(whole):
    # The first block has the same input in both models, the second has not: from
    # there on nothing is new.
    first, second, third = whole.compiled
    assert first <= second == third


def test_every_matrix_and_every_block_is_told(whole):
    layers = [r for r in whole.records if isinstance(r, Layer)]
    assert [r.path for r in layers] == list(whole.result.errors)
    assert len(whole.records) == 3 * (7 + 1)
    assert all(0 < r.error < 1 for r in whole.records)
    blocks = [r for r in whole.records if isinstance(r, streaming.Block)]
    assert [b.layer for b in blocks] == [0, 1, 2] and blocks[-1].left == 0
    assert all(b.seconds > 0 and b.peak > 1 << 20 for b in blocks)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["seq", "asym"])
def test_other_targets_are_the_same_too(stream, tmp_path, target):
    folder, method = tmp_path / "model", fh.SparseGPT(fh.FlexHiNM(8, permute=None))
    params = make_decoder_directory(folder, GROUPED, 0, 2)
    sparsity = {name: 0.5 if "layers.1" in name else 0.75 for name in params}
    options = {"rules": {r"layers\.0\..*q_proj": "skip"}, "sparsity": sparsity}
    want = in_memory(folder, method, target=target, **options)
    stream(folder, method=method, target=target, **options)
    assert_same(tmp_path / "out", want.params)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["checkpoint", "float32"])
def test_a_bfloat16_checkpoint_stays_one(stream, tmp_path, dtype):
    folder = tmp_path / "model"
    make_decoder_directory(folder, GROUPED, 0, 1, jnp.bfloat16)
    stream(folder, dtype=dtype)
    want = in_memory(folder, METHOD, target="resid")
    got = huggingface.read(tmp_path / "out").params
    same = total = 0
    for name, x in got.items():
        assert x.dtype == jnp.bfloat16
        same += int((np.asarray(want.params[name]) == x).sum())
        total += x.size
    if dtype == "checkpoint":
        assert same == total


class Killed(Exception):
    """The process dies."""


@pytest.mark.parametrize("moment", [1, 11])
def test_a_killed_run_goes_on_to_the_same_files(stream, whole, tmp_path, moment):
    """Killed after the first matrix, and inside the second block."""
    count = 0

    def kill(done):
        nonlocal count
        count += isinstance(done, Layer)
        if count == moment:
            raise Killed

    out, partial = tmp_path / "out", tmp_path / "out.partial"
    shutil.copytree(whole.out, out)
    with pytest.raises(Killed):
        stream(progress=kill, overwrite=True, memory_limit=1 << 30)
    assert files(out) == whole.files  # the earlier output is untouched
    assert not list(partial.rglob("*.safetensors"))
    # A process that is killed inside of a write leaves this.
    (partial / "model" / ".model.safetensors.partial.tmp-0123abcd").write_text("half")
    job = json.loads((partial / "job.json").read_text())
    assert job["method"] == repr(METHOD)
    with pytest.raises(ValueError, match=r"out\.partial was begun with target=resid"):
        stream(target="seq", overwrite=True)
    seen = []
    stream(progress=seen.append, overwrite=True)
    assert sum(isinstance(r, streaming.Block) for r in seen) == 3 - moment // 7
    assert files(out) == whole.files
    assert not partial.exists()


def test_a_folder_of_the_user_is_refused_before_anything_is_computed(stream, tmp_path):
    """One under the name that the state of a run would have."""
    partial, told = tmp_path / "out.partial", []
    (partial / "model").mkdir(parents=True)
    (partial / "block-00000.json").write_text("mine")
    with pytest.raises(FileExistsError, match=r"out\.partial holds block-00000\.json"):
        stream(progress=told.append)
    assert (partial / "block-00000.json").read_text() == "mine" and not told
    (partial / "model").rmdir()
    (partial / "job.json").write_text("{}")
    with pytest.raises(ValueError, match=r"out\.partial was begun by another version"):
        stream()
    assert (partial / "block-00000.json").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["out.partial"]


def test_hidden_states_go_to_disk_where_memory_is_short(stream, whole, tmp_path):
    told = []
    stream(memory_limit=whole.plan.least, progress=told.append)
    assert files(tmp_path / "out") == whole.files
    plans = [x for x in told if isinstance(x, Budget)]
    assert len(plans) == 1 and plans[0] == told[0]
    assert plans[0].in_memory == 0 and plans[0].on_disk > whole.plan.on_disk


def test_a_plan_over_the_limit_is_refused_with_its_numbers(stream, tmp_path):
    with pytest.raises(
        ValueError, match=r"needs .* GiB, the limit is .*Allow .* or ta"
    ):
        stream(memory_limit=1000)
    assert list(tmp_path.iterdir()) == []


def test_rules_and_packed_files(model, stream, tmp_path):
    rules = {r"layers\.0\.": "skip", "down_proj": "skip"}
    result = stream(rules=rules, pack=True)
    before = huggingface.read(model).params
    after = huggingface.read(tmp_path / "out").params
    changed = {k for k in before if (before[k] != after[k]).any()}
    pruned = {row.path for row in result.report.rows}
    assert pruned == {
        f"model.layers.{k}.{name}_proj.weight"
        for k in (1, 2)
        for name in (*(f"self_attn.{x}" for x in "qkvo"), "mlp.gate", "mlp.up")
    }
    assert pruned <= changed and all(k.endswith("bias") for k in changed - pruned)
    twin = {}
    for path in sorted((tmp_path / "out" / "packed").iterdir()):
        twin |= packed.read_packed(path)
    for path, leaf in twin.items():
        dense = unpack(leaf) if isinstance(leaf, PackedWeight) else leaf
        np.testing.assert_array_equal(np.asarray(dense), after[path])
    assert {k for k, x in twin.items() if isinstance(x, PackedWeight)} == pruned
    packed_bytes = result.report.total["packed_bytes"]
    assert packed_bytes < result.report.total["dense_bytes"]


@pytest.mark.parametrize(
    "mode",
    [
        fh.OWL(multiple=3, spread=0.2),
        pytest.param("global", marks=pytest.mark.slow),
    ],
)
def test_budgets_are_those_of_the_whole_model_and_outlive_a_kill(
    model, stream, tmp_path, mode
):
    method = fh.Wanda(fh.Unstructured())
    asked = {"allocate": mode, "exceptions": {r"\.1\..*down": 0.2}, "sparsity": 0.5}
    options = {"method": method, "target": "seq", "rules": {"0.mlp.gate": "skip"}}

    def kill(done):
        if isinstance(done, Layer):
            raise Killed

    with pytest.raises(Killed):
        stream(progress=kill, **options, **asked)
    assert (tmp_path / "out.partial" / "budgets.json").is_file()
    told = []
    result = stream(progress=told.append, **options, **asked)
    assert told[1] == streaming.GoingOn(tmp_path / "out.partial")  # after the plan
    told = told[2:]
    assert isinstance(told[0], streaming.Allocated)  # and no block was surveyed again
    assert told[0].sparsity == result.targets

    checkpoint = huggingface.read(model)
    config = decoder.DecoderConfig.from_dict(checkpoint.config)
    apply_fn, params = (
        functools.partial(decoder.apply, config=config),
        checkpoint.params,
    )
    batch = jnp.asarray(TOKENS, jnp.int32)
    uses = fh.discover(apply_fn, params, batch, rules=options["rules"] | OUTSIDE)
    stats = fh.calibrate(apply_fn, params, uses, [batch], gram=False)
    asked = {"mode": mode, "exceptions": asked["exceptions"]}
    want = fh.budgets(method, params, uses, stats, 0.5, **asked)
    assert result.targets == pytest.approx(want, abs=1e-4)
    assert len({*want.values()}) > 2
    for row in result.report.rows:
        assert row.zeros == pytest.approx(want[row.path], abs=4e-3)
    assert result.report.total["zeros"] == pytest.approx(0.5, abs=1e-3)


def test_exceptions_alone_need_no_pass(stream):
    told = []
    options = {"method": fh.Wanda(fh.Unstructured()), "target": "seq"}
    rules = {"layers.[02]": "skip", "layers.1.mlp": fh.NM(2, 4)}
    result = stream(
        sparsity=0.6,
        exceptions={"q_proj": 0.9},
        rules=rules,
        progress=told.append,
        **options,
    )
    told = told[1:]  # after the plan
    assert isinstance(told[0], streaming.Allocated)
    assert not any(isinstance(x, streaming.Surveyed) for x in told)
    zeros = {row.path.split(".")[-2]: row.zeros for row in result.report.rows}
    assert zeros["q_proj"] == pytest.approx(0.9, abs=2e-3)
    assert zeros["up_proj"] == 0.5
    # (7 * .6 - .9 - 3 * .5) / 3: the others make up for it.
    assert zeros["k_proj"] == pytest.approx(0.6, abs=2e-3)


def test_a_broad_rule_prunes_what_can_be_pruned(stream):
    last, none = CONFIG["num_hidden_layers"] - 1, "embed_tokens|layers.1.*o_proj"
    report = stream(rules={none: "skip", r"layers\.0\.|head": fh.NM(1, 4)}).report
    zeros = {row.path: row.zeros for row in report.rows}
    assert len(zeros) == 3 * 7 - 1
    for path, share in zeros.items():
        assert share == (0.75 if ".0." in path else 0.5)
    skipped = report.skipped
    assert "1-D" in skipped["model.layers.0.input_layernorm.weight"]
    assert skipped["lm_head.weight"] == "outside the blocks: copied unchanged"
    # As it was written, not one for every key.
    skip = f"skipped by rule {none!r}"
    assert skipped["model.layers.1.self_attn.o_proj.weight"] == skip
    assert f"model.layers.{last}.self_attn.o_proj.weight" in zeros


def spoiled(model, folder, key, change):
    """A copy of the model in which one array is another."""
    params = dict(huggingface.read(model).params)
    params[key] = change(params[key].copy())
    return huggingface.write(folder, params, source=model)


def test_a_nan_is_named_with_its_leaf(model, stream, tmp_path):
    key = "model.layers.0.mlp.up_proj.weight"

    def change(x):
        x[1, 2] = np.nan
        return x

    bad = spoiled(model, tmp_path / "bad", key, change)
    with pytest.raises(ValueError, match=rf"{key}: weight has 1 NaN"):
        stream(bad)
    assert [p.name for p in tmp_path.iterdir()] == ["bad"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rules": {"lm_head": "prune"}}, "lm_head.weight: outside the blocks: copied"),
        (
            {"rules": {r"0\.input": fh.NM(1, 4)}},
            r"rule '0\\\\.input' asks to prune what cannot be: model.layers.0",
        ),
        ({"rules": {"layers": "skip"}}, "no weight is left"),
        ({"rules": {"layer_9": "skip"}}, "matches no leaf"),
        ({"tokens": TOKENS + 260}, "vocab_size=260"),
        ({"tokens": TOKENS[0]}, r"need integers \[samples, length\]"),
        ({"target": "dense"}, "target='dense'"),
        ({"statistics": "dense"}, "give target='seq', or"),
        ({"reconstruct": fh.Reconstruct(2)}, "streaming has one block at a time"),
        ({"reconstruct": fh.Reconstruct("layers")}, "window='layers': 'layers' has"),
        ({"reconstruct": fh.Reconstruct("blok")}, "window='blok' matches no leaf; the"),
        ({"statistics": "block", "block": "layers"}, "two blocks of the checkpoint"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"method": fh.Fisher(fh.NM(2, 4))}, "needs gradients"),
        ({"method": fh.Wanda(fh.NM(2, 5))}, "multiple of m=5"),
        ({"allocate": "best"}, "unknown mode 'best'"),
        ({"allocate": "owl"}, "need one sparsity"),
        ({"allocate": "owl", "sparsity": 0.5}, "nothing to allocate"),
        ({"exceptions": {"x": 0.5}, "sparsity": 0.5}, "match no layer"),
    ],
)
def test_bad_input_is_refused_before_work_starts(stream, tmp_path, options, match):
    with pytest.raises(ValueError, match=match):
        stream(**options)
    assert list(tmp_path.iterdir()) == []
