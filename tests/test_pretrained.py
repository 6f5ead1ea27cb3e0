"""Checkpoints of other programs, in the forms in which they are published."""

import os

import pytest
import torch
from safetensors.torch import save_file

from asc_ray.ensemble.config import published
from asc_ray.errors import ConfigError, UserError
from asc_ray.models.config import CPResNetConfig, PasstConfig
from asc_ray.models.pretrained import load_published, metadata, read_tensors, start_from
from asc_ray.models.registry import build

LABELS = [f"scene {number}" for number in range(10)]
ABOUT = {"labels": LABELS, "frontend": {"hop": 750, "fmax": 15500.0}}
SMALL = PasstConfig(width=24, depth=2, heads=3, frames=220)


def resnet(seed: int = 0) -> torch.nn.Module:
    return build(CPResNetConfig(width=8), 10, seed)


def lightning(state: dict, prefix: str) -> dict:
    """What Lightning stores: the module's tensors, the front end's, and a lot that is no tensor."""
    return {
        "epoch": 24,
        "pytorch-lightning_version": "2.0.0",
        "state_dict": {f"{prefix}{name}": value for name, value in state.items()} | {"mel.window": torch.ones(800)},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-5}]}],
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}},
        "hyper_parameters": {"batch_size": 80},
    }


FORMS = {
    "bare.pt": torch.save,
    "lightning_model.ckpt": lambda state, file: torch.save(lightning(state, "model."), file),
    "lightning_net.pth": lambda state, file: torch.save(lightning(state, "net."), file),
    "distributed.ckpt": lambda state, file: torch.save(lightning(state, "model.module."), file),
    "prefixed.pt": lambda state, file: torch.save({f"net.{name}": value for name, value in state.items()}, file),
    "plain.safetensors": save_file,
    "old.pt": lambda state, file: torch.save(state, file, _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_loads_to_the_bit(tmp_path, form):
    weights = resnet(1).state_dict()
    FORMS[form](weights, tmp_path / form)
    model = resnet(2)
    assert load_published(model, tmp_path / form, ABOUT) is False
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_what_does_not_fit_is_named(tmp_path):
    state = resnet().state_dict()
    del state["in_c.0.weight"]
    state["extra.weight"] = torch.zeros(3)
    state["feed_forward.0.weight"] = torch.zeros(4, 4)
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(UserError) as caught:
        load_published(resnet(), tmp_path / "x.pt", {})
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'x.pt'}: does not fit CPResNet as configured: ")
    assert "1 missing: in_c.0.weight" in message
    assert "1 left over: extra.weight" in message
    assert "1 of another shape: feed_forward.0.weight (4, 4) instead of" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"labels": LABELS[::-1]},
            r"was trained with labels scene 9, scene 8, .*, and here scene 0, scene 1, .* in this",
        ),
        ({"labels": ["a", *LABELS[1:]]}, "was trained with labels a, scene 1"),
        ({"frontend": {"hop": 500, "fmax": 15500.0}}, r"was trained with frontend \{\"hop\": 500"),
    ],
)
def test_our_own_files_say_for_which_scenes_and_which_front_end_they_are(tmp_path, change, message):
    weights = resnet(1).state_dict()
    save_file(weights, tmp_path / "same.safetensors", metadata(ABOUT))
    assert load_published(resnet(2), tmp_path / "same.safetensors", ABOUT) is True
    save_file(weights, tmp_path / "other.safetensors", metadata(ABOUT | change))
    with pytest.raises(UserError, match=rf"other\.safetensors: {message}"):
        load_published(resnet(2), tmp_path / "other.safetensors", ABOUT)


def test_equal_weights_make_equal_files(tmp_path):
    """safetensors writes entries of its metadata in another order each time."""
    files = [tmp_path / f"{number}.safetensors" for number in range(12)]
    for file in files:
        save_file({"a": torch.zeros(1)}, file, metadata(ABOUT))
    assert len({file.read_bytes() for file in files}) == 1


def spoiled(name: str, change) -> dict:
    state = resnet(1).state_dict()
    state[name] = change(state[name].clone())
    return state


def with_value(value: float):
    def change(tensor):
        tensor.view(-1)[0] = value
        return tensor

    return change


NO_WEIGHTS = {
    "NaN": (spoiled("in_c.0.weight", with_value(float("nan"))), r"not finite: in_c\.0\.weight"),
    "infinite": (spoiled("in_c.0.weight", with_value(float("-inf"))), r"not finite: in_c\.0\.weight"),
    "too large for float32": (spoiled("in_c.0.weight", lambda w: w.double() + 1e300), r"not finite: in_c\.0\.weight"),
    "negative variance": (spoiled("in_c.1.running_var", with_value(-1.0)), r"not above 0: in_c\.1\.running_var"),
    "no variance": (spoiled("in_c.1.running_var", with_value(0.0)), r"not above 0: in_c\.1\.running_var"),
    "integers": (spoiled("in_c.0.weight", lambda w: w.int()), r"1 of another type: in_c\.0\.weight int32"),
    "bools": (spoiled("in_c.0.weight", lambda w: w > 0), r"1 of another type: in_c\.0\.weight bool"),
    "complex": (
        spoiled("in_c.0.weight", lambda w: w.to(torch.complex64)),
        r"that are no weights: in_c\.0\.weight \(complex64\)",
    ),
    "sparse": (
        spoiled("in_c.0.weight", lambda w: w.to_sparse()),
        r"that are no weights: in_c\.0\.weight \(sparse_coo\)",
    ),
}


