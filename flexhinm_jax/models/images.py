"""Images as a classifier reads them: resized, cropped and normalised.

What a model wants is written in its `preprocessor_config.json`, in the ways of the
image processors ViT, DeiT and ConvNext (which ResNets use) of `transformers`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flexhinm_jax import arguments
from flexhinm_jax.io import shards
from flexhinm_jax.io.sources import BUILTIN

__all__ = ["CONFIG", "PROCESSORS", "Preprocessing", "read"]

CONFIG = "preprocessor_config.json"
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

WHAT = (
    "a folder of images, or an .npy file: float pixels [images, channels, height,"
    " width] as the model reads them, or bytes [images, height, width, channels]"
)

WARPED = 384
"""ConvNext's sides from which an image is stretched to a square, not cropped."""

PROCESSORS: dict[str, dict[str, Any]] = {
    "ViT": {"size": 224, "resample": 2},
    "DeiT": {"size": 256, "resample": 3, "do_center_crop": True, "crop_size": 224},
    "ConvNext": {"size": {"shortest_edge": 384}, "resample": 3, "crop_pct": 224 / 256},
}
"""Image processor -> what a field means that is missing."""

COMMON = {
    "do_resize": True,
    "do_center_crop": False,
    "do_rescale": True,
    "do_normalize": True,
    "rescale_factor": 1 / 255,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What becomes of an image.

    Attributes:
      size: height and width that it is resized to; None for not resized, or see
        `shortest`.
      shortest: length that its shorter side is resized to, the other in proportion;
        None for not.
      crop: height and width of the middle that is kept; None for all.
      resample: filter of Pillow, by number.
      scale: what bytes are multiplied with.
      mean: taken off every channel; None for nothing.
      std: every channel is divided by it; None for nothing.
    """

    size: tuple[int, int] | None
    shortest: int | None
    crop: tuple[int, int] | None
    resample: int
    scale: float
    mean: Sequence[float] | None
    std: Sequence[float] | None

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Preprocessing":
        """Reads the contents of a `preprocessor_config.json`.

        Raises:
          ValueError: another image processor.
        """
        name = config.get("image_processor_type") or config.get(
            "feature_extractor_type", "ViT"
        )
        kind = next((kind for kind in PROCESSORS if name.startswith(kind)), None)
        if kind is None:
            raise ValueError(
                f"image_processor_type={name!r} is not supported; supported are"
                f" {', '.join(PROCESSORS)}. Give an .npy file of pixels instead"
            )
        said = {k: v for k, v in config.items() if v is not None}
        given = COMMON | PROCESSORS[kind] | said
        size, shortest = _height_width(given["size"]), None
        crop = _height_width(given["crop_size"]) if given["do_center_crop"] else None
        if kind == "ConvNext" and size[0] < WARPED and given["do_resize"]:
            size, shortest, crop = None, int(size[0] / given["crop_pct"]), size
        normal = given["do_normalize"]
        return cls(
            size=size if given["do_resize"] else None,
            shortest=shortest,
            crop=crop,
            resample=given["resample"],
            scale=given["rescale_factor"] if given["do_rescale"] else 1.0,
            mean=given["image_mean"] if normal else None,
            std=given["image_std"] if normal else None,
        )

    def __call__(self, image: Any, channels: int) -> np.ndarray:
        """Pixels f32[channels, height, width] of an image of Pillow."""
        image = image.convert("RGB" if channels == 3 else "L")
        size = self.size
        if self.shortest is not None:
            short, long = sorted(image.size)
            other = int(self.shortest * long / short)
            wide = image.width > image.height
            size = (self.shortest, other) if wide else (other, self.shortest)
        if size is not None:
            image = image.resize(size[::-1], self.resample)
        if self.crop is not None:
            height, width = self.crop
            top, left = (image.height - height) // 2, (image.width - width) // 2
            image = image.crop((left, top, left + width, top + height))
        pixels = np.asarray(image, np.float32).reshape(*image.size[::-1], channels)
        pixels = pixels * np.float32(self.scale)
        if self.mean is not None and self.std is not None:
            pixels = (pixels - np.array(self.mean, np.float32)) / np.array(
                self.std, np.float32
            )
        return pixels.transpose(2, 0, 1)


def _height_width(size: int | Mapping[str, int]) -> tuple[int, int]:
    """A size in any of its forms; a shorter side stands for a square."""
    if isinstance(size, int):
        return size, size
    side = size.get("shortest_edge", 0)
    return size.get("height", side), size.get("width", side)


def read(
    source: str | Path, directory: Path, channels: int, limit: int | None = None
) -> np.ndarray:
    """Reads images for a classifier.

    Args:
      source: a folder of images, which are taken in the order of their names, those of
        folders in it too; or an .npy file: floating pixels [images, channels, height,
        width] as the model reads them, or bytes [images, height, width, channels].
      directory: of the model, with `preprocessor_config.json` unless pixels are given.
      channels: of an image, 1 or 3.
      limit: takes the first so many images; None takes all.

    Returns:
      f32[images, channels, height, width].

    Raises:
      FileNotFoundError: there is no such file, or none that says how to prepare images.
      ValueError: no images, or an array of another form.
      ImportError: Pillow is not installed, and it is no array of pixels.
    """
    if str(source) == BUILTIN:
        raise ValueError(f"no images are bundled; give {WHAT}")
    path = Path(source)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
        if not files:
            raise ValueError(f"{path} holds no images; give {WHAT}")
        return _prepared(files[:limit], directory, channels)
    if not path.is_file() or path.suffix != ".npy":
        raise ValueError(f"{path} is no folder and no .npy file; give {WHAT}")
    values = np.load(path, allow_pickle=False)[:limit]
    last = values.dtype == np.uint8
    if (
        values.ndim != 4
        or not len(values)
        or values.shape[-1 if last else 1] != channels
        or not (last or np.issubdtype(values.dtype, np.floating))
    ):
        raise ValueError(
            f"{path} holds {values.dtype}{list(values.shape)}, and this model reads"
            f" {channels} channels; give {WHAT}"
        )
    if last:
        return _prepared(list(values), directory, channels)
    return values.astype(np.float32)


def _prepared(
    images: Sequence[Path | np.ndarray], directory: Path, channels: int
) -> np.ndarray:
    """Pixels of files or of arrays of bytes."""
    with arguments.extra("images", "images, unless they are .npy, need Pillow"):
        from PIL import Image
    try:
        prepare = Preprocessing.from_dict(shards.read_json(directory / CONFIG))
    except ValueError as error:
        raise ValueError(f"{directory / CONFIG}: {error}") from error
    rows = []
    for image in images:
        if isinstance(image, Path):
            with Image.open(image) as opened:
                rows.append(prepare(opened, channels))
        else:
            rows.append(prepare(Image.fromarray(image.squeeze()), channels))
    shapes = {row.shape for row in rows}
    if len(shapes) > 1:
        raise ValueError(
            f"{directory / CONFIG} gives images of different sizes {sorted(shapes)};"
            " set do_resize, or give an .npy file of pixels"
        )
    return np.stack(rows)
