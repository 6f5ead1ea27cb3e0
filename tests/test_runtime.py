"""The bundle on a device: the front end in NumPy against training's and the published ones, what is refused."""

import hashlib
import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import soundfile as sf
import torch
from conftest import BUNDLE_FRONTEND, BUNDLE_LABELS, ROOT, noise
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import FRONT_ENDS, RENEW, SOUNDS, golden, mel_digest, needs_reference, published_outputs, waves

from asc_ray.audio.config import FrontendConfig
from asc_ray.audio.frontend import LogMel as TorchLogMel
from asc_ray.errors import UserError
from asc_ray.int8.bundle import seal
from asc_ray.runtime import Bundle, verify
from asc_ray.runtime.agreement import differing
from asc_ray.runtime.frontend import Frontend, LogMel


def frontend(config: FrontendConfig, samples: int) -> Frontend:
    return Frontend(samples=samples, **config.model_dump(exclude={"fmax_jitter"}))


@pytest.mark.parametrize(
    "config",
    [FrontendConfig(), FrontendConfig(hop=750), FrontendConfig(n_fft=1024, window=800, hop=320, mels=128)],
    ids=["student", "cp_resnet", "passt"],
)
@pytest.mark.parametrize("sound", ["noise", "silence", "tone", "full scale"])
def test_the_front_end_is_trainings(config, sound):
    time = np.arange(32_000, dtype=np.float32) / 32_000
    wave = {
        "noise": noise(2),
        "silence": np.zeros((1, 32_000), np.float32),
        # With the noise of a recording: far from a pure tone there is nothing but the transforms' own rounding.
        "tone": 0.5 * np.sin(2 * np.pi * 1000 * time)[None] + 1e-2 * noise(1),
        "full scale": np.sign(noise(1)),
    }[sound]
    expected = TorchLogMel(config)(torch.from_numpy(wave)[:, None]).numpy()
    found = LogMel(frontend(config, 32_000))(wave)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@settings(max_examples=30)
@given(
    window=st.integers(2, 64),
    hop=st.integers(1, 70),
    samples=st.integers(80, 200),
    mels=st.integers(1, 40),
    fmin=st.floats(0, 1000),
)
def test_the_front_end_is_trainings_for_any_settings(window, hop, samples, mels, fmin):
    config = FrontendConfig(
        sample_rate=8000, n_fft=64, window=window, hop=hop, mels=mels, fmin=fmin, fmax=3500.0, fmax_jitter=0
    )
    wave = noise(1, samples, seed=samples)
    expected = TorchLogMel(config)(torch.from_numpy(wave)[:, None]).numpy()
    np.testing.assert_allclose(LogMel(frontend(config, samples))(wave), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("system", FRONT_ENDS)
def test_the_front_end_agrees_with_digests_of_the_published_one(system):
    for sound, digests in golden("published")[system]["mel"].items():
        wave = waves(*SOUNDS[sound]).numpy()
        found = LogMel(frontend(FRONT_ENDS[system], wave.shape[1]))(wave)
        np.testing.assert_allclose(mel_digest(found), digests, rtol=0, atol=1e-4, err_msg=RENEW)


@needs_reference
@pytest.mark.parametrize("system", FRONT_ENDS)
def test_the_front_end_is_the_published_one(system):
    for sound, expected in published_outputs(system, "mel"):
        wave = waves(*SOUNDS[sound]).numpy()
        found = LogMel(frontend(FRONT_ENDS[system], wave.shape[1]))(wave)
        np.testing.assert_allclose(found[:, 0], expected, rtol=0, atol=1e-4)


def test_a_bundle_computes_what_torch_does(bundle, int8_training):
    opened, waves = Bundle(bundle), noise(40)
    assert opened.labels == BUNDLE_LABELS
    expected = int8_training.model(TorchLogMel(BUNDLE_FRONTEND)(torch.from_numpy(waves)[:, None])).numpy()
    found = opened.logits(waves)
    assert abs(found - expected).mean() < 0.1 * expected.std()
    odds = np.exp(found.astype(float))
    np.testing.assert_allclose(opened.probabilities(waves), odds / odds.sum(1, keepdims=True), rtol=1e-4)
    pcm = np.round(waves * 32768).astype(np.int16)
    np.testing.assert_array_equal(opened.logits(pcm), opened.logits(pcm / np.float32(32768)))
    assert verify(bundle)["files"].keys() | {"SHA256SUMS"} == {path.name for path in bundle.iterdir()}


@pytest.mark.parametrize(
    ("waves", "message"),
    [
        (np.zeros((0, 32_000), np.float32), r"waves of shape \(0, 32000\): expected \(N, 32000\)"),
        (np.zeros(32_000, np.float32), r"waves of shape \(32000,\)"),
        (np.zeros((1, 16_000), np.float32), "one row a clip, at 32000 Hz"),
        (np.full((2, 32_000), np.nan, np.float32), "64000 samples are not finite"),
        (np.full((1, 32_000), 1e33), r"samples up to 1e\+33: floating-point sound is expected within \+-1"),
        (np.rint(3000 * noise(1)), r"samples up to 1\d\d\d: .*; divide 16-bit values by 32768"),
        (np.zeros((1, 32_000), np.int32), "waves of type int32: expected int16, or floating point"),
    ],
)
def test_waves_that_are_none_are_refused(bundle, waves, message):
    with pytest.raises(UserError, match=message):
        Bundle(bundle).logits(waves)


def test_logits_that_are_not_finite_are_no_answer(bundle):
    model = onnx.load(bundle / "model.onnx")
    makers = {node.output[0]: node for node in model.graph.node}
    last = next(node for node in model.graph.node if node.op_type == "Gemm")
    scale = makers[last.input[1]].input[1]
    for tensor in model.graph.initializer:
        if tensor.name == scale:
            large = np.full(tuple(tensor.dims), 3e38, np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(large, tensor.name))
    onnx.save(model, bundle / "model.onnx")
    seal(bundle)
    with pytest.raises(UserError, match=r"model\.onnx: its logits of 2 of 2 waves are not finite"):
        Bundle(bundle).probabilities(noise(2))


def test_an_answer_of_another_shape_is_none(bundle):
    opened = Bundle(bundle)
    opened._session = SimpleNamespace(run=lambda *_: [np.zeros((1, 4), np.float32)])
    with pytest.raises(UserError, match=r"model\.onnx: gives \(1, 4\) for 2 waves and 4 labels"):
        opened.logits(noise(2))


def flip(folder, name):
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(bytes(data))


def rewritten(folder, name, change):
    value = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(change(value)))
    seal(folder)


