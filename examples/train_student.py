"""Train a student on a corpus in TAU22's layout, without stages, Ray or MLflow.

    python examples/train_student.py CORPUS OUT --epochs 30

`asc-ray corpus demo CORPUS` makes a corpus. OUT must be new: it takes the decoded clips, checkpoints and the weights.
The pipeline takes the weights as `student.checkpoint`, and makes an int8 model of them.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from asc_ray.audio.config import AugmentConfig, DirConfig, FreqMixStyleConfig
from asc_ray.audio.frontend import LogMel
from asc_ray.audio.impulse import ImpulseBank
from asc_ray.data.clips import ClipStore
from asc_ray.data.corpus import read_corpus
from asc_ray.data.division import partition
from asc_ray.data.shards import write_store
from asc_ray.evaluation.scores import evaluate
from asc_ray.models.config import DSFlexiNetConfig
from asc_ray.models.registry import build
from asc_ray.training.config import OptimizerConfig, Recipe
from asc_ray.training.dataset import Dataset
from asc_ray.training.gpu import training_device
from asc_ray.training.loop import fit
from asc_ray.training.validation import predict
from asc_ray.training.weights import about, save_weights

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("corpus", type=Path)
parser.add_argument("out", type=Path)
parser.add_argument("--size", default="sm1", choices=["sm1", "sm2", "sm3", "sm4"])
parser.add_argument("--epochs", type=int, default=30)
parser.add_argument("--gpus", type=float, default=float(torch.cuda.is_available()))
options = parser.parse_args()

# The clips: one second each, decoded once into files that are mapped into memory.
corpus = read_corpus(options.corpus)
options.out.mkdir(parents=True)
for clip in write_store(corpus, options.out / "clips"):
    print("left out:", clip)
store = ClipStore(options.out / "clips")

# An eighth of the training clips, by place, is for validation. Device augmentation needs impulse responses.
rows = np.flatnonzero(store.split == "train")
divided = partition(store.scene[rows], store.place.codes[rows], store.labels, {"validation": 0.125}, seed=0)
parts = {part: rows[own] for part, own in divided.items()}
responses = corpus.root / "dirs"
bank = ImpulseBank.load(responses if responses.is_dir() else None)
data = Dataset(store, parts, bank)

recipe = Recipe(
    model=DSFlexiNetConfig(size=options.size),
    augment=AugmentConfig(roll=4000, dir=DirConfig(p=0.6), freq_mixstyle=FreqMixStyleConfig(p=0.4), freq_mask=48),
    optimizer=OptimizerConfig(batch_size=16, learning_rate=3e-3).scaled_to(options.epochs),
    balance=0.5,
)
model = build(recipe.model, len(store.labels), recipe.seed)
line = "epoch {epoch}: loss {loss:.3f}, validation {validation_accuracy:.3f}, {clips_per_second:.0f} clips/s"
checkpoints = options.out / "checkpoints"
fit(model, recipe, data, parts["train"], checkpoints, gpus=options.gpus, on_epoch=lambda m: print(line.format(**m)))

test, device = np.flatnonzero(store.split == "test"), training_device(options.gpus)
logits = predict(model, LogMel(recipe.frontend).to(device), store, test, device).numpy()
scores = evaluate(logits, store.scene[test], store.device[test], store.labels, store.unseen_devices)
for name, share in scores.accuracies().items():
    print(f"{name:<8} {100 * share:5.1f} %")

save_weights(model, options.out / "model.safetensors", about(recipe, store.labels))
print(options.out / "model.safetensors")
