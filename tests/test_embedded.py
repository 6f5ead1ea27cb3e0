"""`asc-ray export --target c`: the C form of a bundle, on this computer and on an emulated Cortex-M4, and refusals."""

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import BUNDLE_FRONTEND, BUNDLE_LABELS, command, environment
from hypothesis import given
from hypothesis import strategies as st

from asc_ray.artifacts import Artifact
from asc_ray.audio.config import FrontendConfig
from asc_ray.embedded.folder import noise, verify_c, write_c
from asc_ray.embedded.generate import generate
from asc_ray.embedded.graph import read_network
from asc_ray.embedded.layers import Grid, Layer, MaxPool, MeanLogits, Network, Sum, made, taken
from asc_ray.embedded.memory import plan
from asc_ray.embedded.program import COMPILER, EMULATOR, HOST_TOOLS, answers, emulated, missing
from asc_ray.embedded.source import frontend_header
from asc_ray.errors import UserError
from asc_ray.int8.bundle import write_bundle
from asc_ray.models.config import CPMobileConfig, DSFlexiNetConfig
from asc_ray.models.registry import build
from asc_ray.runtime import EXAMPLE, Bundle
from asc_ray.runtime.frontend import LogMel
from asc_ray.runtime.onnx_file import read_model

compiles = pytest.mark.skipif(bool(missing(*HOST_TOOLS)), reason=f"not here: {missing(*HOST_TOOLS)}")
_M4 = ("make", COMPILER, EMULATOR)
emulates = pytest.mark.skipif(bool(missing(*_M4)), reason=f"not here: {missing(*_M4)}")
NETWORKS = {
    "no normalization": {"name": "ds_flexinet", "size": "sm1", "normalization": {"kind": "none"}},
    "residual normalization": {"name": "ds_flexinet", "size": "sm2"},
    "instance normalization": {
        "name": "ds_flexinet", "size": "sm1", "normalization": {"kind": "in", "places": ["stem", "stages", "last"]},
    },
    "response normalization": {"name": "cp_mobile", "width": 8},
}  # fmt: skip


def made_bundle(folder: Path, model: dict, frontend: FrontendConfig = BUNDLE_FRONTEND) -> Path:
    """A bundle of an untrained network, of which every weight and range is drawn."""
    from asc_ray.int8 import conversion, preparation
    from asc_ray.int8.onnx_form import export_onnx

    config = CPMobileConfig(**model) if model["name"] == "cp_mobile" else DSFlexiNetConfig(**model)
    torch.manual_seed(0)
    network = build(config, len(BUNDLE_LABELS))
    for name, parameter in network.named_parameters():
        if name.endswith((".gamma", ".beta")):  # of a response normalization, which start at 0
            torch.nn.init.normal_(parameter)
    shape = (1, frontend.mels, frontend.frames(32_000))
    fake = preparation.prepare(network, torch.zeros(2, *shape))
    preparation.set_training(fake, True)
    for _ in range(3):
        fake(torch.randn(8, *shape))
    artifact = Artifact(folder / "storage", "int8", "student", "0123456789abcdef", {}, {})
    export_onnx(conversion.convert(fake), artifact.open_partial() / "model.onnx")
    artifact.finish({})
    (folder / "bundle").mkdir()
    write_bundle(folder / "bundle", artifact.path, BUNDLE_LABELS, frontend)
    return folder / "bundle"


