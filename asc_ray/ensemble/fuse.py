"""From stored logits to an artifact with a fusion, soft targets and scores."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from asc_ray.artifacts import Artifact, stored_files
from asc_ray.data.clips import ClipStore
from asc_ray.data.logits import Ensemble, Logits, read_logits, write_logits
from asc_ray.ensemble.config import FusionConfig, Ridge
from asc_ray.ensemble.fusion import Fusion, fit_shards, objectives
from asc_ray.ensemble.newton import Shard
from asc_ray.evaluation.artifact import EVALUATION, headline, score, score_ensemble
from asc_ray.evaluation.gains import gain
from asc_ray.files import write_atomically
from asc_ray.training.dataset import Source

FUSION = "fusion.json"
SHARD_CLIPS = 65_536
FEWEST_LEFT = 2  # systems, without the weakest half


def fuse_systems(artifact: Artifact, source: Source, logits: Mapping[str, Path], config: FusionConfig) -> None:
    """Learn eq. 4 on the part `fusion`, and write soft targets of the training split.

    `targets/fused` and `targets/average` hold logits, not divided by a temperature. The scores are those on the part
    `validation`, which neither the teachers nor the fusion have seen. Nothing of the test split is read, neither its
    logits nor its clips' scenes.

    The record says what the fusion loses or gains without each system, and without the weakest half of them: the half
    that is right on fewer clips of the part `fusion`.

    Raises UserError for damaged files of logits, and for what `fit` and `Ensemble` refuse.
    """
    folder = artifact.open_partial()
    data = source.open()
    store, learn, held_out = data.store, data.parts["fusion"], data.parts["validation"]
    systems = {name: read_logits(stored_files(path, "train-*")) for name, path in logits.items()}

    def learned(some: Mapping[str, Logits], ridge: Ridge) -> Fusion:
        return fit_shards(
            shards(some, store, learn),
            systems=tuple(some),
            labels=store.labels,
            places=store.place[learn],
            ridge=ridge,
            scene_prior=config.scene_prior,
            nonnegative=config.nonnegative,
        )

    fusion = learned(systems, config.ridge)
    fusion.save(folder / FUSION)
    _write_targets(folder / "targets", systems, store, fusion, artifact.key)

    values = Ensemble(list(systems.values()), store.keys(held_out)).read()
    scores = score_ensemble(store, held_out, dict(zip(systems, values, strict=True)), fusion.apply(values))
    write_atomically(folder / EVALUATION, scores.model_dump_json())
    without = {}
    for position, name in enumerate(systems) if len(systems) > 1 else ():
        others = learned({other: value for other, value in systems.items() if other != name}, fusion.ridge)
        rest = score(store, held_out, others.apply(np.delete(values, position, axis=0)))
        without[name] = headline(rest) | {"objective": others.objective_after}
    half = None
    if len(systems) >= 2 * FEWEST_LEFT:
        right = _right(shards(systems, store, learn))
        better = np.sort(np.argsort(-right, kind="stable")[: -(len(systems) // 2)])
        kept = {name: own for position, (name, own) in enumerate(systems.items()) if position in better}
        fused = learned(kept, config.ridge).apply(values[better])
        over_all = gain(fusion.apply(values), fused, store.scene[held_out], store.place[held_out])
        half = headline(score(store, held_out, fused)) | {
            "left_out": [name for name in systems if name not in kept],
            "gain": over_all.model_dump(),
        }
    artifact.finish(
        {
            "data": config.data,
            "clips": fusion.clips,
            "ridge": fusion.ridge,
            "objective_before": fusion.objective_before,
            "objective_after": fusion.objective_after,
            "iterations": fusion.iterations,
            "notes": fusion.notes,
            "weights": dict(zip(systems, fusion.weights.tolist(), strict=True)),
            "biases": dict(zip(store.labels, fusion.biases.tolist(), strict=True)),
            "objectives": objectives(
                shards(systems, store, learn),
                systems=tuple(systems),
                labels=store.labels,
                scene_prior=config.scene_prior,
            ),
            "validation": {name: headline(e) for name, e in scores.systems.items()},
            "validation_gain": scores.gain.model_dump(),
            "validation_without": without,
            "validation_without_half": half,
            "validation_disagreement": disagreement(values),
        }
    )


def _right(some: Sequence[Shard]) -> np.ndarray:
    """Return the number of clips (S,) that each system is right on."""
    return sum((shard.read().argmax(axis=2) == shard.scene).sum(axis=1) for shard in some)


def disagreement(logits: np.ndarray) -> list[list[float]]:
    """Return the share of clips on which each two systems, by logits (S, N, K), answer with different scenes."""
    answers = logits.argmax(axis=2)
    return [[float((one != other).mean()) for other in answers] for one in answers]


def shards(systems: Mapping[str, Logits], store: ClipStore, rows: np.ndarray) -> list[Shard]:
    """Return the store's clips `rows` as shards, which are read one by one."""
    ensemble, scene = Ensemble(list(systems.values()), store.keys(rows)), store.scene[rows]
    some = [slice(start, start + SHARD_CLIPS) for start in range(0, len(rows), SHARD_CLIPS)]
    return [Shard(ensemble.piece(piece), scene[piece]) for piece in some]


def _write_targets(folder: Path, systems: Mapping[str, Logits], store: ClipStore, fusion: Fusion, key: str) -> None:
    train = np.flatnonzero(store.split == "train")
    for index, shard in enumerate(shards(systems, store, train)):
        values, ids = shard.read(), store.ids[train[index * SHARD_CLIPS :][: len(shard.scene)]]
        for name, soft in {"fused": fusion.apply(values), "average": values.mean(axis=0)}.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            metadata = {"system": name, "labels": json.dumps(store.labels), "corpus": store.corpus}
            metadata |= {"config": key, "split": "train"}
            write_logits(folder / name / f"train-{index:05d}.arrow", ids, soft, metadata)
