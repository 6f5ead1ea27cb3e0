"""The inference package of a DCASE 2025 task 1 submission, in the form of the challenge's template.

The template is github.com/CPJKU/dcase2025_task1_inference: a Python package with a module of four functions, which the
challenge's scripts call. This package brings the modules of asc-ray that it needs, so asc-ray need not be installed.
"""

import ast
import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import soundfile as sf
import torch
from torch import nn

from asc_ray.challenge.submission import Submission, compact
from asc_ray.errors import UserError
from asc_ray.files import write_atomically
from asc_ray.models.complexity import complexity
from asc_ray.students.config import StudentConfig
from asc_ray.students.cost import input_shape

MOST_BYTES, MOST_MACS = 128_000, 30_000_000  # of the parameters of one device's network, and for one clip
SUBMISSION = "asc_ray.challenge.submission"
_PACKAGE = Path(__file__).resolve().parents[1]
REQUIREMENTS = ("numpy", "pydantic>=2.11", "soundfile", "soxr", "torch>=2.11")

MODULE = '''"""DCASE 2025 task 1: the four functions that the challenge's scripts call.

Written by `asc-ray export --target dcase2025`. `python -m {label}.{label}_1 EVALUATION_SET` writes output.csv.
"""

import csv
import sys
from pathlib import Path

from {label}.{submission} import Submission, table
from {label}.{submission} import load_inputs as _load_inputs
from {label}.{submission} import load_model as _load_model
from {label}.{submission} import predict as _predict

CHECKPOINT = Path(__file__).parent / "ckpts" / "{label}_1.ckpt"


def load_model(model_file_path=None) -> Submission:
    return _load_model(model_file_path or CHECKPOINT)


def load_inputs(file_paths, device_ids, model):
    return _load_inputs(file_paths, device_ids, model)


def get_model_for_device(model, device_id):
    return model.for_device(device_id)


def predict(file_paths, device_ids, model_file_path=None):
    model = load_model(model_file_path)
    return _predict(file_paths, device_ids, model), model.labels


def main(folder: str) -> None:
    """Read evaluation_setup/fold1_test.csv (filename, device_id) of the evaluation set, and write output.csv."""
    with open(Path(folder) / "evaluation_setup" / "fold1_test.csv", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\\t"))
    names, devices = [row["filename"] for row in rows], [row["device_id"] for row in rows]
    logits, labels = predict([Path(folder) / name for name in names], devices)
    with open("output.csv", "w", newline="") as file:
        csv.writer(file, delimiter="\\t", lineterminator="\\n").writerows(table(names, logits, labels))


if __name__ == "__main__":
    main(sys.argv[1])
'''

PROJECT = """[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "{label}"
version = "1"
requires-python = ">=3.11"
dependencies = {requirements}

[tool.setuptools.packages.find]
include = ["{label}*"]

[tool.setuptools.package-data]
"*" = ["*.wav", "*.ckpt"]
"""


def submission_of(
    general: nn.Module, specialized: Mapping[str, nn.Module], config: StudentConfig, labels: Sequence[str]
) -> tuple[Submission, dict[str, Any]]:
    """Return the networks as they are submitted, and what the checkpoint says about them.

    They are in float16 where that fits the challenge's limit, otherwise with int8 weights. Raises UserError where
    neither does.
    """
    about: dict[str, Any] = {
        "labels": list(labels),
        "devices": list(specialized),
        "model": config.model.model_dump(mode="json"),
        "frontend": config.frontend.model_dump(mode="json"),
    }
    found = {}
    for int8 in (False, True):
        model = Submission(about | {"int8": int8})
        model.networks = nn.ModuleList(compact(copy.deepcopy(own), int8) for own in (general, *specialized.values()))
        found = cost(model, config)["general"]
        if found["MACs"] <= MOST_MACS and found["Params"] <= MOST_BYTES:
            return model.eval(), about | {"int8": int8}
    raise UserError(
        f"{config.model.name} is too large for DCASE 2025 task 1: {found['Params']:,} bytes with int8 weights and "
        f"{found['MACs']:,} MACs; allowed are {MOST_BYTES:,} and {MOST_MACS:,}. Choose a smaller student"
    )


def cost(model: Submission, config: StudentConfig) -> dict[str, dict[str, int]]:
    """Return `MACs` and `Params` (bytes) of the general network and of each device's, counted by the challenge's rules.

    MACs are torchinfo's for one clip; bytes are those of the parameters, each by its type.
    """
    found = {}
    for name, network in zip(("general", *model.devices), model.networks, strict=True):
        macs = complexity(copy.deepcopy(network).float(), input_shape(config)).macs
        size = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
        found[name] = {"MACs": macs, "Params": size}
    return found


def write_package(
    folder: Path, label: str, model: Submission, about: Mapping[str, Any], complexity_: Mapping[str, Any]
) -> None:
    """Write the package `label` and what surrounds it to the empty `folder`."""
    package = folder / label
    for name in ("ckpts", "resources"):
        (package / name).mkdir(parents=True)
        (package / name / "__init__.py").touch()
    (package / "__init__.py").touch()
    for module in closure(SUBMISSION):
        file = package / Path(*module.split(".")).with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        for parent in file.relative_to(package).parents:
            (package / parent / "__init__.py").touch()
        file.write_text(_source(module).read_text().replace("from asc_ray.", f"from {label}.asc_ray."))
    (package / f"{label}_1.py").write_text(MODULE.format(label=label, submission=SUBMISSION))
    torch.save({"about": dict(about), "state_dict": model.state_dict()}, package / "ckpts" / f"{label}_1.ckpt")
    rate = model.frontend.config.sample_rate
    sf.write(package / "resources" / "dummy.wav", [0.0] * rate, rate)
    (folder / "requirements.txt").write_text("".join(f"{line}\n" for line in REQUIREMENTS))
    (folder / "pyproject.toml").write_text(PROJECT.format(label=label, requirements=json.dumps(REQUIREMENTS)))
    most = {f"max_{kind}": max(own[kind] for own in complexity_.values()) for kind in ("MACs", "Params")}
    predictions = folder / "predictions" / f"{label}_1"
    predictions.mkdir(parents=True)
    write_atomically(predictions / "complexity.json", json.dumps({"per_device": complexity_, **most}, indent=2) + "\n")


def closure(module: str) -> list[str]:
    """Return the names of a module of asc-ray and of all modules of asc-ray that it imports, directly or not."""
    found, waiting = dict.fromkeys([module]), [module]
    while waiting:
        for name in _imported(waiting.pop()):
            if name not in found:
                found[name] = None
                waiting.append(name)
    return sorted(found)


def _imported(module: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(_source(module).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("asc_ray."):
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from [name for name in inner if _source(name).is_file()] or [node.module]


def _source(module: str) -> Path:
    return _PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")
