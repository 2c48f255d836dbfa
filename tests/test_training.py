"""Training against plain torch: the schedules, whole runs against a loop written out here, and what a run prints."""

import copy
import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import ghostnet
from ghostnet import Arguments, Constants


@pytest.fixture
def few(data):
    """The tiny data set with 40 training images and 10 test images."""
    few = copy.copy(data)
    few.train_images, few.train_labels = data.train_images[:40], data.train_labels[:40]
    few.test_images, few.test_labels = data.test_images[:10], data.test_labels[:10]
    return few


def train(path, constants, data, precision=torch.float32):
    return ghostnet.train(path, constants, data, precision, Arguments())


# ------------------------------------------------------------------------------------------------------ schedules


@pytest.mark.parametrize(
    ("constants", "expected"),
    [
        (Constants(), lambda e: 0.05 * (1 + math.cos(math.pi * (e - 1) / 200))),
        (Constants(epochs=30, lr=0.4), lambda e: 0.2 * (1 + math.cos(math.pi * (e - 1) / 30))),
        (Constants(schedule="multistep"), lambda e: 0.1 if e <= 100 else 0.01 if e <= 150 else 0.001),
        (Constants(schedule="multistep", milestones=(), epochs=3), lambda e: 0.1),
        (
            Constants(schedule="multistep", milestones=(3, 5, 9), epochs=12),
            lambda e: 0.1 ** (1 + sum(e > m for m in (3, 5, 9))),
        ),
    ],
)
def test_schedules_follow_their_closed_forms(constants, expected):
    for epoch in range(1, constants.epochs + 1):
        assert ghostnet.learning_rate(constants, epoch) == pytest.approx(expected(epoch), abs=1e-9)


