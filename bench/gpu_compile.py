"""Compiles the GPU kernels for chips that are not here, and reads what came out.

`make gpu-compile` runs it in an environment of its own (jax >= 0.11.2, its CUDA 13
plugin and NVIDIA's assembler; no driver and no GPU). Every kernel is compiled to PTX
and machine code for the chips it is meant for. A case passes if

    the sparse instruction is in the PTX, and in the machine code where `nvdisasm`
    can list it,
    nothing is spilled from registers,
    products in flight are not serialised by the assembler,
    no register of a product is touched before the wait that covers it, and every
    element of both operands is read where the copies put it (`bench.gpu_faults`),
    shared memory stays within the limit of the chip.

Nothing is run: numbers and speed need a GPU (`bench/gpu.py`). Chips are compiled in
processes of their own, because Mosaic keeps the architecture of the first one.
"""

import argparse
import contextlib
import functools
import importlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # else the plugin asks for a driver

import jax
import jax.numpy as jnp

from bench import gpu_faults, gpu_parts, study

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


class Case(NamedTuple):
    """One kernel at one size, and how it is cut; None if it is no sparse kernel."""

    kernel: str
    size: str
    function: Callable[..., Any]
    arguments: tuple[jax.ShapeDtypeStruct, ...]
    ptx: str
    sass: str
    cut: Any = None


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


def dump(case: Case, chip: Chip, mesh: Any) -> dict[str, str]:
    """Compiles one case: kind of file -> what Mosaic and the assembler wrote."""
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    arguments = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
        for a in case.arguments
    ]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
        with traced_for(chip):
            jax.jit(case.function).lower(*arguments).compile()
        return {
            kind: "\n".join(
                p.read_text() for p in sorted(Path(folder).glob(f"*{kind}"))
            )
            for kind in (".ptx", ".ptxas", ".resources.txt", ".sass_ctrl")
        }


def compile_case(case: Case, chip: Chip, mesh: Any) -> dict[str, Any]:
    """Compiles one case and reads the reports of the assembler."""
    row: dict[str, Any] = {"chip": chip.name, "kernel": case.kernel, "size": case.size}
    try:
        text = dump(case, chip, mesh)
    except Exception as error:  # every kind of failure is a row of the table
        return row | {"failures": [f"{type(error).__name__}: {str(error)[:300]}"]}
    return row | read_reports(text, case, chip)


def read_reports(text: dict[str, str], case: Case, chip: Chip) -> dict[str, Any]:
    """What the dumped files of one compilation say, and what is wrong with it."""
    number = lambda pattern, where: [int(n) for n in re.findall(pattern, where)]  # noqa: E731
    spills = number(r"(\d+) bytes spill", text[".ptxas"])
    registers = number(r"Used (\d+) registers", text[".ptxas"])
    shared = number(r"smem_scratch_bytes=(\d+)", text[".resources.txt"])
    found = {
        "ptx": len(re.findall(case.ptx, text[".ptx"])),
        "sass": len(re.findall(case.sass, text[".sass_ctrl"])),
        "registers": max(registers, default=0),
        "spills": sum(spills),
        "shared": max(shared, default=0),
        "disassembled": bool(text[".sass_ctrl"]),
    }
    failures = []
    if not registers or not spills:
        failures.append("no report of the assembler")
    if not found["ptx"]:
        failures.append(f"no {case.ptx!r} in the PTX")
    if found["disassembled"] and not found["sass"]:
        failures.append(f"no {case.sass!r} in the machine code")
    if found["spills"]:
        failures.append(f"{found['spills']} bytes spilled")
    if any(word in text[".ptxas"] for word in SERIALISED):
        failures.append("the assembler serialised wgmma")
    if case.cut and found["ptx"]:
        cut = case.cut
        failures += gpu_faults.descriptor_faults(text[".ptx"], cut.tokens, cut.step)
        failures += gpu_faults.machine_faults(text[".sass_ctrl"])
    if found["shared"] > chip.shared_block:
        failures.append(f"{found['shared']} bytes of shared memory are too many")
    return found | {"failures": failures}


