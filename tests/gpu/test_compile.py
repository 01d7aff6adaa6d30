"""What `make gpu-compile` finds wrong in the reports of the assembler."""

import pytest

from bench import gpu_compile

CHIP = gpu_compile.CHIPS["h200"]
CASE = gpu_compile.Case("k", "s", lambda: None, (), r"wgmma\.sp", r"HGMMA\.SP")
GOOD = {
    ".ptx": "wgmma.sp x; wgmma.sp y;",
    ".ptxas": "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
    "ptxas info : Used 60 registers, used 2 barriers",
    ".resources.txt": "Resources(smem_scratch_bytes=102400)",
    ".sass_ctrl": "HGMMA.SP.64x64x32",
}


def test_a_clean_compilation_passes_with_its_counts():
    found = gpu_compile.read_reports(GOOD, CASE, CHIP)
    assert found["failures"] == []
    assert (found["ptx"], found["sass"], found["registers"]) == (2, 1, 60)


def test_a_missing_disassembler_is_no_failure_but_is_told():
    found = gpu_compile.read_reports(GOOD | {".sass_ctrl": ""}, CASE, CHIP)
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
    [failure] = gpu_compile.read_reports(GOOD | change, CASE, CHIP)["failures"]
    assert message in failure