@pytest.mark.parametrize("case", NO_WEIGHTS)
def test_what_no_network_can_compute_with_is_refused(tmp_path, case):
    state, message = NO_WEIGHTS[case]
    torch.save(state, tmp_path / "x.pt")
    model = resnet(2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=rf"x\.pt: .*{message}"):
        load_published(model, tmp_path / "x.pt", ABOUT)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_weights_too(tmp_path, dtype):
    state = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in resnet(1).state_dict().items()
    }
    torch.save(state, tmp_path / "x.pt")
    model = resnet(2)
    load_published(model, tmp_path / "x.pt", ABOUT)
    assert all(torch.equal(value, state[name].to(value.dtype)) for name, value in model.state_dict().items())


class Attack:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("content", [Attack(), {"state_dict": resnet().state_dict(), "x": Attack()}, resnet()])
def test_a_pickle_of_more_than_tensors_is_refused_and_not_run(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=r"x\.ckpt: refused: its pickle holds more than plain tensors \([\w.]+\)"):
        read_tensors(tmp_path / "x.ckpt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [("x.pt", b""), ("x.pt", b"nonsense"), ("x.safetensors", b"nonsense"), ("x.safetensors", b""), ("x.pt", None)],
)
def test_broken_files_are_named(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}: cannot be read as a checkpoint \("):
        read_tensors(tmp_path / name)


def test_a_file_without_tensors_is_named(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="holds no tensors"):
        read_tensors(tmp_path / "x.pt")


def test_audioset_weights_come_with_a_fresh_head(tmp_path):
    audioset, model = build(SMALL, 527, seed=1), build(SMALL, 10, seed=2)
    torch.save(audioset.state_dict(), tmp_path / "passt_s.pt")
    fresh = {name: value.clone() for name, value in model.state_dict().items()}
    assert start_from(model, tmp_path / "passt_s.pt", LABELS, [], {}) == ["a fresh head"]
    for name, value in model.state_dict().items():
        expected = fresh if name.startswith("head") else audioset.state_dict()
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("labels", [LABELS, LABELS[::-1]])
def test_a_head_for_other_scenes_stays_the_fresh_one(tmp_path, labels):
    trained, model = build(SMALL, 10, seed=1), build(SMALL, 10, seed=2)
    fresh = {name: value.clone() for name, value in model.state_dict().items()}
    save_file(trained.state_dict(), tmp_path / "x.safetensors", metadata({"labels": labels}))
    changes = start_from(model, tmp_path / "x.safetensors", LABELS, [], {})
    expected = trained.state_dict() if labels == LABELS else fresh
    assert changes == ([] if labels == LABELS else ["a fresh head"])
    assert all(torch.equal(v, expected[n]) for n, v in model.state_dict().items() if n.startswith("head"))


def test_positional_grids_of_another_geometry_are_interpolated(tmp_path):
    """A grid that is linear along its axis stays linear between the outer centres."""
    audioset = build(SMALL, 527, seed=1)
    columns = audioset.time_new_pos_embed.shape[3]
    with torch.no_grad():
        audioset.time_new_pos_embed.copy_((torch.arange(columns) + 0.5) / columns)
    torch.save(audioset.state_dict(), tmp_path / "passt_s.pt")
    model = build(SMALL.model_copy(update={"frames": 420}), 10, seed=2)
    changes = start_from(model, tmp_path / "passt_s.pt", LABELS, [], {})
    wanted = model.time_new_pos_embed.shape[3]
    assert changes == ["a fresh head", f"time_new_pos_embed from (1, {columns}) to (1, {wanted})"]
    line = ((torch.arange(wanted) + 0.5) / wanted)[2:-2]
    torch.testing.assert_close(model.time_new_pos_embed[0, 0, 0, 2:-2], line, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.freq_new_pos_embed, audioset.freq_new_pos_embed)


def test_files_are_found_by_the_published_names(tmp_path):
    names = ["passt_fms_1", "cpr_128k_fms_1"]
    with pytest.raises(ConfigError, match=r"holds no file of a configured system; expected passt_fms_1\.ckpt"):
        published(tmp_path, names)
    for name in ("passt_fms_1.ckpt", "other.ckpt", "cpr_128k_fms_1.txt"):
        (tmp_path / name).write_bytes(b"")
    assert published(tmp_path, names) == {"passt_fms_1": tmp_path / "passt_fms_1.ckpt"}
    (tmp_path / "passt_fms_1.pt").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"passt_fms_1\.ckpt and passt_fms_1\.pt are of one system; keep one"):
        published(tmp_path, names)
    with pytest.raises(ConfigError, match="is no folder"):
        published(tmp_path / "absent", names)