def struct(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    """A shape to trace with."""
    return jax.ShapeDtypeStruct(shape, dtype)


def backend_case(
    backend: Any,
    name: str,
    size: gpu_parts.Size,
    n: int,
    dtype: Any,
    ptx: str,
    sass: str,
    plain: bool = False,
) -> Case:
    """A case of a whole backend: `matmul` on a packed weight with its layout."""
    import dataclasses

    make = functools.partial(gpu_parts.random_weight, size=size, dtype=dtype)
    packed = jax.eval_shape(make, jax.random.key(0))
    ready = jax.eval_shape(backend.prepare, packed)
    ready = {k: v for k, v in ready.items() if not (plain and k == "index")}
    leaves, tree = jax.tree.flatten(
        dataclasses.replace(packed, layouts={backend.NAME: ready})
    )

    def run(x: jax.Array, *leaves: jax.Array) -> jax.Array:
        return backend.matmul(x, jax.tree.unflatten(tree, leaves), dtype)

    kind = {"bfloat16": "bf16", "float16": "f16"}[jnp.dtype(dtype).name]
    o, i = packed.shape
    x, name = struct(n, i, dtype=dtype), f"{name} {o}x{i} n={n} {kind}"
    cut = backend.tiling(n, backend.shape(jax.tree.unflatten(tree, leaves)))
    return Case(backend.NAME, name, run, (x, *leaves), ptx, sass, cut)


def cases(chip: str) -> list[Case]:
    """What is compiled for a chip."""
    from flexhinm_jax.gpu import wgmma_sp

    assert chip == "h200"
    bf16, f16 = jnp.bfloat16, jnp.float16
    flat, half, mixed = gpu_parts.two_of_four, gpu_parts.hinm, gpu_parts.flexhinm
    sparse = functools.partial(
        backend_case,
        wgmma_sp,
        ptx=r"wgmma\.mma_async\.sp\.sync\.aligned",
        sass=r"HGMMA\.SP\.64x\d+x32",
    )
    return [
        sparse("2:4", flat(4096, 4096), 1, bf16, plain=True),
        sparse("2:4", flat(8192, 8192), 64, bf16, plain=True),
        sparse("2:4", flat(8192, 8192), 1024, f16),
        sparse("2:4 in an order", flat(8192, 8192), 16, bf16),
        sparse("2:4", flat(1000, 388), 65, bf16),
        sparse("FlexHiNM v=64", mixed(8192, 8192, 64), 1, bf16),
        sparse("FlexHiNM v=64", mixed(1536, 384, 64), 65, f16),
        sparse("2:4", flat(8192, 8192), 256, bf16, plain=True),
        sparse("HiNM v=128", half(8192, 8192, 128), 256, bf16),
        sparse("FlexHiNM v=64", mixed(8192, 8192, 64), 128, bf16),
        sparse("2:4", flat(8192, 8192), 128, bf16),
        sparse("FlexHiNM v=128", mixed(8192, 8192, 128), 256, bf16),
        sparse("FlexHiNM v=128", mixed(8192, 8192, 128), 1024, bf16),
        sparse("HiNM v=128", half(8192, 8192, 128), 8, f16),
        sparse("FlexHiNM v=32", mixed(4096, 4096, 32), 16, f16),
        sparse("HiNM v=64", half(14336, 4096, 64), 32, bf16),
    ]


def compile_chip(chip: str) -> list[dict[str, Any]]:
    """Compiles every case of one chip in this process."""
    numbers = CHIPS[chip]
    mesh = mesh_of(numbers)
    return [compile_case(case, numbers, mesh) for case in cases(chip)]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [
        f"{'chip':22} {'kernel':9} {'size':36} {'ptx':>4} {'sass':>4} {'regs':>4} "
        f"{'spills':>6} {'shared':>7}"
    ]
    for row in rows:
        sass = row.get("sass", 0) if row.get("disassembled") else "-"
        lines.append(
            f"{row['chip']:22} {row['kernel']:9} {row['size']:36} "
            f"{row.get('ptx', 0):4} {sass:>4} {row.get('registers', 0):4} "
            f"{row.get('spills', 0):6} {row.get('shared', 0):7}"
        )
        lines += [f"    FAILED: {failure}" for failure in row["failures"]]
    return "\n".join(lines)


def run_chip(chip: str) -> list[dict[str, Any]]:
    """`compile_chip` in a process of its own; a crash becomes a failed row."""
    try:
        return study.alone(compile_chip, chip)
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
        }
        data, what = {"cases": each}, f"{chip}, {kernel}"
        command = "make gpu-compile"
        yield study.Row(TABLE, what, passed, len(each), None, more, data, command)


def main() -> int:
    """Compiles for all chips, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    rows = [row for chip in CHIPS for row in run_chip(chip)]
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
