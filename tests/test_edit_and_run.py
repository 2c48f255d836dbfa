"""The script as its user meets it: constants edited and given, what it prints, where it runs."""

import pickle
import re
import shutil
from unittest import mock

import numpy as np
import pytest
import torch
from tiny import ROOT, at_step, files, interrupt, size_of_white_png
from torchvision.datasets import CIFAR100

import ghostnet

EPOCHS = ("epochs: int = 200", "epochs: int = 1")


@pytest.fixture
def shipped(script):
    """The script beside two files that are shipped."""
    for name in ("gr_cosine.pth", "gr_multistep.pth"):
        shutil.copy(ROOT / "checkpoints" / name, script.checkpoints)
    return script


def test_edited_constants_train_a_run_of_their_own_and_edited_back_find_the_shipped_one(shipped):
    before = files(shipped.checkpoints)
    edits = EPOCHS, ("padding: int = 4", "padding: int = 0")
    for edit in edits:
        shipped.edit(*edit)
    done = shipped.run("gr_cosine")
    assert (done.returncode, done.stderr) == (0, "")
    run = "gr_cosine-epochs1-padding0"
    assert f"{run} is gr_cosine with epochs 1 instead of 200, padding 0 instead of 4" in done.stdout
    assert f"{run}: epoch 1/1, loss" in done.stdout
    assert files(shipped.checkpoints).keys() - before.keys() == {f"{run}.pth"}
    assert files(shipped.checkpoints).items() >= before.items()
    evaluated = "gr_cosine: test accuracy "
    assert evaluated in shipped.call("gr_cosine", "--epochs", 200, "--padding", 4).stdout

    for edit in edits:
        shipped.edit(*reversed(edit))
    done = shipped.call("gr_cosine")
    assert done.returncode == 0
    assert evaluated in done.stdout
    assert ": epoch " not in done.stdout
    assert "instead of" not in done.stdout


def test_an_edited_experiment_leaves_a_shipped_file_alone_and_is_what_a_new_one_holds(shipped):
    before = files(shipped.checkpoints)
    small = 'Constants(network="resnet32", epochs=1'
    shipped.edit('Constants(schedule="multistep"', f'{small}, schedule="multistep"')
    shipped.edit("Constants(ratio=20, dw_kernel_size=5", small)
    done = shipped.call("gr_multistep", "gr_s20")
    assert (done.returncode, done.stderr) == (0, "")
    run = "gr_multistep-networkresnet32-epochs1"
    differences = "network resnet32 instead of resnet56, epochs 1 instead of 200"
    assert f"{run} is gr_multistep with {differences}\n" in done.stdout
    assert files(shipped.checkpoints).keys() - before.keys() == {f"{run}.pth", "gr_s20.pth"}
    assert files(shipped.checkpoints).items() >= before.items()
    assert ghostnet.read_checkpoint(shipped.checkpoints / "gr_s20.pth").constants.ratio == 2


SEED = "    seed: int = 0  #"
AS_BEFORE = "    label_smoothing: float = 0.0\n    mixup: bool = False\n"
ANEW = """
    label_smoothing: float = 0.2
    mixup: bool = True
    cutout: int = 8
    policy: str = "flip"
    blurs: tuple[int, ...] = (3, 5)
"""


def test_a_constant_of_ones_own_is_zero_in_shipped_files_and_part_of_a_new_run(shipped):
    before = files(shipped.checkpoints)
    shipped.edit(SEED, AS_BEFORE + SEED)
    done = shipped.call("gr_cosine")
    assert (done.returncode, done.stderr) == (0, "")
    assert "gr_cosine: test accuracy " in done.stdout
    assert ": epoch " not in done.stdout
    done = shipped.call("gr_cosine", "--epochs", 1, "--label-smoothing", 0.1, "--mixup")
    assert "gr_cosine-epochs1-label_smoothing0.1-mixupTrue: epoch 1/1" in done.stdout

    shipped.edit(AS_BEFORE, ANEW)  # another default than zero is another training than the files'
    shipped.edit(*EPOCHS)
    done = shipped.call("gr_cosine")
    own = "label_smoothing0.2-mixupTrue-cutout8-policyflip-blurs3_5"
    assert f"gr_cosine-epochs1-{own}: epoch 1/1" in done.stdout
    assert files(shipped.checkpoints).items() >= before.items()
    shipped.edit(ANEW, "\n")  # who takes them out again, has files too many
    done = shipped.call("gr_cosine")
    assert done.returncode == 0
    assert f"gr_cosine-epochs1-{own}.pth is no checkpoint of this script (unknown" in done.stderr


