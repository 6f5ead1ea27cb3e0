"""`asc-ray predict`: every second heard, any recording read, what cannot be is named, three forms of answer."""

import csv
import io
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import soundfile as sf
from conftest import BUNDLE_LABELS, command, noise
from hypothesis import given
from hypothesis import strategies as st

from asc_ray.audio.recording import BadAudio, Recording
from asc_ray.errors import UserError
from asc_ray.predict import answer, live, seconds
from asc_ray.runtime import Bundle


@given(length=st.integers(0, 75), cuts=st.lists(st.integers(0, 75), max_size=6))
def test_seconds_hear_everything_but_less_than_a_tenth(length, cuts):
    size, wave = 20, np.arange(1, length + 1, dtype=np.float32)
    blocks = np.split(wave, sorted(min(cut, length) for cut in cuts))
    if length == 0:
        with pytest.raises(UserError, match="no samples"):
            list(seconds(blocks, size))
        return
    found = list(seconds(blocks, size))
    assert all(len(own) == size for own in found)
    heard = np.unique(np.concatenate(found))
    heard = heard[heard > 0]
    whole = length - length % size if length >= size and length % size < 2 else length
    np.testing.assert_array_equal(heard, wave[:whole])
    for number in range(length // size):
        np.testing.assert_array_equal(found[number], wave[number * size : (number + 1) * size])
    assert len(found) == max(1, length // size + (length > size and length % size >= 2))
    if length < size:
        expected = np.pad(wave, (0, size - length)) if length >= 18 else np.resize(wave, size)
        np.testing.assert_array_equal(found[0], expected)


@pytest.fixture
def recordings(tmp_path):
    """Two seconds and a half of one sound, as different files."""
    folder = tmp_path / "sounds"
    (folder / "deep").mkdir(parents=True)
    wave = 0.1 * np.sin(2 * np.pi * 500 * np.arange(80_000) / 32_000).astype(np.float32) + noise(1, 80_000)[0] / 10
    sf.write(folder / "plain.wav", wave, 32_000)
    sf.write(folder / "float.wav", wave, 32_000, subtype="FLOAT")
    sf.write(folder / "two.flac", np.stack([wave, wave], axis=1), 32_000)
    sf.write(folder / "deep" / "three.ogg", np.stack([wave] * 3, axis=1), 32_000)
    return folder


def test_formats_and_channels_answer_alike(bundle, recordings):
    opened = Bundle(bundle)
    plain = answer(opened, "plain", recordings / "plain.wav")
    assert plain.probabilities.shape == (3, len(BUNDLE_LABELS))
    wave, _ = sf.read(recordings / "plain.wav", dtype="int16")
    expected = opened.probabilities(np.stack([wave[:32_000], wave[32_000:64_000], wave[-32_000:]]))
    np.testing.assert_array_equal(plain.probabilities, expected)
    np.testing.assert_allclose(plain.pooled, expected.mean(0))
    for name in ("float.wav", "two.flac"):
        np.testing.assert_allclose(answer(opened, name, recordings / name).probabilities, expected, atol=0.02)
    lossy = answer(opened, "three", recordings / "deep" / "three.ogg").probabilities
    np.testing.assert_allclose(lossy, expected, atol=0.2)


@pytest.mark.parametrize("rate", [8_000, 44_100, 48_000, 192_000])
def test_other_rates_are_resampled(bundle, tmp_path, rate):
    def tone(rate):
        return 0.3 * np.sin(2 * np.pi * 1000 * np.arange(3 * rate) / rate)

    opened = Bundle(bundle)
    for name, own in (("own", 32_000), ("other", rate)):
        sf.write(tmp_path / f"{name}.wav", tone(own), own)
    own, other = (answer(opened, name, tmp_path / f"{name}.wav").probabilities for name in ("own", "other"))
    assert other.shape == own.shape
    np.testing.assert_allclose(other[1], own[1], atol=0.1)  # away from the ends, where the filter rings


def run(*arguments, stdin=None):
    return subprocess.run(command("predict", *arguments), input=stdin, capture_output=True, check=False)


def test_a_folder_as_dcase_has_it(bundle, recordings):
    done = run(bundle, recordings, "--format", "csv")
    assert done.returncode == 0, done.stderr
    header, *rows = csv.reader(io.StringIO(done.stdout.decode()), delimiter="\t")
    assert header == ["filename", "scene_label", *BUNDLE_LABELS]
    assert [row[0] for row in rows] == ["deep/three.ogg", "float.wav", "plain.wav", "two.flac"]
    for _, label, *values in rows:
        probabilities = np.array(values, dtype=float)
        assert probabilities.sum() == pytest.approx(1, abs=1e-5)
        assert BUNDLE_LABELS[probabilities.argmax()] == label


def test_names_with_tabs_do_not_break_the_columns(bundle, recordings):
    (recordings / "plain.wav").rename(recordings / 'a\tb"ü.wav')
    done = run(bundle, recordings, "--format", "csv")
    rows = list(csv.reader(io.StringIO(done.stdout.decode()), delimiter="\t"))
    assert rows[1][0] == 'a\tb"ü.wav'
    assert {len(row) for row in rows} == {2 + len(BUNDLE_LABELS)}


def test_half_a_sample_at_the_end_is_said(bundle):
    done = run(bundle, "-", stdin=bytes(64_001))
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 1
    assert b"1 bytes at the stream's end are no whole sample" in done.stderr


def test_json_lines_and_seconds(bundle, recordings):
    done = run(bundle, recordings / "plain.wav", "--format", "jsonl", "--per-second")
    (line,) = done.stdout.decode().splitlines()
    entry = json.loads(line)
    assert entry["filename"] == str(recordings / "plain.wav")
    assert entry["seconds"] == len(entry["per_second"]) == 3
    pooled = {label: np.mean([own["probabilities"][label] for own in entry["per_second"]]) for label in BUNDLE_LABELS}
    assert entry["probabilities"] == pytest.approx(pooled, abs=1e-5)
    assert entry["scene_label"] == max(pooled, key=pooled.get)


def test_bad_files_are_named_and_the_rest_is_done(bundle, recordings):
    (recordings / "broken.wav").write_bytes(b"RIFF????WAVE")
    sf.write(recordings / "empty.wav", np.zeros(0), 32_000)
    sf.write(recordings / "nan.wav", np.full(32_000, np.nan), 32_000, subtype="FLOAT")
    (recordings / "phone.m4a").write_bytes(b"....ftypM4A ")
    (recordings / "notes.txt").write_text("left out")
    sf.write(recordings / "half.mp3", noise(1, 8 * 32_000)[0], 32_000)  # whose header tells of eight seconds
    whole = (recordings / "half.mp3").read_bytes()
    (recordings / "half.mp3").write_bytes(whole[: len(whole) // 2])
    (recordings / "sampler.xi").write_bytes(bytes(500))
    (recordings / "gone.wav").symlink_to(recordings / "nowhere.wav")
    (recordings / "headless.raw").write_bytes(bytes(64_000))
    os.rename(recordings / "plain.wav", os.fsencode(recordings) + b"/\xe9.wav")  # in no encoding
    done = run(bundle, recordings)
    assert done.returncode == 1
    assert [line.split()[-1] for line in done.stdout.decode().splitlines()] == [
        "deep/three.ogg", "float.wav", "two.flac", "\\udce9.wav",
    ]  # fmt: skip
    errors = done.stderr.decode()
    assert "7 of 11 files without an answer" in errors
    for line in (
        "empty.wav: no samples",
        "nan.wav: 32000 samples are not finite",
        "broken.wav: unreadable",
        "half.mp3: cut short: ",
        "sampler.xi: unreadable",
        "gone.wav: unreadable",
        "phone.m4a: unreadable (MP4, which libsndfile does not decode)",
        "ffmpeg converts most formats: ffmpeg -i broken.wav converted.wav",
    ):
        assert line in errors
    assert "left out, no sound by their suffix: 1 .raw, 1 .txt" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("{bundle}", "nowhere.wav"), 1, "nowhere.wav: no such file"),
        (("nowhere", "{bundle}"), 1, "nowhere: no SHA256SUMS, so this is no bundle"),
        (("{bundle}", "{bundle}"), 1, "no sound file; known suffixes"),
        (("{bundle}", "-", "--format", "xml"), 2, "--format xml: allowed are table, jsonl, csv"),
        (("{bundle}", "-", "--format", "csv"), 1, "--format csv: DCASE's output.csv has a line a file"),
        (("{bundle}", "-", "a.wav"), 2, "standard input is one stream"),
        (("{bundle}", "-"), 1, "no samples"),
        (("--with", "teachers", "{bundle}", "-"), 2, "--with teachers: allowed are bundle, ensemble"),
    ],
)
def test_wrong_commands(bundle, arguments, code, message):
    done = run(*(argument.format(bundle=bundle) for argument in arguments), stdin=b"")
    errors = done.stderr.decode()
    assert done.returncode == code, errors
    assert message in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("rate", [32_000, 44_100])
def test_a_stream_is_answered_while_it_lasts(bundle, rate):
    """A twentieth of a second later at most, where it has to be resampled."""
    later = 0 if rate == 32_000 else rate // 20
    pcm = np.round(32768 * noise(1, 3 * rate + later)[0]).astype("<i2")
    process = subprocess.Popen(
        command("predict", bundle, "-", "--rate", rate), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    lines, sent = [], 0
    with process:
        for second in range(1, 4):
            process.stdin.write(pcm[sent : second * rate + later].tobytes())
            process.stdin.flush()
            sent = second * rate + later
            lines.append(process.stdout.readline().decode().split())  # before the next second is sent
        process.stdin.close()
        assert process.stdout.read() == b""
    assert process.returncode == 0
    assert [line[:2] for line in lines] == [["0", "s"], ["1", "s"], ["2", "s"]]
    if not later:
        expected = Bundle(bundle).probabilities(pcm.reshape(3, rate)).argmax(1)
        assert [line[2] for line in lines] == [BUNDLE_LABELS[k] for k in expected]


def test_files_of_two_folders_have_their_folders_names(bundle, recordings):
    done = run(bundle, recordings / "deep", recordings, "--format", "csv")
    names = [line.split("\t")[0] for line in done.stdout.decode().splitlines()[1:]]
    assert names == [str(recordings / "deep" / "three.ogg")] + [
        str(recordings / name) for name in ("deep/three.ogg", "float.wav", "plain.wav", "two.flac")
    ]


def test_a_stream_of_two_channels_at_another_rate(bundle):
    pcm = np.round(3276 * noise(1, 2 * 48_000)).astype("<i2").repeat(2)
    done = run(bundle, "-", "--rate", 48_000, "--channels", 2, "--format", "jsonl", stdin=pcm.tobytes())
    entries = [json.loads(line) for line in done.stdout.decode().splitlines()]
    assert [entry["second"] for entry in entries] == [0, 1]


def test_predicting_imports_neither_torch_nor_ray_nor_mlflow():
    code = "import sys, asc_ray.predict; print(sorted({'torch', 'ray', 'mlflow'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_a_chain_of_streams_is_heard_to_its_end(bundle, tmp_path):
    parts = [tmp_path / f"{number}.ogg" for number in range(3)]
    for number, part in enumerate(parts):
        sf.write(part, noise(1, 64_000, seed=number)[0], 32_000)
    (tmp_path / "chain.ogg").write_bytes(b"".join(part.read_bytes() for part in parts))
    opened = Bundle(bundle)
    alone = [answer(opened, "x", part).probabilities for part in parts]
    np.testing.assert_array_equal(answer(opened, "x", tmp_path / "chain.ogg").probabilities, np.concatenate(alone))


def test_sound_of_another_scale_or_rate_gets_no_answer(bundle, tmp_path):
    wave = noise(1, 64_000)[0]
    sf.write(tmp_path / "a.wav", np.rint(10_000 * wave), 32_000, subtype="FLOAT")
    sf.write(tmp_path / "b.wav", wave, 900)
    done = run(bundle, tmp_path)
    assert done.returncode == 1
    error = done.stderr.decode()
    assert re.search(r"a\.wav: samples up to \d+: .* within \+-1; divide 16-bit values by 32768", error)
    assert "b.wav: a rate of 900 Hz; allowed are 1000 to 1000000 Hz" in error
    assert "Traceback" not in error
    done = run(bundle, "-", "--rate", "500", stdin=bytes(64_000))
    assert done.returncode == 1
    assert b"a rate of 500 Hz" in done.stderr


@pytest.mark.parametrize(
    ("length", "note"),
    [(0.95, "0.95 s long, padded with zeros to 1 s"), (0.3, "0.30 s long, repeated to 1 s"), (1, ""), (1.5, "")],
)
def test_a_recording_shorter_than_a_clip_says_how_it_was_filled(bundle, tmp_path, length, note):
    sf.write(tmp_path / "a.wav", noise(1, round(length * 44_100))[0], 44_100)
    assert answer(Bundle(bundle), "a", tmp_path / "a.wav").note == note


@pytest.mark.parametrize(
    ("head", "kind"),
    [(b"\0\0\0\x18ftypM4A ", "MP4"), (b"\x1aE\xdf\xa3", "WebM or Matroska"), (b"0&\xb2u\x8ef\xcf\x11", "WMA")],
)
def test_a_foreign_format_is_named_by_its_content(tmp_path, head, kind):
    (tmp_path / "a.wav").write_bytes(head + bytes(500))
    with pytest.raises(BadAudio, match=f"unreadable .{kind}, which libsndfile does not decode"):
        Recording(tmp_path / "a.wav")


@pytest.mark.parametrize("form", ["table", "jsonl", "csv"])
def test_silence_is_answered_with_a_note(bundle, tmp_path, form):
    wave = noise(1, 96_000)[0]
    sounds = {
        "half.wav": np.concatenate([wave, np.zeros(64_000)]),
        "opposite.wav": np.stack([wave, -wave], axis=1),
        "silent.wav": np.zeros(64_000),
        "sound.wav": wave,
    }
    folder = tmp_path / "sounds"
    folder.mkdir()
    for name, samples in sounds.items():
        sf.write(folder / name, samples, 32_000, subtype="FLOAT")
    done = run(bundle, folder, "--format", form)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4 + (form == "csv")
    assert done.stderr.decode().splitlines() == [
        "asc-ray: half.wav: 2 of 5 seconds are silent, and count like the others",
        "asc-ray: opposite.wav: its channels cancel each other when they are mixed down; the answer means little",
        "asc-ray: silent.wav: silent; the answer means nothing",
    ]
    if form == "jsonl":
        assert ["note" in json.loads(line) for line in done.stdout.splitlines()] == [True, True, True, False]


def test_a_silent_second_of_a_stream_is_marked(bundle):
    pcm = np.concatenate([np.rint(noise(1)[0] * 32768), np.zeros(32_000)]).astype("<i2").tobytes()
    sound, silence = run(bundle, "-", stdin=pcm).stdout.decode().splitlines()
    assert not sound.endswith("silent")
    assert silence.endswith("silent")
    lines = [json.loads(line) for line in run(bundle, "-", "--format", "jsonl", stdin=pcm).stdout.splitlines()]
    assert [line.get("note") for line in lines] == [None, "silent"]


@pytest.mark.parametrize("form", ["WAV", "RF64", "FLAC", "OGG", "AIFF", "MP3", "CAF", "AU"])
def test_a_container_on_standard_input_is_no_raw_pcm(bundle, form):
    stream = io.BytesIO()
    sf.write(stream, noise(1)[0], 32_000, format=form)
    content = stream.getvalue()
    if form == "MP3":
        content = b"ID3\x04\0\0\0\0\0\0" + content
    opened = Bundle(bundle)
    with pytest.raises(UserError, match=r"begins as \w+ does, and raw PCM .* is expected.*ffmpeg -i - -f s16le"):
        list(live(opened, io.BytesIO(content), 32_000, 1))
