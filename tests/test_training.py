"""Schedules, objective, checkpoints and the loop against closed forms, and resuming against not having stopped."""

import gc
import json
import math
import shutil
import weakref
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import clip_store
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from asc_ray.artifacts import Artifact
from asc_ray.audio.augment import Augment
from asc_ray.audio.frontend import LogMel
from asc_ray.audio.impulse import ImpulseBank
from asc_ray.config.composition import load_config
from asc_ray.data.batches import epoch_batches, step_generator
from asc_ray.data.clips import ClipStore
from asc_ray.data.config import DataConfig, DemoConfig, PartitionConfig
from asc_ray.data.corpus import read_corpus
from asc_ray.data.demo import make_demo_corpus
from asc_ray.data.logits import write_logits
from asc_ray.errors import ConfigError, UserError
from asc_ray.int8.config import QATConfig
from asc_ray.int8.train import train_int8
from asc_ray.models.complexity import complexity
from asc_ray.models.registry import build
from asc_ray.search.config import ObjectiveConfig
from asc_ray.students.config import StudentConfig
from asc_ray.students.targets import TargetFiles, student_clips
from asc_ray.students.train import train_student
from asc_ray.training import loop, parallel, validation
from asc_ray.training.checkpoints import load_checkpoint, restore_optimizer, save_checkpoint
from asc_ray.training.config import (
    DistillationConfig,
    LearnedWeight,
    OptimizerConfig,
    Recipe,
    ScheduleConfig,
    ScheduledWeight,
)
from asc_ray.training.dataset import Source
from asc_ray.training.gpu import Replayed, training_device
from asc_ray.training.loop import Diverged, fit
from asc_ray.training.objective import Objective
from asc_ray.training.optimizer import learning_rate_factor, optimizer_of


def test_schedule_is_the_closed_form():
    schedule = ScheduleConfig(warm_up=15, ramp_down_start=50, ramp_down_length=85, last_factor=0.005)
    assert learning_rate_factor(0, schedule) == pytest.approx(math.exp(-5 * (1 - 0.5 / 15) ** 2))
    assert learning_rate_factor(6, schedule) == pytest.approx(math.exp(-5 * 0.6**2))
    assert learning_rate_factor(15, schedule) == learning_rate_factor(50, schedule) == 1.0
    assert learning_rate_factor(50 + 17, schedule) == pytest.approx(1 - 0.995 / 5)
    assert learning_rate_factor(135, schedule) == learning_rate_factor(149, schedule) == pytest.approx(0.005)


@given(st.integers(1, 200), st.integers(1, 200))
def test_a_scaled_schedule_stays_in_proportion(epochs, target):
    config = OptimizerConfig(
        epochs=epochs, schedule=ScheduleConfig(warm_up=0, ramp_down_start=0, ramp_down_length=epochs)
    )
    scaled = config.scaled_to(target)
    assert scaled.epochs == scaled.schedule.ramp_down_length == target
    assert scaled.learning_rate == config.learning_rate


@given(st.integers(0, 2**31 - 1), st.floats(0.5, 8.0), st.floats(0.0, 1.0))
def test_objective_is_eq_5_and_its_gradient_is_the_divergence_s(seed, tau, weight):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, 4, generator=g, dtype=torch.float64, requires_grad=True)
    soft = 3 * torch.randn(5, 4, generator=g, dtype=torch.float64)
    target = torch.nn.functional.one_hot(torch.randint(4, (5,), generator=g), 4).double()
    config = DistillationConfig(label_weight=weight, temperature=tau)
    losses = Objective(config)(logits, target, soft)
    label = torch.nn.functional.cross_entropy(logits, target.argmax(1), reduction="none")
    torch.testing.assert_close(losses["label"], label)
    torch.testing.assert_close(losses["total"], weight * label + (1 - weight) * losses["distillation"])
    divergence = torch.nn.functional.kl_div(
        torch.log_softmax(logits / tau, 1), torch.softmax(soft / tau, 1), reduction="sum"
    )
    (ours,) = torch.autograd.grad(losses["distillation"].sum(), logits, retain_graph=True)
    (reference,) = torch.autograd.grad(tau**2 * divergence, logits)
    torch.testing.assert_close(ours, reference)


def test_objective_without_soft_targets_is_the_label_loss():
    logits, target = torch.randn(3, 2), torch.eye(2)[[0, 1, 1]]
    losses = Objective(None)(logits, target, None)
    assert set(losses) == {"total", "label"}
    assert torch.equal(losses["total"], losses["label"])