@pytest.mark.parametrize("schedule", ["cosine", "multistep"])
def test_schedules_are_those_of_torch(schedule):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1)
    scheduler = (
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=200)
        if schedule == "cosine"
        else torch.optim.lr_scheduler.MultiStepLR(optimizer, [100, 150])
    )
    for epoch in range(1, 201):
        ours = ghostnet.learning_rate(Constants(schedule=schedule), epoch)
        assert ours == pytest.approx(scheduler.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        scheduler.step()


# ----------------------------------------------------------------------------------------------------- whole runs


def plain_training(data, c):
    """The same run as a loop of plain steps; weights before and after, momentum, last epoch's loss and accuracy.

    Rounding grows without bound in these networks, so the arithmetic of image and update is ours, to the bit.
    """
    torch.manual_seed(10**6 * c.seed)
    model = ghostnet.build_network(c).to(memory_format=torch.channels_last)
    before = copy.deepcopy(model.state_dict())
    options = {"momentum": c.momentum, "nesterov": True, "weight_decay": c.weight_decay, "fused": True}
    optimizer = torch.optim.SGD(model.parameters(), c.lr, **options)
    mean, std = (255 * torch.tensor(value).view(3, 1, 1) for value in (ghostnet.MEAN, ghostnet.STD))
    for epoch in range(1, c.epochs + 1):
        torch.manual_seed(10**6 * c.seed + epoch)
        optimizer.param_groups[0]["lr"] = c.lr * (1 + math.cos(math.pi * (epoch - 1) / c.epochs)) / 2
        plan, losses, hits = data.epoch_plan(), 0.0, 0
        for start in range(0, len(plan), c.batch_size):
            images, labels = [], data.train_labels[plan[start : start + c.batch_size, 0]]
            for index, top, left, mirrored in plan[start : start + c.batch_size].tolist():
                image = data.train_images[index, top : top + 32, left : left + 32].permute(2, 0, 1)
                images.append(((image.flip(2) if mirrored else image) - mean) / std)
            logits = model(torch.stack(images).contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses += loss.item() * len(labels)
            hits += int((logits.argmax(1) == labels).sum())
    momentum = {name: optimizer.state[parameter]["momentum_buffer"] for name, parameter in model.named_parameters()}
    return before, model.state_dict(), momentum, losses / len(plan), 100 * hits / len(plan)


def distance(ours, theirs, before=None):
    """Norm of the difference of two states over that of theirs, or over how far theirs has come."""

    def flat(state):
        return torch.cat([value.float().flatten() for name, value in state.items() if "num_batches" not in name])

    ours, theirs, before = flat(ours), flat(theirs), flat(before) if before else 0
    return ((ours - theirs).norm() / (theirs - before).norm()).item()


RUNS = {
    "resnet": Constants(network="resnet32", epochs=2, batch_size=16, weight_decay=0.1, seed=3),
    "dropout": Constants(network="vgg16", epochs=2, batch_size=16, lr=0.01),
}


@pytest.mark.parametrize("constants", RUNS.values(), ids=RUNS)
def test_a_run_equals_a_plain_loop_and_its_file_holds_float16_weights_and_no_momentum(few, tmp_path, constants):
    finished = train(tmp_path / "run.pth", constants, few)
    before, weights, _, loss, hits = plain_training(few, constants)
    assert finished.history["loss"][-1] == pytest.approx(loss, rel=1e-4)
    assert finished.history["train_accuracy"][-1] == pytest.approx(hits, abs=1e-4)
    assert distance(finished.model, weights, before) < 1e-2  # float16 alone makes 3e-3

    file = torch.load(tmp_path / "run.pth", weights_only=True)
    assert file["momentum"] == {}
    assert all(value.dtype == torch.float16 for value in file["model"].values() if value.is_floating_point())
    rounded = ghostnet.build_network(constants).half()
    rounded.load_state_dict(file["model"])
    logits = rounded.float().eval()(few.normalize(few.test_images))
    accuracy = 100 * (logits.argmax(1) == few.test_labels).float().mean().item()
    assert file["history"]["test_accuracy"][-1] == finished.accuracy == pytest.approx(accuracy, abs=1e-4)


class Killed(BaseException):
    pass


def interrupted(path, constants, data, epoch, patch):
    """Train until this epoch begins and return what is saved."""
    whole = ghostnet.Trainer.epoch

    def until(trainer, number, title):
        if number == epoch:
            raise Killed
        return whole(trainer, number, title)

    with patch.context() as patched, pytest.raises(Killed):
        patched.setattr(ghostnet.Trainer, "epoch", until)
        train(path, constants, data)
    return ghostnet.read_checkpoint(path)


@pytest.mark.parametrize("constants", RUNS.values(), ids=RUNS)
def test_an_interrupted_run_goes_on_as_the_uninterrupted_one_to_the_bit(few, tmp_path, monkeypatch, constants):
    half = interrupted(tmp_path / "half.pth", constants, few, 2, monkeypatch)
    assert half.epochs == 1 and not half.finished
    torch.manual_seed(99)  # as another process finds it
    resumed = train(tmp_path / "half.pth", constants, few)
    whole = train(tmp_path / "whole.pth", constants, few)
    for name in ("loss", "train_accuracy", "test_accuracy"):
        assert resumed.history[name] == whole.history[name]
    assert resumed.model.keys() == whole.model.keys()
    assert all(torch.equal(resumed.model[name], value) for name, value in whole.model.items())


def test_an_unfinished_file_holds_weights_and_momentum_in_float32(few, tmp_path, monkeypatch):
    half = interrupted(tmp_path / "run.pth", RUNS["resnet"], few, 2, monkeypatch)
    first_epoch = replace(RUNS["resnet"], epochs=1)  # which has the same rate, however many follow
    before, weights, momentum, *_ = plain_training(few, first_epoch)
    assert distance(half.model, weights, before) < 1e-4
    assert half.momentum.keys() == momentum.keys() and distance(half.momentum, momentum) < 1e-4
    assert all(value.dtype == torch.float32 for value in half.momentum.values())


def test_seeds_differ_and_every_epoch_of_one_draws_its_own_numbers(few, monkeypatch):
    monkeypatch.setitem(ghostnet.NETWORKS, "resnet56", lambda: torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)))
    plans = []
    monkeypatch.setattr(ghostnet.Trainer, "take_step", lambda trainer, plan: plans.append(plan))
    for seed in (0, 1):
        trainer = ghostnet.Trainer(Constants(seed=seed), few, torch.float32)
        for epoch in (1, 2, 1):
            trainer.epoch(epoch, "")
    first, second, again, *others = plans
    assert torch.equal(first, again)
    assert not any(torch.equal(first, plan) for plan in (second, *others))


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_half_precision_training_stays_near_float32(few, tmp_path, precision):
    few.train_images, few.train_labels = few.train_images[:20], few.train_labels[:20]  # a CPU emulates it, slowly
    constants = Constants(network="resnet32", epochs=1, lr=0.001)
    losses = {}
    for kind in (torch.float32, precision):
        run = train(tmp_path / f"{kind}.pth", constants, few, kind)
        assert str(kind).removeprefix("torch.") in run.trained_on
        losses[kind] = run.history["loss"][0]
    assert losses[precision] == pytest.approx(losses[torch.float32], rel=0.02)


