"""Plans for many accelerators: everything is placed once, and no one waits for long."""

import itertools
import math
import random
from collections import Counter
from pathlib import Path

import pytest

from bench import placement, report
from bench.placement import ACCELERATOR, Cut
from bench.study import alone
from flexhinm_jax.models.decoder_config import DecoderConfig

PAGE = Path(__file__).parents[1] / "docs" / "scale.md"


def some_cuts(draw, count):
    return [
        Cut("0", draw.choice([4, 100, 3000]), draw.choice([64, 512, 1024]))
        for _ in range(count)
    ]


def test_every_row_is_placed_once_and_no_accelerator_waits_for_more_than_a_part():
    draw = random.Random(0)
    for _ in range(20):
        work, count = some_cuts(draw, draw.randint(1, 30)), draw.randint(1, 9)
        found = placement.placed(work, count)
        rows = Counter()
        for parts in found.parts:
            for k, n in parts:
                rows[k] += n
        assert rows == {k: cut.rows for k, cut in enumerate(work)}
        cost = lambda k, n: placement.seconds(work[k], n, ACCELERATOR)  # noqa: B023, E731
        loads = [sum(cost(k, n) for k, n in parts) for parts in found.parts]
        assert loads == pytest.approx(found.loads)
        largest = max(cost(k, n) for parts in found.parts for k, n in parts)
        assert found.longest <= sum(loads) / count + largest
        assert found.balance == pytest.approx(max(loads) * count / sum(loads))


def test_the_last_accelerator_is_near_the_best_of_all_ways_to_place_whole_cuts():
    """Graham's bound for the longest first; dividing by rows makes it only better."""
    draw = random.Random(1)
    for _ in range(10):
        work = some_cuts(draw, 6)
        costs = [placement.seconds(cut, cut.rows, ACCELERATOR) for cut in work]
        best = min(
            max(sum(itertools.compress(costs, [w == n for w in way])) for n in range(3))
            for way in itertools.product(range(3), repeat=6)
        )
        bound = 4 / 3 - 1 / (3 * 3)
        assert placement.placed(work, 3).longest <= best * bound * (1 + 1e-9)


def test_seven_billion_weights_are_balanced_on_eight_accelerators():
    config = DecoderConfig.from_dict(placement.MODELS["LLaMA-2-7B"])
    block = placement.cuts(config, 0)
    assert [(cut.rows, cut.width) for cut in block] == [
        (3 * 4096, 4096),
        (4096, 4096),
        (2 * 11_008, 4096),
        (4096, 11_008),
    ]
    assert placement.placed(block * 32, 8).balance <= 1.1
    for stage in placement.by_stage(block):
        assert placement.placed(stage, 8).balance <= 1.1


def test_experts_are_cuts_of_their_own_that_a_share_of_the_tokens_reaches():
    config = DecoderConfig.from_dict(placement.MODELS["100B, 8 of 128 experts"])
    block = placement.cuts(config, 0)
    assert Counter(cut.share for cut in block) == {1.0: 2, 8 / 128: 256}
    assert [len(stage) for stage in placement.by_stage(block)] == [1, 1, 128, 128]
    weights = sum(cut.rows * cut.width for cut in block) * config.num_hidden_layers
    assert 1.0e11 < weights < 1.1e11


def test_bytes_are_counted_in_the_text_of_a_program():
    text = """
      %a = f32[4,8]{1,0} reduce-scatter(%x), dimensions={0}
      %b = (bf16[2]{0}, f32[3]{0}) all-gather-start(%y)
      %c = f32[] add(%all-reduce.1, %z)
    """
    assert placement.sent(text) == {"reduce-scatter": 128, "all-gather": 16}


@pytest.mark.slow
def test_the_compiled_programs_send_what_the_plan_counts():
    flags = "--xla_force_host_platform_device_count=8"
    [programs] = alone(
        placement.compiled, [[16, 8, 12]], 8, 64, XLA_FLAGS=flags, JAX_PLATFORMS="cpu"
    )
    assert sum(programs["sums"].values()) == 4 * math.prod((12, 12, 16)) // 8
    assert programs["solver"] == {}


def test_the_page_shows_what_the_command_prints():
    page = PAGE.read_text()
    for row in placement.plan(None):
        numbers = [row.value, *row.more.values()]
        line = " | ".join([row.what, *map(report.number, numbers)])
        assert f"| {line} |" in page
    [row] = placement.check(None)
    for number in (row.value, *row.more.values()):
        assert report.number(number) in page