def test_a_bare_command_runs_those_of_the_three_that_are_left_in_the_experiments(shipped):
    for run in ("gr_multistep", "gv_cosine"):
        shipped.edit(f'    "{run}": C', f'    # "{run}": C')
    done = shipped.call()
    assert (done.returncode, done.stderr) == (0, "")
    assert "gr_cosine: test accuracy " in done.stdout
    assert "gr_multistep: " not in done.stdout


def test_a_network_of_ones_own_trains_or_is_one_line_that_says_where_to_add_it(shipped):
    shipped.edit('"vgg16"]', '"vgg16", "resnet20", "resnet18", "alexnet"]')
    for network in ("resnet20", "resnet18", "alexnet"):
        line = f'    "{network}": Constants(network="{network}", epochs=1, ratio=1),\n'
        shipped.edit("    # The sweeps", f"{line}    # The sweeps")
    done = shipped.call("resnet20")
    assert (done.returncode, done.stderr) == (0, "")
    assert "resnet20: epoch 1/1" in done.stdout
    for network in ("resnet18", "alexnet"):
        done = shipped.call(network, "resnet32", "--epochs", 1)
        assert done.returncode == 2
        said = f"build_network cannot build {network}: add it there"
        assert done.stderr == f"ghostnet.py: {network}: {said}\n"
        assert "resnet32-epochs1: test accuracy" in done.stdout


def test_a_run_that_stops_early_as_the_script_says_is_saved_and_goes_on(script):
    place = "        # To stop early: checkpoint.save(path), then break."
    stop = "        if epoch == 2:\n            checkpoint.save(path)\n            break\n"
    script.edit(place, stop + place)
    done = script.call("resnet32", "--epochs", 3)
    assert (done.returncode, done.stderr) == (0, "")
    assert "training from epoch 3" in script.call("resnet32", "--epochs", 3).stdout


def test_another_optimizer_trains_where_a_loop_is_left_out_as_the_script_says(script, monkeypatch):
    script.edit("torch.optim.SGD(", "torch.optim.AdamW(")
    script.edit("self.lr, constants.momentum, nesterov=constants.momentum > 0,", "self.lr,")
    text = script.path.read_text()
    (loop,) = re.findall(r"# AdamW .*: leave this loop out;.*\n(.*:\n.*momentum_buffer.*\n)", text)
    script.edit(loop, "")
    command = ("resnet32", "--epochs", 2, "--lr", 0.001)
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", at_step(2, interrupt, torch.optim.AdamW))
        assert script.call(*command).returncode == 130
    done = script.call(*command)
    assert (done.returncode, done.stderr) == (0, "")
    assert "training from epoch 2" in done.stdout
    assert "epoch 2/2" in done.stdout


@pytest.mark.parametrize("old, new, said", [
    ("PICTURE_MODULE = 1 ", "PICTURE_MODULE = 57 ", "PICTURE_MODULE must be below 57"),
    ("PICTURE_IMAGE = 12 ", "PICTURE_IMAGE = 20 ", "there is no test image PICTURE_IMAGE"),
])
def test_a_picture_that_cannot_be_drawn_is_one_line_and_costs_no_run(shipped, old, new, said):
    before = files(shipped.checkpoints)
    shipped.edit(old, new)
    done = shipped.call("gr_cosine")
    assert (done.returncode, done.stderr) == (2, f"ghostnet.py: {said}\n")
    assert files(shipped.checkpoints) == before


