"""What the README says: its example names what is in a picture, however the picture is stored."""

import inspect
import re
import struct
import zlib
from itertools import product

import numpy as np
import pytest
from PIL import Image
from tiny import ROOT

import ghostnet

README = (ROOT / "README.md").read_text()
(EXAMPLE,) = re.findall(r"\n```python\n(import torch\n.*?)\n```\n", README, re.DOTALL)
STORED_AS = {  # to show a picture upright, the ways to turn it before its EXIF orientation does
    1: lambda picture: picture,
    2: np.fliplr,
    3: lambda picture: np.rot90(picture, 2),
    4: np.flipud,
    5: lambda picture: picture.swapaxes(0, 1),
    6: lambda picture: np.rot90(picture, 1),
    7: lambda picture: np.rot90(picture, 2).swapaxes(0, 1),
    8: lambda picture: np.rot90(picture, -1),
}
BOOLS = (False, True)
COLOR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # of a PNG, by its channels


@pytest.mark.parametrize("words", [
    "what Python or numpy draws in a step (a weight of mixup, say) is drawn once and recorded",
    "`CUDA_VISIBLE_DEVICES=1` chooses one",
    "an EMA copy or DistributedDataParallel made before goes on with the old weights",
    "in a notebook, after `%cd ghostnet`",
    "**CIFAR-100** needs two edits, `CIFAR100` in `load_cifar10` and 100 names in `CLASSES`",
])
def test_what_no_message_can_say_is_in_the_readme(words):
    assert words in " ".join(README.split())


def test_the_code_of_the_recording_says_what_is_frozen_by_it():
    recording = inspect.getsource(ghostnet.Trainer.record)
    assert "random number of Python's or numpy's is recorded too" in recording


@pytest.fixture(scope="module")
def dog(real_data_dir):
    image, _ = ghostnet.load_cifar10(real_data_dir)[1][12]
    return np.asarray(image)


@pytest.fixture
def lines_of(monkeypatch, capsys):
    """What the example prints of a file."""

    def run(path):
        monkeypatch.chdir(ROOT)
        assert EXAMPLE.count('"picture.png"') == 1
        exec(EXAMPLE.replace('"picture.png"', repr(str(path))), {})
        return capsys.readouterr().out.splitlines()

    return run


def write_png(path, pixels, bits=8, orientation=1):
    """A PNG of pixels (height, width, channels) from 0 to 255, as the format's text has it."""
    height, width, channels = pixels.shape
    samples = pixels if bits == 8 else (pixels * 257.0).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", width, height, bits, COLOR_TYPES[channels], 0, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = orientation
    chunks = {b"IHDR": header, b"eXIf": exif.tobytes()[6:], b"IDAT": zlib.compress(rows)}
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in {**chunks, b"IEND": b""}.items():
        checksum = struct.pack(">I", zlib.crc32(name + data))
        content += struct.pack(">I", len(data)) + name + data + checksum
    path.write_bytes(content)


def test_it_prints_of_the_test_image_what_the_readme_states(dog, lines_of, tmp_path):
    Image.fromarray(dog).save(tmp_path / "dog.png")
    lines = lines_of(tmp_path / "dog.png")
    assert len(lines) == 3
    assert [line for line in lines if f"`{line}`" not in README] == []


@pytest.mark.parametrize("orientation, form", [*enumerate(product((8, 16), BOOLS, BOOLS), 1)])
def test_a_png_is_the_same_picture_in_every_form(dog, lines_of, tmp_path, orientation, form):
    bits, grey, alpha = form
    seen = dog
    channels = [dog]
    if grey:
        channels = [np.asarray(Image.fromarray(dog).convert("L"))[:, :, None]]
        seen = channels[0].repeat(3, axis=2)
    if alpha:
        channels.append(np.full((32, 32, 1), 255, dtype=np.uint8))
    Image.fromarray(seen).save(tmp_path / "seen.png")
    stored = STORED_AS[orientation](np.concatenate(channels, axis=2))
    write_png(tmp_path / "stored.png", np.ascontiguousarray(stored), bits, orientation)
    assert lines_of(tmp_path / "stored.png") == lines_of(tmp_path / "seen.png")


@pytest.mark.parametrize("orientation", STORED_AS)
def test_a_camera_s_jpeg_is_turned_upright_and_reduced_without_aliasing(
    dog, lines_of, tmp_path, orientation
):
    large = dog.repeat(20, axis=0).repeat(20, axis=1)
    for row, column in product((9, 10), repeat=2):  # a reduction that picks pixels picks these
        large[row::20, column::20] = 255 - large[row::20, column::20]
    stored = STORED_AS[orientation](large)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "camera.jpg", exif=exif, quality=95)
    assert lines_of(tmp_path / "camera.jpg")[0].startswith("dog: 9")


def test_a_palette_is_its_colors(dog, lines_of, tmp_path):
    palette = Image.fromarray(dog).quantize(256)
    palette.save(tmp_path / "palette.png")
    palette.convert("RGB").save(tmp_path / "colors.png")
    assert lines_of(tmp_path / "palette.png") == lines_of(tmp_path / "colors.png")
