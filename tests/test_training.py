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
    (Constants(schedule="multistep"), lambda sgd: MultiStepLR(sgd, (100, 150))),
])
def test_schedules_are_those_of_torch(constants, scheduler):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], constants.lr)
    theirs = scheduler(optimizer)
    for epoch in range(1, constants.epochs + 1):
        ours = ghostnet.learning_rate(constants, epoch)
        assert ours == pytest.approx(theirs.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        theirs.step()


def augmented(data, plan):
    """The images of a plan, padded by 4, cropped and mirrored one by one."""
    images = []
    for index, top, left, mirrored in plan.tolist():
        padded = F.pad(data.train_images[index], (0, 0, 4, 4, 4, 4))
        image = padded[top : top + 32, left : left + 32]
        images.append(image.flip(1) if mirrored else image)
    return data.normalize(torch.stack(images))


@pytest.mark.parametrize("norm_inside", [False, True])
def test_an_epoch_is_plain_sgd_with_nesterov_momentum_and_two_weight_decays(small, norm_inside):
    """On images that are drawn as by a script that knows no erasing."""
    decays = {"weight_decay": 0.3, "cheap_weight_decay": 0.1}
    constants = replace(small, norm_inside=norm_inside, **decays)
    data = few_images()
    trainer = Trainer(constants, data, torch.float32)
    model = copy.deepcopy(trainer.model)
    start = weights(model)
    loss, accuracy = trainer.epoch(2, "", cuda_graph=False)

    lr = 0.01 * (1 + math.cos(math.pi / 3)) / 2
    torch.manual_seed(3_000_002)
    top, left = torch.randint(9, (2, 40))
    whole_plan = torch.stack([torch.randperm(40), top, left, torch.randint(2, (40,))], dim=1)
    velocity = dict.fromkeys(dict(model.named_parameters()), 0.0)
    losses = 0.0
    hits = 0
    for plan in whole_plan.split(16):  # 16, 16 and 8 images
        images, labels = augmented(data, plan), data.train_labels[plan[:, 0]]
        assert torch.equal(images, data.train_batch(plan, 4)[0])
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


def test_the_steps_of_an_epoch_move_a_bar_on_a_terminal(small, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    Trainer(small, few_images(), torch.float32).epoch(1, "a title", cuda_graph=False)
    assert "a title:   0%|          | 0/3 [" in capsys.readouterr().err


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
    exact = train(tmp_path / "exact.pth", replace(SMALL, epochs=2), few_images())
    computed.clear()
    monkeypatch.setattr(F, "cross_entropy", loss := mock.Mock(wraps=F.cross_entropy))
    run = train(tmp_path / "run.pth", replace(SMALL, epochs=2), few_images(), precision)
    steps = 3 * [(True, precision)]
    assert computed == [*steps, (False, precision), *steps, (False, torch.float32)]
    assert {call.args[0].dtype for call in loss.call_args_list} == {torch.float32}
    assert run.history["loss"] == pytest.approx(exact.history["loss"], rel=0.02)


def test_an_epoch_s_numbers_are_printed_kept_and_saved_between_every_ten_seconds(
    small, tmp_path, monkeypatch, capsys
):
    """Each epoch takes 5 seconds to train and 1 to test. The first and the last one are saved."""
    clock = SimpleNamespace(now=0)
    saved = []

    def epoch(*_):
        clock.now += 5
        return 0.5, 90.0

    def evaluate(*_):
        clock.now += 1
        return 80.0

    monkeypatch.setattr(Trainer, "epoch", epoch)
    monkeypatch.setattr(ghostnet, "evaluate", evaluate)
    monkeypatch.setattr(ghostnet, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(Checkpoint, "save", lambda run, _path: saved.append(run.epochs))
    run = train(tmp_path / "run.pth", replace(small, epochs=4), few_images())
    numbers = {"loss": 0.5, "train_accuracy": 90.0, "test_accuracy": 80.0, "seconds": 6}
    assert run.history == {name: 4 * [number] for name, number in numbers.items()}
    assert saved == [1, 3, 4]
    line = "run: epoch {}/4, loss 0.5000, train 90.00%, test 80.00%, 6.0 s, 0:00:{:02} left"
    assert capsys.readouterr().out.splitlines() == [
        "run: training from epoch 1", *(line.format(n, 6 * (4 - n)) for n in (1, 2, 3, 4))]


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
    def run(number, seed):
        constants = replace(small, seed=seed, lr=1e-9)  # so that training makes no difference
        run = train(tmp_path / f"{number}.pth", constants, few_images())
        return run.history["loss"], weights(run.network(CPU))

    (losses, start), (again, start_again), (others, other_start) = map(run, range(3), (0, 0, 1))
    assert losses == again
    assert torch.equal(start, start_again)
    assert len({round(loss, 4) for loss in losses + others}) == 6
    assert not torch.equal(start, other_start)


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


def test_a_finished_file_is_float16_and_its_accuracy_that_of_the_file(small, tmp_path, monkeypatch):
    def evaluate(model, *_):  # another number for other weights
        return weights(model).norm().item()

    monkeypatch.setattr(ghostnet, "evaluate", evaluate)
    path = tmp_path / "run.pth"
    train(path, small, few_images())
    saved = ghostnet.read_checkpoint(path)
    dtypes = {saved.model[name].dtype for name, _ in saved.network(CPU).named_parameters()}
    assert dtypes == {torch.float16}
    assert saved.momentum == {}
    assert not saved.network(CPU).training
    assert saved.accuracy == evaluate(saved.network(CPU))


def test_what_a_file_lacks_is_zero_or_what_was_added_later_and_what_it_has_wins(small, tmp_path):
    path = tmp_path / "run.pth"
    constants = replace(small, epochs=1, padding=0, erasing=0.5)
    train(path, constants, few_images())
    assert ghostnet.read_checkpoint(path).constants == constants
    fields = torch.load(path)
    for name in ("padding", "erasing", "norm_inside"):
        del fields["constants"][name]
    torch.save(fields, path)
    older = replace(constants, padding=4, erasing=0.0, norm_inside=False)
    assert ghostnet.read_checkpoint(path).constants == older


def test_a_trained_network_goes_to_other_tools(tmp_path):
    train(tmp_path / "run.pth", Constants(epochs=1), few_images())
    network = ghostnet.read_checkpoint(tmp_path / "run.pth").network(CPU)
    for tensor in network.state_dict().values():  # what safetensors asks for
        assert tensor.is_contiguous()
    maps = network.conv1(few_images().normalize(few_images().test_images).contiguous())
    assert maps.view(20, -1).shape == (20, 16 * 32 * 32)


LIMITS = {  # what a constant may be at least and at most
    "ratio": (1, 512), "dw_kernel_size": (1, 13), "epochs": (1, 10**5), "batch_size": (1, 50_000),
    "seed": (0, 2**31 - 1), "lr": (1e-9, 1e9), "momentum": (0, 0.9999), "weight_decay": (0, 1000),
    "cheap_weight_decay": (0, 1000), "padding": (0, 31), "erasing": (0, 1), "norm_inside": (0, 1),
}
ODD = st.one_of(st.integers(-3, 1000), st.floats(), st.floats(0, 2), st.text(), st.none())


@given(st.sampled_from(list(LIMITS)), ODD)
@example("erasing", 1.0)
@example("seed", -1)
@example("dw_kernel_size", 2)
@example("dw_kernel_size", 15)
def test_odd_constants_are_refused_by_name_and_all_others_are_possible(name, value):
    typed = isinstance(value, type(getattr(Constants(), name)) | int)
    possible = typed and LIMITS[name][0] <= value <= LIMITS[name][1]
    if name == "dw_kernel_size":
        possible = possible and value % 2 == 1
    try:
        ghostnet.check_constants(replace(Constants(), **{name: value}))
        assert possible
    except UserError as error:
        assert not possible and name in str(error)
