"""Images as a classifier reads them."""

import json

import numpy as np
import pytest

pytest.importorskip("PIL")
from PIL import Image  # noqa: E402

from flexhinm_jax.models import images  # noqa: E402

MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
BYTES = np.random.RandomState(0).randint(0, 256, (2, 16, 16, 3), np.uint8)
WIDE = np.random.RandomState(1).randint(0, 256, (1, 16, 25, 3), np.uint8)


def pixels(values, folder, config, **options):
    """The pixels of byte images for a model with that configuration."""
    config = {"image_mean": MEAN, "image_std": STD} | config
    (folder / images.CONFIG).write_text(json.dumps(config))
    np.save(folder / "images.npy", values)
    return images.read(folder / "images.npy", folder, 3, **options)


def normal(values):
    """By hand: bytes [n, h, w, 3] -> pixels [n, 3, h, w]."""
    return ((values / 255 - MEAN) / STD).transpose(0, 3, 1, 2)


# Every size is that of the image, so that no filter of Pillow takes part.
WAYS = {
    "ViT": ({"feature_extractor_type": "ViTFeatureExtractor", "size": 16}, BYTES, ...),
    "DeiT": (
        {"image_processor_type": "DeiTImageProcessor", "size": 16, "crop_size": 13},
        BYTES,
        np.s_[:, 1:14, 1:14],
    ),
    "ConvNext": (
        {"image_processor_type": "ConvNextImageProcessorFast", "size": 14},
        WIDE,
        np.s_[:, 1:15, 5:19],
    ),
}


@pytest.mark.parametrize("kind", images.PROCESSORS)
def test_images_are_prepared_as_the_directory_says(kind, tmp_path):
    config, values, part = WAYS[kind]
    got = pixels(values, tmp_path, config)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, normal(values[part]), rtol=1e-5, atol=1e-5)


def test_steps_can_be_left_out(tmp_path):
    steps = ("do_resize", "do_rescale", "do_normalize")
    got = pixels(WIDE, tmp_path, dict.fromkeys(steps, False))
    np.testing.assert_array_equal(got, WIDE.transpose(0, 3, 1, 2))


def test_a_folder_of_files_is_read_in_the_order_of_names(tmp_path):
    (tmp_path / "photos" / "b").mkdir(parents=True)
    Image.fromarray(BYTES[1]).save(tmp_path / "photos" / "b" / "a.png")
    Image.fromarray(BYTES[0]).save(tmp_path / "photos" / "a.PNG")
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    want = pixels(BYTES, tmp_path, {"size": {"height": 16, "width": 16}})
    got = images.read(tmp_path / "photos", tmp_path, 3)
    np.testing.assert_array_equal(got, want)
    assert len(images.read(tmp_path / "photos", tmp_path, 3, limit=1)) == 1


def test_pixels_are_taken_as_they_are(tmp_path):
    values = np.ones((3, 1, 5, 4), np.float16)
    np.save(tmp_path / "pixels.npy", values)
    got = images.read(tmp_path / "pixels.npy", tmp_path, 1, limit=2)
    assert got.dtype == np.float32 and got.shape == (2, 1, 5, 4)


def test_what_is_no_image_is_named(tmp_path):
    with pytest.raises(ValueError, match="no images are bundled; give a folder of"):
        images.read("builtin", tmp_path, 3)
    with pytest.raises(ValueError, match="holds no images"):
        images.read(tmp_path, tmp_path, 3)
    with pytest.raises(ValueError, match="text.txt is no folder and no .npy file"):
        images.read(tmp_path / "text.txt", tmp_path, 3)
    for shape, dtype in (((2, 4, 5, 5), "f4"), ((2, 3, 5, 5), "i4"), ((5, 3), "f4")):
        np.save(tmp_path / "x.npy", np.zeros(shape, dtype))
        with pytest.raises(ValueError, match=r"holds .*this model reads 3 channels"):
            images.read(tmp_path / "x.npy", tmp_path, 3)
    np.save(tmp_path / "x.npy", BYTES)
    with pytest.raises(FileNotFoundError, match="preprocessor_config.json is missing"):
        images.read(tmp_path / "x.npy", tmp_path, 3)
    config = {"image_processor_type": "CLIPImageProcessor"}
    with pytest.raises(ValueError, match="'CLIPImageProcessor' is not.*ViT, DeiT"):
        pixels(BYTES, tmp_path, config)
