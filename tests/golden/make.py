"""Writes `golden.npz`: what every program gives today.

Run it by hand, before a refactoring or when a result is meant to change:

    JAX_PLATFORMS=cpu python -m tests.golden.make

Thousands of small arrays as entries of their own would take more for their headers than
for their data. So a program is one entry, the bytes of its arrays in a row, and "index"
says in JSON what they are: program -> [[name, dtype, shape], ...].
"""

import json
import math
import sys
from pathlib import Path

import numpy as np

import conftest  # noqa: F401  compiles as the tests do, or other bits come out
from tests.golden import programs

FILE = Path(__file__).with_name("golden.npz")


def save(results: dict[str, programs.Arrays]) -> None:
    """Writes the results of all programs."""
    index, entries = {}, {}
    for program, arrays in results.items():
        index[program] = [[n, x.dtype.str, x.shape] for n, x in arrays.items()]
        whole = b"".join(x.tobytes() for x in arrays.values())
        entries[program] = np.frombuffer(whole, np.uint8)
    np.savez_compressed(FILE, index=np.array(json.dumps(index)), **entries)


def load() -> dict[str, programs.Arrays]:
    """The results of all programs, as they were saved."""
    out = {}
    with np.load(FILE) as file:
        for program, arrays in json.loads(str(file["index"])).items():
            whole, start, found = file[program].tobytes(), 0, {}
            for name, dtype, shape in arrays:
                count = math.prod(shape)
                x = np.frombuffer(whole, dtype, count, start)
                found[name], start = x.reshape(shape), start + x.nbytes
            out[program] = found
    return out


def main(names: list[str]) -> None:
    """Records the named programs again, or all of them."""
    known = programs.programs()
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"no program {unknown[0]!r}; there are {', '.join(known)}")
    results = load() if names else {}
    for name in names or known:
        results[name] = known[name][0]()
        size = sum(x.nbytes for x in results[name].values())
        print(f"{name}: {len(results[name])} arrays, {size} bytes", flush=True)
    save({name: results[name] for name in known})
    print(f"{FILE.name}: {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
