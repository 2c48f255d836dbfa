"""Training against plain torch, what a run's file holds, and which constants a run can have."""

import contextlib
import copy
import math
import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from few import few_images, small_network, train, weights
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR

import ghostnet
from ghostnet import Arguments, Checkpoint, Constants, Trainer, UserError

CPU = torch.device("cpu")
SMALL = Constants(network="resnet32", epochs=3, batch_size=16, lr=0.01, seed=3)


@pytest.fixture
def small(monkeypatch):
    """Runs of a network that trains in no time."""
    monkeypatch.setattr(ghostnet, "build_network", small_network)
    return SMALL


def train_an_epoch(path, constants, data, number=1):
    """Train the epoch of this number until another one would begin, as a run that is killed."""
    rate = ghostnet.learning_rate(constants, number)
    rates = mock.Mock(side_effect=[rate, KeyboardInterrupt])
    with mock.patch.object(ghostnet, "learning_rate", rates), pytest.raises(KeyboardInterrupt):
        train(path, constants, data)


@pytest.mark.parametrize("constants, scheduler", [
    (Constants(), lambda sgd: CosineAnnealingLR(sgd, 200)),
    (Constants(epochs=30), lambda sgd: CosineAnnealingLR(sgd, 30)),
    (Constants(schedule="multistep"), lambda sgd: MultiStepLR(sgd, (100, 150))),
    (Constants(schedule="multistep", milestones=()), lambda sgd: MultiStepLR(sgd, ())),
])
def test_schedules_are_those_of_torch(constants, scheduler):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], constants.lr)
    theirs = scheduler(optimizer)
    for epoch in range(1, constants.epochs + 1):
        ours = ghostnet.learning_rate(constants, epoch)
        assert ours == pytest.approx(theirs.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("norm_inside", [False, True])
def test_an_epoch_is_plain_sgd_with_nesterov_momentum_and_two_weight_decays(small, norm_inside):
    decays = {"weight_decay": 0.3, "cheap_weight_decay": 0.1}
    constants = replace(small, norm_inside=norm_inside, **decays)
    data = few_images()
    trainer = Trainer(constants, data, torch.float32)
    model = copy.deepcopy(trainer.model)
    start = weights(model)
    loss, accuracy = trainer.epoch(2, "", cuda_graph=False)

    lr = 0.01 * (1 + math.cos(math.pi / 3)) / 2
    torch.manual_seed(3_000_002)
    velocity = dict.fromkeys(dict(model.named_parameters()), 0.0)
    losses = 0.0
    hits = 0
    for plan in data.epoch_plan(4, 0.0).split(16):  # 16, 16 and 8 images
        images, labels = data.train_batch(plan, 4)
        logits = model(images)
        summed_loss = F.cross_entropy(logits, labels, reduction="sum")
        model.zero_grad()
        (summed_loss / len(labels)).backward()
        losses += summed_loss.item()
        hits += (logits.argmax(1) == labels).sum().item()
        for name, parameter in model.named_parameters():
            decay = 0.1 if "cheap_operation" in name else 0.3
            gradient = parameter.grad + decay * parameter.data
            velocity[name] = 0.9 * velocity[name] + gradient
            parameter.data -= lr * (gradient + 0.9 * velocity[name])
    assert (loss, accuracy) == pytest.approx((losses / 40, 100 * hits / 40), rel=1e-5)
    moved = weights(model) - start
    assert (weights(trainer.model) - weights(model)).norm() < 1e-4 * moved.norm()


class NoErasing(ghostnet.Cifar10):
    """The data of a script that knows no erasing."""

    def epoch_plan(self, padding, _erasing):
        top, left = torch.randint(2 * padding + 1, (2, 40))
        return torch.stack([torch.randperm(40), top, left, torch.randint(2, (40,))], dim=1)

    def train_batch(self, plan, padding):
        images = []
        for index, top, left, mirrored in plan.tolist():
            padded = F.pad(self.train_images[index], (0, 0, *4 * [padding]))
            image = padded[top : top + 32, left : left + 32]
            images.append(image.flip(1) if mirrored else image)
        return self.normalize(torch.stack(images)), self.train_labels[plan[:, 0]]


def test_a_run_without_erasing_is_to_the_bit_one_that_knows_none(small):
    trained = []
    for kind, erasing in ((ghostnet.Cifar10, 0.0), (NoErasing, 0.0), (ghostnet.Cifar10, 0.5)):
        data = few_images()
        data.__class__ = kind
        trainer = Trainer(replace(small, erasing=erasing), data, torch.float32)
        losses = [trainer.epoch(number, "", cuda_graph=False) for number in (1, 2)]
        trained.append((losses, weights(trainer.model)))
    (losses, end), (reference_losses, reference), (_, erased) = trained
    assert losses == reference_losses
    assert torch.equal(end, reference)
    assert not torch.equal(end, erased)


def test_images_of_another_size_are_trained_on_and_tested_as_they_are(tmp_path):
    seen = []

    def watched_network(constants):
        model = ghostnet.ResNet(8)
        model.register_forward_pre_hook(lambda _, images: seen.append(images[0].shape[2:]))
        return model

    constants = Constants(epochs=1, erasing=1.0, batch_size=40)
    with mock.patch.object(ghostnet, "build_network", watched_network):
        train(tmp_path / "run.pth", constants, few_images(size=(48, 48)))
    assert seen == [(48, 48), (48, 48)]  # a step, and the evaluation


def test_the_steps_of_an_epoch_move_a_bar_on_a_terminal(small, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    Trainer(small, few_images(), torch.float32).epoch(1, "a title", cuda_graph=False)
    assert "a title:   0%|          | 0/3 [" in capsys.readouterr().err


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_half_precision_trains_as_float32_does_and_has_its_loss_in_float32(
    small, precision, monkeypatch
):
    def epoch(precision):
        return Trainer(small, few_images(), precision).epoch(1, "", cuda_graph=False)

    exact = epoch(torch.float32)
    monkeypatch.setattr(F, "cross_entropy", loss := mock.Mock(wraps=F.cross_entropy))
    assert epoch(precision) == pytest.approx(exact, rel=0.02)
    assert [call.args[0].dtype for call in loss.call_args_list] == 3 * [torch.float32]


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16, torch.float32])
def test_a_run_computes_in_its_precision_until_it_tests_what_its_file_holds(
    monkeypatch, tmp_path, precision
):
    computed = []

    def watch(model, _images, logits):
        computed.append((model.training, logits.dtype))

    def watched_network(constants):
        model = small_network(constants)
        model.register_forward_hook(watch)
        return model

    monkeypatch.setattr(ghostnet, "build_network", watched_network)
    train(tmp_path / "run.pth", replace(SMALL, epochs=2), few_images(), precision)
    steps = 3 * [(True, precision)]
    assert computed == [*steps, (False, precision), *steps, (False, torch.float32)]


