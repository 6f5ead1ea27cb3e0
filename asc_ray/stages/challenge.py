"""`asc-ray export --target dcase2025`: a finished student as an inference package of DCASE 2025 task 1."""

import csv
import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from asc_ray.artifacts import input_folder, read_manifest
from asc_ray.audio.frontend import LogMel
from asc_ray.challenge.package import MOST_BYTES, MOST_MACS, cost, submission_of, write_package
from asc_ray.challenge.submission import Submission, logits, table
from asc_ray.data.batches import waveform
from asc_ray.data.clips import ClipStore, open_clips
from asc_ray.errors import UserError
from asc_ray.files import built
from asc_ray.places import is_uri, named, opened
from asc_ray.progress import Progress
from asc_ray.stages.export import student_config
from asc_ray.students.specialize import load_specialized, of_devices
from asc_ray.training.validation import predict
from asc_ray.training.weights import load_model

_BATCH = 64
_README = """# {label}

{network} as an inference package of DCASE 2025 task 1, written by asc-ray. {license}

`pip install -e .` installs it; asc-ray is not needed. Then run the challenge's `test_complexity.py` and
`evaluate_submission.py` with `--submission_name {label} --submission_index 1`, or
`python -m {label}.{label}_1 EVALUATION_SET`, which writes `output.csv` alone.

The parameters are {precision}. Known devices, each with a network of its own: {devices}. All others have the general
network. `predictions/{label}_1/` has the complexity by the challenge's rules, and the accuracy and the answers on the
test split of the corpus that it was trained on (`test_output.csv`); these are not what is submitted.
"""
_PRECISION = {
    False: "float16",
    True: "int8 in convolutions and linear layers, with one float16 step an output channel (a buffer, which the "
    "challenge's count leaves out), and float16 elsewhere",
}


def export_challenge(run: str, out: Path, license: str, progress: Progress) -> None:
    """Write the package of the finished student or specialized student in the folder or URI `run` to the new folder
    `out`, whose name is the submission's label.

    Raises UserError if `run` is neither, if `out` exists or its name is no label, and for a student over the
    challenge's limits.
    """
    label, out = out.name, out.absolute()
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", label):
        raise UserError(
            f"{out}: the folder's name is the submission's label, and found is {label!r}; allowed are letters, digits "
            "and _, as in Mueller_UNI_task1"
        )
    if out.exists():
        raise UserError(f"{out}: exists; choose another folder, or delete it")
    made = opened(run) if is_uri(run) else Path(run).resolve()
    manifest = read_manifest(made)
    if manifest["stage"] not in ("students", "specialized"):
        raise UserError(
            f"{named(made)}: of the stage {manifest['stage']}; --target dcase2025 takes a folder of `students`, or of "
            "`specialized` (asc-ray specialize), which `asc-ray status` shows"
        )
    storage, specialized = made.parents[1], manifest["stage"] == "specialized"
    student = input_folder(storage, "students", manifest["inputs"]["student"]) if specialized else made
    store = open_clips(input_folder(storage, "clips", read_manifest(student)["inputs"]["clips"]))
    config = student_config(student)
    general = load_model(student, config, len(store.labels))
    networks = load_specialized(made, student, config, len(store.labels)) if specialized else {}
    model, about = submission_of(general, networks, config, store.labels)
    complexity = cost(model, config)

    test = np.flatnonzero(store.split == "test")
    devices = [str(name) for name in store.device[test]]
    found = _answers(model, store, test, devices)
    ours = torch.empty_like(found)
    for name, rows in of_devices(networks, store.device[test]).items():
        network = general if name is None else networks[name]
        ours[rows] = predict(network, LogMel(config.frontend), store, test[rows], torch.device("cpu"))
    scene = torch.from_numpy(store.scene[test])
    right, before = ((answers.argmax(1) == scene).double().mean().item() for answers in (found, ours))
    differ = int((found.argmax(1) != ours.argmax(1)).sum())

    with built(out) as building:
        write_package(building, label, model, about, complexity)
        predictions = building / "predictions" / f"{label}_1"
        accuracy = {"Test Accuracy": round(100 * right, 2), "clips": len(test), "other scene than as float32": differ}
        (predictions / "test_accuracy.json").write_text(json.dumps(accuracy, indent=2) + "\n")
        with open(predictions / "test_output.csv", "w", newline="") as file:
            lines = table([str(name) for name in store.ids[test]], list(found), store.labels)
            csv.writer(file, delimiter="\t", lineterminator="\n").writerows(lines)
        text = _README.format(
            label=label,
            network=config.model.name,
            license=f"License: {license}." if license else "",
            precision=_PRECISION[about["int8"]],
            devices=", ".join(networks) or "none",
        )
        (building / "README.md").write_text(text)
        building.rename(out)
    _tell(progress, complexity, about["int8"], right, before, differ, len(test))


def _answers(model: Submission, store: ClipStore, test: np.ndarray, devices: list[str]) -> torch.Tensor:
    """Return the package's logits (N, K) for the store's clips `test`."""
    found = []
    for start in range(0, len(test), _BATCH):
        some = slice(start, start + _BATCH)
        mels = model.mels(waveform(torch.from_numpy(store.pcm(test[some]))))
        found.append(logits(mels, devices[some], model))
    return torch.cat(found)


def _tell(
    progress: Progress,
    complexity: Mapping[str, Mapping[str, int]],
    int8: bool,
    right: float,
    before: float,
    differ: int,
    clips: int,
) -> None:
    most = {kind: max(own[kind] for own in complexity.values()) for kind in ("MACs", "Params")}
    progress.note(
        f"{len(complexity) - 1} devices with a network of their own, {'int8' if int8 else 'float16'}: at most "
        f"{most['Params']:,} of {MOST_BYTES:,} bytes and {most['MACs']:,} of {MOST_MACS:,} MACs"
    )
    progress.note(
        f"{clips} test clips: {100 * right:.1f} % right, {100 * before:.1f} % as float32; {differ} get another scene"
    )
