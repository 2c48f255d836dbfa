"""What the README says: the tables and numbers are those of the commands; its examples run."""

import inspect
import os
import re
import subprocess
import sys
from itertools import product

import comparison
import numpy as np
import pytest
from PIL import Image
from tiny import ROOT

import ghostnet

README = (ROOT / "README.md").read_text()
TEXT = " ".join(README.split())
EXAMPLE, DROP_IN_EXAMPLE = re.findall(r"\n```python\n(import .*?)\n```\n", README, re.DOTALL)
RUNS, _ = ghostnet.read_all(ROOT / "checkpoints")
OLDER, _ = ghostnet.read_all(ROOT / "checkpoints" / "batch128")
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
FORMS = ["RGB", "RGBA", "L", "LA", "I;16", "P", "RGB", "RGBA"]  # I;16 is gray in 16 bits


@pytest.mark.parametrize("words", [
    "what Python or numpy draws in a step (a weight of mixup, say) is drawn once and recorded",
    "`CUDA_VISIBLE_DEVICES=1` chooses one",
    "an EMA copy or DistributedDataParallel made before goes on with the old weights",
    "in a notebook, after `%cd ghostnet`",
    "**CIFAR-100** needs two edits, `CIFAR100` in `load_cifar10` and 100 names in `CLASSES`",
])
def test_what_no_message_can_say_is_in_the_readme(words):
    assert words in TEXT


def test_the_code_of_the_recording_says_what_is_frozen_by_it():
    recording = inspect.getsource(ghostnet.Trainer.record)
    assert "random number of Python's or numpy's is recorded too" in recording


def test_the_tables_are_those_that_comparison_py_prints():
    ordinary = {f"batch128/{name}": OLDER[name] for name in ("resnet56", "vgg16")}
    rows = comparison.rows_of(RUNS | ordinary)
    assert comparison.results_table(rows) in README
    assert comparison.erasing_table(rows) in README
    assert max(len(line) for line in README.splitlines() if line.startswith("| ")) <= 130


def test_numbers_in_the_text_are_those_of_the_files():
    on_h200 = OLDER["gr_multistep-cheap_weight_decay0.0005"].history["seconds"]
    assert f"takes {min(on_h200):.1f} s on an H200 without other runs" in TEXT
    runs = [RUNS[name] for name in ("gr_cosine-epochs30", "gr_cosine", "gr_erasing")]
    short, long, erasing = [f"{run.accuracy:.2f}%" for run in runs]
    assert f"{short} by 30 epochs, {long} by 200 and {erasing} by 200 with random erasing" in TEXT
    hours = [f"{run.epochs * min(run.history['seconds']) / 3600:.1f}" for run in runs]
    assert f"these take {hours[0]}, {hours[1]} and {hours[2]} hours" in TEXT
    decays = ("", "-cheap_weight_decay0.0005")
    gr, gr_decayed = [OLDER[f"gr_cosine{decay}"] for decay in decays]
    gv, gv_decayed = [OLDER[f"gv_cosine{decay}"] for decay in decays]
    empty = [comparison.emptied(run.network("cpu")) for run in (gr_decayed, gv_decayed, gr, gv)]
    assert f"{empty[0]} ghosts of Ghost-ResNet-56 and {empty[1]} of Ghost-VGG-16 end" in TEXT
    assert empty[2:] == ["0 of 1064", "0 of 2112"]
    assert f"{gr.accuracy} without and {gr_decayed.accuracy} with decay in Ghost-ResNet-56" in TEXT
    assert f"{gv.accuracy} and {gv_decayed.accuracy} in Ghost-VGG-16" in TEXT


def test_the_drop_in_example_prints_the_savings_that_are_stated(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", DROP_IN_EXAMPLE]
    out = subprocess.check_output(command, cwd=tmp_path, env=environment, text=True, timeout=120)
    totals = re.findall(r"^ +.*: (\d+\.\d+[Mx])", out, re.MULTILINE)
    assert len(totals) == 6
    assert [total for total in totals if total not in README] == []


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


def test_it_prints_of_the_test_image_what_the_readme_states(dog, lines_of, tmp_path):
    Image.fromarray(dog).save(tmp_path / "dog.png")
    lines = lines_of(tmp_path / "dog.png")
    assert len(lines) == 3
    assert [line for line in lines if f"`{line}`" not in README] == []


def save(stored, path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(path, exif=exif)


@pytest.mark.parametrize("orientation, form", [*enumerate(FORMS, 1)])
def test_a_picture_is_the_same_in_every_form(dog, lines_of, tmp_path, orientation, form):
    seen = Image.fromarray(dog)
    if form in ("L", "LA", "I;16"):
        seen = seen.convert("L")
    elif form == "P":
        seen = seen.quantize(256).convert("RGB")  # to as many colors as a palette has
    seen.save(tmp_path / "seen.png")
    turned = STORED_AS[orientation](np.asarray(seen))
    if form == "I;16":
        stored = Image.fromarray(257 * turned.astype(np.uint16))
    else:
        stored = Image.fromarray(turned).convert(form, palette=Image.Palette.ADAPTIVE)
    assert stored.mode == form
    save(stored, tmp_path / "stored.png", orientation)
    assert lines_of(tmp_path / "stored.png") == lines_of(tmp_path / "seen.png")


def test_a_camera_s_jpeg_is_turned_upright_and_reduced_without_aliasing(dog, lines_of, tmp_path):
    large = dog.repeat(20, axis=0).repeat(20, axis=1)
    for row, column in product((9, 10), repeat=2):  # a reduction that picks pixels picks these
        large[row::20, column::20] = 255 - large[row::20, column::20]
    save(Image.fromarray(STORED_AS[6](large)), tmp_path / "camera.jpg", 6)
    assert lines_of(tmp_path / "camera.jpg")[0].startswith("dog: 9")
