"""Ingest by its command, on a corpus with every kind of bad file."""

import re
import subprocess

import numpy as np
import pytest
import soundfile as sf
from conftest import TINY, command, joined, new_storage

from asc_ray.config.composition import load_config
from asc_ray.data.clips import ClipStore
from asc_ray.data.demo import make_demo_corpus
from asc_ray.errors import UserError
from asc_ray.plan import Plan

TONE = 0.1 * np.sin(np.arange(44_100) / 20)


def spoil(corpus):
    """Overwrite files of the corpus; {name: the reason expected}, and the names of those that can be mended."""
    names = sorted(str(path.relative_to(corpus)) for path in corpus.glob("audio/*-a.wav"))
    absent, empty, garbage, silent, nan, short, long, *good = names
    (corpus / absent).unlink()
    (corpus / empty).write_bytes(b"")
    (corpus / garbage).write_bytes(b"RIFF of nothing")
    sf.write(corpus / silent, np.zeros(44_100), 44_100)
    sf.write(corpus / nan, np.full(44_100, np.nan, dtype=np.float32), 44_100, subtype="FLOAT")
    sf.write(corpus / short, TONE[:20_000], 44_100)
    sf.write(corpus / long, np.tile(TONE, 3), 44_100)
    bad = {
        absent: "no such file",
        empty: "empty",
        garbage: "unreadable",
        silent: "silent",
        nan: "not finite|NaN|number",
        short: "s",
        long: "s",
    }
    sf.write(corpus / good[0], np.stack([TONE, TONE], axis=1), 44_100)
    sf.write(corpus / good[1], TONE[:16_000], 16_000)
    sf.write(corpus / good[2], TONE[:43_500], 44_100)
    return bad


@pytest.fixture
def corpus(tmp_path):
    root = tmp_path / "corpus"
    make_demo_corpus(root, load_config(TINY, [f"storage={tmp_path}"]).corpus.demo)
    return root


def ingest(corpus, storage, *more):
    if not storage.exists():
        new_storage(storage)
    arguments = ("--config", TINY, "--set", f"corpus.path={corpus}", "--set", f"storage={storage}", *more)
    done = subprocess.run(command("ingest", *arguments), capture_output=True, text=True, env=joined(), check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_bad_clips_are_all_named_or_left_out_and_recorded(corpus, tmp_path):
    bad = spoil(corpus)
    absent_and_empty = list(bad)[:2]
    refused = ingest(corpus, tmp_path / "storage")
    assert refused.returncode == 1
    for name in absent_and_empty:  # seen before any file is decoded
        assert name in refused.stderr
    for name in absent_and_empty:
        sf.write(corpus / name, TONE, 44_100)
    refused = ingest(corpus, tmp_path / "storage")
    assert refused.returncode == 1
    decoded = list(bad)[2:]
    for name in decoded:
        assert name in refused.stderr
    assert "corpus.on_bad_clip=skip" in refused.stderr

    for name in absent_and_empty:
        (corpus / name).unlink()
    skipped = ingest(corpus, tmp_path / "storage", "--set", "corpus.on_bad_clip=skip")
    assert skipped.returncode == 0, skipped.stderr
    assert "7 bad clips left out" in skipped.stdout
    overrides = [f"corpus.path={corpus}", f"storage={tmp_path}/storage", "corpus.on_bad_clip=skip"]
    clips = Plan(load_config(TINY, overrides)).clips
    assert {clip["clip_id"] for clip in clips.facts()["skipped"]} == set(bad)
    assert not set(ClipStore(clips.path).ids) & set(bad)
    notes = clips.facts()["notes"]
    assert notes["stereo mixed down"] == 1
    assert notes["resampled 16000 Hz"] == 1
    assert notes["padded"] == 1


def test_files_that_were_mended_are_decoded_again_and_the_others_are_not(corpus, tmp_path):
    name = next(iter(sorted(str(p.relative_to(corpus)) for p in corpus.glob("audio/*-a.wav"))))
    good = (corpus / name).read_bytes()
    (corpus / name).write_bytes(good[:44] + b"\0" * (len(good) - 44))  # silent, of the same size
    assert ingest(corpus, tmp_path / "storage").returncode == 1
    partial = next((tmp_path / "storage" / "clips").glob("*.partial"))
    stamps = {path.name: path.stat().st_mtime_ns for path in partial.glob("shard-*.arrow")}
    (corpus / name).write_bytes(good)
    assert ingest(corpus, tmp_path / "storage").returncode == 0
    clips = next(path for path in (tmp_path / "storage" / "clips").iterdir())
    kept = [n for n, stamp in stamps.items() if (clips / n).stat().st_mtime_ns == stamp]
    assert len(kept) == len(stamps) - 1
    assert name in ClipStore(clips).ids


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("corpus.impulse_responses=/nowhere", r"corpus\.impulse_responses: /nowhere is no folder"),
        (
            "student.augment.dir.apply_to=[a, z]",
            r"student\.augment\.dir\.apply_to: the corpus has no device 'z'; allowed: all",
        ),
        ("partition.fusion=0.4", r"no split into train, fusion, validation by place"),
    ],
)
def test_what_a_corpus_cannot_give_is_refused_before_any_work(corpus, tmp_path, override, message):
    if "partition" in override:  # one place cannot be in three parts
        meta = corpus / "meta.csv"
        meta.write_text(
            re.sub(r"\t(northport|eastham|southbury|westfield)-\w+\t", r"\tnorthport-1\t", meta.read_text())
        )
    overrides = [f"corpus.path={corpus}", f"storage={tmp_path}/storage", override]
    with pytest.raises(UserError, match=message):
        Plan(load_config(TINY, overrides))
    assert not (tmp_path / "storage").exists()