def test_a_loss_that_is_not_finite_ends_the_run_and_the_file_keeps_the_last_good_epoch(few, tmp_path, monkeypatch):
    path = tmp_path / "run.pth"
    interrupted(path, RUNS["resnet"], few, 2, monkeypatch)
    good = path.read_bytes()
    monkeypatch.setattr(ghostnet, "learning_rate", lambda *_: 1e30)
    with pytest.raises(ghostnet.UserError, match=r"not finite in epoch 2\b.*--lr"):
        train(path, RUNS["resnet"], few)
    assert path.read_bytes() == good


# -------------------------------------------------------------------------------------------------- time and saves


@pytest.fixture
def clock(monkeypatch):
    """A clock on which the first epoch of a process takes 1000 seconds, and each other one clock["epoch"]."""
    clock = {"now": 0.0, "epoch": 10.0}

    def epoch(trainer, number, _title):
        clock["now"] += 1000.0 if trainer is not clock.get("trainer") else clock["epoch"]
        clock["trainer"] = trainer
        return 1.0, 10.0

    monkeypatch.setattr(ghostnet.time, "perf_counter", lambda: clock["now"])
    monkeypatch.setattr(ghostnet.Trainer, "epoch", epoch)
    monkeypatch.setattr(ghostnet, "evaluate", lambda *_, **__: 10.0)
    return clock


def test_time_left_is_never_told_by_the_first_epoch_of_a_process(few, tmp_path, monkeypatch, capsys, clock):
    constants = Constants(network="resnet32", epochs=6)
    interrupted(tmp_path / "run.pth", constants, few, 4, monkeypatch)
    train(tmp_path / "run.pth", constants, few)
    out = capsys.readouterr().out
    ends = {int(epoch): end for epoch, end in re.findall(r"epoch (\d)/6, .*, (.*)$", out, re.MULTILINE)}
    assert ends.keys() == {1, 2, 3, 4, 5, 6}
    assert [ends[epoch].partition(" ")[2] for epoch in (1, 4)] == ["img/s", "img/s"]
    assert [ends[epoch] for epoch in (2, 3, 5, 6)] == [f"0:00:{seconds:02} left" for seconds in (40, 30, 10, 0)]
    assert out.count("6 epochs take about 0:01:00 here") == 2


def test_short_epochs_are_saved_every_few_seconds_and_the_last_always(few, tmp_path, monkeypatch, clock):
    saved, write = [], ghostnet.write_atomically

    def write_and_note(path, save):
        write(path, save)
        saved.append(ghostnet.read_checkpoint(path).epochs)

    clock["epoch"] = 3.0
    monkeypatch.setattr(ghostnet, "SAVE_SECONDS", 10)
    monkeypatch.setattr(ghostnet, "write_atomically", write_and_note)
    train(tmp_path / "run.pth", Constants(network="resnet32", epochs=11), few)
    assert saved == [1, 5, 9, 11]  # 12 seconds apart, the first multiple of 3 from 10
