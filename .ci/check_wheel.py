"""Checks the one wheel in dist/: what it holds, and that it imports by itself.

Run from the repository root: `python .ci/check_wheel.py`. The wheel is installed beside
the environment's own packages, in front of the editable checkout.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

IMPORT_EVERYTHING = """
import importlib, pathlib, pkgutil, sys
import flexhinm_jax
home = pathlib.Path(sys.argv[1]).resolve()
found = pathlib.Path(flexhinm_jax.__file__).resolve()
assert home in found.parents, f"imported {found}, not the wheel"
names = [m.name for m in pkgutil.walk_packages(flexhinm_jax.__path__, "flexhinm_jax.")]
for name in names:
    importlib.import_module(name)
version = flexhinm_jax.__version__
print(f"wheel: imported {len(names)} modules of flexhinm_jax {version}")
"""


def check_contents(wheel: Path) -> None:
    """Raises if the wheel lacks a file, or holds anything but the package."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = next(n for n in names if n.endswith(".dist-info/METADATA"))
        description = archive.read(metadata).decode()
    tops = {name.split("/")[0] for name in names}
    extra = {t for t in tops if t != "flexhinm_jax" and not t.endswith(".dist-info")}
    if extra:
        raise SystemExit(f"wheel holds more than the package: {sorted(extra)}")
    source = {str(p) for p in Path("flexhinm_jax").rglob("*.py")}
    missing = (source | {"flexhinm_jax/py.typed"}) - set(names)
    if missing:
        raise SystemExit(f"wheel lacks {sorted(missing)}")
    if not any(n.endswith("/LICENSE") for n in names):
        raise SystemExit("wheel lacks LICENSE")
    if "make demo" not in description:
        raise SystemExit("wheel's long description is not the README")
    print(f"wheel: {wheel.name}, {len(names)} files, the package and nothing else")


def check_import(wheel: Path) -> None:
    """Raises if a module of the installed wheel does not import."""
    with tempfile.TemporaryDirectory() as home:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--target", home, str(wheel)], check=True)
        subprocess.run(
            [sys.executable, "-c", IMPORT_EVERYTHING, home],
            check=True,
            cwd=home,
            env=os.environ | {"PYTHONPATH": home, "JAX_PLATFORMS": "cpu"},
        )


if __name__ == "__main__":
    (built,) = Path("dist").glob("*.whl")
    check_contents(built.resolve())
    check_import(built.resolve())