def test_lambda_by_schedule_and_learned_within_its_bounds():
    @torch.no_grad()
    def weights(config):
        objective = Objective(DistillationConfig(label_weight=config))
        return [float(objective.label_weight(progress)) for progress in (0.0, 0.25, 0.5, 1.0)]

    assert weights(ScheduledWeight(start=0.8, end=0.2)) == pytest.approx([0.8, 0.65, 0.5, 0.2])
    cosine = [0.8, 0.8 - 0.6 * (1 - math.sqrt(0.5)) / 2, 0.5, 0.2]
    assert weights(ScheduledWeight(start=0.8, end=0.2, shape="cosine")) == pytest.approx(cosine)
    assert weights(LearnedWeight(start=0.3, low=0.1, high=0.9)) == pytest.approx([0.3] * 4)
    with pytest.raises(ValidationError, match=r"low 0\.3 < start 0\.3 < high 0\.9"):
        LearnedWeight(start=0.3, low=0.3, high=0.9)
    # It goes to the smaller loss, as far as the bound: the label is certain, the soft target is at odds with it.
    learner = Objective(DistillationConfig(label_weight=LearnedWeight(start=0.3, low=0.1, high=0.9)))
    optimizer = torch.optim.SGD(learner.parameters(), lr=1.0)
    logits, target, soft = torch.tensor([[9.0, 0.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 9.0]])
    for _ in range(200):
        optimizer.zero_grad()
        learner(logits, target, soft)["total"].sum().backward()
        optimizer.step()
    assert 0.89 < float(learner.label_weight(0.0).detach()) <= 0.9
    # An unsure teacher is no reason to leave it: a student that is as unsure has nothing left to learn from it.
    learner = Objective(DistillationConfig(label_weight=LearnedWeight(start=0.3, low=0.1, high=0.9)))
    optimizer = torch.optim.SGD(learner.parameters(), lr=1.0)
    same = torch.tensor([[0.4, 0.0]])
    for _ in range(200):
        optimizer.zero_grad()
        losses = learner(same, target, same)
        losses["total"].sum().backward()
        optimizer.step()
    assert 0.1 <= float(learner.label_weight(0.0).detach()) < 0.15
    weight = learner.label_weight(0.0)
    losses = learner(same, target, same)
    torch.testing.assert_close(losses["total"], weight * losses["label"] + (1 - weight) * losses["distillation"])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_under_mixup_labels_and_soft_targets_are_mixed_as_probabilities(data, tmp_path, monkeypatch, smoothing):
    """What the objective is given in the first step, against the step's own draw; smooth labels are mixed as such."""
    monkeypatch.setitem(RECIPES, "cp_resnet", {**RECIPES["cp_resnet"], "label_smoothing": smoothing})
    given = []

    def note(self, logits, target, soft_targets, progress=0.0):
        given.append((target, torch.softmax(soft_targets / self.config.temperature, 1)))
        return real(self, logits, target, soft_targets, progress)

    real = Objective.forward
    monkeypatch.setattr(Objective, "forward", note)
    soft = 4 * torch.randn(len(data.store), 10, generator=torch.Generator().manual_seed(0))
    distillation = DistillationConfig(label_weight=0.3, temperature=1.7)
    train("cp_resnet", data, tmp_path, soft=soft.numpy(), distillation=distillation, epochs=1)
    config, rows = recipe("cp_resnet"), data.parts["train"]
    clips = rows[epoch_batches(len(rows), 16, seed=0, epoch=0)[0]]
    augment = Augment(config.augment, config.frontend, data.bank, data.mean_energy)
    energies, devices = torch.from_numpy(data.store.energy[clips]), data.store.device[clips].tolist()
    draw = augment.draw(energies, devices, step_generator(0, 0, 0))
    scenes = torch.nn.functional.one_hot(torch.from_numpy(data.store.scene[clips]).long(), 10).float()
    scenes = (1 - smoothing) * scenes + smoothing / 10
    softened = torch.softmax(soft[clips] / 1.7, 1)
    lam = draw.lam[:, None]
    for found, own in zip(given[0], (scenes, softened), strict=True):
        torch.testing.assert_close(found, lam * own + (1 - lam) * own[draw.partner])


def test_int8_training_keeps_the_last_lambda_and_the_balance_of_its_student(clips, data, tmp_path, monkeypatch):
    """And in the last epochs the ranges and the batch norms' statistics, while the weights go on learning."""
    recipes, states = [], []

    def noted(model, recipe, *arguments, on_epoch, **given):
        def note(metrics):
            states.append({name: value.clone() for name, value in model.state_dict().items()})
            on_epoch(metrics)

        recipes.append(recipe)
        return fit(model, recipe, *arguments, on_epoch=note, **given)

    monkeypatch.setattr("asc_ray.students.train.fit", noted)
    monkeypatch.setattr("asc_ray.int8.train.fit", noted)
    raw = {**recipe("cp_resnet", epochs=2).model_dump(), "balance": 1.0}
    raw["distillation"] = {"label_weight": {"start": 0.9, "end": 0.2}}
    config = StudentConfig.model_validate(raw)
    fusion = Artifact(tmp_path, "fusion", "x", "0", {}, {})
    folder = fusion.open_partial() / "targets" / "fused"
    folder.mkdir(parents=True)
    rows = np.flatnonzero(data.store.split == "train")
    about = {"system": "fused", "labels": json.dumps(data.store.labels), "corpus": data.store.corpus}
    write_logits(folder / "train-0.arrow", data.store.ids[rows], np.zeros((len(rows), 10), np.float32), about)
    fusion.finish({})
    targets = TargetFiles(fusion.path, "targets/fused/*")
    student, int8 = (Artifact(tmp_path, stage, "x", "0", {}, {}) for stage in ("students", "int8"))
    source = Source(clips, PartitionConfig(fusion=0.2, validation=0.2))
    train_student(student, source, targets, config)
    states.clear()
    train_int8(int8, source, targets, student.path, config, QATConfig(epochs=3, frozen_epochs=1))
    assert [epoch["label_weight"] for epoch in student.facts()["history"]] == pytest.approx([0.9, 0.2])
    assert [epoch["label_weight"] for epoch in int8.facts()["history"]] == pytest.approx([0.2] * 3)
    for kinds, still in (
        (("running_mean", "running_var"), True),
        (("activation_post_process",), True),
        (("weight",), False),
    ):
        own = [
            name for name in states[0] if any(kind in name for kind in kinds) and states[0][name].is_floating_point()
        ]
        moved = [any(not torch.equal(before[name], after[name]) for name in own) for before, after in pairwise(states)]
        assert moved == [True, not still], kinds
    assert [recipe.balance for recipe in recipes] == [1.0, 1.0]


