"""Compiles the GPU kernels for chips that are not here, and reads what came out.

`make gpu-compile` runs it in an environment of its own (jax >= 0.11.2, its CUDA 13
plugin and NVIDIA's assembler; no driver and no GPU), ARGS=--all for all that
`bench.gpu` and the self-check run. Every kernel is compiled to PTX and machine code for
the chips it is meant for. A case passes if

    the sparse instruction is in the PTX, and in the machine code where `nvdisasm`
    can list it,
    nothing is spilled from registers,
    products in flight are not serialised by the assembler,
    no register of a product is touched before the wait that covers it (the metadata
    apart where one product is in flight: whether it still reads them a GPU must show),
    and every element of both operands is read where the copies put it
    (`bench.gpu_faults`),
    shared memory stays within the limit of the chip,
    programs without a kernel, such as the one that writes the matrix out, have no loop.

Nothing is run: numbers and speed need a GPU (`bench/gpu.py`). Chips are compiled in
processes of their own, because Mosaic keeps the architecture of the first one.
"""

import argparse
import contextlib
import importlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # else the plugin asks for a driver

import jax

from bench import gpu_faults, study
from bench.gpu_programs import Case, cases, every_case
from flexhinm_jax import kernels
from flexhinm_jax.gpu import wgmma_sp
from flexhinm_jax.gpu.layouts import STEP
from flexhinm_jax.gpu.tilings import Tiling

OUT = Path(__file__).parent / "results" / "gpu_compile.json"

SERIALISED = ("C7510", "C7514", "serialized")
"""What ptxas says when it takes the asynchrony out of wgmma."""


class Chip(NamedTuple):
    """Numbers of a chip, as NVIDIA and openxla/xla publish them."""

    name: str
    capability: tuple[int, int]
    cores: int
    shared_core: int
    shared_block: int
    bandwidth: int


CHIPS = {
    "h200": Chip("NVIDIA H200", (9, 0), 132, 233472, 232448, 4800 * 10**9),
}


