"""Systems far below the others: which, why, what is said, and what the ensemble is without them."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, Run
from rich.console import Console

from asc_ray.artifacts import Artifact
from asc_ray.config.composition import load_config
from asc_ray.data.logits import write_logits
from asc_ray.ensemble.config import FusionConfig
from asc_ray.ensemble.fuse import fuse_systems
from asc_ray.ensemble.weak import Standing, far_below
from asc_ray.plan import Plan
from asc_ray.progress import Progress
from asc_ray.stages.fuse import fusion_summary
from asc_ray.stages.teachers import watched
from asc_ray.stages.work import Work, source_of
from asc_ray.training.config import Recipe

RECIPES = {
    "cp_resnet": Recipe.model_validate({"model": {"name": "cp_resnet"}}),
    "passt": Recipe.model_validate({"model": {"name": "passt"}, "frontend": {"mels": 128, "hop": 320}}),
}


def standing(model: str, validation: float, train: float | None = 0.6) -> Standing:
    return Standing(RECIPES[model], validation, train)


def test_a_system_is_compared_with_the_better_half():
    good = {f"good_{n}": standing("cp_resnet", 0.7 + 0.01 * n) for n in range(3)}
    weak = {f"weak_{n}": standing("passt", 0.4, 0.3) for n in range(3)}
    found = far_below(good | weak, places=100)
    assert set(found) == set(weak)
    assert "weak_0 is far below the others (40 % on the validation part, the better half has 71 %)" in found["weak_0"]
    assert not far_below(good, places=100)
    assert not far_below(dict(list((good | weak).items())[2:4]), places=100)  # two are no ensemble


def test_few_places_do_not_tell_a_system_from_the_others():
    systems = {"a": standing("cp_resnet", 0.7), "b": standing("cp_resnet", 0.7), "c": standing("cp_resnet", 0.58)}
    assert set(far_below(systems, places=400)) == {"c"}
    assert not far_below(systems, places=20)  # twice the standard error is 20 points


def test_the_reason_is_what_the_training_says():
    good = {f"good_{n}": standing("cp_resnet", 0.7) for n in range(3)}

    def reason(one: Standing) -> str:
        return far_below({**good, "x": one}, places=400)["x"]

    assert "AudioSet" in reason(standing("passt", 0.4, 0.35))
    assert "teachers.recipes.x.model.pretrained" in reason(standing("passt", 0.4, 0.35))
    assert "underfitted; train it longer or faster (teachers.recipes.x.optimizer.epochs" in reason(
        standing("cp_resnet", 0.4, 0.35)
    )
    assert "overfitted; augment more (teachers.recipes.x.augment)" in reason(standing("cp_resnet", 0.4, 0.99))
    assert "not trained here; check that its checkpoint" in reason(standing("passt", 0.4, None))


def plan_of(run: Run, *overrides: str) -> Plan:
    return Plan(load_config(TINY, [f"storage={run.storage}", *overrides]))


def test_a_system_is_named_while_the_others_are_trained(finished):
    """The events of a fan-out: one system ends far below two finished ones, and is named once."""
    shown = io.StringIO()
    systems = ["cpr_128k_fms_2", "cpr_128k_fms_3", "cpr_128k_dirfms_1", "passt_fms_3"]
    plan = plan_of(finished, f"teachers.systems=[{', '.join(systems)}]")
    heard: list[str] = []
    work = Work(plan, None, Progress(Console(file=shown, width=1000)))
    listen = watched(work, work.source.open(), lambda name, event: heard.append(name))

    def train(name: str, validation: float) -> None:
        listen(name, {"epoch": 3, "validation_macro_accuracy": validation, "train_accuracy": 0.2})
        listen(name, {"finished": True})

    train(systems[0], 0.9)
    train(systems[3], 0.1)
    assert not shown.getvalue()  # two are no ensemble
    for name in systems[1:3]:
        train(name, 0.92)
    assert shown.getvalue().count("warning: ") == 1
    assert "passt_fms_3 is far below the others (10 % on the validation part" in shown.getvalue()
    assert len(heard) == 8


@pytest.fixture
def fused(finished, tmp_path):
    """The record of a fusion of three systems that know the scenes and three that know next to nothing."""
    source = source_of(plan_of(finished))
    store = source.store()
    rows = np.flatnonzero(store.split == "train")
    rng = np.random.default_rng(0)
    logits: dict[str, Path] = {}
    for name, merit in {
        "weak_1": 0.2,
        "good_1": 3.0,
        "weak_2": 0.3,
        "good_2": 3.0,
        "good_3": 3.0,
        "weak_3": 0.1,
    }.items():
        artifact = Artifact(tmp_path, "logits", name, "0", {}, {})
        values = merit * np.eye(len(store.labels))[store.scene[rows]] + rng.standard_normal((len(rows), 10))
        about = {"system": name, "labels": json.dumps(store.labels), "corpus": store.corpus, "checkpoint": name}
        about |= {"config": "0", "split": "train"}
        write_logits(artifact.open_partial() / "train-00000.arrow", store.ids[rows], values.astype(np.float32), about)
        artifact.finish({})
        logits[name] = artifact.path
    artifact = Artifact(tmp_path, "fusion", "fusion", "0", {}, {})
    fuse_systems(artifact, source, logits, FusionConfig())
    return artifact.facts()


def test_what_the_ensemble_is_without_its_weakest_half_is_said(fused):
    half = fused["validation_without_half"]
    assert half["left_out"] == ["weak_1", "weak_2", "weak_3"]
    gained = half["gain"]["log_loss"]["value"]
    assert gained == pytest.approx(fused["validation"]["fusion"]["log_loss"] - half["log_loss"])
    lines = fusion_summary(fused)
    assert any(line.startswith("without the weakest half (weak_1, weak_2, weak_3) over the fusion:") for line in lines)


def test_how_often_two_systems_disagree_is_recorded(fused):
    shares = np.array(fused["validation_disagreement"])
    np.testing.assert_array_equal(shares, shares.T)
    assert (shares.diagonal() == 0).all()
    assert shares[1, 3] < shares[0, 2]  # good ones agree more often than weak ones
