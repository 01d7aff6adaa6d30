"""What the page docs/architecture.md adds to the library in a file and a line."""

import importlib.util
from pathlib import Path
from typing import Any

from tests.test_docs import BLOCK, DOCS


def added(room: str, folder: Path) -> dict[str, Any]:
    """Entries of a registry that the page adds to a room: name -> class.

    Args:
      room: of the package, such as "methods".
      folder: gets the file.
    """
    (file, source), (_, line) = (
        (found["title"].rsplit("/", 1)[1], found["code"])
        for found in BLOCK.finditer((DOCS / "architecture.md").read_text())
        if (found["title"] or "").startswith(f"flexhinm_jax/{room}/")
    )
    path = folder / file
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return eval("{" + line + "}", vars(module))