def test_a_balanced_epoch_has_as_many_clips_of_every_device(data, tmp_path, monkeypatch):
    trained, counts = [], {}

    def note(self, energies, devices, generator):
        trained.extend(devices)
        return real(self, energies, devices, generator)

    real = Augment.draw
    monkeypatch.setattr(Augment, "draw", note)
    for balance in (0.0, 1.0):
        trained.clear()
        config = recipe("cp_resnet", epochs=1).model_copy(update={"balance": balance})
        fit(build(config.model, 10, seed=1), config, data, data.parts["train"], tmp_path / str(balance))
        counts[balance] = np.unique(trained, return_counts=True)[1]
    there = np.unique(data.store.device[data.parts["train"]], return_counts=True)[1]
    assert counts[0.0].tolist() == there.tolist()
    assert there.max() > 3 * there.min()
    # Each clip as often as its share says, but for rounding: a device's clips together, too.
    assert abs(counts[1.0] - there.sum() / len(there)).max() < there.max()
    assert counts[1.0].max() < 3 * counts[1.0].min()


def test_a_learned_lambda_is_resumed_with_the_network(data, tmp_path):
    soft = np.zeros((len(data.store), 10), dtype=np.float32)
    learned = DistillationConfig(label_weight=LearnedWeight(start=0.3, low=0.1, high=0.9))
    whole, history = train("cp_resnet", data, tmp_path / "whole", soft=soft, distillation=learned)
    train("cp_resnet", data, tmp_path / "cut", until=2, soft=soft, distillation=learned)
    resumed, again = train("cp_resnet", data, tmp_path / "cut", soft=soft, distillation=learned)
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())
    assert timeless(history) == timeless(again)
    weights = [epoch["label_weight"] for epoch in history]
    assert len(set(weights)) == len(weights)
    assert all(0.1 < weight < 0.9 for weight in weights)


def test_the_mean_of_the_last_epochs_weights_is_the_result(data, tmp_path):
    """And the last epoch's metrics are about it; cut off among the epochs of the mean, it comes out the same."""
    train("cp_resnet", data, tmp_path / "plain", until=3)
    third = load_checkpoint(tmp_path / "plain").model
    fourth, plain = train("cp_resnet", data, tmp_path / "plain")
    mean, history = train("cp_resnet", data, tmp_path / "mean", average_epochs=2)
    for key, value in mean.items():
        expected = (third[f"network.{key}"] + fourth[key]) / 2 if value.is_floating_point() else fourth[key]
        torch.testing.assert_close(value, expected)
    assert [m["loss"] for m in history] == [m["loss"] for m in plain]
    assert [m["validation_log_loss"] for m in history[:3]] == [m["validation_log_loss"] for m in plain[:3]]
    assert history[3]["validation_log_loss"] != plain[3]["validation_log_loss"]
    train("cp_resnet", data, tmp_path / "cut", until=3, average_epochs=2)
    resumed, again = train("cp_resnet", data, tmp_path / "cut", average_epochs=2)
    assert all(torch.equal(value, resumed[key]) for key, value in mean.items())
    assert timeless(again) == timeless(history)
    with pytest.raises(ValidationError, match="average_epochs: 5 of 4 epochs"):
        recipe("cp_resnet", average_epochs=5)
    with pytest.raises(ValidationError, match="choose one of them"):
        Recipe.model_validate({**RECIPES["cp_resnet"], "select": "best", "optimizer": {"average_epochs": 2}})


def test_devices_left_out_are_not_trained_on_and_validated_apart(clips):
    source = Source(clips, PartitionConfig(fusion=0.2, validation=0.2))
    whole, part = source.open(), replace(source, held_out_devices=("a", "s3")).open()
    device = whole.store.device
    for name in ("train", "fusion"):
        assert set(device[part.parts[name]]) == set(device[whole.parts[name]]) - {"a", "s3"}
        assert set(part.parts[name]) < set(whole.parts[name])
    assert np.array_equal(part.parts["validation"], whole.parts["validation"])
    model, front_end = build(recipe("cp_resnet").model, 10, seed=1).eval(), LogMel(recipe("cp_resnet").frontend)
    found = validation.validate(model, front_end, part, torch.device("cpu"))
    rows = part.parts["validation"]
    right = (
        validation.predict(model, front_end, part.store, rows, torch.device("cpu")).argmax(1).numpy()
        == part.store.scene[rows]
    )
    for name, own in (
        ("macro_accuracy", np.ones(len(rows), bool)),
        ("unseen", np.isin(device[rows], ["a", "s3"])),
        ("seen", ~np.isin(device[rows], ["a", "s3"])),
    ):
        scenes = part.store.scene[rows]
        expected = np.mean([right[own & (scenes == k)].mean() for k in np.unique(scenes[own])])
        assert found[f"validation_{name}"] == pytest.approx(expected)
    assert "validation_unseen" not in validation.validate(model, front_end, whole, torch.device("cpu"))
    for wrong in (("s9",), tuple(np.unique(device[whole.store.split == "train"]))):
        with pytest.raises(ConfigError, match=r"sweep\.validation\.devices: found .* allowed are some, and not all"):
            replace(source, held_out_devices=wrong).open()


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus") / "demo"
    sizes = {"train_clips_per_scene": 6, "train_places_per_scene": 6}
    make_demo_corpus(root, DemoConfig(**sizes, test_seconds_per_scene=1, test_places_per_scene=1))
    corpus = read_corpus(root)
    return clip_store(tmp_path_factory.mktemp("storage"), corpus, responses=root / "dirs")


