"""Soft targets: a clip's own, whatever their order and their files, and none that is missing, twice or not finite."""

import json

import numpy as np
import pytest
from conftest import clip_store, noise

from asc_ray.artifacts import Artifact
from asc_ray.audio.impulse import ImpulseBank
from asc_ray.data.clips import open_clips
from asc_ray.data.config import DemoConfig
from asc_ray.data.corpus import read_corpus
from asc_ray.data.demo import make_demo_corpus
from asc_ray.data.logits import write_logits
from asc_ray.errors import UserError
from asc_ray.students.targets import TargetFiles, read_soft_targets, student_clips
from asc_ray.training.dataset import Dataset


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Dataset:
    folder = tmp_path_factory.mktemp("corpus")
    config = DemoConfig(train_clips_per_scene=4, train_places_per_scene=4, test_seconds_per_scene=1)
    make_demo_corpus(folder / "corpus", config)
    store = open_clips(clip_store(folder, read_corpus(folder / "corpus")))
    train = np.flatnonzero(store.split == "train")
    parts = {"train": train[:20], "fusion": train[20:30], "validation": train[30:]}
    return Dataset(store, parts, ImpulseBank.load(None))


def targets(data: Dataset, folder, rows: np.ndarray, values: np.ndarray) -> TargetFiles:
    """Write the logits of these rows of the store to two files of an artifact."""
    artifact = Artifact(folder, "fusion", "fusion", "0123456789abcdef", {}, {})
    about = {"system": "fused", "labels": json.dumps(data.store.labels), "corpus": data.store.corpus}
    for number, some in enumerate(np.array_split(np.arange(len(rows)), 2)):
        file = artifact.open_partial() / f"train-{number}.arrow"
        write_logits(file, data.store.ids[rows[some]], values[some], about)
    artifact.finish({})
    return TargetFiles(artifact.path, "train-*")


def of(rows: np.ndarray, data: Dataset) -> np.ndarray:
    """Return logits that say which clip they are of."""
    return rows[:, None].astype(np.float32) + noise(len(data.store), len(data.store.labels))[rows]


@pytest.mark.parametrize("seed", [None, 0])
def test_a_clip_has_its_own_whatever_their_order(data, tmp_path, seed):
    train = np.flatnonzero(data.store.split == "train")
    rows = train if seed is None else np.random.default_rng(seed).permutation(train)
    soft = read_soft_targets(data, targets(data, tmp_path, rows, of(rows, data)))
    asked = np.random.default_rng(1).choice(train, 17)
    assert np.array_equal(soft[asked], of(asked, data))


def test_clips_that_no_student_learns_from_may_have_none(data, tmp_path):
    rows = student_clips(data)
    soft = read_soft_targets(data, targets(data, tmp_path, rows, of(rows, data)))
    asked = np.array([rows[3], data.parts["validation"][0], rows[0]])
    found = soft[asked]
    assert np.array_equal(found[[0, 2]], of(asked[[0, 2]], data))
    assert np.isnan(found[1]).all()


def test_what_is_missing_twice_or_not_finite_is_refused(data, tmp_path):
    rows = student_clips(data)
    with pytest.raises(UserError, match=rf"2 training clips have no soft target, first {data.store.ids[rows[0]]}, "):
        read_soft_targets(data, targets(data, tmp_path / "missing", rows[2:], of(rows[2:], data)))
    twice = np.append(rows, rows[:1])
    with pytest.raises(UserError, match="1 clips have a second soft target; fuse again"):
        read_soft_targets(data, targets(data, tmp_path / "twice", twice, of(twice, data)))
    values = of(rows, data)
    values[-1, 2] = np.inf
    with pytest.raises(UserError, match=r"train-1\.arrow: soft targets that are not finite; fuse again"):
        read_soft_targets(data, targets(data, tmp_path / "infinite", rows, values))