def target(chip: Chip) -> str:
    """Text form of the GpuTargetConfigProto that XLA compiles for."""
    major, minor = chip.capability
    features = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: {chip.shared_core}
  threads_per_core_limit: 2048 core_count: {chip.cores} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {chip.bandwidth} l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 85899345920
  shared_memory_per_block_optin: {chip.shared_block}
  cuda_compute_capability {{
    major: {major} minor: {minor} feature_extension: {features}
  }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation" device_address_bits: 64 name: "{chip.name}"
  driver_version: "13.0.0" runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{chip.name}"
"""


@contextlib.contextmanager
def traced_for(chip: Chip) -> Iterator[None]:
    """Mosaic takes the architecture from the device at hand: pretend it is `chip`."""
    utils: Any = importlib.import_module("jax.experimental.mosaic.gpu.utils")
    device = jax.sharding.AbstractDevice(
        device_kind=chip.name, platform="gpu", num_cores=chip.cores
    )
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    saved = utils._infer_arch
    utils._infer_arch = lambda: chip.capability
    try:
        with jax.sharding.use_abstract_mesh(mesh):
            yield
    finally:
        utils._infer_arch = saved


def mesh_of(chip: Chip) -> Any:
    """A mesh of one chip that is not there."""
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        platform="cuda", target_config=target(chip), topology="1x1x1"
    )
    return topologies.make_mesh(topo=topology, mesh_shape=(1,), axis_names=("x",))


class Dump(NamedTuple):
    """What a compilation wrote: kind of file -> text of every kernel; the program."""

    kernels: list[dict[str, str]]
    program: str


KINDS = (".ptx", ".ptxas", ".sass_ctrl")

_written: dict[str, dict[str, str]] = {}
"""Of every kernel of this process, by its hash: one is compiled and written once."""


def dump(case: Case, chip: Chip, mesh: Any) -> Dump:
    """Compiles one case."""
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    put = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)  # noqa: E731
    arguments = jax.tree.map(put, case.arguments)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
        with traced_for(chip), kernels.assume(*chip.capability):
            lowered = jax.jit(case.function).lower(*arguments)
            program = lowered.compile()
        read = lambda path: path.read_text() if path.exists() else ""  # noqa: E731
        shared = map(read, sorted(Path(folder).glob("*.resources.txt")))
        common = {".resources.txt": "\n".join(shared)}
        fresh = [
            {kind: read(path.with_suffix(kind)) for kind in KINDS} | common
            for path in sorted(Path(folder).glob("*.ptx"))
        ]
    hashes = re.findall(r'kernel_hash = "((?:[^"\\]|\\.)*)"', lowered.as_text())
    new = [name for name in dict.fromkeys(hashes) if name not in _written]
    _written.update(zip(new, fresh, strict=True))
    texts = [_written[name] for name in dict.fromkeys(hashes)]
    return Dump(texts, program.as_text() or "")


def compile_case(case: Case, chip: Chip, mesh: Any) -> dict[str, Any]:
    """Compiles one case and reads the reports of the assembler."""
    row: dict[str, Any] = {"chip": chip.name, "kernel": case.group, "size": case.size}
    try:
        made = dump(case, chip, mesh)
    except Exception as error:  # every kind of failure is a row of the table
        return row | {"failures": [f"{type(error).__name__}: {str(error)[:300]}"]}
    return row | read_dump(made, case.cuts, chip)


def read_dump(made: Dump, cuts: tuple[Tiling, ...], chip: Chip) -> dict[str, Any]:
    """The reports of all kernels of a program as one, and what it starts."""
    each = [read_reports(text, cuts, chip) for text in made.kernels]
    failures = [failure for report in each for failure in report["failures"]]
    if bool(each) != bool(cuts):
        failures.append(f"{len(each)} sparse kernels, {len(cuts)} cuts")
    if re.search(r"\bwhile\(", made.program):
        failures.append("a loop of programs")
    found: dict[str, Any] = {"programs": programs(made.program)}
    for name, of in {"ptx": sum, "sass": sum, "registers": max, "spills": sum}.items():
        found[name] = of([report[name] for report in each] or [0])
    found["shared"] = max([report["shared"] for report in each] or [0])
    found["disassembled"] = all(report["disassembled"] for report in each)
    return found | {"failures": failures}


def programs(text: str) -> int:
    """How many a compiled program starts, one after the other.

    XLA says what is fused; sorting may take several of its own.
    """
    entry = text[text.find("\nENTRY") :]
    started = r" = .*? (fusion|custom-call|sort|copy|dot|reduce|scatter|gather)\("
    return len(re.findall(started, entry))


def read_reports(
    text: dict[str, str], cuts: tuple[Tiling, ...], chip: Chip
) -> dict[str, Any]:
    """What the dumped files of one kernel say, and what is wrong with it.

    Args:
      text: kind of file -> what is in it.
      cuts: of the kernels of the program; that of this one has as many tokens as its
        instructions; none lets descriptors and registers unread.
      chip: that it is compiled for.
    """
    number = lambda pattern, where: [int(n) for n in re.findall(pattern, where)]  # noqa: E731
    spills = number(r"(\d+) bytes spill", text[".ptxas"])
    registers = number(r"Used (\d+) registers", text[".ptxas"])
    shared = number(r"smem_scratch_bytes=(\d+)", text[".resources.txt"])
    tokens = number(PTX, text[".ptx"])
    found = {
        "ptx": len(tokens),
        "sass": len(re.findall(SASS, text[".sass_ctrl"])),
        "registers": max(registers, default=0),
        "spills": sum(spills),
        "shared": max(shared, default=0),
        "disassembled": bool(text[".sass_ctrl"]),
    }
    failures = []
    if not registers or not spills:
        failures.append("no report of the assembler")
    if not tokens:
        failures.append("no sparse product in the PTX")
    if found["disassembled"] and not found["sass"]:
        failures.append("no sparse product in the machine code")
    if found["spills"]:
        failures.append(f"{found['spills']} bytes spilled")
    if any(word in text[".ptxas"] for word in SERIALISED):
        failures.append("the assembler serialised wgmma")
    if cuts and tokens:
        steps = {cut.tokens: cut.step for cut in cuts}
        step = steps.get(tokens[0], STEP)
        use = min(cut.selectors for cut in cuts)
        failures += gpu_faults.descriptor_faults(text[".ptx"], tokens[0], step, use)
        latched = any(cut.in_flight for cut in cuts)
        failures += gpu_faults.machine_faults(text[".sass_ctrl"], latched)
    if found["shared"] > chip.shared_block:
        failures.append(f"{found['shared']} bytes of shared memory are too many")
    return found | {"failures": failures}


PTX = r"wgmma\.mma_async\.sp\.sync\.aligned\.m64n(\d+)k32"
SASS = r"HGMMA\.SP\.64x\d+x32"


def compile_chip(chip: str, beside: bool) -> list[dict[str, Any]]:
    """Compiles every case for one chip in this process."""
    numbers = CHIPS[chip]
    mesh = mesh_of(numbers)
    rows = []
    for case in cases() + (every_case() if beside else []):
        rows.append(compile_case(case, numbers, mesh))
        print(table(rows[-1:]).partition("\n")[2], file=sys.stderr, flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [
        f"{'kernel':20} {'size':45} {'ptx':>4} {'sass':>4} {'regs':>4} "
        f"{'spills':>6} {'shared':>7} {'programs':>8}"
    ]
    for row in rows:
        sass = row.get("sass", 0) if row.get("disassembled") else "-"
        lines.append(
            f"{row['kernel']:20} {row['size']:45} "
            f"{row.get('ptx', 0):4} {sass:>4} {row.get('registers', 0):4} "
            f"{row.get('spills', 0):6} {row.get('shared', 0):7} "
            f"{row.get('programs', 0):8}"
        )
        lines += [f"    FAILED: {failure}" for failure in row["failures"]]
    return "\n".join(lines)


def run_chip(chip: str, beside: bool) -> list[dict[str, Any]]:
    """`compile_chip` in a process of its own; a crash becomes a failed row."""
    try:
        return study.alone(compile_chip, chip, beside)
    except RuntimeError as error:
        failed = {"chip": CHIPS[chip].name, "kernel": "all", "size": ""}
        return [failed | {"failures": [str(error)]}]


TABLE = "GPU kernels compiled offline"
NOTE = "Cases that pass; the anchor is how many there are. Compiled, not executed."
STUDY = study.Study("gpu_compile", "Kernels compiled offline", {}, {TABLE: NOTE})


def results(cases: list[dict[str, Any]]) -> Iterator[study.Row]:
    """The rows of bench/results/gpu_compile.json: one per chip and kernel."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for case in cases:
        groups.setdefault((case["chip"], case["kernel"]), []).append(case)
    for (chip, kernel), each in groups.items():
        passed = sum(not case["failures"] for case in each)
        more = {
            "registers, most": max(case.get("registers", 0) for case in each),
            "spills": sum(case.get("spills", 0) for case in each),
            "programs, most": max(case.get("programs", 0) for case in each),
        }
        data, what = {"cases": each}, f"{chip}, {kernel}"
        command = "make gpu-compile"
        command += "" if kernel == wgmma_sp.NAME else " ARGS=--all"
        yield study.Row(TABLE, what, passed, len(each), None, more, data, command)


def main() -> int:
    """Compiles for all chips, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--all", action="store_true", help="all that bench.gpu runs")
    options = parser.parse_args()
    rows = [row for chip in CHIPS for row in run_chip(chip, options.all)]
    print(table(rows))
    failed = sum(bool(row["failures"]) for row in rows)
    for row in results(rows):
        study.merge(options.out, STUDY, row.document())
    if not all(row.get("disassembled") for row in rows):
        print("no nvdisasm: the machine code was not listed (column sass)")
    print(f"{len(rows)} compiled with jax {jax.__version__}, {failed} failed; none run")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