@pytest.fixture(scope="module")
def data(clips):
    return Source(clips, PartitionConfig(fusion=0.2, validation=0.2)).open()


RECIPES = {
    "cp_resnet": {"model": {"name": "cp_resnet", "width": 4}, "frontend": {"hop": 2000}},
    "passt": {
        "model": {"name": "passt", "width": 16, "depth": 1, "heads": 2, "patchout_freq": 2},
        "frontend": {"n_fft": 1024, "window": 800, "hop": 640, "mels": 128},
    },
}
AUGMENT = {
    "crop": True,
    "roll": 4000,
    "dir": {"p": 0.5, "apply_to": "all", "threshold": "auto"},
    "freq_mixstyle": {"p": 0.5},
    "freq_mask": 16,
    "mixup_alpha": 0.3,
}


def recipe(name, epochs=4, **changes):
    optimizer = {"epochs": epochs, "batch_size": 16, "learning_rate": 1e-3, **changes}
    return Recipe.model_validate({**RECIPES[name], "augment": AUGMENT, "optimizer": optimizer})


def train(name, data, folder, until=None, soft=None, distillation=None, **changes):
    """Train four epochs; `until` raises after that many, as a killed worker would leave it."""
    config = recipe(name, **changes)
    model = build(config.model, 10, seed=1)

    def stop(metrics):
        if metrics["epoch"] == until:
            raise KeyboardInterrupt

    if soft is not None:
        distillation = distillation or DistillationConfig(label_weight=0.3)
    try:
        history = fit(
            model,
            config,
            data,
            data.parts["train"],
            folder,
            on_epoch=stop,
            soft_targets=soft,
            distillation=distillation,
        )
    except KeyboardInterrupt:
        return None, None
    return model.state_dict(), history


@pytest.mark.parametrize("name", RECIPES)
def test_a_resumed_training_equals_an_uninterrupted_one_to_the_bit(name, data, tmp_path):
    whole, history = train(name, data, tmp_path / "whole")
    train(name, data, tmp_path / "cut", until=2)
    resumed, resumed_history = train(name, data, tmp_path / "cut")
    for key, value in whole.items():
        assert torch.equal(value, resumed[key]), key
    assert timeless(history) == timeless(resumed_history)


CLOCK = {"clips_per_second", "seconds", "minutes_left"}


def timeless(history):
    return [{key: value for key, value in metrics.items() if key not in CLOCK} for metrics in history]


@pytest.mark.parametrize("cut", [2, 3, 7])
def test_a_training_cut_within_an_epoch_resumes_to_the_bit(data, tmp_path, monkeypatch, cut):
    """Checkpoints after every step; the worker dies after the one with that number."""
    whole, history = train("cp_resnet", data, tmp_path / "whole")
    saved = []

    def save(*arguments):
        save_checkpoint(*arguments)
        saved.append(sorted(path.name for path in (tmp_path / "cut").glob("epoch-*"))[-1])
        if len(saved) == cut:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save_checkpoint", save)
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    config = recipe("cp_resnet")
    with pytest.raises(KeyboardInterrupt):
        fit(build(config.model, 10, seed=1), config, data, data.parts["train"], tmp_path / "cut")
    monkeypatch.undo()
    assert "-step-" in saved[-1] or cut == 3  # of the three steps of an epoch the last ends it
    resumed, resumed_history = train("cp_resnet", data, tmp_path / "cut")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert timeless(history) == timeless(resumed_history)


def test_how_clips_are_delivered_changes_nothing(clips, data, tmp_path):
    whole, _ = train("cp_resnet", data, tmp_path / "mapped", epochs=1)
    source = Source(clips, PartitionConfig(fusion=0.2, validation=0.2), DataConfig(mode="resident"))
    resident, _ = train("cp_resnet", source.open(), tmp_path / "resident", epochs=1)
    assert all(torch.equal(whole[key], resumed) for key, resumed in resident.items())


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_network_trains_as_the_plain_one(data, tmp_path):
    """One step: Adam's are of equal size however small a gradient is, so rounding differences grow with the steps."""
    plain, history = train("cp_resnet", data, tmp_path / "plain", epochs=1, batch_size=64)
    config = recipe("cp_resnet", epochs=1, batch_size=64).model_copy(update={"compile": True})
    model = build(config.model, 10, seed=1)
    (metrics,) = fit(model, config, data, data.parts["train"], tmp_path / "compiled")
    assert metrics["compiled"] == 1
    assert metrics["loss"] == pytest.approx(history[0]["loss"], rel=1e-5)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, plain[key], rtol=1e-4, atol=2.1 * config.optimizer.learning_rate)


