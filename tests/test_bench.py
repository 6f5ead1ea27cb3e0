"""Short runs of the benchmarks: each measures something and says it."""

import importlib
import json
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import soundfile as sf
from conftest import ROOT, Run

from asc_ray.data.corpus import read_corpus
from asc_ray.embedded.program import COMPILER, EMULATOR, HOST_TOOLS, missing

BENCH = ROOT / "bench"
SHARED = ROOT.parent / "shared" / "data"


def run(name: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, BENCH / f"{name}.py", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def clips(finished: Run):
    return next((finished.storage / "clips").iterdir())


def test_front_end():
    output = run("frontend", "--batch", 4, "--runs", 2)
    for name in ("student", "CP-ResNet", "PaSST"):
        found = re.search(rf"{name} .* difference to plain ([\d.e-]+)\n  plain .* ratio [\d.]+", output)
        assert float(found[1]) < 1e-4
    if "without torchaudio" not in output:
        assert len(re.findall(r"^  torchaudio.* ratio [\d.]+", output, re.MULTILINE)) == 5


def test_clip_store(clips):
    output = run("clips", clips, "--batch", 16, "--runs", 5)
    assert re.search(r"shuffled batch\s+median\s+\d+ clips/s", output)


def test_ingest_of_a_shard_takes_less_than_a_gigabyte(finished):
    output = run("ingest", next((finished.storage / "corpus").iterdir()) / "audio", "--shard")
    assert 0.2 < float(re.search(r"peak memory ([\d.]+) GB", output).group(1)) < 1.0


def test_logits(clips):
    output = run("logits", clips, "--clips", 16, "--systems", 2, "--runs", 1)
    assert float(re.search(r"ratio [\d.]+, .* difference ([\d.e-]+)", output)[1]) < 1e-4


@pytest.mark.skipif(bool(missing(*HOST_TOOLS, COMPILER, EMULATOR)), reason="no compilers or no emulator here")
def test_microcontroller(clips):
    output = run("microcontroller", clips, "--models", "sm1", "--epochs", 1, "--emulated", 2)
    assert re.search(r"^\| sm1 \| 12,\d{3} \| .* \| [01] of 90 \| \d+ \| 0 of 2 \|$", output, re.MULTILINE)


def test_training(clips):
    output = run("train", clips, "--model", "sm1", "--batch", 16, "--epochs", 1)
    assert re.search(r"whole loop: median [\d.]+ clips/s", output)
    shares = [float(share) for share in re.findall(r"us a clip\s+([\d.]+) %", output)]
    assert len(shares) == 6
    assert sum(shares) == pytest.approx(100, abs=0.5)


@pytest.mark.campaign
def test_sweep(clips):
    output = run("sweep", clips, "--trials", 3, "--seconds", 1, "--only", "time")
    busy = re.search(r"3 trials of .* in 2 slots.*slots busy with training: ([\d.]+) %", output, re.DOTALL)
    assert busy, output
    assert 0 < float(busy[1]) <= 100


@pytest.mark.campaign
def test_fanout(clips):
    output = run("fanout", clips, "--teachers", 2, "--seconds", 1)
    wall, ideal = (float(re.search(rf"{name} ([\d.]+) s", output).group(1)) for name in ("wall", "training"))
    assert float(re.search(r"ratio ([\d.]+)", output).group(1)) == pytest.approx(2 * wall / ideal, rel=0.1)


def test_teachers_steps():
    output = run("teachers", "--batch", 2, "--runs", 1)
    for name in ("plain, every patch", "plain, patchout 6", "one after another"):
        assert re.search(rf"{name} .* ratio [\d.]+", output)


def test_fusion(tmp_path):
    output = run("fusion", "--clips", 20_000, "--systems", 3, "--runs", 1)
    assert re.search(r"ratio [\d.]+", output)
    run("fusion", "--write", tmp_path / "logits", "--clips", 100_000, "--systems", 3)
    output = run("fusion", "--stream", tmp_path / "logits")
    assert 0.05 < float(re.search(r"peak memory ([\d.]+) GB", output).group(1)) < 1.0


def test_fusion_small(tmp_path):
    """No rule is better than eq. 4 fitted to the clips that judge them, and copies of systems harm the average."""
    run("fusion_small", "--repeats", 1, "--sizes", "50/10", "--csv", tmp_path / "regrets.csv")
    table = pd.read_csv(tmp_path / "regrets.csv")
    assert len(table) == 5 * 5
    assert (table["nats"] > 0).all()
    copies = table[table["kind"] == "copies"].set_index("rule")["nats"]
    assert copies["greedy selection"] < copies["average"] < copies["best single system"]


def test_recipes_are_compared_and_none_is_trained_twice(clips, tmp_path):
    arguments = (tmp_path, clips, "--model", "sm1", "--epochs", 1, "--recipes", "short", "cpjku_short")
    first = run("recipes", *arguments)
    assert len(list(tmp_path.glob("*.json"))) == 2
    again = run("recipes", *arguments)
    assert first.endswith(again)
    assert re.search(r"short +[\d.]+ +[\d.]+ +[\d.]+", again)


def test_the_design_meets_every_setting_with_each_other_equally_often(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    rows = np.array(list(importlib.import_module("recipes").design().values())) * 2 - 1
    np.testing.assert_array_equal(rows.T @ rows, 8 * np.eye(5))
    assert [-1] * 5 in rows.tolist()  # short
    assert [1, 1, -1, 1, -1] in rows.tolist()  # CP-JKU's loop


@pytest.mark.campaign
@pytest.mark.skipif(not SHARED.exists(), reason="the real recordings are not there")
def test_a_corpus_of_four_scenes_is_made(tmp_path):
    run("corpora", tmp_path, "--only", "dev5")
    corpus = read_corpus(tmp_path / "dev5")
    assert len(corpus.labels) == 4
    train = [clip for clip in corpus.clips if clip.split == "train"]
    share = np.mean([clip.device == "a" for clip in train])
    assert 0.65 < share < 0.8


@pytest.mark.campaign
def test_a_search_that_loses_a_node(clips):
    output = run("sweep_faults", clips, "--trials", 6, "--nodes", 2)
    assert "one killed half-way: 6 trials" in output
    assert "both agree to the bit" in output


def test_scale():
    output = run("scale", "--only", "shards", "files", "trials", "--most", 100)
    assert len(re.findall(r"100: [\d.e-]+ s  slope unknown", output)) == 7
    output = run("scale", "--only", "clips", "--clips", 10_000, "--steps", 1)
    # Below 1 GB a process: 10,000 clips of 64 kB would be 0.6 GB more, and their samples are read from holes.
    (peaks,) = re.findall(r"^10,000 " + 3 * r".* ([\d.]+) GB" + r".* ([\d.]+) ([\d.]+) GB$", output, re.MULTILINE)
    assert all(0.1 < float(peak) < 2.0 for peak in peaks)


@pytest.fixture
def tau22_shape(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("tau22_shape")


def test_the_full_shape_is_tau22_s(tau22_shape):
    """Its published counts, and no place in two splits."""
    listed = tau22_shape.rows(tau22_shape.CLIPS)
    assert {split: len(rows) for split, rows in listed.items()} == {
        "train": 139_620, "evaluate": 29_680, "neither": 61_050,
    }  # fmt: skip
    every = [row for rows in listed.values() for row in rows]
    assert len({row.name for row in every}) == 230_350
    of_a = sum(row.device == "a" for row in every)
    assert of_a == 144_000
    train, test = ({row.device for row in listed[split]} for split in ("train", "evaluate"))
    assert test - train == {"s4", "s5", "s6"}
    places = [{row.place for row in rows} for rows in listed.values()]
    assert sum(map(len, places)) == len(set.union(*places))


@pytest.mark.campaign
def test_a_small_corpus_of_that_shape_is_one(tau22_shape, tmp_path):
    """Its clips are different sounds in TAU22's form, and the reader takes it; what no split lists is there, too."""
    count = tau22_shape.make_corpus(tmp_path / "corpus", 400)
    corpus = read_corpus(tmp_path / "corpus")
    assert len(corpus.clips) == count == pytest.approx(400, abs=10)
    assert (len(corpus.labels), len(corpus.devices)) == (10, 9)
    assert not any("places" in note for note in corpus.notes)
    files = [tmp_path / "corpus" / clip.clip_id for clip in corpus.clips]
    assert len({file.read_bytes() for file in files}) == count
    info = sf.info(files[0])
    assert (info.samplerate, info.subtype, info.channels, info.frames) == (44_100, "PCM_24", 1, 44_100)
    rows = (tmp_path / "corpus" / "meta.csv").read_text().splitlines()[1:]
    assert len(rows) == len(list((tmp_path / "corpus" / "audio").iterdir())) > count


@pytest.mark.campaign
def test_the_pipeline_at_a_small_part_of_tau22_s_shape(tmp_path):
    output = run("tau22_shape", tmp_path / "here", "--clips", 700)
    killed = re.search(r"^ingest, killed .* (\d+) clips, .* (\d+) of 8 shards$", output, re.MULTILINE)
    again = re.search(r"^ingest, again .* (\d+) clips, \d+ clips/s$", output, re.MULTILINE)
    listed = re.search(r"^(\d+) clips in", output)
    assert killed, output
    assert again, output
    assert listed, output
    assert 4 <= int(killed[2]) < 8
    assert int(killed[1]) + int(again[1]) == int(listed[1])
    for stage in ("teachers", "logits", "fuse", "student", "qat", "evaluate", "report", "pipeline, all is done"):
        assert re.search(rf"^{stage} +[\d.]+ ", output, re.MULTILINE), output
    assert len(list((tmp_path / "here" / "storage" / "teachers").glob("*/manifest.json"))) == 12
    assert list((tmp_path / "here" / "storage").glob("report/*/report.html"))


def test_int8():
    output = run("int8", "--models", "sm1", "--repeats", 3, "--batch", 2)
    for form in ("wave to scene, int8", "front end", "onnxruntime, int8", "onnxruntime, float32", "torch, float32"):
        median, late = re.search(rf"{form} +([\d.]+) ms  p99 +([\d.]+) ms", output).groups()
        assert 0 < float(median) <= float(late)


@pytest.mark.campaign
def test_gpu_without_one(tmp_path):
    output = run(
        "gpu",
        "--device",
        "cpu",
        "--out",
        tmp_path,
        "--only",
        "step_counts",
        "same_again",
        "students",
        "front_ends",
        "teachers",
    )
    assert "FAILED" not in output
    for line in (
        "weights of sm1, as it comes: difference +again 0e",
        "training sm2, batch 8 ",
        "training passt, batch 4",
    ):
        assert re.search(line, output), line
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert 300 < found["steps"]["sm2"]["kernels"] < 350
    assert found["training"]["training sm2, batch 8"][-1] > 0
    assert len(found["rows"]) == len(output.splitlines())
