"""A path that is no model directory is answered with what to do about it."""

import pytest

from flexhinm_jax.io import gguf, huggingface, sources, tensors
from flexhinm_jax.io.hints import hint


@pytest.mark.parametrize(
    ("file", "given", "message"),
    [
        ("m.gguf", "m.gguf", r"m\.gguf is not a directory; 'flexhinm import .*m\.gguf"),
        ("m.gguf", "", r"config\.json is missing; it holds m\.gguf: 'flexhinm import"),
        ("adapter_config.json", "", "it is a LoRA adapter: merge it into its base"),
        ("model.safetensors", "model.safetensors", "it is a file: give its folder, "),
        ("pytorch_model.bin", "", r"it holds pytorch_model\.bin: load it where it"),
        ("notes.txt", "", "give a complete Hugging Face model directory"),
        ("notes.txt", "other", "give the folder that holds config.json and"),
    ],
)
def test_what_is_no_model_directory_gets_advice(tmp_path, file, given, message):
    (tmp_path / file).write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=message):
        huggingface.read(tmp_path / given)


def test_weights_of_another_format_are_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"it holds model\.onnx: load it"):
        huggingface.read(tmp_path)
    assert hint(tmp_path / "nowhere", "look again") == "look again"


def test_a_pointer_of_git_lfs_is_no_truncated_file(tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "model.safetensors"
    path.write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    )
    with pytest.raises(ValueError, match="pointer of Git LFS .* 'git lfs pull'"):
        tensors.read_header(path)


def test_a_directory_is_no_gguf_file(tmp_path):
    pytest.importorskip("gguf")
    with pytest.raises(IsADirectoryError, match="give the GGUF file itself"):
        gguf.convert(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    "address",
    [
        "https://huggingface.co/owner/tiny",
        "https://huggingface.co/owner/tiny/tree/main",
        "hf://owner/tiny/",
    ],
)
def test_the_address_of_a_model_is_its_name(address, tmp_path):
    pytest.importorskip("huggingface_hub")
    with pytest.raises(ValueError, match=r"^owner/tiny(@main)? is no folder here"):
        sources.find(address, tmp_path, offline=True)
