"""Fuse logits of systems from elsewhere, and see what the fusion gains over their average.

    python examples/fuse_logits.py CLIPS.csv ONE.npy TWO.npy ... [--bundle BUNDLE --recordings FILES...]

CLIPS.csv has a row a clip, with its `scene` and, where it is known, its `place`. A system's .npy holds its logits of
these clips, (clips, scenes), with the scenes in alphabetical order. No system may have been trained on these clips.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from asc_ray.ensemble.fusion import fit
from asc_ray.evaluation.gains import gain
from asc_ray.predict import answer, files_in
from asc_ray.runtime import Bundle

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("clips", type=Path)
parser.add_argument("logits", type=Path, nargs="+")
parser.add_argument("--out", type=Path, default=Path("fusion.json"))
parser.add_argument("--bundle", type=Path, help="a folder that `asc-ray export` made")
parser.add_argument("--recordings", type=Path, nargs="+", default=[])
options = parser.parse_args()

clips = pd.read_csv(options.clips)
scenes, scene = np.unique(clips["scene"].to_numpy(str), return_inverse=True)
place = clips["place"].to_numpy(str) if "place" in clips else clips.index.to_numpy(str)
systems = [file.stem for file in options.logits]
logits = np.stack([np.load(file) for file in options.logits])  # (systems, clips, scenes)

# The gain is measured on a quarter of the places, which the fusion does not learn from.
places = np.random.default_rng(0).permutation(np.unique(place))
new = np.isin(place, places[: len(places) // 4])
fusion = fit(logits[:, ~new], scene[~new], systems=systems, labels=scenes.tolist(), places=place[~new])
for system, weight in zip(systems, fusion.weights, strict=True):
    print(f"weight   {weight:6.3f}  {system}")
average, fused = logits[:, new].mean(axis=0), fusion.apply(logits[:, new])
for name, values in {**dict(zip(systems, logits[:, new], strict=True)), "average": average, "fusion": fused}.items():
    print(f"accuracy {(values.argmax(axis=1) == scene[new]).mean():6.1%}  {name}")
gained = gain(average, fused, scene[new], place[new])
for figure in ("accuracy", "log_loss"):
    found = getattr(gained, figure)
    print(f"gain     {found.value:+.3f} {figure}, 95 % of the resamples {found.low:+.3f} to {found.high:+.3f}")
fusion.save(options.out)

if options.bundle:
    bundle = Bundle(options.bundle)
    for name, file in files_in(options.recordings)[0]:
        shares = answer(bundle, name, file).pooled
        print(f"{bundle.labels[shares.argmax()]}  {shares.max():.1%}  {name}")
