"""What a configuration asks of its corpus."""

from asc_ray.config.configuration import Config
from asc_ray.data.division import check_held_out_devices, divide
from asc_ray.data.reading import Reading
from asc_ray.data.recordings import check_followed
from asc_ray.ensemble.config import check_prior
from asc_ray.errors import ConfigError
from asc_ray.students.config import changed
from asc_ray.training.config import Recipe


def check_corpus(config: Config, corpus: Reading) -> None:
    """Raise ConfigError or CorpusError if the configuration asks for something that the corpus does not have."""
    recipes: dict[str, Recipe] = {f"teachers.recipes.{name}": own for name, own in config.teachers.recipes.items()}
    recipes["student"] = config.student
    asked = [(key, recipe.augment.dir) for key, recipe in recipes.items() if recipe.augment.dir.p > 0]
    cropped = [key for key, recipe in recipes.items() if recipe.augment.crop]
    for key, parameter in config.sweep.space.items() if config.sweep else ():
        if key in ("augment", "augment.dir", "augment.dir.apply_to"):
            asked += [("sweep.space", changed(config.student, {key: end}).augment.dir) for end in parameter.ends()]
        if key in ("augment", "augment.crop"):
            cropped += ["sweep.space" for e in parameter.ends() if changed(config.student, {key: e}).augment.crop]
    for key, dir_ in asked:
        if dir_.apply_to != "all" and (unknown := sorted(set(dir_.apply_to) - set(corpus.devices))):
            raise ConfigError(
                f"{key}.augment.dir.apply_to: the corpus has no device {unknown[0]!r}; "
                f"allowed: all, or some of {', '.join(corpus.devices)}"
            )
    if cropped:
        check_followed(cropped[0], corpus.followed, corpus.first)
    shares = config.partition.shares(config.fusion.data, config.fusion.folds)
    groups = ((corpus.labels[scene], place, clips) for scene, place, clips in corpus.groups)
    part_of = divide(groups, shares, config.partition.seed)
    if config.sweep:
        validated = (heard for place, heard in enumerate(corpus.heard) if part_of[place] == "validation")
        check_held_out_devices(
            config.sweep.validation.devices, corpus.devices_of(corpus.heard), corpus.devices_of(validated)
        )
    check_prior(config.fusion.scene_prior, corpus.labels)
