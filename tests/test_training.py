"""Training against plain torch: the schedules, and one epoch against a loop written out here."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

import ghostnet
from ghostnet import Arguments, Constants


def arguments(folder, **options):
    return Arguments(checkpoint_dir=folder, image_dir=folder, device="cpu", **options)


@pytest.mark.parametrize(
    ("constants", "expected"),
    [
        (Constants(), lambda e: 0.05 * (1 + math.cos(math.pi * e / 200))),
        (Constants(epochs=30, lr=0.4), lambda e: 0.2 * (1 + math.cos(math.pi * e / 30))),
        (Constants(schedule="multistep"), lambda e: 0.1 * 0.1 ** ((e >= 100) + (e >= 150))),
        (
            Constants(schedule="multistep", milestones=(3, 5, 9), epochs=12),
            lambda e: 0.1 ** (1 + sum(e >= m for m in (3, 5, 9))),
        ),
    ],
)
def test_schedules_follow_their_closed_forms(constants, expected):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], constants.lr)
    scheduler = ghostnet.build_schedule(optimizer, constants)
    for epoch in range(constants.epochs):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected(epoch), abs=1e-9)
        optimizer.step()
        scheduler.step()


def plain_training(data, constants):
    """The same run as a loop of plain steps: NCHW, unfused SGD, crops by slicing, no autocast."""
    torch.manual_seed(constants.seed)
    model = ghostnet.build_network(constants)
    optimizer = torch.optim.SGD(
        model.parameters(), constants.lr, constants.momentum, weight_decay=constants.weight_decay, foreach=False
    )
    losses = []
    for epoch in range(constants.epochs):
        optimizer.param_groups[0]["lr"] = constants.lr * (1 + math.cos(math.pi * epoch / constants.epochs)) / 2
        plan = data.epoch_plan()
        for start in range(0, len(plan), constants.batch_size):
            images, labels = [], []
            for index, top, left, mirrored in plan[start : start + constants.batch_size].tolist():
                image = data.train_images[index, top : top + 32, left : left + 32].permute(2, 0, 1) / 255
                images.append(image.flip(2) if mirrored else image)
                labels.append(data.train_labels[index])
            mean, std = (torch.tensor(v).view(3, 1, 1) for v in (ghostnet.MEAN, ghostnet.STD))
            loss = F.cross_entropy(model((torch.stack(images) - mean) / std), torch.stack(labels))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append((loss.item(), len(labels)))
    return model, sum(loss * n for loss, n in losses[-3:]) / len(data.train_labels)


def test_a_run_equals_a_plain_loop_and_its_file_holds_rounded_weights(data, tmp_path):
    constants = Constants(epochs=2, lr=0.001)
    finished = ghostnet.train("run", constants, data, arguments(tmp_path, precision="float32"))
    model, loss = plain_training(data, constants)
    assert finished["history"][-1]["loss"] == pytest.approx(loss, rel=1e-3)
    assert [record["lr"] for record in finished["history"]] == pytest.approx([0.001, 0.0005])
    assert all(v.dtype == torch.float16 for v in finished["model"].values() if v.is_floating_point())
    theirs = torch.cat([v.flatten() for k, v in model.state_dict().items() if "num_batches" not in k])
    ours = torch.cat([v.float().flatten() for k, v in finished["model"].items() if "num_batches" not in k])
    assert (ours - theirs).norm() / theirs.norm() < 2e-3  # float16 alone makes 3e-4

    rounded = ghostnet.load_network(tmp_path / "run.pth", finished, torch.device("cpu")).eval()
    hits = rounded(data.normalize(data.test_images)).argmax(1) == data.test_labels
    assert finished["accuracy"] == pytest.approx(100 * hits.float().mean().item(), abs=1e-4)
    assert ghostnet.evaluate(rounded, data) == finished["accuracy"]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_training_stays_near_float32(data, tmp_path, precision):
    few = copy.copy(data)  # a CPU emulates float16, slowly
    few.train_images, few.train_labels = data.train_images[:32], data.train_labels[:32]
    few.test_images, few.test_labels = data.test_images[:10], data.test_labels[:10]
    losses = {}
    for name in ("float32", precision):
        run = ghostnet.train(name, Constants(epochs=1, lr=0.001), few, arguments(tmp_path, precision=name))
        assert run["precision"] == name
        losses[name] = run["history"][0]["loss"]
    assert losses[precision] == pytest.approx(losses["float32"], rel=0.02)


def test_only_a_run_of_hours_says_how_long_it_will_take(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ghostnet.Cifar10, "epoch_plan", lambda self: torch.zeros(2, 4, dtype=torch.long))
    monkeypatch.setattr(ghostnet, "evaluate", lambda *_: 10.0)
    clock = iter(range(0, 10**6, 2000))
    monkeypatch.setattr(ghostnet.time, "perf_counter", lambda: next(clock))
    ghostnet.train("hours", Constants(epochs=2), data, arguments(tmp_path))
    assert "2 epochs take about 1.1 h here" in capsys.readouterr().out
    clock = iter(range(0, 10**6, 2))
    ghostnet.train("seconds", Constants(epochs=2), data, arguments(tmp_path))
    assert "take about" not in capsys.readouterr().out
