"""Systems far below the others: which, why, and what is said."""

from asc_ray.ensemble.weak import Standing, far_below
from asc_ray.training.recipe import Recipe

RECIPES = {
    "cp_resnet": Recipe.model_validate({"model": {"name": "cp_resnet"}}),
    "passt": Recipe.model_validate({"model": {"name": "passt"}, "frontend": {"mels": 128, "hop": 320}}),
}


def standing(model: str, validation: float, train: float | None = 0.6) -> Standing:
    return Standing(RECIPES[model], validation, train)


def test_a_system_is_compared_with_the_better_half():
    good = {f"good_{n}": standing("cp_resnet", 0.7 + 0.01 * n) for n in range(3)}
    weak = {f"weak_{n}": standing("passt", 0.4, 0.3) for n in range(3)}
    found = far_below(good | weak, places=100)
    assert set(found) == set(weak)
    assert "weak_0 is far below the others (40 % on the validation part, the better half has 71 %)" in found["weak_0"]
    assert not far_below(good, places=100)
    assert not far_below(dict(list((good | weak).items())[2:4]), places=100)  # two are no ensemble


def test_few_places_do_not_tell_a_system_from_the_others():
    systems = {"a": standing("cp_resnet", 0.7), "b": standing("cp_resnet", 0.7), "c": standing("cp_resnet", 0.58)}
    assert set(far_below(systems, places=400)) == {"c"}
    assert not far_below(systems, places=20)  # twice the standard error is 20 points


def test_the_reason_is_what_the_training_says():
    good = {f"good_{n}": standing("cp_resnet", 0.7) for n in range(3)}

    def reason(one: Standing) -> str:
        return far_below({**good, "x": one}, places=400)["x"]

    assert "AudioSet" in reason(standing("passt", 0.4, 0.35))
    assert "teachers.recipes.x.model.pretrained" in reason(standing("passt", 0.4, 0.35))
    assert "underfitted; train it longer or faster (teachers.recipes.x.optimizer.epochs" in reason(
        standing("cp_resnet", 0.4, 0.35)
    )
    assert "overfitted; augment more (teachers.recipes.x.augment)" in reason(standing("cp_resnet", 0.4, 0.99))
    assert "not trained here; check that its checkpoint" in reason(standing("passt", 0.4, None))