def test_where_compiling_fails_training_says_so_and_goes_on(data, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no C++ compiler here")

    plain, _ = train("cp_resnet", data, tmp_path / "plain", epochs=1)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: fail)
    config = recipe("cp_resnet", epochs=1).model_copy(update={"compile": True})
    model = build(config.model, 10, seed=1)
    with pytest.warns(UserWarning, match="goes on without it: no C"):
        (metrics,) = fit(model, config, data, data.parts["train"], tmp_path / "compiled")
    assert metrics["compiled"] == 0
    assert all(torch.equal(plain[key], value) for key, value in model.state_dict().items())


class FakeGraph:
    """In the place of a CUDA graph: what was computed within `recording` is computed anew by each replay."""

    def __init__(self, replayed, function):
        self.replayed, self.function, self.replays = replayed, function, 0

    def replay(self):
        self.replays += 1
        self.replayed._output.copy_(self.function(*self.replayed._inputs))


def test_a_step_is_recorded_by_its_second_call_and_replayed_for_its_shapes_alone(monkeypatch):
    calls = []

    def function(a, b):
        calls.append(len(a))
        return (a * b).sum(0)

    replayed, graphs = Replayed(), []

    def made():
        graphs.append(FakeGraph(replayed, lambda a, b: (a * b).sum(0)))
        return graphs[-1]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", made)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    results = []
    for rows in (3, 8, 8, 8, 3, 8):  # a resumed epoch whose last, short batch comes first
        a, b = torch.randn(rows, 4), torch.randn(rows, 4)
        results.append((replayed(function, a, b), (a * b).sum(0)))
    for found, expected in results:
        assert torch.equal(found, expected), "also after later calls: a result is no memory of the graph's"
    assert calls == [3, 8, 8, 3], "plainly, plainly, recorded, plainly"
    assert [graph.replays for graph in graphs] == [3]


def test_a_finished_training_lives_on_in_nothing(data, tmp_path, monkeypatch):
    """On a GPU it would keep its memory from the next training of the process."""
    made, real = [], loop.Trainer.__init__

    def note(self, **arguments):
        real(self, **arguments)
        made.append(weakref.ref(self))

    monkeypatch.setattr(loop.Trainer, "__init__", note)
    gc.disable()
    try:
        for number in range(3):
            train("cp_resnet", data, tmp_path / str(number), epochs=1)
        assert [trainer() is None for trainer in made[1:]] == [True, True]
    finally:
        gc.enable()


def test_training_learns(data, tmp_path):
    _, history = train("cp_resnet", data, tmp_path, epochs=6, learning_rate=3e-3)
    assert history[-1]["loss"] < history[0]["loss"]


def test_another_seed_trains_the_same_weights_otherwise(data, tmp_path):
    config = recipe("cp_resnet", epochs=1)
    losses = []
    for number, seed in enumerate((3, 3, 4)):
        other, model = config.model_copy(update={"seed": seed}), build(config.model, 10, seed=1)
        losses.append(fit(model, other, data, data.parts["train"], tmp_path / str(number))[0]["loss"])
    assert losses[0] == losses[1] != losses[2]


def test_soft_targets_change_the_result_and_only_through_their_clips(data, tmp_path):
    soft = np.zeros((len(data.store), 10), dtype=np.float32)
    first, _ = train("cp_resnet", data, tmp_path / "1", soft=soft, epochs=1)
    others = soft.copy()
    others[data.store.split == "test"] = 7.0
    same, _ = train("cp_resnet", data, tmp_path / "2", soft=others, epochs=1)
    assert all(torch.equal(first[k], same[k]) for k in first)
    others[data.parts["train"][0], 0] = 9.0
    changed, _ = train("cp_resnet", data, tmp_path / "3", soft=others, epochs=1)
    assert any(not torch.equal(first[k], changed[k]) for k in first)


