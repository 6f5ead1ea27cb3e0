"""The search: proposals and stopping follow from earlier results alone, whatever ended when."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from asc_ray.errors import UserError
from asc_ray.training.distillation import LearnedWeight, ScheduledWeight
from asc_ray.training.search import (
    ObjectiveConfig,
    SweepConfig,
    TrialResult,
    best,
    finalists,
    may_start,
    planned,
    propose,
    repeated,
    should_stop,
    trial_config,
)
from asc_ray.training.space import Parameter, grid, values_of
from asc_ray.training.systems import StudentConfig

SPACE = {
    "distillation.label_weight": {"uniform": [0.0, 1.0]},
    "optimizer.learning_rate": {"loguniform": [1e-4, 1e-2]},
    "augment.roll": {"int": [0, 8000]},
    "augment.dir.threshold": {"choice": [None, "auto", 323.0]},
}
SWEEP = SweepConfig.model_validate(
    {"trials": 20, "epochs": 9, "startup_trials": 4, "lookback": 3, "grace_epochs": 1, "reduction": 3, "space": SPACE}
)
STUDENT = StudentConfig.model_validate({"model": {"name": "ds_flexinet"}})


def result(number, curve, state="complete"):
    return TrialResult(number=number, parameters=propose(SWEEP, number, []), curve=tuple(curve), state=state)


def test_a_proposal_depends_on_what_it_may_see_and_on_nothing_else():
    ended = [result(n, [0.1 * n], "complete") for n in range(12)]
    known = propose(SWEEP, 10, ended)
    assert known == propose(SWEEP, 10, random.Random(1).sample(ended, len(ended)))
    assert known == propose(SWEEP, 10, ended[:8])  # trials 8 and 9 may still run
    assert known != propose(SWEEP, 10, [result(n, [1.0 - 0.1 * n]) for n in range(12)])
    assert propose(SWEEP, 0, []) != propose(SWEEP, 1, [])


@given(st.integers(0, 3), st.integers(0, 50))
def test_proposals_lie_in_the_space_and_make_a_valid_student(number, seed):
    parameters = propose(SWEEP.model_copy(update={"seed": seed}), number, [])
    config = trial_config(STUDENT, SWEEP, parameters)
    assert 0.0 <= config.distillation.label_weight <= 1.0
    assert 1e-4 <= config.optimizer.learning_rate <= 1e-2
    assert config.augment.dir.threshold in (None, "auto", 323.0)
    assert config.model == STUDENT.model


def test_tpe_prefers_what_did_well():
    space = {"distillation.label_weight": Parameter(uniform=(0.0, 1.0))}
    sweep = SWEEP.model_copy(update={"trials": 40, "space": space})
    ended = []
    for n in range(40):
        parameters = propose(sweep, n, ended)
        value = 1.0 - abs(parameters["distillation.label_weight"] - 0.7)
        ended.append(TrialResult(number=n, parameters=parameters, curve=(value,), state="complete"))
    late = [r.value for r in ended[25:]]
    assert sum(late) / len(late) > 0.85  # uniform proposals have a mean of 0.71


def test_a_trial_waits_for_those_it_learns_from():
    assert may_start(SWEEP, 2, [])
    assert not may_start(SWEEP, 3, [])
    assert may_start(SWEEP, 3, [result(0, [0.1])])
    assert not may_start(SWEEP, 5, [result(0, [0.1]), result(2, [0.2])])


def test_halving_keeps_the_best_third_at_a_rung():
    ended = [result(n, [0.1 * n] * 9) for n in range(9)]
    assert should_stop(SWEEP, 11, [0.5], ended)
    assert not should_stop(SWEEP, 11, [0.6], ended)
    assert should_stop(SWEEP, 11, [0.9, 0.9, 0.5], ended)  # rung 3
    assert not should_stop(SWEEP, 11, [0.9, 0.0], ended)  # between rungs
    assert not should_stop(SWEEP, 11, [0.0] * 9, ended)  # the end is no rung
    assert not should_stop(SWEEP, 2, [0.0], ended)  # it may see nobody


def test_the_best_ran_to_its_end_and_the_first_of_equals_wins():
    ended = [result(0, [0.9], "stopped"), result(1, [0.2, 0.5]), result(2, [0.1, 0.5]), result(3, [0.99], "diverged")]
    assert best(ended).number == 1
    with pytest.raises(UserError, match="trial 0 stopped"):
        best(ended[:1])


def test_finalists_run_again_with_other_seeds_and_the_best_mean_wins():
    sweep = SWEEP.model_copy(update={"trials": 4, "finalists": 2, "seeds": 3, "lookback": 1})
    ended = [result(0, [0.5] * 9), result(1, [0.7] * 9), result(2, [0.9], "stopped")]
    assert finalists(sweep, ended) == []  # trial 3 may still be one
    assert (planned(sweep, ended), sweep.most) == (4, 8)
    assert not may_start(sweep, 4, ended)
    ended.append(result(3, [0.6] * 9))
    assert finalists(sweep, ended) == [1, 3]
    assert planned(sweep, ended) == 8
    assert [repeated(sweep, n, ended) for n in range(3, 8)] == [(None, 0), (1, 1), (1, 2), (3, 1), (3, 2)]
    values = {4: 0.3, 5: 0.5, 6: 0.6, 7: 0.6}
    for number, value in values.items():
        assert may_start(sweep, number, ended)
        of, seed = repeated(sweep, number, ended)
        parameters = propose(sweep, number, ended)
        assert parameters == ended[of].parameters
        assert not should_stop(sweep, number, [0.0], ended)
        ended.append(
            TrialResult(number=number, parameters=parameters, curve=(value,), state="complete", repeats=of, seed=seed)
        )
    assert best(ended[:4]).number == 1
    assert best(ended).number == 3  # 0.6 against (0.7 + 0.3 + 0.5) / 3
    none = [result(n, [0.5], "diverged") for n in range(4)]
    assert planned(sweep, none) == 4


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        ({}, "exactly one"),
        ({"uniform": [0, 1], "choice": [1]}, "exactly one"),
        ({"uniform": [1, 0]}, "not below"),
        ({"loguniform": [0, 1]}, "not positive"),
        ({"choice": []}, "at least one value"),
        ({"normal": [0, 1]}, "Extra inputs"),
    ],
)
def test_a_wrong_parameter_is_refused(parameter, message):
    with pytest.raises(ValidationError, match=message):
        Parameter.model_validate(parameter)


@pytest.mark.parametrize(
    ("key", "parameter", "message"),
    [
        ("distillation.tau", {"uniform": [1, 2]}, r"sweep\.space\.distillation\.tau"),
        ("distillation.label_weight", {"uniform": [0, 2]}, r"label_weight=2"),
        ("augment.dir.threshold", {"choice": ["sometimes"]}, r"threshold='sometimes'"),
    ],
)
def test_a_space_that_makes_no_valid_student_is_refused(key, parameter, message):
    sweep = SweepConfig.model_validate({"space": {key: parameter}})
    with pytest.raises(ValueError, match=message):
        sweep.check(STUDENT)


def test_the_objective_weighs_devices_left_out():
    metrics = {"validation_macro_accuracy": 0.7, "validation_seen": 0.8, "validation_unseen": 0.4}
    assert ObjectiveConfig().value(metrics) == 0.7
    assert ObjectiveConfig(devices=("s1",), weight=0.75).value(metrics) == pytest.approx(0.75 * 0.4 + 0.25 * 0.8)


CONDITIONAL = {
    "distillation.label_weight": {
        "one_of": {
            "fixed": {"uniform": [0.0, 1.0]},
            "schedule": {
                "start": {"uniform": [0.4, 1.0]},
                "end": {"choice": [0.0, 0.2]},
                "shape": {"choice": ["linear", "cosine"]},
            },
            "learned": {"start": 0.3, "low": {"uniform": [0.0, 0.2]}, "high": 0.9},
        }
    },
    "augment.dir.apply_to": {"one_of": {"first": ["a"], "all": "all"}},
}


@given(st.integers(0, 12), st.integers(0, 100))
@settings(deadline=None, max_examples=40)
def test_an_alternative_s_own_parameters_are_searched_where_it_is_chosen(number, seed):
    raw = {"space": CONDITIONAL, "seed": seed, "startup_trials": 2, "lookback": 1}
    sweep = SweepConfig.model_validate(raw)
    sweep.check(STUDENT)
    ended = []
    for n in range(number + 1):
        parameters = propose(sweep, n, ended)
        chosen = parameters["distillation.label_weight"]
        own = {name for name in parameters if name.startswith("distillation.label_weight.")}
        assert {name.split(".")[2] for name in own} == {chosen}
        ended.append(TrialResult(number=n, parameters=parameters, curve=(0.5,), state="complete"))
    assert parameters == propose(sweep, number, ended[:-1])
    weight = trial_config(STUDENT, sweep, parameters).distillation.label_weight
    expected = {"fixed": float, "schedule": ScheduledWeight, "learned": LearnedWeight}[chosen]
    assert isinstance(weight, expected)
    if chosen == "schedule":
        assert weight.start == parameters["distillation.label_weight.schedule.start"]
    assert trial_config(STUDENT, sweep, parameters).augment.dir.apply_to in (("a",), "all")


def test_a_grid_has_every_point_once():
    space = {
        "augment.roll": {"int": [1, 3]},
        "distillation.label_weight": {
            "one_of": {"fixed": {"choice": [0.1, 0.2]}, "schedule": {"start": 0.5, "end": {"choice": [0.0, 0.1, 0.2]}}}
        },
    }
    sweep = SweepConfig.model_validate({"space": space, "sampler": "grid", "trials": 15})
    sweep.check(STUDENT)
    points = [values_of(sweep.space, propose(sweep, n, [])) for n in range(15)]
    assert len(set(map(repr, points))) == len(grid(sweep.space)) == 3 * (2 + 3)
    assert points[0] == {"augment.roll": 1, "distillation.label_weight": 0.1}
    assert points[-1] == {"augment.roll": 3, "distillation.label_weight": {"start": 0.5, "end": 0.2}}
    with pytest.raises(ValueError, match=r"sweep\.trials: 16, but the grid of sweep\.space has 15 points"):
        sweep.model_copy(update={"trials": 16}).check(STUDENT)
    real = SweepConfig.model_validate({"space": SPACE, "sampler": "grid", "trials": 1})
    with pytest.raises(ValueError, match="label_weight: a grid takes choice, int and one_of"):
        real.check(STUDENT)


def test_every_alternative_is_checked_with_all_its_ends():
    wrong = {"one_of": {"fixed": 0.5, "learned": {"start": {"uniform": [0.1, 0.9]}, "low": 0.2}}}
    sweep = SweepConfig.model_validate({"space": {"distillation.label_weight": wrong}})
    with pytest.raises(ValueError, match=r"label_weight=\{'start': 0\.1, 'low': 0\.2\}: .*low 0\.2 < start 0\.1"):
        sweep.check(STUDENT)
