"""Training against plain torch: the schedules, and one epoch against a loop written out here."""

import copy
import itertools
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
        (Constants(epochs=4, lr=0.6, warmup_epochs=2), [0.2, 0.4, 0.6, 0.3].__getitem__),
        (Constants(epochs=6, warmup_epochs=4), [0.02, 0.04, 0.06, 0.08, 0.1, 0.05].__getitem__),
        (
            Constants(schedule="multistep", epochs=4, warmup_epochs=1, milestones=(3,)),
            [0.05, 0.1, 0.1, 0.01].__getitem__,
        ),
    ],
)
def test_schedules_follow_their_closed_forms(constants, expected):
    for epoch in range(constants.epochs):
        assert ghostnet.learning_rate(constants, epoch) == pytest.approx(expected(epoch), abs=1e-9)


@pytest.mark.parametrize("schedule", ["cosine", "multistep"])
def test_schedules_are_those_of_torch(schedule):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1)
    scheduler = (
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=200)
        if schedule == "cosine"
        else torch.optim.lr_scheduler.MultiStepLR(optimizer, [100, 150])
    )
    for epoch in range(200):
        ours = ghostnet.learning_rate(Constants(schedule=schedule), epoch)
        assert ours == pytest.approx(scheduler.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        scheduler.step()


def plain_training(data, c):
    """The same run as a loop of plain steps: NCHW, unfused SGD, crops and squares by slicing, no autocast."""
    torch.manual_seed(c.seed)
    model = ghostnet.build_network(c)
    ghostnet.initialize(model, c.initialization)
    groups = {c.weight_decay: [], 0.0: []}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            exempt = not c.decay_norm_and_bias and (name == "bias" or isinstance(module, torch.nn.BatchNorm2d))
            groups[0.0 if exempt else c.weight_decay].append(parameter)
    groups = [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items()]
    optimizer = torch.optim.SGD(groups, c.lr, c.momentum, nesterov=c.nesterov, foreach=False)
    average = {name: value.clone().float() for name, value in model.state_dict().items()}
    losses = []
    for epoch in range(c.epochs):
        for group in optimizer.param_groups:
            group["lr"] = c.lr * (1 + math.cos(math.pi * epoch / c.epochs)) / 2
        plan = data.epoch_plan(c.cutout > 0)
        for start in range(0, len(plan), c.batch_size):
            images, labels = [], []
            for index, top, left, mirrored, *centre in plan[start : start + c.batch_size].tolist():
                image = data.train_images[index, top : top + 32, left : left + 32].permute(2, 0, 1) / 255
                mean, std = (torch.tensor(v).view(3, 1, 1) for v in (ghostnet.MEAN, ghostnet.STD))
                image = (image.flip(2) if mirrored else image).sub(mean).div(std)
                if centre:
                    y, x = (max(0, coordinate - c.cutout // 2) for coordinate in centre)
                    bottom, right = (coordinate - c.cutout // 2 + c.cutout for coordinate in centre)
                    image[:, y:bottom, x:right] = 0
                images.append(image)
                labels.append(data.train_labels[index])
            target = F.one_hot(torch.stack(labels), 10) * (1 - c.label_smoothing) + c.label_smoothing / 10
            loss = -(F.log_softmax(model(torch.stack(images)), 1) * target).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append((loss.item(), len(labels)))
            for name, value in model.state_dict().items():
                average[name] = c.ema * average[name] + (1 - c.ema) * value
    return average, sum(loss * n for loss, n in losses[-3:]) / len(data.train_labels)


LEVERS = {
    "initialization": "he",
    "nesterov": True,
    "weight_decay": 0.1,
    "decay_norm_and_bias": False,
    "label_smoothing": 0.1,
    "cutout": 9,
    "ema": 0.8,
}


@pytest.mark.parametrize("levers", [{}, LEVERS])
def test_a_run_equals_a_plain_loop_and_its_file_holds_rounded_weights(data, tmp_path, levers):
    constants = Constants(epochs=2, lr=0.001, **levers)
    finished = ghostnet.train("run", constants, data, arguments(tmp_path, precision="float32"))
    weights, loss = plain_training(data, constants)
    assert finished["history"][-1]["loss"] == pytest.approx(loss, rel=1e-3)
    assert [record["lr"] for record in finished["history"]] == pytest.approx([0.001, 0.0005])
    assert all(v.dtype == torch.float16 for v in finished["model"].values() if v.is_floating_point())
    theirs = torch.cat([v.flatten() for k, v in weights.items() if "num_batches" not in k])
    ours = torch.cat([v.float().flatten() for k, v in finished["model"].items() if "num_batches" not in k])
    assert (ours - theirs).norm() / theirs.norm() < 2e-3  # float16 alone makes 3e-4

    rounded = ghostnet.load_network(tmp_path / "run.pth", finished, torch.device("cpu")).eval()
    images = data.normalize(data.test_images)
    views = {"accuracy": rounded(images), "mirrored_accuracy": rounded(images) + rounded(images.flip(3))}
    for key, logits in views.items():
        hits = logits.argmax(1) == data.test_labels
        assert finished[key] == pytest.approx(100 * hits.float().mean().item(), abs=1e-4)
        assert ghostnet.evaluate(rounded, data, mirrored=key != "accuracy") == finished[key]


@pytest.mark.parametrize("how", ["he", "he_zero"])
def test_he_initialization_has_its_deviation_in_every_convolution(how):
    torch.manual_seed(0)
    model = ghostnet.build_network(Constants(network="resnet20", ratio=4))
    ghostnet.initialize(model, how)
    for name, conv in model.named_modules():
        if isinstance(conv, torch.nn.Conv2d):
            # of one input map, by torch's own rule: a depthwise kernel feeds the ghosts of its map and no others
            alone = torch.empty(conv.out_channels // conv.groups, 1, *conv.kernel_size)
            std = torch.nn.init.calculate_gain("relu") / torch.nn.init._calculate_fan_in_and_fan_out(alone)[1] ** 0.5
            assert conv.weight.std().item() == pytest.approx(std, rel=6 / (2 * conv.weight.numel()) ** 0.5), name
    x = torch.randn(2, 16, 8, 8)
    block = model.blocks[0].train()
    assert torch.equal(block(x), x.relu()) == (how == "he_zero")


def test_default_initialization_is_that_of_torch():
    torch.manual_seed(0)
    model = ghostnet.build_network(Constants(network="resnet20"))
    before = copy.deepcopy(model.state_dict())
    ghostnet.initialize(model, "default")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_run_with_images_held_out_neither_trains_on_them_nor_looks_at_the_test_set(data, tmp_path):
    constants = Constants(network="resnet20", epochs=1, holdout=60, lr=0.01)
    part = data.hold_out(60)
    blind = copy.copy(data)
    blind.test_images, blind.test_labels = None, None
    finished = ghostnet.train("run", constants, blind.hold_out(60), arguments(tmp_path, precision="float32"))
    rounded = ghostnet.load_network(tmp_path / "run.pth", finished, torch.device("cpu")).eval()
    held = data.train_images[240:, 4:36, 4:36]
    hits = rounded(data.normalize(held)).argmax(1) == data.train_labels[240:]
    assert finished["accuracy"] == pytest.approx(100 * hits.float().mean().item(), abs=1e-4)
    assert sorted(part.epoch_plan()[:, 0].tolist()) == list(range(240))
    assert torch.equal(part.train_images, data.train_images[:240])
    assert torch.equal(part.train_labels, data.train_labels[:240])


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
    monkeypatch.setattr(ghostnet.Cifar10, "epoch_plan", lambda *_: torch.zeros(2, 4, dtype=torch.long))
    monkeypatch.setattr(ghostnet, "evaluate", lambda *_, **__: 10.0)
    clock = iter(range(0, 10**6, 2000))
    monkeypatch.setattr(ghostnet.time, "perf_counter", lambda: next(clock))
    ghostnet.train("hours", Constants(epochs=2), data, arguments(tmp_path))
    assert "2 epochs take about 1.1 h here" in capsys.readouterr().out
    clock = iter(range(0, 10**6, 2))
    ghostnet.train("seconds", Constants(epochs=2), data, arguments(tmp_path))
    assert "take about" not in capsys.readouterr().out


def test_short_epochs_are_saved_every_few_seconds_and_the_last_always(data, tmp_path, monkeypatch):
    clock, saves, write = itertools.count(), [], ghostnet.write_atomically

    def write_and_note(path, save):
        write(path, save)
        checkpoint = ghostnet.read_checkpoint(path)
        saves.append((len(checkpoint["history"]), next(clock)))

    monkeypatch.setattr(ghostnet.time, "perf_counter", lambda: next(clock))  # a second passes between any two looks
    monkeypatch.setattr(ghostnet.Cifar10, "epoch_plan", lambda *_: torch.zeros(2, 4, dtype=torch.long))
    monkeypatch.setattr(ghostnet, "evaluate", lambda *_, **__: 10.0)
    monkeypatch.setattr(ghostnet, "write_atomically", write_and_note)
    ghostnet.train("run", Constants(network="resnet20", epochs=11), data, arguments(tmp_path))
    epochs, times = zip(*saves, strict=True)
    assert epochs[0] == 1 and epochs[-1] == 11 and 3 <= len(epochs) < 8
    assert all(b - a >= 10 for a, b in itertools.pairwise(times[:-1]))