def test_cifar_100_is_two_edits_and_the_picture_names_one_of_its_classes(script, tmp_path):
    folder = tmp_path / "cifar-100" / CIFAR100.base_folder
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for name, fine in (("train", 60 * [99]), ("test", 20 * [71])):
        images = random.integers(0, 256, (len(fine), 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": images, "fine_labels": fine}))
    names = [f"class {number}" for number in range(100)]
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": names}))

    script.edit("datasets.CIFAR10\n", "datasets.CIFAR100\n")
    script.edit('"automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")',
                f'{str(names[1:])[1:-1]})')
    titles = []
    with (
        mock.patch("torchvision.datasets.cifar.check_integrity", return_value=True),
        mock.patch("matplotlib.axes.Axes.set_title", lambda _, title: titles.append(title)),
    ):
        done = script.call("gr_cosine", "--epochs", 1, "--data-dir", folder.parent)
    assert (done.returncode, done.stderr) == (0, "")
    assert titles == ["test image 12: class 71"]


REPORTS = [
    "flops: 127.93M", "params: 0.86M", "flops: 67.50M", "params: 0.44M",
    "flops reduction: 1.90x (paper claims ~2x)", "param reduction: 1.95x (paper claims ~2x)",
    "flops: 314.57M", "params: 14.99M", "flops: 159.22M", "params: 7.65M",
    "flops reduction: 1.98x (paper claims ~2x)", "param reduction: 1.96x (paper claims ~2x)",
]  # fmt: skip


def test_the_bare_command_trains_reports_and_draws(script):
    done = script.call("--epochs", 1, quick=False)
    assert (done.returncode, done.stderr) == (0, "")  # and no progress bar, without a terminal
    lines = done.stdout.splitlines()
    assert [line.strip() for line in lines if re.match(" +(flops|param)", line)] == REPORTS
    version = re.escape(torch.__version__)
    assert re.search(rf"^.* CPU, .*float.*, torch {version}$", done.stdout, re.M)
    checkpoints, _ = ghostnet.read_all(script.checkpoints)
    assert list(checkpoints) == ["gr_cosine-epochs1", "gr_multistep-epochs1", "gv_cosine-epochs1"]
    for run, checkpoint in checkpoints.items():
        accuracy = f"{checkpoint.accuracy:.2f}"
        assert f"{run}: test accuracy {accuracy}% now, {accuracy}% when trained" in done.stdout
        row = rf"\| {run} +\| ghost-\w+ +\| 1/1 +\| {accuracy} +\| 9\d.\d +\| [\d.]+M +\| .*"
        assert [line for line in lines if re.fullmatch(row, line)]
    for picture in ("ghost_visualization.png", "training_curves.png"):
        width, height = size_of_white_png(script.images / picture)
        assert width > 1.5 * height > 600


def test_the_paper_s_claim_stands_only_below_its_own_ratio(script):
    script.edit("ratio: int = 2  #", "ratio: int = 4  #")
    done = script.call("resnet32", "--epochs", 1, quick=False)
    assert done.returncode == 0
    assert "flops reduction: 3.86x\n" in done.stdout
    assert "paper claims" not in done.stdout


def test_what_is_known_is_shown_before_what_is_missing_is_trained(script):
    script.call("resnet32", "--epochs", 2)
    done = script.call("resnet56", "resnet32", "--epochs", 2, quick=False)
    parts = ["| resnet32-epochs2 ", "resnet56-epochs2: epoch 1/2", "resnet56-epochs2: epoch 2/2"]
    parts += ["resnet56-epochs2: test", "resnet32-epochs2: test", "| resnet56-epochs2 "]
    places = [done.stdout.index(part) for part in parts]
    assert places == sorted(places)


def test_runs_with_random_erasing_stand_under_a_line_that_says_so(script):
    done = script.call("resnet32_erasing", "resnet32", "--epochs", 1)
    line = "with random erasing: not the paper's training"
    above, under = done.stdout.split(f"\n\n{line}\n\n")
    assert "| resnet32-epochs1 " in above and "| resnet32_erasing" not in above
    assert "| resnet32-epochs1 " not in under and "| resnet32_erasing-epochs1 " in under
    (script.checkpoints / "resnet32_erasing-epochs1.pth").unlink()
    assert line not in script.call("resnet32", "--epochs", 1).stdout


def test_a_finished_run_is_tested_now_and_shown_once(script):
    command = ("resnet32", "--epochs", 1)
    script.call(*command)
    path = script.checkpoints / "resnet32-epochs1.pth"
    fields = torch.load(path)
    fields["history"]["test_accuracy"] = [12.34]  # not of 20 images
    torch.save(fields, path)
    out = script.call(*command).stdout
    assert re.search(r"test accuracy \d+\.00% now, 12\.34% when trained\n", out)
    assert out.count("| resnet32-epochs1 ") == 1


def test_a_run_is_trained_in_the_precision_that_is_asked_for(script):
    script.checkpoints.rmdir()  # as one that --checkpoint-dir names
    for epochs, precision in enumerate(("bfloat16", "float32"), 1):  # auto is one of them
        out = script.call("resnet32", "--epochs", epochs, "--precision", precision).stdout
        run = ghostnet.read_checkpoint(script.checkpoints / f"resnet32-epochs{epochs}.pth")
        assert f", torch.{precision}, " in run.trained_on
        assert f"{run.trained_on}\n" in out


def test_the_backend_of_a_notebook_and_a_users_own_style_change_nothing(script, tmp_path):
    script.call("gr_cosine", "--epochs", 1, quick=False)
    pictures = {path.name: path.read_bytes() for path in script.images.glob("*.png")}
    shutil.rmtree(script.images)
    style = tmp_path / "matplotlibrc"
    style.write_text("savefig.format: pdf\nimage.origin: lower\ntext.usetex: True\n")
    done = script.run(
        *("gr_cosine", "--epochs", 1),
        patches="",
        MPLBACKEND="inline of a notebook that is not installed here",
        MATPLOTLIBRC=str(style),
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(pictures) == 2
    assert {path.name: path.read_bytes() for path in script.images.glob("*.png")} == pictures


def test_a_console_needs_no_letters_but_ascii(script):
    pictures = script.folder / "größe"
    command = ["resnet32", "--epochs", 1, "--image-dir", pictures]
    done = script.run(*command, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert (done.returncode, done.stderr) == (0, "")
    assert r"pictures in" in done.stdout and r"gr\xf6\xdfe" in done.stdout
    assert "| resnet32-epochs1 " in done.stdout
    for program in (ROOT / "ghostnet.py", *ROOT.glob("benchmarks/*.py")):
        assert program.read_text().isascii(), program


def test_a_gpu_that_this_torch_cannot_use_is_said(script, tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.touch(mode=0o755)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path))
    command = ["resnet32", "--epochs", 1]
    done = script.call(*command, "--device", "auto")
    assert done.returncode == 0
    (line,) = done.stderr.splitlines()
    assert "this torch cannot use the GPU that is here" in line
    assert script.call(*command).stderr == ""  # --device cpu is what was asked for
    assert "--device cuda is not there" in script.call(*command, "--device", "cuda").stderr


def test_a_gpu_that_is_there_and_fails_is_one_line_with_the_words_of_torch(script, monkeypatch):
    error = RuntimeError("CUDA error: no kernel image is available\nCompile with TORCH_USE")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", mock.Mock())
    monkeypatch.setattr(torch, "ones", mock.Mock(side_effect=error))
    done = script.call("resnet32", "--epochs", 1, "--device", "auto")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert " ".join(str(error).split()) in line
    assert "README" in line and "--device cpu" in line
