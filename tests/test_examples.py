"""The scripts of examples/, as a user runs them, where Ray and MLflow are not installed."""

import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import soundfile as sf
import torch
from conftest import ROOT, noise

from asc_ray.audio.config import FrontendConfig
from asc_ray.audio.frontend import LogMel
from asc_ray.data.clips import ClipStore
from asc_ray.data.config import DemoConfig
from asc_ray.data.corpus import read_corpus
from asc_ray.data.demo import make_demo_corpus
from asc_ray.models.config import DSFlexiNetConfig
from asc_ray.models.pretrained import load_published
from asc_ray.models.registry import build
from asc_ray.predict import answer
from asc_ray.runtime import EXAMPLE, Bundle, verify
from asc_ray.training.validation import predict

ALONE = """
import runpy, sys
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name in {"ray", "mlflow"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Nothing())
import torch
torch.set_num_threads(1)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(script, *arguments, cwd):
    words = [sys.executable, "-c", ALONE, str(ROOT / "examples" / script), *map(str, arguments)]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_student_is_trained_and_its_weights_have_the_accuracies_that_are_printed(tmp_path):
    sizes = {"train_clips_per_scene": 4, "train_locations_per_scene": 3, "impulse_responses": 2}
    test = {"test_seconds_per_scene": 1, "test_locations_per_scene": 1}
    make_demo_corpus(tmp_path / "corpus", DemoConfig(**sizes, **test))
    said = run("train_student.py", "corpus", "out", "--epochs", 2, "--gpus", 0, cwd=tmp_path)
    assert said.count("epoch ") == 2
    found = {name: float(share) for name, share in re.findall(r"^(\w+) +([\d.]+) %$", said, re.MULTILINE)}

    store = ClipStore(tmp_path / "out" / "clips")
    model, config = build(DSFlexiNetConfig(size="sm1"), len(store.labels)), FrontendConfig()
    about = {"labels": list(store.labels), "frontend": config.model_dump(exclude={"fmax_jitter"})}
    assert load_published(model, tmp_path / "out" / "model.safetensors", about)  # as `student.checkpoint` reads it
    rows = np.flatnonzero(store.split == "test")
    logits = predict(model.eval(), LogMel(config), store, rows, torch.device("cpu"))
    right, device = logits.argmax(1).numpy() == store.scene[rows], store.device[rows]
    groups = {"all": right, "unseen": right[np.isin(device, ["s4", "s5", "s6"])]}
    expected = groups | {name: right[device == name] for name in store.devices}
    for name, own in expected.items():
        assert found[name] == pytest.approx(100 * own.mean(), abs=0.051), name


def test_logits_are_fused_by_the_weights_of_the_true_posterior(bundle, tmp_path):
    """Logits that are a system's `height` at the scene, in noise of a `deviation` of its own: the best weights are
    height / deviation^2."""
    count, scenes, rng = 40_000, ("bus", "metro", "park"), np.random.default_rng(0)
    scene = rng.integers(0, 3, count)
    pd.DataFrame({"scene": np.array(scenes)[scene], "place": np.arange(count) % 50}).to_csv(tmp_path / "clips.csv")
    best = 0
    for name, height, deviation in (("near", 2.0, 1.0), ("far", 1.0, 2.0), ("deaf", 0.0, 1.0)):
        logits = height * np.eye(3)[scene] + deviation * rng.standard_normal((count, 3))
        np.save(tmp_path / f"{name}.npy", logits)
        best = best + height / deviation**2 * logits
    waves = noise(3)
    sf.write(tmp_path / "sound.wav", waves.reshape(-1), 32_000, subtype="FLOAT")
    options = ("--bundle", bundle, "--recordings", "sound.wav")
    said = run("fuse_logits.py", "clips.csv", "near.npy", "far.npy", "deaf.npy", *options, cwd=tmp_path)

    weights = {name: float(value) for value, name in re.findall(r"^weight +(\S+)  (\w+)$", said, re.MULTILINE)}
    assert weights == pytest.approx({"near": 2.0, "far": 0.25, "deaf": 0.0}, abs=0.06)
    shares = {name: float(value) for value, name in re.findall(r"^accuracy +([\d.]+)%  (\w+)$", said, re.MULTILINE)}
    assert shares["fusion"] == pytest.approx(100 * (best.argmax(axis=1) == scene).mean(), abs=1.0)
    gained = re.search(r"^gain +(\S+) accuracy, 95 % of the resamples (\S+) to", said, re.MULTILINE)
    assert gained is not None
    assert float(gained[1]) == pytest.approx((shares["fusion"] - shares["average"]) / 100, abs=0.0015)
    assert float(gained[2]) > 0
    assert (tmp_path / "fusion.json").is_file()

    opened = Bundle(bundle)
    rounded = np.clip(np.rint(waves * 32768), -32768, 32767).astype(np.int16)
    pooled = opened.probabilities(rounded).mean(axis=0)
    assert said.splitlines()[-1] == f"{opened.labels[pooled.argmax()]}  {pooled.max():.1%}  sound.wav"


def test_a_corpus_is_made_of_recordings_by_kind_of_sound(tmp_path):
    """Silent seconds, and a recording under another license, are left out; fold 5 is the test split."""
    tone = noise(1, 5 * 44_100)[0]
    tone[2 * 44_100 : 3 * 44_100] = 0
    for name in ("001 - Dog bark/1-1-A", "001 - Dog bark/5-2-A", "009 - Rooster/2-3-A", "009 - Rooster/1-40730-A"):
        file = tmp_path / "in" / f"{name}.ogg"
        file.parent.mkdir(parents=True, exist_ok=True)
        sf.write(file, tone, 44_100)
    assert "12 clips, 4 of them for the test" in run("esc10.py", "in", "out", cwd=tmp_path)
    corpus = read_corpus(tmp_path / "out")
    assert corpus.labels == ("dog_bark", "rooster")
    assert {(clip.place, clip.split) for clip in corpus.clips} == {("1", "train"), ("2", "test"), ("3", "train")}


def test_the_model_that_the_package_brings_is_whole_and_knows_its_recordings():
    """Where ESC-10 is beside the checkout, it names most of the recordings that it was not trained on."""
    assert verify(EXAMPLE)["labels"] == 10
    bundle = Bundle(EXAMPLE)
    recordings = sorted((ROOT.parent / "shared" / "data" / "esc10").glob("*/5-*.ogg"))
    if not recordings:
        pytest.skip("ESC-10 is not beside the checkout")
    right = [
        answer(bundle, file.name, file).pooled.argmax() == bundle.labels.index(file.parent.name) for file in recordings
    ]
    assert np.mean(right) > 0.75
