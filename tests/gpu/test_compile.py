"""What `make gpu-compile` finds wrong in the reports of the assembler."""

import collections

import pytest

from bench import gpu_compile, gpu_parts, gpu_programs
from flexhinm_jax.gpu import wgmma_sp
from flexhinm_jax.gpu.tilings import Tiling

CHIP = gpu_compile.CHIPS["h200"]
PRODUCT = "wgmma.mma_async.sp.sync.aligned.m64n8k32.f32.bf16.bf16"
GOOD = {
    ".ptx": f"{PRODUCT} x; {PRODUCT} y;",
    ".ptxas": "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
    "ptxas info : Used 60 registers, used 2 barriers",
    ".resources.txt": "Resources(smem_scratch_bytes=102400)",
    ".sass_ctrl": "HGMMA.SP.64x64x32",
}


def test_a_clean_compilation_passes_with_its_counts():
    found = gpu_compile.read_reports(GOOD, (), CHIP)
    assert found["failures"] == []
    assert (found["ptx"], found["sass"], found["registers"]) == (2, 1, 60)


def test_a_missing_disassembler_is_no_failure_but_is_told():
    found = gpu_compile.read_reports(GOOD | {".sass_ctrl": ""}, (), CHIP)
    assert found["failures"] == [] and not found["disassembled"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({".ptx": "wgmma.dense"}, "in the PTX"),
        ({".sass_ctrl": "HGMMA.64x64x16"}, "in the machine code"),
        ({".ptxas": GOOD[".ptxas"].replace("0 bytes spill s", "8 bytes spill s")}, "8"),
        ({".ptxas": GOOD[".ptxas"] + "\n(C7510) wgmma are serialized"}, "serialised"),
        ({".ptxas": ""}, "no report"),
        ({".resources.txt": "smem_scratch_bytes=240000"}, "240000"),
    ],
)
def test_every_defect_is_reported(change, message):
    [failure] = gpu_compile.read_reports(GOOD | change, (), CHIP)["failures"]
    assert message in failure


PROGRAM = """
%fused (a: f32[8]) -> f32[8] {
  ROOT %b = f32[8]{0} copy(%a)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %two = (s32[8]{0}, f32[8]{0}) fusion(%x), kind=kInput, calls=%fused
  %c = f32[8]{0} get-tuple-element(%two), index=1
  ROOT %d = f32[8]{0} custom-call(%c), custom_call_target="gemm"
}
"""


def test_what_a_program_starts_is_counted():
    found = gpu_compile.read_dump(gpu_compile.Dump([], PROGRAM), (), CHIP)
    assert found["programs"] == 2 and found["failures"] == []


def test_a_program_without_its_kernels_or_with_a_loop_fails():
    cut, loop = Tiling(), PROGRAM.replace("fusion(%x)", "while(%x)")
    made = gpu_compile.Dump([], loop)
    failures = gpu_compile.read_dump(made, (cut,), CHIP)["failures"]
    assert failures == ["0 sparse kernels, 1 cuts", "a loop of programs"]


def test_what_runs_on_a_gpu_is_compiled_before():
    groups = collections.Counter(case.group for case in gpu_programs.every_case())
    sizes = gpu_parts.every_size()
    assert groups == {
        "wgmma_sp, numerics": len(gpu_parts.every_form()),
        "wgmma_sp, selector 0": len(gpu_parts.every_form()) // 2,
        "wgmma_sp, self-check": len(wgmma_sp.CASES),
        "wgmma_sp, times": sum(len(tokens) for _, tokens in sizes)
        + len(gpu_parts.IN_FLIGHT),
        "written out": len(sizes),
        "block": len(gpu_parts.block_sizes(128)) * len(gpu_parts.BLOCK_TOKENS),
    }