@pytest.fixture
def clock(small, monkeypatch):
    """The clock of runs whose every epoch takes 5 seconds to train and 1 to test."""
    clock = SimpleNamespace(now=0)

    def epoch(*_):
        clock.now += 5
        return 0.5, 90.0

    def evaluate(*_):
        clock.now += 1
        return 80.0

    monkeypatch.setattr(Trainer, "epoch", epoch)
    monkeypatch.setattr(ghostnet, "evaluate", evaluate)
    monkeypatch.setattr(ghostnet, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_an_epoch_s_numbers_are_printed_and_kept(clock, tmp_path, capsys):
    run = train(tmp_path / "run.pth", SMALL, few_images())
    numbers = {"loss": 0.5, "train_accuracy": 90.0, "test_accuracy": 80.0, "seconds": 6}
    assert run.history == {name: 3 * [number] for name, number in numbers.items()}
    assert capsys.readouterr().out.splitlines() == [
        "run: training from epoch 1",
        "run: epoch 1/3, loss 0.5000, train 90.00%, test 80.00%, 6.0 s, 0:00:12 left",
        "run: epoch 2/3, loss 0.5000, train 90.00%, test 80.00%, 6.0 s, 0:00:06 left",
        "run: epoch 3/3, loss 0.5000, train 90.00%, test 80.00%, 6.0 s, 0:00:00 left",
    ]


def test_a_run_is_saved_after_its_first_and_last_epoch_and_between_every_ten_seconds(
    clock, tmp_path, monkeypatch
):
    saved = []
    monkeypatch.setattr(Checkpoint, "save", lambda run, _path: saved.append(run.epochs))
    train(tmp_path / "run.pth", replace(SMALL, epochs=4), few_images())
    assert saved == [1, 3, 4]


def test_a_run_that_another_process_finished_before_the_lock_was_taken_is_not_trained(
    small, tmp_path, monkeypatch
):
    path = tmp_path / "run.pth"

    @contextlib.contextmanager
    def lock(*_, **__):
        train(path, small, few_images())
        monkeypatch.setattr(ghostnet, "train", mock.Mock(side_effect=UserError("trained again")))
        yield

    monkeypatch.setattr(ghostnet.filelock, "FileLock", lock)
    arguments = Arguments(checkpoint_dir=tmp_path)
    assert ghostnet.finish_and_test("run", small, few_images(), torch.float32, arguments)


def test_a_seed_repeats_a_run_and_every_seed_and_epoch_draws_anew(small, tmp_path):
    losses = []
    for number, seed in enumerate((0, 0, 1)):
        constants = replace(small, seed=seed, lr=1e-9)  # so that training makes no difference
        run = train(tmp_path / f"{number}.pth", constants, few_images())
        losses.append(run.history["loss"])
    assert losses[0] == losses[1]
    assert len({round(loss, 4) for loss in losses[0] + losses[2]}) == 6


def test_a_seed_repeats_an_initialization_and_every_seed_draws_another(small):
    def start(seed):
        return weights(Trainer(replace(small, seed=seed), few_images(), torch.float32).model)

    assert torch.equal(start(0), start(0))
    assert not torch.equal(start(0), start(1))


@pytest.mark.parametrize("constants", [
    SMALL, replace(SMALL, network="vgg16"),  # vgg16 has dropout
    replace(SMALL, erasing=0.5), replace(SMALL, norm_inside=True),
])
def test_a_run_that_goes_on_elsewhere_and_back_is_the_same_and_names_each_place_once(
    tmp_path, constants
):
    whole = train(tmp_path / "whole.pth", constants, few_images())
    path = tmp_path / "parts.pth"
    train_an_epoch(path, constants, few_images(), number=1)
    torch.manual_seed(99)  # as another process may find it
    with mock.patch.object(ghostnet, "hardware_name", return_value="Tesla T4"):
        train_an_epoch(path, constants, few_images(), number=2)
    torch.manual_seed(99)
    parts = train(path, constants, few_images())
    for name in ("loss", "train_accuracy", "test_accuracy"):
        assert parts.history[name] == whole.history[name]
    for name, tensor in whole.model.items():
        assert torch.equal(parts.model[name], tensor)
    how = f"torch.float32, torch {torch.__version__}"
    assert whole.trained_on == f"{ghostnet.hardware_name(CPU)}, {how}"
    assert parts.trained_on == f"{whole.trained_on}; Tesla T4, {how}"


def test_a_finished_file_is_float16_and_its_accuracy_that_of_the_file(tmp_path, monkeypatch):
    """The greatest bias is the first in bfloat16, the second in float16, the third in float32."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10), nn.Dropout())
    nn.init.zeros_(model[1].weight).requires_grad_(False)
    nn.init.zeros_(model[1].bias)
    model[1].bias.data[:3] = torch.tensor([1, 1 + 2**-10, 1 + 2**-10 + 1e-5])
    monkeypatch.setattr(ghostnet, "build_network", lambda _constants: copy.deepcopy(model))
    data = few_images(test=600)  # of the second class in the evaluation's batches: 90, 60, 30
    labels = 160 * [0] + 90 * [1] + 190 * [0] + 60 * [1] + 70 * [2] + 30 * [1]
    data.test_labels = torch.tensor(labels)
    path = tmp_path / "run.pth"
    run = train(path, replace(SMALL, epochs=2, lr=1e-9), data, torch.bfloat16)
    assert run.accuracy == 30

    saved = ghostnet.read_checkpoint(path)
    assert {tensor.dtype for tensor in saved.model.values()} == {torch.float16}
    assert saved.momentum == {}
    assert saved.accuracy == 30 == ghostnet.evaluate(saved.network(CPU), data)


def test_what_does_not_fit_float16_is_kept_in_float32(tmp_path, monkeypatch):
    """As maps of wide ghosts, whose variance is beyond 65,504, and weights that float16 rounds."""
    model = nn.Sequential(nn.Conv2d(3, 10, 32), nn.BatchNorm2d(10), nn.Flatten())
    model[0].weight.data *= 1e5
    model[1].weight.data[:] = 7e4
    model[1].bias.data[:] = 1e-8
    monkeypatch.setattr(ghostnet, "build_network", lambda _constants: copy.deepcopy(model))
    constants = replace(SMALL, epochs=1, lr=1e-9, batch_size=40)
    run = train(tmp_path / "run.pth", constants, few_images())
    saved = ghostnet.read_checkpoint(str(tmp_path / "run.pth"))
    assert run.model["1.running_var"].min() > 65_504
    assert saved.model["0.weight"].dtype == torch.float16
    for name, value in (("1.weight", 7e4), ("1.bias", 1e-8)):
        torch.testing.assert_close(saved.model[name], torch.full((10,), value), rtol=0.1, atol=0)
    network = saved.network(CPU)
    assert not network.training
    assert torch.equal(network[1].running_var, run.model["1.running_var"])


def test_a_trained_network_goes_to_other_tools_and_the_script_s_own_is_channels_last(
    tmp_path, monkeypatch
):
    tested = []
    evaluate = ghostnet.evaluate

    def watched(model, *arguments):
        weight = model.conv1.primary_conv.weight
        tested.append(weight.is_contiguous(memory_format=torch.channels_last))
        return evaluate(model, *arguments)

    monkeypatch.setattr(ghostnet, "evaluate", watched)
    run = train(tmp_path / "run.pth", Constants(epochs=2), few_images())
    arguments = Arguments(checkpoint_dir=tmp_path)
    ghostnet.finish_and_test("run", run.constants, few_images(), torch.float32, arguments)
    assert tested == 3 * [True]

    network = ghostnet.read_checkpoint(tmp_path / "run.pth").network(CPU)
    for tensor in network.state_dict().values():  # what safetensors asks for
        assert tensor.is_contiguous()
    maps = network.conv1(few_images().normalize(few_images().test_images).contiguous())
    assert maps.view(20, -1).shape == (20, 16 * 32 * 32)
    prune.l1_unstructured(network.fc, "weight", 0.5)
    prune.global_unstructured([(network.conv1.primary_conv, "weight")], prune.L1Unstructured,
                              amount=0.5)
    assert (network.conv1.primary_conv.weight == 0).float().mean() == 0.5


LEAST = {"ratio": 1, "dw_kernel_size": 1, "epochs": 1, "batch_size": 1, "seed": 0, "lr": 1e-9,
         "momentum": 0, "weight_decay": 0, "cheap_weight_decay": 0, "padding": 0,
         "erasing": 0, "norm_inside": 0}
ODD = st.one_of(st.integers(-3, 1000), st.floats(), st.floats(0, 2), st.text(), st.none())


@given(st.sampled_from(list(LEAST)), ODD)
@example("momentum", 1.0)
@example("erasing", 1.0)
@example("seed", -1)
def test_odd_constants_are_refused_by_name_and_all_others_are_possible(name, value):
    try:
        ghostnet.check_constants(replace(Constants(), **{name: value}))
    except UserError as error:
        assert name in str(error)
        return
    assert isinstance(value, type(getattr(Constants(), name)) | int)
    assert LEAST[name] <= value < math.inf
    assert name != "momentum" or value < 1
    assert name not in ("erasing", "norm_inside") or value <= 1
    assert name != "dw_kernel_size" or value % 2 == 1
