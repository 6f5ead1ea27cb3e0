"""Make a corpus of ESC-10's recordings, from which the model comes that the package brings.

    python examples/esc10.py RECORDINGS OUT

RECORDINGS is a checkout of https://github.com/karolpiczak/ESC-10: a folder a kind of sound, 400 recordings of five
seconds by Freesound's users, CC0 and CC-BY (Piczak 2015). Two of them are under Sampling+ and are left out. Each second
with sound in it is a clip; fold 5 is the test split. ESC-10 says no place, so every source recording is one.

    asc-ray ingest  --config configs/esc10.yaml --set corpus.path=OUT
    asc-ray student --config configs/esc10.yaml --set corpus.path=OUT
    asc-ray qat     --config configs/esc10.yaml --set corpus.path=OUT
    asc-ray export runs/esc10/int8/student-KEY asc_ray/bundle --license CC-BY-4.0 --config configs/esc10.yaml
"""

import argparse
import csv
import re
from pathlib import Path

import numpy as np
import soundfile as sf

OTHER_LICENSE = {"1-40730-A", "2-96460-A"}
TEST_FOLD = "5"


def seconds(wave: np.ndarray, rate: int) -> dict[int, np.ndarray]:
    """Return the whole seconds of a wave (samples,) that hold sound, by their number; ESC-10 is padded with zeros."""
    found = {}
    for number in range(len(wave) // rate):
        clip = wave[number * rate : (number + 1) * rate]
        if np.mean(np.abs(clip) < 1e-5) < 0.4 and np.sqrt(np.mean(clip**2)) > 1e-3:
            found[number] = clip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recordings", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    (options.out / "audio").mkdir(parents=True)
    (options.out / "evaluation_setup").mkdir()
    rows = []
    for file in sorted(options.recordings.glob("*/*.ogg")):
        if file.stem in OTHER_LICENSE:
            continue
        fold, source, _ = file.stem.split("-")
        scene = re.sub(r"^\d+ - ", "", file.parent.name).lower().replace(" ", "_")
        wave, rate = sf.read(file, always_2d=True)
        for number, clip in seconds(wave.mean(axis=1), rate).items():
            name = f"audio/{scene}-{file.stem.lower()}-{number}-a.wav"
            sf.write(options.out / name, clip, rate, subtype="PCM_16")
            rows.append((name, scene, source, fold == TEST_FOLD))
    tables = {
        "meta.csv": [("filename", "scene_label", "identifier", "source_label")]
        + [(name, scene, source, "a") for name, scene, source, _ in rows],
        "evaluation_setup/fold1_train.csv": [("filename", "scene_label")]
        + [(name, scene) for name, scene, _, test in rows if not test],
        "evaluation_setup/fold1_evaluate.csv": [("filename", "scene_label")]
        + [(name, scene) for name, scene, _, test in rows if test],
    }
    for name, table in tables.items():
        with open(options.out / name, "w", newline="", encoding="utf-8") as file:
            csv.writer(file, delimiter="\t", lineterminator="\n").writerows(table)
    print(f"{options.out}: {len(rows)} clips, {sum(test for *_, test in rows)} of them for the test")


if __name__ == "__main__":
    main()