def test_a_corpus_that_loses_a_scene_without_its_bad_clips_is_refused(corpus, tmp_path):
    train = (corpus / "evaluation_setup" / "fold1_train.csv").read_text().splitlines()[1:]
    scene = train[0].split("\t")[1]
    for line in train:
        name, label = line.split("\t")
        if label == scene:
            sf.write(corpus / name, np.zeros(44_100), 44_100)
    done = ingest(corpus, tmp_path / "storage", "--set", "corpus.on_bad_clip=skip")
    assert done.returncode == 1
    assert f"scene '{scene}': no usable training clip" in done.stderr


def test_a_corpus_of_recordings_of_another_length_is_told_once(corpus, tmp_path):
    files = sorted(corpus.glob("audio/*.wav"))
    for file in files[:-20]:
        sf.write(file, np.tile(TONE, 10), 44_100)
    done = ingest(corpus, tmp_path / "storage")
    assert done.returncode == 1
    found = re.search(
        r"(\d+) of (\d+) clips: 10\.00 s long, one second is expected; (.*) \(.*, \.\.\.\)\n", done.stderr
    )
    assert found, done.stderr
    assert (int(found[1]), int(found[2])) == (len(files) - 20, len(files))
    assert found[3] == "corpus.segment_seconds=1.0 cuts longer recordings"
    assert len(done.stderr.splitlines()) < 8


def test_what_is_strange_about_a_corpus_is_said_once(corpus, tmp_path):
    meta = corpus / "meta.csv"
    rows = [line.split("\t") for line in meta.read_text().splitlines()]
    rows[1][3] += " "
    rows[2][2] = rows[-1][2]
    meta.write_text("".join("\t".join(row) + "\n" for row in rows))
    done = ingest(corpus, tmp_path / "storage")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("blanks around values were taken away, by column: source_label 1") == 1
    assert done.stdout.count("places of the test split are in the training split, too") == 1
    assert "blanks" not in ingest(corpus, tmp_path / "storage").stdout
