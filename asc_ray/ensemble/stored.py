"""A finished ensemble on any waveforms: the teachers and the fusion of a storage."""

from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from asc_ray.artifacts import artifacts_in, input_folder, read_manifest, stored_file
from asc_ray.audio.config import AnyFrontendConfig
from asc_ray.audio.frontends import FrontEnd, front_end, laid_out
from asc_ray.data.batches import waveform
from asc_ray.data.clips import CLIP_SAMPLES, SAMPLE_RATE
from asc_ray.ensemble.fuse import FUSION
from asc_ray.ensemble.fusion import Fusion
from asc_ray.errors import UserError
from asc_ray.models.config import ModuleConfig
from asc_ray.models.registry import folded
from asc_ray.places import named
from asc_ray.training.config import Recipe
from asc_ray.training.weights import load_model


class _Clip(NamedTuple):
    sample_rate: int
    samples: int


class StoredEnsemble:
    """The teachers of a finished fusion, each behind its own front end, and eq. 4 over their logits.

    `run` is the folder of a fusion, or a storage that has one alone. `code` names the modules whose code may run: a
    storage says which networks are of its user's own code, and never brings that code to run. Raises UserError where
    `run` is neither, where a teacher is not there or not as it was written, and where it needs other code.
    """

    frontend = _Clip(SAMPLE_RATE, CLIP_SAMPLES)

    def __init__(self, run: Path, code: Collection[str] = ()) -> None:
        folder, self._code = _fusion(run), code
        self.fusion = Fusion.load(stored_file(folder, FUSION))
        self.labels = self.fusion.labels
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._front_ends: dict[AnyFrontendConfig, FrontEnd] = {}
        self._systems = [self._system(folder, name) for name in self.fusion.systems]

    def _system(self, folder: Path, name: str) -> tuple[AnyFrontendConfig, list[nn.Module]]:
        """Return a system's front end, and its network; with cross-fitting, its networks of all folds."""
        storage = folder.parents[1]
        logits = input_folder(storage, "logits", read_manifest(folder)["inputs"][name])
        keys = [key for role, key in read_manifest(logits)["inputs"].items() if role != "clips"]
        if not keys:
            raise UserError(
                f"{logits}: the logits of {name} come from a file, so the ensemble cannot be asked about others"
            )
        models = []
        for teacher in (input_folder(storage, "teachers", key) for key in keys):
            recipe = Recipe.model_validate(read_manifest(teacher)["config"]["recipe"])
            if isinstance(recipe.model, ModuleConfig) and recipe.model.module not in self._code:
                raise UserError(
                    f"{named(teacher)}: {name} is a network of the code {recipe.model.function}, and code runs only "
                    f"where you name its module: --code {recipe.model.module}"
                )
            model = folded(load_model(teacher, recipe, len(self.labels)))
            models.append(model.to(self._device, memory_format=torch.channels_last))  # type: ignore[call-overload]
        if recipe.frontend not in self._front_ends:
            self._front_ends[recipe.frontend] = front_end(recipe.frontend).to(self._device)
        return recipe.frontend, models

    @torch.no_grad()
    def logits(self, waves: np.ndarray) -> np.ndarray:
        """Map (N, 32000) int16 to the fused logits (N, K) float32. Raises UserError where one is not finite."""
        wave = waveform(torch.from_numpy(waves).to(self._device))[:, None]
        mels: dict[AnyFrontendConfig, Tensor] = {}
        each = []
        for frontend, models in self._systems:
            if frontend not in mels:
                mels[frontend] = laid_out(self._front_ends[frontend](wave))
            each.append(torch.stack([model(mels[frontend]).float() for model in models]).mean(dim=0))
        fused = self.fusion.apply(torch.stack(each).cpu().numpy())
        if broken := int((~np.isfinite(fused).all(axis=1)).sum()):
            raise UserError(f"the fused logits of {broken} of {len(fused)} seconds are not finite")
        return fused

    def probabilities(self, waves: np.ndarray) -> np.ndarray:
        """Return the softmax of `logits`: (N, K) float32."""
        return torch.from_numpy(self.logits(waves)).softmax(dim=1).numpy()


def _fusion(run: Path) -> Path:
    fusions = [artifact.path for artifact in artifacts_in(run) if artifact.stage == "fusion"]
    if len(fusions) > 1:
        names = "\n  ".join(map(named, fusions))
        raise UserError(f"{named(run)}: has {len(fusions)} fusions; give the folder of one:\n  {names}")
    folder = fusions[0] if fusions else run.resolve()
    try:
        if read_manifest(folder)["stage"] == "fusion":
            return folder
    except UserError:
        if fusions:
            raise
    raise UserError(
        f"{named(run)}: no finished fusion, and no storage with one; give the `storage` of a run whose stage `fuse` is "
        "done, or the folder of its fusion, as `asc-ray status` shows it"
    )
