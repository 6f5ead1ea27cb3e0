"""Tiny recipes of every kind: what the rehearsal of a GPU and the golden loss curves train."""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import ROOT

from asc_ray.audio.frontend import LogMel
from asc_ray.config.composition import load_config
from asc_ray.data.config import DataConfig
from asc_ray.models.registry import build
from asc_ray.plan import Plan
from asc_ray.training.config import DistillationConfig, Recipe
from asc_ray.training.loop import fit
from asc_ray.training.validation import validate

sys.path.insert(0, str(ROOT / "bench"))

CLIPS = 22  # three of them to validate on
SHORT = {"n_fft": 1024, "window": 800, "hop": 1000, "mels": 64}
AUGMENT: dict[str, Any] = {
    "roll": 4000,
    "dir": {"p": 0.6, "apply_to": "all"},
    "freq_mixstyle": {"p": 0.5},
    "freq_mask": 8,
    "time_mask": 4,
}
PASST = {"name": "passt", "width": 24, "depth": 2, "heads": 2, "mels": 64, "stride": 10, "patchout_freq": 2}
NETWORKS: dict[str, dict[str, Any]] = {
    "sm1": {"model": {"name": "ds_flexinet", "size": "sm1"}},
    "frequency": {"model": {"name": "ds_flexinet", "size": "sm1", "normalization": {"kind": "rn_frequency"}}},
    "cp_mobile": {"model": {"name": "cp_mobile", "width": 8}},
    "bsconv": {"model": {"name": "bsconv_cnn", "stem": 8, "channels": [8, 16]}},
    "baseline": {
        "model": {"name": "dcase22_baseline"},
        "frontend": {"n_fft": 2048, "window": 1280, "hop": 639, "mels": 40},
    },
    "tf_sepnet": {"model": {"name": "tf_sepnet", "width": 8}},
    "cp_resnet": {"model": {"name": "cp_resnet", "width": 4}},
    "passt": {"model": PASST | {"patchout_time": 1, "patchout": 1}},
}
SCHEDULED, LEARNED = {"start": 0.5, "end": 0.1}, {"start": 0.5}
KINDS: dict[str, dict[str, Any]] = {
    "bf16": {"recipe": {"precision": "bf16"}, "label_weight": LEARNED},
    "bf16 of a transformer": {"recipe": NETWORKS["passt"] | {"precision": "bf16"}},
    "labels alone": {"recipe": {}},
    **{name: {"recipe": network, "label_weight": 0.3} for name, network in NETWORKS.items()},
    "mixup": {"recipe": {"augment": AUGMENT | {"mixup_alpha": 0.3}}, "label_weight": 0.3},
    "in parts": {"recipe": NETWORKS["passt"] | {"optimizer": {"accumulate": 2}}},
    "scheduled lambda": {"recipe": {}, "label_weight": SCHEDULED},
    "learned lambda": {"recipe": {}, "label_weight": LEARNED},
    "adam, balanced, averaged": {"recipe": {"balance": 0.5, "optimizer": {"kind": "adam", "average_epochs": 2}}},
    "resident": {"recipe": {}, "mode": "resident"},
    "stream": {"recipe": {}, "mode": "stream"},
    "int8": {"recipe": {}, "int8": True},
    "int8, taught": {"recipe": NETWORKS["cp_mobile"], "int8": True, "label_weight": LEARNED},
}


def asked(kind: str) -> tuple[dict[str, Any], Recipe]:
    given = {"label_weight": None, "mode": "mapped", "int8": False} | KINDS[kind]
    raw = {"model": NETWORKS["sm1"]["model"], "frontend": SHORT, "augment": AUGMENT, "precision": "fp32"}
    raw |= given["recipe"]
    raw["optimizer"] = {"epochs": 2, "batch_size": 8} | raw.get("optimizer", {})
    return given, Recipe.model_validate(raw)


def trained(kind: str, device: torch.device) -> list[float]:
    """The losses of two epochs of three steps; validation and conversion run, too."""
    from gpu import SCENES, noise

    given, recipe = asked(kind)
    arguments: dict[str, Any] = {}
    model = build(recipe.model, SCENES)
    if given["label_weight"] is not None:
        arguments["distillation"] = DistillationConfig(label_weight=given["label_weight"])
        arguments["soft_targets"] = np.random.default_rng(1).standard_normal((CLIPS, SCENES)).astype(np.float32)
    if given["int8"]:
        from asc_ray.int8 import conversion, preparation

        example = torch.randn(2, 1, 64, 32, generator=torch.Generator().manual_seed(0))
        model = preparation.prepare(model, example)
        preparation.set_training(model, True)
        model(example)  # before the first batch the channels' ranges have no shape

        def set_mode(model: torch.nn.Module, epoch: int | None) -> None:
            preparation.set_training(model, epoch is not None)
            if epoch:
                preparation.freeze(model)

        arguments["set_mode"] = set_mode
    with tempfile.TemporaryDirectory() as folder:
        data = noise(Path(folder), CLIPS)
        delivery = DataConfig.model_validate({"mode": given["mode"]})
        data = replace(data, delivery=delivery, stream=lambda _, batches: map(data.store.pcm, batches))
        history = fit(model, recipe, data, data.parts["train"], Path(folder) / "checkpoints", **arguments)
        validate(model, LogMel(recipe.frontend).to(device), data, device)
    if given["int8"]:
        conversion.convert(model.cpu())
    return [metrics["loss"] for metrics in history]


GOLDEN = ("sm1", "cp_mobile", "passt", "labels alone", "mixup", "in parts", "scheduled lambda", "learned lambda")
GOLDEN += ("adam, balanced, averaged", "resident", "stream", "int8", "int8, taught")
PLANS: dict[str, tuple[str, list[str]]] = {
    "demo": ("demo", []),
    "small": ("small", ["corpus.path=null"]),
    "tables": ("small-tables", ["corpus.path=null"]),
    "seeds": ("demo", ["student.seeds=3", "sweep=null"]),
    "labels alone": ("demo", ["student.distillation.soft_target=none", "student.preset=cp_mobile"]),
    "crossfit": ("demo", ["fusion.data=crossfit", "fusion.scene_prior=uniform", "logits.precision=bf16"]),
    "population": (
        "demo",
        [
            "sweep.scheduler=pbt",
            "sweep.trials=4",
            "sweep.seeds=1",
            "sweep.finalists=1",
            "sweep.space={optimizer.learning_rate: {loguniform: [1.0e-4, 1.0e-2]}}",
            "sweep.validation.devices=[b]",
        ],
    ),
}


def curves() -> dict[str, list[float]]:
    """The losses of every golden recipe, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {kind: trained(kind, torch.device("cpu")) for kind in GOLDEN}
    finally:
        torch.set_num_threads(threads)


def keys(storage: Path) -> dict[str, list[str]]:
    """Where some configurations put their artifacts, below the storage; the plan's own key is the last."""
    found = {}
    for name, (config, given) in PLANS.items():
        plan = Plan(load_config(config, [f"storage={storage}", *given]))
        artifacts = [artifact for stage in plan.by_stage().values() for artifact in stage]
        found[name] = [*(str(artifact.path.relative_to(storage)) for artifact in artifacts), plan.key]
    return found
