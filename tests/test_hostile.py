"""Files that someone else wrote, or that were damaged: refused in one line, or harmless; never a crash or a hang."""

import itertools
import os
import random

import pytest
import torch
from harness import (
    STRANGE,
    Script,
    edited,
    edits,
    hostile_archives,
    hostile_files,
    is_one_line,
    random_flips,
    real_files,
    refusal,
    saved,
    survives_flip,
    train,
    tried,
    write_tiny_cifar10,
)

import ghostnet
from ghostnet import Constants, UserError

HALF, FINISHED = Constants(network="resnet32", ratio=1, epochs=2), Constants(epochs=2)


@pytest.fixture(scope="module")
def uses(few, tmp_path_factory):
    """A half-trained file of the smallest network, which is quickly trained on; a finished one of a ghost network."""
    of_resnet = real_files(tmp_path_factory.mktemp("resnet32"), HALF, few)
    return of_resnet | {"finished": real_files(tmp_path_factory.mktemp("ghost"), FINISHED, few)["finished"]}


@pytest.fixture(scope="module")
def finished(uses):
    return uses["finished"][0]


def files(folder):
    """The contents of all files in a folder by name, without the locks."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".pth" and path.is_file()}


# -------------------------------------------------------------------------------------------------------- contents


@pytest.mark.parametrize(("kind", "number"), [("half-trained", 50), ("finished", 25)])
def test_an_edited_value_is_refused_or_changes_nothing(kind, number, uses, tmp_path):
    whole, use = uses[kind]
    path, checkpoint = tmp_path / whole.name, torch.load(whole, weights_only=True)
    assert tried(whole.read_bytes(), path, use) == "equal"
    pairs = edits(checkpoint, number, number, random.Random(0))
    answers = {pair: tried(saved(edited(checkpoint, *pair)), path, use) for pair in pairs}
    assert {pair: answer for pair, answer in answers.items() if answer not in ("refused", "equal")} == {}
    assert len(answers) >= 2 * number - 1
    if kind == "half-trained":
        assert {kind for _, kind in answers} >= STRANGE.keys()
        assert {place[0] for place, _ in answers if place} == checkpoint.keys()


def test_an_archive_that_lies_takes_no_memory(uses, tmp_path):
    whole, use = uses["half-trained"]
    archives = hostile_archives(whole)
    answers = {name: tried(archive, tmp_path / whole.name, use) for name, archive in archives.items()}
    harmless = {"hides what unpacks to a gigabyte", "hides such a pickle", "a state_dict with an attribute"}
    assert {name for name, answer in answers.items() if answer != "refused"} <= harmless, answers
    assert {*answers.values()} <= {"refused", "equal"}, answers


def test_an_archive_larger_than_any_checkpoint_is_refused_unread(tmp_path):
    path = tmp_path / "run.pth"
    path.touch()
    os.truncate(path, 10**12)
    assert "larger than any checkpoint" in refusal(path)


def test_hostile_and_damaged_files_are_refused(finished, tmp_path, recwarn):
    marker, path = tmp_path / "marker", tmp_path / "run.pth"
    refused = {}
    for name, content in hostile_files(finished, marker).items():
        path.write_bytes(content)
        refused[name] = refusal(path)
        assert path.read_bytes() == content
    clear = {name for name, line in refused.items() if line and is_one_line(line) and str(path) in line}
    assert refused.keys() - clear == set()
    assert recwarn.list == []  # which would be more lines on stderr
    assert not marker.exists()
    path.write_bytes(hostile_files(finished, marker)["code in a new place"])
    torch.load(path, weights_only=False)
    assert marker.exists()  # the code was there


@pytest.mark.parametrize("kind", ["finished", "half-trained"])
def test_a_flipped_bit_is_refused_or_changes_nothing(kind, uses, tmp_path):
    whole, _ = uses[kind]
    content, expected = whole.read_bytes(), ghostnet.read_checkpoint(whole)
    flips = random_flips(content, 100, random.Random(0))
    assert [flip for flip in flips if not survives_flip(content, *flip, expected, tmp_path / "run.pth")] == []


def test_a_file_of_other_constants_is_refused(finished, few):
    with pytest.raises(UserError, match=r"is of Constants\(.*epochs=1.*--fresh replaces it"):
        train(finished, Constants(epochs=2, seed=7), few)


# ------------------------------------------------------------------------------------- the folder of checkpoints


@pytest.fixture
def script(tmp_path, tiny_data_dir, finished):
    script = Script(tmp_path, tiny_data_dir)
    script.checkpoints.mkdir()
    (script.checkpoints / "gr_cosine-epochs1.pth").write_bytes(finished.read_bytes())
    return script


def test_each_bad_run_costs_one_line_and_the_others_are_shown(script, uses):
    checkpoint = torch.load(uses["half-trained"][0], weights_only=True)
    kinds = ["None", "a nested tuple", "sparse", "not a number", "a smaller tensor", "expanded to a terabyte"]
    places = [("momentum", "fc.bias"), ("constants", "network"), ("model", "fc.bias"), ("history", "loss", 0)]
    for seed, (place, kind) in enumerate(zip(itertools.cycle(places), kinds), 10):
        edit = edited(checkpoint, place, kind)
        (script.checkpoints / f"gr_cosine-epochs1-seed{seed}.pth").write_bytes(saved(edit))
    held = files(script.checkpoints)
    seeds = range(10, 10 + len(kinds))
    command = ["gr_cosine", "--epochs", 1]
    for process, code in ((script.fork(*command).wait(), 0), (script.fork(*command, "--seeds", *seeds).wait(), 2)):
        assert process.returncode == code, process.stderr
        lines = process.stderr.splitlines()
        assert len(lines) == len(kinds)
        assert all("is not a checkpoint of this script" in line for line in lines)
        assert "| gr_cosine-epochs1 |" in process.stdout
    assert files(script.checkpoints) == held
    assert (script.images / "training_curves.png").exists()


def test_only_regular_files_that_can_be_read_are_read(script, monkeypatch):
    os.mkfifo(script.checkpoints / "fifo.pth")
    (script.checkpoints / "folder.pth").mkdir()
    (script.checkpoints / "nowhere.pth").symlink_to("nothing")
    (script.checkpoints / "foreign.pth").write_bytes(saved({"epoch": "three"}))
    (script.checkpoints / "unreadable.pth").write_bytes(b"secret")
    opened = open

    def forbidding(path, *arguments, **options):  # root may read everything
        if str(path).endswith("unreadable.pth"):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr("builtins.open", forbidding)
    monkeypatch.setattr("io.open", forbidding)
    process = script.fork("gr_cosine", "--epochs", 1).wait()
    assert process.returncode == 0, process.stderr
    assert len(process.stderr.splitlines()) == 5
    for name in ("fifo", "folder", "nowhere", "foreign"):
        assert process.stderr.count(f"checkpoints/{name}.pth is not a checkpoint of this script") == 1
    assert process.stderr.count("checkpoints/unreadable.pth cannot be read (Permission denied)") == 1
    assert "| gr_cosine-epochs1 |" in process.stdout
    assert "test accuracy" in process.stdout


def test_a_run_whose_file_is_a_pipe_is_refused(script):
    os.mkfifo(script.checkpoints / "gr_cosine-epochs1-seed5.pth")
    process = script.fork("gr_cosine", "--epochs", 1, "--seeds", 5, 0).wait()
    assert process.returncode == 2
    assert len(process.stderr.splitlines()) == 1
    assert "gr_cosine-epochs1: complete" in process.stdout


@pytest.mark.filterwarnings("ignore:Glyph .* missing from font")
def test_any_name_of_a_file_is_shown(script, finished):
    names = ["$x{ $", "_hidden", "a|b", "%s{0}", "日本", "space and\nline"]
    for name in [*names, "-seed1"]:  # which is the seed of no name
        (script.checkpoints / f"{name}.pth").write_bytes(finished.read_bytes())
    checkpoints, refused = ghostnet.read_all(script.checkpoints)
    assert refused == {}
    assert len(checkpoints) == len(names) + 2
    table = ghostnet.results_table(checkpoints)
    assert [name for name in names if name not in table] == []
    ghostnet.draw_curves(checkpoints, script.folder / "curves.png")


def test_a_link_at_the_temporary_name_is_not_followed(tmp_path, monkeypatch):
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    monkeypatch.setattr(os, "urandom", lambda n: bytes(n))
    (tmp_path / ".picture.png.00000000.tmp").symlink_to(precious)
    with pytest.raises(UserError, match="cannot be written"):
        ghostnet.write_atomically(tmp_path / "picture.png", lambda file: file.write(b"picture"))
    assert precious.read_bytes() == b"precious"
    assert not (tmp_path / "picture.png").exists()


def test_a_link_at_the_lock_is_not_written_to(script, tmp_path):
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    (script.checkpoints / ".gr_cosine-epochs1.lock").symlink_to(precious)
    script.fork("gr_cosine", "--epochs", 1).wait()
    assert precious.read_bytes() == b"precious"


def test_tiny_data_is_not_what_a_stranger_gives(tmp_path):
    """Data files hold pickles, so without the right checksum they are not opened."""
    write_tiny_cifar10(tmp_path, 20, 10)
    with pytest.raises(UserError, match="delete it"):
        ghostnet.Cifar10(tmp_path, torch.device("cpu"))