def test_a_truncated_checkpoint_is_passed_over_for_the_one_before(data, tmp_path):
    whole, _ = train("cp_resnet", data, tmp_path / "whole")
    train("cp_resnet", data, tmp_path / "cut", until=3)
    newest = sorted((tmp_path / "cut").glob("epoch-*"))[-1] / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    assert load_checkpoint(tmp_path / "cut").epoch == 2
    resumed, _ = train("cp_resnet", data, tmp_path / "cut")
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_checkpoints_keep_the_last_two_and_every_tensor(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    for epoch in range(1, 5):
        model(torch.randn(4, 3)).sum().backward()
        optimizer.step()
        history = [{"epoch": e, "validation_macro_accuracy": e / 10} for e in range(1, epoch + 1)]
        save_checkpoint(tmp_path, model, optimizer, history)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["epoch-00003", "epoch-00004"]
    checkpoint = load_checkpoint(tmp_path)
    assert torch.equal(checkpoint.model["weight"], model.weight)
    state = optimizer.state_dict()["state"]
    assert torch.equal(checkpoint.optimizer["0.exp_avg"], state[0]["exp_avg"])
    assert checkpoint.history == history


def test_no_checkpoint_is_no_checkpoint(tmp_path):
    assert load_checkpoint(tmp_path / "absent") is None


def test_a_diverging_training_names_epoch_step_and_clips(data, tmp_path):
    soft = np.zeros((len(data.store), 10), dtype=np.float32)
    soft[data.parts["train"][5]] = np.inf
    with pytest.raises(Diverged, match=r"epoch 1, step \d+; clips audio/"):
        train("cp_resnet", data, tmp_path, soft=soft)
    assert load_checkpoint(tmp_path) is None


def test_parts_are_disjoint_by_place_and_students_never_see_validation_or_test(data):
    places = {part: set(data.store.place[rows]) for part, rows in data.parts.items()}
    names = list(places)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert not places[a] & places[b], (a, b)
    clips = set(student_clips(data))
    assert clips == set(data.parts["train"]) | set(data.parts["fusion"])


def test_a_clip_store_is_enough_for_training(clips, tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(clips, copy)
    data = Source(copy, PartitionConfig(fusion=0.2, validation=0.2)).open()
    assert data.bank.names == ImpulseBank.load(next(clips.parents[2].glob("corpus*/demo/dirs"))).names
    energy = ClipStore(copy).energy[data.store.split == "train"]
    assert data.mean_energy == pytest.approx(float(energy.mean()), rel=1e-5)


def test_the_best_epoch_s_checkpoint_is_kept_and_can_be_the_result(data, tmp_path, monkeypatch):
    """Validation of this training, made up: the second of five epochs is the best, and the last two are kept anyway."""
    accuracies = iter([0.3, 0.6, 0.5, 0.6, 0.4, 0.1])
    monkeypatch.setattr(loop, "validate", lambda *_: {"validation_macro_accuracy": next(accuracies)})
    config = recipe("cp_resnet", epochs=6).model_copy(update={"select": "best"})
    model = build(config.model, 10, seed=1)
    fit(model, config, data, data.parts["train"], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch-00002", "epoch-00005", "epoch-00006"]
    best, last = load_checkpoint(tmp_path, 2), load_checkpoint(tmp_path)
    assert all(torch.equal(value, best.model[f"network.{key}"]) for key, value in model.state_dict().items())
    assert not all(torch.equal(value, last.model[f"network.{key}"]) for key, value in model.state_dict().items())
    (tmp_path / "epoch-00002" / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="checkpoint of the best epoch, 2, is damaged"):
        fit(model, config, data, data.parts["train"], tmp_path)


def test_a_batch_in_parts_has_the_same_gradient(data, tmp_path):
    """A transformer has no batch norm, and without patchout its parts see what the whole batch saw."""
    config = recipe("passt", epochs=2)
    passt = config.model.model_copy(update={"patchout_freq": 0, "frames": 50})
    weights, losses = [], []
    for accumulate in (1, 3):
        optimizer = config.optimizer.model_copy(update={"accumulate": accumulate})
        model = build(passt, 10, seed=1)
        changed = config.model_copy(update={"model": passt, "optimizer": optimizer})
        history = fit(model, changed, data, data.parts["train"], tmp_path / str(accumulate))
        weights.append(model.state_dict())
        losses.append([epoch["loss"] for epoch in history])
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-3, atol=2e-5)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def gradients_of(fit_it, monkeypatch) -> list[list[torch.Tensor]]:
    """What each step's gradient was when the optimizer took it."""
    found = []

    def step(self, *_):
        found.append([p.grad.clone() for group in self.param_groups for p in group["params"] if p.grad is not None])

    for kind in (torch.optim.Adam, torch.optim.AdamW):
        monkeypatch.setattr(kind, "step", step)
    fit_it()
    return found


def norm(gradient) -> float:
    return float(torch.stack([part.norm() for part in gradient]).norm())


def test_parts_of_a_batch_add_up_to_its_gradient(data, tmp_path, monkeypatch):
    """Not to a part of it: Adam would not notice, but the clipping and the weight decay would."""
    config = recipe("passt", epochs=1)
    passt = config.model.model_copy(update={"patchout_freq": 0, "frames": 50})
    found = []
    for accumulate in (1, 3):
        settings = config.optimizer.model_copy(update={"accumulate": accumulate, "clip_norm": 1e9})
        changed = config.model_copy(update={"model": passt, "optimizer": settings})
        model, folder = build(passt, 10, seed=1), tmp_path / str(accumulate)
        found.append(
            gradients_of(lambda m=model, c=changed, f=folder: fit(m, c, data, data.parts["train"], f), monkeypatch)
        )
    for whole, parts in zip(*found, strict=True):
        for own, other in zip(whole, parts, strict=True):
            torch.testing.assert_close(other, own, rtol=1e-3, atol=1e-6)


def test_gradients_are_no_longer_than_the_clip_norm(data, tmp_path, monkeypatch):
    free, clipped = (
        gradients_of(lambda c=c: train("cp_resnet", data, tmp_path / str(c), epochs=1, clip_norm=c), monkeypatch)
        for c in (1e9, 0.01)
    )
    assert all(norm(own) > 0.02 for own in free)
    assert all(norm(own) == pytest.approx(0.01, rel=1e-3) for own in clipped)
    for own, other in zip(free[0], clipped[0], strict=True):  # the direction stays
        torch.testing.assert_close(other, own * 0.01 / norm(free[0]), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_the_weight_decay_is_coupled_or_not_and_spares_a_learned_lambda(kind):
    """Without a gradient, AdamW shrinks a weight by lr x decay; Adam takes its first step of lr whatever the decay."""
    model, objective = torch.nn.Linear(3, 1, bias=False), Objective(DistillationConfig(label_weight={"start": 0.3}))
    settings = OptimizerConfig(kind=kind, learning_rate=0.01, weight_decay=0.5)
    optimizer = optimizer_of(model, objective, settings, torch.device("cpu"))
    before, raw = model.weight.detach().clone(), objective.raw.detach().clone()
    for parameter in (model.weight, objective.raw):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    expected = before * (1 - 0.01 * 0.5) if kind == "adamw" else before - 0.01 * before.sign()
    torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(objective.raw.detach(), raw)


def test_the_recipe_cpjku_takes_the_steps_of_their_loop():
    """Theirs, in their own units: 0.02 of the mean label loss and 0.98 of the mean over clips and classes of the
    divergence times tau squared, by Adam with 1e-4."""
    student = load_config("tau22", ["student.recipe=cpjku", "storage=/unused"]).student
    ours, theirs = (torch.nn.Linear(7, 10) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    objective, settings = Objective(student.distillation), student.optimizer
    optimizers = (
        optimizer_of(ours, objective, settings, torch.device("cpu")),
        torch.optim.Adam(theirs.parameters(), lr=0.0009, weight_decay=0.0001),
    )
    generator = torch.Generator().manual_seed(0)
    tau, kl = 2.0, torch.nn.KLDivLoss(log_target=True, reduction="none")
    for _ in range(100):
        x = torch.randn(32, 7, generator=generator)
        label = torch.randint(10, (32,), generator=generator)
        soft = 3 * torch.randn(32, 10, generator=generator)
        optimizers[0].zero_grad()
        objective(ours(x), torch.nn.functional.one_hot(label, 10).float(), soft)["total"].mean().backward()
        optimizers[0].step()
        optimizers[1].zero_grad()
        logits = theirs(x)
        divergence = kl(torch.log_softmax(logits / tau, 1), torch.log_softmax(soft / tau, 1)).mean() * tau**2
        (0.02 * torch.nn.functional.cross_entropy(logits, label) + 0.98 * divergence).backward()
        optimizers[1].step()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(("name", "kind", "decay"), [("passt", "adam", 0.001), ("cp_resnet", "adam", 0.001)])
def test_the_teachers_recipes_have_the_published_optimizer(name, kind, decay):
    config = load_config("tau22", ["storage=/unused"])
    found = {
        (r.optimizer.kind, r.optimizer.weight_decay) for r in config.teachers.recipes.values() if r.model.name == name
    }
    assert found == {(kind, decay)}


def test_trials_are_judged_by_the_mean_over_scenes_and_not_over_clips(data):
    """On clips of which one scene has most."""
    rows = data.parts["validation"]
    scenes = data.store.scene[rows]
    uneven = np.concatenate([rows[scenes == 0], rows[scenes == 0], rows[scenes == 0], rows])
    model, config = build(recipe("cp_resnet").model, 10, seed=1).eval(), recipe("cp_resnet")
    front_end, cpu = LogMel(config.frontend), torch.device("cpu")
    found = validation.validate(model, front_end, replace(data, parts={**data.parts, "validation": uneven}), cpu)
    right = validation.predict(model, front_end, data.store, uneven, cpu).argmax(1).numpy() == data.store.scene[uneven]
    macro = np.mean([right[data.store.scene[uneven] == k].mean() for k in range(10)])
    assert found["validation_accuracy"] == pytest.approx(right.mean())
    assert found["validation_macro_accuracy"] == pytest.approx(macro)
    assert abs(macro - right.mean()) > 0.05
    assert ObjectiveConfig().value(found) == found["validation_macro_accuracy"]


def test_without_a_gpu_asked_for_a_training_is_on_the_cpu_whatever_the_machine_has(data, tmp_path, monkeypatch):
    expected, _ = train("cp_resnet", data, tmp_path / "a", epochs=1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found, _ = train("cp_resnet", data, tmp_path / "b", epochs=1)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    assert all(value.device.type == "cpu" for value in found.values())
    assert training_device(0.25) == torch.device("cuda")
    # Counting a network takes no GPU, either.
    assert complexity(build(recipe("cp_resnet").model, 10), (1, 1, 256, 17)).parameters > 0


def test_a_gpu_that_was_asked_for_and_is_not_seen_is_said(data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = recipe("cp_resnet", epochs=1)
    with pytest.raises(
        UserError, match=r"gpus: 0\.5 was asked for, and torch .* sees no GPU here; install a CUDA build"
    ):
        fit(build(config.model, 10), config, data, data.parts["train"], tmp_path, gpus=0.5)


def test_logits_that_are_not_finite_end_a_training_and_never_become_an_answer(data, tmp_path, monkeypatch):
    config = recipe("cp_resnet", epochs=1)
    model = build(config.model, 10, seed=1)
    with torch.no_grad():
        model.feed_forward[0].weight[0] = float("nan")
    front_end, rows = LogMel(config.frontend), data.parts["validation"]
    with pytest.raises(
        validation.NotFinite, match=rf"the logits of {len(rows)} of {len(rows)} clips are not finite \(audio/"
    ):
        validation.validate(model.eval(), front_end, data, torch.device("cpu"))

    def ruin(self, *_):
        with torch.no_grad():
            self.param_groups[0]["params"][0].fill_(float("inf"))

    for kind in (torch.optim.Adam, torch.optim.AdamW):
        monkeypatch.setattr(kind, "step", ruin)
    settings = config.optimizer.model_copy(update={"batch_size": 10_000})
    one_step = config.model_copy(update={"optimizer": settings})
    with pytest.raises(Diverged, match=r"after epoch 1 the logits of .* are not finite .*\. Lower optimizer"):
        fit(build(config.model, 10, seed=1), one_step, data, data.parts["train"], tmp_path)


def train_on_rank(rank, clips, folder, recipes):
    """One of two processes of data-parallel trainings; it leaves the weights and the epochs of each."""
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    source = Source(clips, PartitionConfig(fusion=0.2, validation=0.2)).open()
    results = {name: train(name, source, folder / name, **changes) for name, changes in recipes.items()}
    soft = np.random.default_rng(0).standard_normal((len(source.store), 10)).astype(np.float32)
    learned = DistillationConfig(label_weight={"start": 0.5})
    results["learned"] = train("cp_resnet", source, folder / "learned", soft=soft, distillation=learned)
    results["gradients"] = gradients(slice(rank, None, 2), parallel.distributed(perturbed()), scale=2)
    torch.save(results, folder / f"rank-{rank}.pt")
    torch.distributed.destroy_process_group()


def perturbed():
    """A CP-ResNet in float64, every weight of which has a gradient: as built, its blocks pass on what they get."""
    model, generator = build(recipe("cp_resnet").model, 10, seed=1).double(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.double))
    return model.train()


def gradients(own, model, scale=1):
    x = torch.randn(15, 1, 64, 16, generator=torch.Generator().manual_seed(3), dtype=torch.double)
    (model(x[own]).square().sum() * scale).backward()
    return {name.removeprefix("module."): parameter.grad for name, parameter in model.named_parameters()}


def test_two_workers_train_as_one(clips, data, tmp_path):
    """The same batches and draws; gradients, batch norms, mixup and Freq-MixStyle reach over both workers' clips.

    In float64 gradients agree to rounding. In float32 Adam's first steps are of equal size however small a gradient
    is, so rounding grows: the learning rate is one at which it stays below what is compared.
    """
    recipes = {"cp_resnet": {"learning_rate": 5e-5}, "passt": {"accumulate": 2}}
    torch.multiprocessing.spawn(train_on_rank, (clips, tmp_path, recipes), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(2))
    for name, expected in gradients(slice(None), perturbed()).items():
        torch.testing.assert_close(first["gradients"][name], expected, rtol=1e-9, atol=1e-10)
    lambdas = [[epoch["label_weight"] for epoch in results["learned"][1]] for results in (first, second)]
    assert lambdas[0] == lambdas[1]
    assert lambdas[0][-1] != 0.5
    for name, changes in recipes.items():
        (weights, history), (same, _) = first[name], second[name]
        assert all(torch.equal(value, same[key]) for key, value in weights.items())
        alone, curve = train(name, data, tmp_path / "alone" / name, **changes)
        assert set(weights) == set(alone)
        for ours, theirs in zip(curve, history, strict=True):
            assert theirs["loss"] == pytest.approx(ours["loss"], abs=1e-3)
            assert theirs["validation_log_loss"] == pytest.approx(ours["validation_log_loss"], abs=1e-3)


def test_a_resumed_optimizer_has_the_parameters_layout(tmp_path):
    """A fused one refuses another, and channels_last is not what a file of tensors keeps."""

    def made():
        model = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        return model, torch.optim.Adam(model.parameters())

    model, optimizer = made()
    model(torch.randn(1, 3, 5, 5)).sum().backward()
    optimizer.step()
    save_checkpoint(tmp_path, model, optimizer, [{"validation_macro_accuracy": 0.5}])
    again, resumed = made()
    restore_optimizer(resumed, load_checkpoint(tmp_path).optimizer)
    for own, other in zip(again.parameters(), model.parameters(), strict=True):
        for name, value in optimizer.state[other].items():
            assert torch.equal(resumed.state[own][name], value)
            assert resumed.state[own][name].stride() == value.stride()


def test_checkpoints_later_than_the_resumed_one_make_room(tmp_path):
    """Damaged ones, passed over when the training was resumed, would count among the last two."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    history = [{"validation_macro_accuracy": accuracy} for accuracy in (0.1, 0.5, 0.2, 0.3, 0.9)]
    for epochs in range(1, 6):
        save_checkpoint(tmp_path, model, optimizer, history[:epochs])
    # Were the fifth damaged, the second would be the best again.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch-00002", "epoch-00004", "epoch-00005"]
    save_checkpoint(tmp_path, model, optimizer, history[:2], [[1.0, 1.0, 1.0]])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch-00002", "epoch-00002-step-000001"]


def test_where_the_fusion_is_learned(clips):
    """holdout: on clips of no teacher. train: on theirs. Students have all but the validation part in each way."""
    parts = PartitionConfig(fusion=0.2, validation=0.2)
    held, own, crossed = (
        Source(clips, parts, fusion_data=data, folds=3).open() for data in ("holdout", "train", "crossfit")
    )
    assert not set(held.parts["train"]) & set(held.parts["fusion"])
    for data in (own, crossed):
        assert (data.parts["train"] == data.parts["fusion"]).all()
        assert not set(student_clips(data)) & set(data.parts["validation"])
        assert len(student_clips(data)) + len(data.parts["validation"]) == (data.store.split == "train").sum()
    assert len(student_clips(held)) + len(held.parts["validation"]) == (held.store.split == "train").sum()
    assert "test" not in held.parts
    assert set(Source(clips, parts).open(test=True).parts) == {"train", "fusion", "validation", "test"}