def foreign(folder):
    """An ONNX file that another program made, sealed as if it were ours."""
    model = onnx.load(folder / "model.onnx")
    del model.metadata_props[:]
    onnx.save(model, folder / "model.onnx")
    seal(folder)


def renamed(folder):
    """An ONNX file that says that it is ours, with other inputs and without labels."""
    model = onnx.load(folder / "model.onnx")
    for node in model.graph.node:
        node.input[:] = ["features" if name == "mel" else name for name in node.input]
    model.graph.input[0].name = "features"
    onnx.helper.set_model_props(model, {"producer": "asc-ray"})
    onnx.save(model, folder / "model.onnx")
    seal(folder)


def relabelled(folder):
    model = onnx.load(folder / "model.onnx")
    for entry in model.metadata_props:
        if entry.key == "labels.json":
            entry.value = json.dumps([*BUNDLE_LABELS, "tram"])
    onnx.save(model, folder / "model.onnx")
    rewritten(folder, "labels.json", lambda labels: [*labels, "tram"])


DAMAGES = {
    "a changed byte": (lambda f: flip(f, "model.onnx"), "model.onnx: checksum differs"),
    "a changed byte of the card": (lambda f: flip(f, "card.md"), "card.md: checksum differs"),
    "a missing file": (lambda f: (f / "labels.json").unlink(), "labels.json: missing"),
    "no checksums": (lambda f: (f / "SHA256SUMS").unlink(), "no SHA256SUMS, so this is no bundle"),
    "no checksums in the file": (lambda f: (f / "SHA256SUMS").write_text("nothing"), "not a list of checksums"),
    "an empty list": (lambda f: (f / "SHA256SUMS").write_text(""), "model.onnx: not in SHA256SUMS"),
    "another label count": (relabelled, r"model.onnx gives logits \(4,\), but labels.json has 5 labels"),
    "another label": (
        lambda f: rewritten(f, "labels.json", lambda labels: [*labels[:3], "tram"]),
        "labels.json is not what model.onnx was exported with",
    ),
    "another front end": (
        lambda f: rewritten(f, "frontend.json", lambda own: own | {"mels": 128}),
        r"takes mel \(1, 64, 32\), but frontend.json makes mel \(1, 128, 32\)",
    ),
    "another front end of this shape": (
        lambda f: rewritten(f, "frontend.json", lambda own: own | {"fmin": 50.0}),
        "frontend.json is not what model.onnx was exported with",
    ),
    "a front end with a key too many": (
        lambda f: rewritten(f, "frontend.json", lambda own: own | {"gain": 1}),
        "frontend.json: keys fmax, fmin, gain",
    ),
    "no front end": (
        lambda f: rewritten(f, "frontend.json", lambda own: own | {"hop": 0}),
        "must be whole numbers from 1",
    ),
    "lengths in words": (
        lambda f: rewritten(f, "frontend.json", lambda own: own | {"hop": "a"}),
        "must be whole numbers",
    ),
    "frequencies in words": (
        lambda f: rewritten(f, "frontend.json", lambda own: own | {"fmax": "a"}),
        "frontend.json: ",
    ),
    "a range of nothing": (lambda f: rewritten(f, "frontend.json", lambda own: own | {"fmax": -5.0}), r"fmax -5\.0"),
    "a file in its place": (lambda f: (shutil.rmtree(f), f.write_text("")), "no SHA256SUMS, so this is no bundle"),
    "another's model under our name": (renamed, "takes features "),
    "another's model": (foreign, "not a model of `asc-ray export`"),
    "no model": (
        lambda f: ((f / "model.onnx").write_bytes(b"no model"), seal(f)),
        "model.onnx: holds no ONNX, which `asc-ray export` does not write",
    ),
    "labels that are no list": (lambda f: rewritten(f, "labels.json", lambda _: {}), "a list of scenes is expected"),
    "no JSON": (lambda f: ((f / "labels.json").write_text("{"), seal(f)), "labels.json: not valid JSON"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_bundle_is_refused(bundle, damage):
    Bundle(bundle)
    do, message = DAMAGES[damage]
    do(bundle)
    with pytest.raises(UserError, match=message):
        Bundle(bundle)


def test_verify_knows_every_file_of_a_bundle(bundle):
    (bundle / "notes.txt").write_text("not its own")
    with pytest.raises(UserError, match=r"not in SHA256SUMS: notes\.txt"):
        verify(bundle)
    seal(bundle)
    assert "notes.txt" in verify(bundle)["files"]


def test_a_device_needs_three_files_and_their_sums(bundle):
    (bundle / "card.md").unlink()
    with pytest.raises(UserError, match=r"card\.md: missing"):
        verify(bundle)
    seal(bundle)
    assert verify(bundle)["files"].keys() == {"model.onnx", "frontend.json", "labels.json"}


def test_checksums_are_those_of_sha256sum(bundle):
    for line in (bundle / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((bundle / name).read_bytes()).hexdigest() == digest
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=bundle, check=True, capture_output=True)


def test_the_runtime_imports_neither_torch_nor_ray_nor_mlflow(bundle):
    code = (
        "import sys; from asc_ray.runtime import Bundle; Bundle(sys.argv[1]);"
        "print(sorted({'torch', 'ray', 'mlflow', 'pydantic', 'pandas', 'soundfile'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code, bundle], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_a_fresh_environment_with_the_runtime_alone_predicts(bundle, tmp_path):
    """`pip install asc-ray`: no torch and no Ray; the model that the package brings answers, too."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", ROOT], check=True, timeout=600)
    listed = subprocess.run([python, "-m", "pip", "list", "--format=json"], capture_output=True, text=True, check=True)
    installed = {entry["name"] for entry in json.loads(listed.stdout)}
    assert {"asc-ray", "numpy", "onnxruntime"} <= installed
    assert not {"torch", "ray", "mlflow", "pandas"} & installed
    np.save(tmp_path / "waves.npy", noise(3))
    code = (
        "import sys, numpy as np; from asc_ray.runtime import Bundle;"
        "np.save(sys.argv[3], Bundle(sys.argv[1]).probabilities(np.load(sys.argv[2])))"
    )
    out = tmp_path / "out.npy"
    subprocess.run([python, "-c", code, bundle, tmp_path / "waves.npy", out], check=True, cwd=tmp_path)
    np.testing.assert_allclose(np.load(out), Bundle(bundle).probabilities(noise(3)), atol=1e-5)
    asc_ray = [tmp_path / "env" / "bin" / "asc-ray", "status"]
    command = subprocess.run(asc_ray, capture_output=True, text=True, check=False)
    assert command.returncode == 1
    assert command.stderr.strip().endswith("pip install 'asc-ray[train]'")
    assert "Traceback" not in command.stderr
    sf.write(tmp_path / "noise.wav", noise(1)[0], 32_000)
    for model in ([], [bundle]):
        words = [tmp_path / "env" / "bin" / "asc-ray", "predict", *model, "noise.wav", "--format", "jsonl"]
        done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=tmp_path)
        assert json.loads(done.stdout)["filename"] == "noise.wav"
        assert ("by the example model, which knows" in done.stderr) == (not model)


def test_the_bundle_is_small(bundle):
    model = json.loads((bundle / "frontend.json").read_text())
    assert model["samples"] == 32_000
    assert (bundle / "model.onnx").stat().st_size < 128_000
    assert Path(bundle / "SHA256SUMS").read_text().count("\n") == 4


@pytest.mark.parametrize(("clips", "allowed"), [(1, 1), (10, 1), (399, 1), (400, 2), (1000, 5)])
def test_forms_may_differ_in_one_clip_or_in_half_a_per_cent(clips, allowed):
    one = np.tile([1.0, 0.0], (clips, 1))
    other = one.copy()
    other[:allowed] = 0.0, 1.0
    assert differing(one, other, "one and other", "Mend it") == allowed
    if clips > allowed:
        other[allowed] = 0.0, 1.0
        said = rf"^one and other name {allowed + 1} of {clips} clips differently; .*\. Mend it$"
        with pytest.raises(UserError, match=said):
            differing(one, other, "one and other", "Mend it")