@pytest.fixture(scope="module")
def bundles(tmp_path_factory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def bundle(name: str) -> Path:
        if name not in made:
            made[name] = made_bundle(tmp_path_factory.mktemp("network"), NETWORKS[name])
        return made[name]

    return bundle


def tones(bundle: Bundle, clips: int) -> np.ndarray:
    """Clips of tones in noise, from soft to loud, (clips, samples) int16."""
    rng = np.random.default_rng(1)
    time = np.arange(bundle.frontend.samples) / bundle.frontend.sample_rate
    pitch, loud = rng.uniform(50, 12_000, (clips, 3, 1)), np.geomspace(3, 8_000, clips)[:, None]
    sound = np.sin(2 * np.pi * pitch * time).sum(axis=1) + 0.5 * rng.standard_normal((clips, len(time)))
    return np.round(loud * sound).clip(-32768, 32767).astype(np.int16)


@compiles
@pytest.mark.parametrize("name", NETWORKS)
def test_wave_to_logits_as_onnxruntime(bundles, name):
    """Scenes are onnxruntime's; logits differ by the few steps that rounded log-mels and normalizations may differ."""
    folder = bundles(name)
    bundle = Bundle(folder)
    pcm = tones(bundle, 60)
    expected = bundle.logits(pcm)
    own = answers(generate(folder).files, iter([pcm]), len(BUNDLE_LABELS))
    assert (own.argmax(1) != expected.argmax(1)).sum() <= 1
    assert np.median(abs(own - expected)) < 1e-5 * expected.std()


@compiles
def test_integer_layers_give_the_bits_of_onnxruntime(bundles, tmp_path):
    """Without a normalization all is integers between the log-mels and the logits."""
    folder = bundles("no normalization")
    bundle, source = Bundle(folder), generate(folder)
    mels = np.random.default_rng(0).integers(0, 256, (40, bundle.frontend.mels, bundle.frontend.frames), np.uint8)
    for name, text in source.files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "network.c").write_text(NETWORK_ALONE)
    parts = ("network.c", "asc_model.c", "asc_kernels.c", "asc_frontend.c", "asc_labels.c")
    flags = ("-std=c99", "-O2", "-ffp-contract=off", "-fno-math-errno")
    subprocess.run(["cc", *flags, "-o", "network", *parts, "-lm"], cwd=tmp_path, check=True)
    done = subprocess.run(["./network"], cwd=tmp_path, input=mels.tobytes(), capture_output=True, check=True)
    own = np.frombuffer(done.stdout, np.float32).reshape(len(mels), -1)
    grid = read_network(read_model((folder / "model.onnx").read_bytes())).input
    floats = (mels.astype(np.float32) - grid.zero) * grid.step
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(own, session.run(["logits"], {"mel": floats[:, None]})[0])


NETWORK_ALONE = """
#include <stdio.h>
#include "asc_frontend.h"
int main(void)
{
    float logits[ASC_LABELS];
    while (fread(asc_mels(), 1, ASC_MELS * ASC_FRAMES, stdin) == ASC_MELS * ASC_FRAMES) {
        asc_name(logits);
        fwrite(logits, sizeof logits[0], ASC_LABELS, stdout);
    }
    return 0;
}
"""
FRONT_END_ALONE = """
#include <stdio.h>
#include "asc_frontend.h"
int main(void)
{
    static int16_t samples[ASC_SAMPLES];
    while (fread(samples, sizeof samples[0], ASC_SAMPLES, stdin) == ASC_SAMPLES) {
        asc_listen(samples);
        fwrite(asc_mels(), 1, ASC_MELS * ASC_FRAMES, stdout);
    }
    return 0;
}
"""


@compiles
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"n_fft": 64, "window": 50, "mels": 16},
        {"n_fft": 1024, "window": 800, "hop": 250},
        {"n_fft": 2048, "window": 1281, "fmin": 40.0},
        {"n_fft": 512, "window": 512, "hop": 512},  # an odd number of frames
        {"n_fft": 32768, "window": 28_000, "hop": 1600},
    ],
)
def test_rounded_log_mels_are_numpys(bundles, tmp_path, given):
    """All but some in a hundred thousand, which lie between two steps, and those by one step. Each number of points
    that the transform takes first, and each number of passes."""
    folder = bundles("no normalization")
    network = read_network(read_model((folder / "model.onnx").read_bytes()))
    bundle, grid = Bundle(folder), network.input
    frontend = replace(bundle.frontend, **given)
    source = generate(folder)
    files = source.files | {"asc_frontend.h": frontend_header(frontend, network), "main.c": FRONT_END_ALONE}
    files["asc_model.c"] = (
        '#include "asc_frontend.h"\nstatic uint8_t mels[ASC_MELS * ASC_FRAMES];\nstatic asc_complex work[ASC_N_FFT];\n'
        "uint8_t *asc_mels(void) { return mels; }\n"
        "void asc_listen(const int16_t samples[ASC_SAMPLES]) { asc_log_mel(samples, mels, work); }\n"
    )
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    subprocess.run(["make", "-s"], cwd=tmp_path, check=True)
    pcm = tones(bundle, 20)
    pcm[0] = 0
    done = subprocess.run(["./asc"], cwd=tmp_path, input=pcm.tobytes(), capture_output=True, check=True)
    own = np.frombuffer(done.stdout, np.uint8).astype(int).reshape(len(pcm), frontend.mels, frontend.frames)
    mels = LogMel(frontend)(pcm / np.float32(32768))[:, 0]
    differ = abs(own - np.clip(np.rint(mels / grid.step) + grid.zero, 0, 255).astype(int))
    assert differ.max() <= 1
    assert differ.mean() < 1e-4


