"""What to do about a path that is no model directory, by what lies there."""

from pathlib import Path

__all__ = ["OTHER_WEIGHTS", "hint"]

ADAPTER = "adapter_config.json"

OTHER_WEIGHTS = tuple(
    ".bin .bin.index.json .pt .pth .ckpt .h5 .msgpack .msgpack.index.json .onnx"
    " .onnx_data .gguf .ot .npz .tflite .mlmodel".split()
)
"""Ends of files that hold weights in another format than safetensors."""


def hint(path: Path, otherwise: str) -> str:
    """The end of a message: what a person who gave this path should do.

    Args:
      path: a file, a directory, or nothing that exists.
      otherwise: what to do where nothing else is known.
    """
    if path.suffix == ".gguf" and path.is_file():
        return f"'flexhinm import {path} --out DIR' makes a model directory of it"
    if path.is_file():
        return f"it is a file: give its folder, {path.parent}"
    if (path / ADAPTER).is_file():
        return (
            "it is a LoRA adapter: merge it into its base model (merge_and_unload of"
            " peft), save that, and give the directory of the merged model"
        )
    for file in sorted(path.glob("*.gguf")):
        return f"it holds {file.name}: 'flexhinm import {file} --out DIR' reads that"
    if any(path.glob("*.safetensors")):
        return otherwise
    others = (path.glob(f"*{end}") for end in OTHER_WEIGHTS)
    for file in (file for files in others for file in sorted(files)):
        return (
            f"it holds {file.name}: load it where it came from and save it as"
            " safetensors (save_pretrained of transformers does)"
        )
    return otherwise
