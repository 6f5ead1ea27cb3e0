"""Make the corpora that recipes and teachers are chosen on, each of other scenes, recordings, microphones and devices.

    python bench/corpora.py OUT [--only dev1 ...]

They are made of the real recordings in ../shared/data by its make_corpus.py, which this script drives: 600 to 1,400
training clips each, and 150 test seconds on each of nine devices. No choice is ever made on that script's default
corpus (seed 0, test fold 5), the one of docs/results.md.
"""

import argparse
import importlib.util
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

DATA = Path(__file__).resolve().parents[2] / "shared/data"
SEVEN = ("chainsaw", "clock_tick", "fire_crackling", "helicopter", "rain", "rooster", "sea_waves")
OTHER_SEVEN = ("baby_cry", "chainsaw", "dog_bark", "helicopter", "person_sneeze", "rain", "rooster")


@dataclass(frozen=True)
class Plan:
    """`device_a` is the share of the training clips that are of device a; the other five have equal shares."""

    seed: int
    test_fold: int
    scenes: tuple[str, ...] = ()  # empty: all ten
    device_a: float = 0.73


CORPORA = {
    "dev1": Plan(1, test_fold=4),
    "dev2": Plan(2, test_fold=3),
    "dev3": Plan(3, 2, SEVEN),
    "dev4": Plan(4, 1, OTHER_SEVEN, device_a=0.4),
    "dev5": Plan(5, 4, ("fire_crackling", "helicopter", "rain", "sea_waves")),
    "dev6": Plan(6, 2, ("baby_cry", "chainsaw", "clock_tick", "dog_bark"), device_a=0.4),
    "dev7": Plan(7, 3, ("clock_tick", "person_sneeze", "rain", "rooster"), device_a=0.4),
    "dev8": Plan(8, 1, ("chainsaw", "dog_bark", "helicopter", "sea_waves")),
}


def maker() -> ModuleType:
    """Return make_corpus.py as a module. Raises SystemExit where the recordings are not there."""
    file = DATA / "make_corpus.py"
    if not file.exists():
        raise SystemExit(f"{file} is not there: this command needs the real recordings")
    spec = importlib.util.spec_from_file_location("make_corpus", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make(out: Path, plan: Plan) -> None:
    module = maker()
    others = len(module.TRAIN_DEVICES) - 1
    if plan.device_a != module.TRAIN_SHARE[0]:
        module.TRAIN_SHARE = (plan.device_a, *[(1 - plan.device_a) / others] * others)
    recordings = (
        one for one in module.esc10_recordings(module.HERE / "esc10") if not plan.scenes or one[0] in plan.scenes
    )
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    module.build(partial, recordings, module.HERE / "dirs", plan.seed, plan.test_fold)
    partial.rename(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", choices=CORPORA, default=list(CORPORA))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        if not (options.out / name).exists():
            make(options.out / name, CORPORA[name])


if __name__ == "__main__":
    main()