@compiles
def test_folder_beside_the_model_and_verify(bundles, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(bundles("residual normalization"), folder)
    pcm, logits = noise(Bundle(folder))
    form = write_c(folder, folder / "c", [pcm[:7], pcm[7:]], logits)
    assert (form.clips, form.differ) == (len(pcm), 0)
    assert {"asc_model.c", "asc_model.h", "asc_frontend.c", "asc_labels.c", "main.c", "Makefile", "README.md"} <= {
        file.name for file in (folder / "c").iterdir()
    }
    assert f"| arena, bytes of RAM | {form.arena:,} |" in (folder / "c" / "README.md").read_text()
    assert not list(folder.glob(".*")), "nothing half-done stays"
    done = subprocess.run(command("verify", folder), capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    assert "0 of 20 clips of noise get another scene" in done.stdout


@compiles
def test_the_commands_of_the_page(tmp_path):
    """A bundle alone, too, gives its C form: that of the package's own example."""
    words = command("export", EXAMPLE, tmp_path / "c", "--target", "c")
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    assert "0 get another scene" in done.stdout
    subprocess.run(["make", "-s"], cwd=tmp_path / "c", check=True)
    bundle = Bundle(EXAMPLE)
    pcm = tones(bundle, 3)
    (tmp_path / "samples.raw").write_bytes(pcm.tobytes())
    lines = subprocess.run(
        [tmp_path / "c" / "asc", tmp_path / "samples.raw"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    named = [bundle.labels[best] for best in bundle.logits(pcm).argmax(1)]
    assert [line.split(maxsplit=1 + len(bundle.labels))[-1] for line in lines] == named
    again = subprocess.run(words, capture_output=True, text=True, env=environment(), check=False)
    assert again.returncode == 1
    assert "exists; choose another folder" in again.stderr


@compiles
def test_other_flags_and_paths_with_spaces_change_no_bit(bundles, tmp_path):
    """`make CFLAGS=...` keeps what the code needs; flags that it cannot have are refused by the compiler."""
    folder = tmp_path / 'a folder\'s "name"'
    folder.mkdir()
    pcm = tones(Bundle(bundles("residual normalization")), 3)
    for name, text in generate(bundles("residual normalization")).files.items():
        (folder / name).write_text(text)
    (folder / "samples.raw").write_bytes(pcm.tobytes())
    said = set()
    for flags in ("-O0", "-O3 -march=native"):
        subprocess.run(["make", "-s", "-B", f"CFLAGS={flags}"], cwd=folder, check=True)
        said.add(subprocess.run(["./asc"], cwd=folder, capture_output=True, check=True).stdout)
    assert len(said) == 1
    done = subprocess.run(
        ["make", "-s", "-B", "CFLAGS=-O2 -ffast-math"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "compile without -ffast-math" in done.stderr


@emulates
@pytest.mark.parametrize("bundle", ["example", "response normalization"])
def test_on_a_cortex_m4(bundles, bundle):
    """A hundred clips; logits are those of this computer to the bit, because both round the same way."""
    folder = EXAMPLE if bundle == "example" else bundles(bundle)
    own, source = Bundle(folder), generate(folder)
    pcm = tones(own, 100)
    logits, figures = emulated(source.files, pcm, len(own.labels))
    assert (logits.argmax(1) != own.logits(pcm).argmax(1)).mean() <= 0.005
    assert figures.ram == source.arena
    assert figures.stack < 1024
    assert figures.flash > source.weights
    if not missing(*HOST_TOOLS):
        np.testing.assert_array_equal(logits, answers(source.files, iter([pcm]), len(own.labels)))


@emulates
@pytest.mark.parametrize(("size", "ram", "flash"), [("sm1", 128_000, 64_000), ("sm2", 192_000, 96_000)])
def test_sizes_of_the_goal(tmp_path, size, ram, flash):
    """Front end included, and in RAM the clip's samples and the stack, too."""
    folder = made_bundle(tmp_path, {"name": "ds_flexinet", "size": size}, FrontendConfig())
    bundle = Bundle(folder)
    _, figures = emulated(generate(folder).files, tones(bundle, 1), len(bundle.labels))
    assert figures.ram + figures.stack + 2 * bundle.frontend.samples <= ram
    assert figures.flash <= flash
    assert 3 * figures.front_end <= figures.front_end + figures.network


def test_a_changed_file_is_named(bundles, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(bundles("no normalization"), folder)
    own = folder / "c"
    own.mkdir()
    for name, text in generate(folder).files.items():
        (own / name).write_text(text)
    (own / "asc_model.c").write_text("int main(void) { return 0; }")
    with pytest.raises(UserError, match=r"asc_model\.c: not what this version of asc-ray makes of model\.onnx"):
        verify_c(folder)
    (own / "asc_model.c").unlink()
    with pytest.raises(UserError, match=r"asc_model\.c: No such file"):
        verify_c(folder)


def test_without_a_compiler_nothing_is_written(bundles, tmp_path, monkeypatch):
    folder = tmp_path / "bundle"
    shutil.copytree(bundles("no normalization"), folder)
    pcm, logits = noise(Bundle(folder))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="this machine has no make and no cc; install what is missing"):
        write_c(folder, folder / "c", [pcm], logits)
    assert not (folder / "c").exists()
    (folder / "c").mkdir()
    for name, text in generate(folder).files.items():
        (folder / "c" / name).write_text(text)
    assert verify_c(folder) is None, "its text is compared nevertheless"


def test_a_damaged_bundle_is_refused(bundles, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(bundles("no normalization"), folder)
    with (folder / "model.onnx").open("ab") as file:
        file.write(b"x")
    done = subprocess.run(
        command("export", folder, tmp_path / "c", "--target", "c"),
        capture_output=True, text=True, env=environment(), check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "model.onnx: checksum differs" in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["bundle"]


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (
            {"name": "ds_flexinet", "size": "sm1", "normalization": {"kind": "rn_frequency"}},
            "has Add of .*ReduceMean.* in float",
        ),
        (
            {"name": "ds_flexinet", "size": "sm1", "normalization": {"kind": "rn", "places": ["input"]}},
            "has Add of InstanceNormalization, ",
        ),
    ],
)
def test_an_unknown_operator_is_named_before_anything_is_written(tmp_path, model, named):
    folder = made_bundle(tmp_path, model)
    pcm, logits = noise(Bundle(folder))
    with pytest.raises(UserError, match=named) as refused:
        write_c(folder, tmp_path / "c", [pcm], logits)
    assert "which the C form does not compute" in str(refused.value)
    assert not (tmp_path / "c").exists()


def test_a_front_end_of_another_length_is_refused(tmp_path):
    frontend = BUNDLE_FRONTEND.model_copy(update={"n_fft": 3072})
    folder = made_bundle(tmp_path, NETWORKS["no normalization"], frontend)
    with pytest.raises(UserError, match="n_fft is 3072; the C form's transform takes powers of two"):
        generate(folder)


@given(st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=8))
def test_no_two_values_that_live_together_overlap(blocks):
    """Blocks with and without a shortcut; only an output may lie over an input."""

    def grid(name: str, channels: int) -> Grid:
        return Grid(name, channels, 8, 8, np.float32(1), 0)

    x = first = grid("input", 2)
    layers: list[Layer] = []
    for n, (channels, shortcut) in enumerate(blocks):
        layers.append(MaxPool(x, y := grid(f"wide {n}", 2 * channels), (1, 1)))
        layers.append(MaxPool(y, z := grid(f"narrow {n}", channels), (1, 1)))
        if shortcut:
            layers.append(MaxPool(x, beside := grid(f"beside {n}", channels), (1, 1)))
            layers.append(Sum(z, beside, z := grid(f"sum {n}", channels), 0))
        x = z
    network = Network(first, [*layers, MeanLogits(x)], 1)
    placed = plan(network, work=100)
    last = {own.name: n for n, layer in enumerate(network.layers, start=1) for own in taken(layer)}
    lives = [("input", first.bytes, 0, last["input"])]
    lives += [(y.name, y.bytes, n, last[y.name]) for n, layer in enumerate(layers, start=1) if (y := made(layer))]
    for i, (name, size, start, stop) in enumerate(lives):
        assert placed.at[name] + size <= placed.bytes
        for other, own, begin, end in lives[:i]:
            if start < end and begin < stop:  # longer together than an input and an output of one layer
                low, high = placed.at[name], placed.at[other]
                assert low + size <= high or high + own <= low, (name, other)
