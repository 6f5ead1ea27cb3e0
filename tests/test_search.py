"""The search: proposals and stopping follow from earlier results alone, whatever ended when."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from asc_ray.config.composition import load_config
from asc_ray.config.configuration import check_space
from asc_ray.errors import UserError
from asc_ray.search.config import BudgetConfig, ObjectiveConfig, Parameter, PopulationConfig, SweepConfig
from asc_ray.search.course import Course, checkpoints_of
from asc_ray.search.halving import should_stop
from asc_ray.search.order import finalists, may_start, planned, repeated, visible, within_budget
from asc_ray.search.population import explored
from asc_ray.search.proposals import cost_of, parent, propose, trial_config
from asc_ray.search.trials import TrialResult, best, importances, pareto
from asc_ray.stages.sweep import advice
from asc_ray.students.config import Limits, StudentConfig
from asc_ray.students.cost import student_cost
from asc_ray.training.config import LearnedWeight, ScheduledWeight

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
    assert best(SWEEP, ended).number == 1
    with pytest.raises(UserError, match="trial 0 stopped"):
        best(SWEEP, ended[:1])


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
    assert best(sweep, ended[:4]).number == 1
    assert best(sweep, ended).number == 3  # 0.6 against (0.7 + 0.3 + 0.5) / 3
    none = [result(n, [0.5], "diverged") for n in range(4)]
    assert planned(sweep, none) == 4


# --- budgets ------------------------------------------------------------------------------------------------------


@given(data=st.data(), budget=st.integers(1, 120), lookback=st.integers(1, 6))
def test_a_budget_of_epochs_ends_a_search_alike_whatever_ends_first(data, budget, lookback):
    sweep = SWEEP.model_copy(update={"budget": BudgetConfig(epochs=budget), "lookback": lookback})
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=20, max_size=20))
    counts = set()
    for order in range(3):
        rng, ended, running, started = random.Random(order), [], [], 0
        while True:
            within = within_budget(sweep, ended)
            while started < within.trials and len(running) < lookback and may_start(within, started, ended):
                running.append(started)
                started += 1
            if not running:
                break
            number = running.pop(rng.randrange(len(running)))
            ended.append(TrialResult(number=number, parameters={}, curve=(0.5,) * lengths[number], state="stopped"))
        counts.add(started)
        assert started == within.trials
        used = sum(len(r.curve) for r in ended)
        assert used >= budget or started == sweep.trials
        assert used < budget + lookback * 9
    assert len(counts) == 1


@given(st.lists(st.integers(0, 9), max_size=30), st.integers(1, 60), st.integers(1, 6), st.randoms())
def test_a_budget_goes_by_the_trials_that_each_one_sees(lengths, budget, lookback, rng):
    sweep = SWEEP.model_copy(update={"budget": BudgetConfig(epochs=budget), "lookback": lookback})
    ended = [TrialResult(number=n, parameters={}, curve=(0.5,) * k, state="stopped") for n, k in enumerate(lengths)]
    rng.shuffle(ended)
    spent = [sum(len(r.curve) for r in visible(sweep, number, ended)) for number in range(sweep.trials)]
    assert within_budget(sweep, ended).trials == sum(epochs < budget for epochs in spent)


def test_a_budget_looks_at_each_result_once():
    looked = []

    class Looked(list):
        def __iter__(self):
            for result in super().__iter__():
                looked.append(result.number)
                yield result

    sweep = SWEEP.model_copy(update={"trials": 800, "budget": BudgetConfig(epochs=800)})
    ended = Looked(TrialResult(number=n, parameters={}, curve=(0.5,), state="stopped") for n in range(790))
    assert within_budget(sweep, ended).trials == 800
    assert len(looked) == 790


# --- two objectives -----------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_the_pareto_front_is_what_nothing_dominates(pairs):
    ended = [
        TrialResult(number=n, parameters={}, curve=(value / 10,), cost=cost, state="complete")
        for n, (cost, value) in enumerate(pairs)
    ]
    front = {(one.result.cost, round(10 * one.value)) for one in pareto(ended)}
    assert front == {(c, v) for c, v in pairs if not any((a <= c and b >= v) and (a, b) != (c, v) for a, b in pairs)}
    costs = [one.result.cost for one in pareto(ended)]
    assert costs == sorted(set(costs))


def test_a_small_network_is_not_stopped_for_being_worse_than_large_ones():
    large = [TrialResult(number=n, parameters={}, curve=(0.9,) * 9, cost=100.0, state="complete") for n in range(3)]
    small = [TrialResult(number=n, parameters={}, curve=(0.4,) * 9, cost=10.0, state="complete") for n in range(3, 6)]
    assert should_stop(SWEEP, 10, [0.5], large + small)
    assert not should_stop(SWEEP, 10, [0.5], large + small, cost=20.0)
    assert should_stop(SWEEP, 10, [0.3], large + small, cost=20.0)
    assert should_stop(SWEEP, 10, [0.5], large + small, cost=100.0)


def test_a_search_for_both_looks_where_good_and_cheap_is():
    """The objective grows with the width, and so does the cost; the second parameter should be 0."""
    space = {"width": Parameter(uniform=(0.0, 1.0)), "harm": Parameter(uniform=(0.0, 1.0))}
    sweep = SWEEP.model_copy(update={"trials": 50, "space": space, "cost": "bytes", "startup_trials": 10})
    ended = []
    for n in range(50):
        p = propose(sweep, n, ended)
        value = p["width"] * (1 - p["harm"])
        ended.append(TrialResult(number=n, parameters=p, curve=(value,), cost=p["width"], state="complete"))
    late = [r.parameters for r in ended[25:]]
    assert sum(p["harm"] for p in late) / len(late) < 0.3  # 0.5 by chance
    assert min(p["width"] for p in late) < 0.4
    assert max(p["width"] for p in late) > 0.6


def test_of_equals_the_cheapest_wins():
    ended = [
        TrialResult(number=n, parameters={}, curve=(value,), cost=cost, state="complete")
        for n, (value, cost) in enumerate([(0.5, 30.0), (0.5, 10.0), (0.5, 20.0), (0.4, 1.0)])
    ]
    assert best(SWEEP, ended).number == 1
    assert best(SWEEP, ended) in [one.result for one in pareto(ended)]


def test_importance_finds_the_parameter_that_matters():
    some = {"one_of": {"off": {"p": 0.0}, "on": {"p": {"uniform": [0.1, 1.0]}}}}
    raw = {"augment.dir.p": {"uniform": [0.0, 1.0]}, "augment.freq_mixstyle": some}
    sweep = SweepConfig.model_validate({"space": raw, "sampler": "random", "trials": 80})
    ended = []
    for n in range(80):
        p = propose(sweep, n, [])
        value = 1 - abs(p["augment.dir.p"] - 0.3)
        ended.append(TrialResult(number=n, parameters=p, curve=(value,), state="complete"))
    shares = importances(sweep.space, ended)
    assert sum(shares.values()) == pytest.approx(1)
    assert set(shares) == {"augment.dir.p", "augment.freq_mixstyle", "augment.freq_mixstyle.on.p"}
    assert shares["augment.dir.p"] > 0.7
    off = [r for r in ended if r.parameters["augment.freq_mixstyle"] == "off"]
    assert importances(sweep.space, off) == {"augment.dir.p": pytest.approx(1)}  # the other never varied
    assert importances(sweep.space, ended[:7]) == {}
    assert importances(sweep.space, [r.model_copy(update={"state": "failed"}) for r in ended]) == {}


def test_costs_are_those_of_complexity():
    for what, expected in (("bytes", 30_708), ("macs", None), (None, None)):
        sweep = SWEEP.model_copy(update={"cost": what})
        student = StudentConfig.model_validate({"model": {"name": "ds_flexinet", "size": "sm2"}})
        cost = cost_of(sweep, student_cost(student, Limits(), 10))
        if expected:
            assert cost == expected
        assert (cost is None) == (what is None)
    counted = student_cost(student, Limits(), 10)
    assert 8.2e6 < cost_of(SWEEP.model_copy(update={"cost": "macs"}), counted) < 8.4e6


# --- populations --------------------------------------------------------------------------------------------------

POPULATION = SweepConfig.model_validate(
    {"trials": 8, "epochs": 9, "scheduler": "pbt", "population": {"every": 2, "replaced": 0.25}, "space": SPACE}
)


def generation(number, values, before=()):
    """Results of the members with these values; None diverged."""
    made = []
    for member, value in enumerate(values):
        n = number * len(values) + member
        made.append(
            TrialResult(
                number=n,
                parameters=propose(POPULATION, n, before),
                curve=() if value is None else (0.0, value),
                state="diverged" if value is None else "complete",
                parent=parent(POPULATION, n, before),
            )
        )
    return [*before, *made]


def test_the_worst_of_a_population_go_on_from_the_best():
    assert (POPULATION.searched, POPULATION.span(0), POPULATION.span(8), POPULATION.span(39)) == (
        40, (0, 2), (2, 4), (8, 9),
    )  # fmt: skip
    first = generation(0, [0.1, 0.9, 0.5, None, 0.4, 0.8, 0.3, 0.2])
    assert len({str(r.parameters) for r in first}) == 8
    assert not may_start(POPULATION, 8, first[:7])
    assert may_start(POPULATION, 15, first)
    assert parent(POPULATION, 3, first) is None
    for number in range(8, 16):
        origin, parameters = parent(POPULATION, number, first), propose(POPULATION, number, first)
        own = next(r for r in first if r.number == origin).parameters
        if number - 8 in (0, 3, 7):  # the two worst, and the one that diverged
            assert origin in (1, 5)
            assert parameters != own
            trial_config(STUDENT, POPULATION, parameters)
        else:
            assert (origin, parameters) == (number - 8, own)
    second = generation(1, [0.95, 0.1, 0.5, 0.5, 0.4, 0.8, 0.3, 0.2], first)
    assert best(POPULATION.model_copy(update={"epochs": 4}), second).number == 8
    with pytest.raises(UserError, match="no trial ran to its end"):
        best(POPULATION, second)  # the first generations are no end
    none = generation(0, [None] * 8)
    assert {parent(POPULATION, n, none) for n in range(8, 16)} == {None}
    assert not should_stop(POPULATION, 9, [0.0] * 2, first)


def test_a_population_removes_a_generations_checkpoints_once(tmp_path):
    """When the second generation after it starts; until then its trials may be gone on from."""
    sweep = POPULATION.model_copy(update={"trials": 2, "epochs": 8})
    course = Course(sweep, STUDENT, Limits(), 10, tmp_path, [], lambda name, event: None)
    present = []
    for generation in range(4):
        started = [course.start()["number"], course.start()["number"]]
        present.append(sorted(int(folder.name[:4]) for folder in tmp_path.glob("*.checkpoints")))
        for number in started:
            (tmp_path / checkpoints_of(number)).mkdir()
            for epoch in (1, 2):
                course.hear(number, {"epoch": 2 * generation + epoch, "objective": 0.1 * number})
            course.close(number, failed=False)
        if generation == 2:
            (tmp_path / checkpoints_of(0)).mkdir()  # back again
    assert present == [[], [0, 1], [2, 3], [0, 4, 5]]


@given(st.integers(0, 10**6))
def test_explored_parameters_stay_in_the_space(seed):
    space = {name: Parameter.model_validate(own) for name, own in SPACE.items()}
    parameters, rng = propose(POPULATION, seed % 8, []), np.random.default_rng(seed)
    config = PopulationConfig(resample=0.0)
    for _ in range(10):
        changed = explored(config, space, parameters, rng)
        rate = changed["optimizer.learning_rate"]
        assert 1e-4 <= rate <= 1e-2
        ratio = rate / parameters["optimizer.learning_rate"]
        assert any(ratio == pytest.approx(own) for own in (0.8, 1.25)) or rate in (1e-4, 1e-2)
        assert 0.0 <= changed["distillation.label_weight"] <= 1.0
        roll, before = changed["augment.roll"], parameters["augment.roll"]
        assert isinstance(roll, int)
        assert 0 <= roll <= 8000
        assert roll != before or before in (0, 8000)
        assert changed["augment.dir.threshold"] in (None, "auto", 323.0)
        parameters = changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": 2}, "seeds: with scheduler pbt allowed is 1"),
        ({"cost": "macs"}, "cost: with scheduler pbt"),
        ({"budget": {"epochs": 9}}, "budget: with scheduler pbt"),
        ({"trials": 1}, "trials: with scheduler pbt"),
        ({"space": {"model.size": {"choice": ["sm1", "sm2"]}}}, r"space\.model\.size: with scheduler pbt"),
        ({"space": {"augment.roll": {"one_of": {"no": 0}}}}, r"space\.augment\.roll: with scheduler pbt"),
    ],
)
def test_what_a_population_cannot_do_is_refused(change, message):
    with pytest.raises(ValidationError, match=message):
        SweepConfig.model_validate({"scheduler": "pbt", "space": SPACE, **change})


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
        (
            "distillation.label_weight",
            {"uniform": [0, 2]},
            r"label_weight: 2.0: student.distillation.label_weight: found 2",
        ),
        ("augment.dir.threshold", {"choice": ["sometimes"]}, r"threshold: 'sometimes': student"),
    ],
)
def test_a_space_that_makes_no_valid_student_is_refused(key, parameter, message):
    sweep = SweepConfig.model_validate({"space": {key: parameter}})
    with pytest.raises(ValueError, match=message):
        check_space(sweep, STUDENT)


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
@settings(max_examples=40)
def test_an_alternative_s_own_parameters_are_searched_where_it_is_chosen(number, seed):
    raw = {"space": CONDITIONAL, "seed": seed, "startup_trials": 2, "lookback": 1}
    sweep = SweepConfig.model_validate(raw)
    check_space(sweep, STUDENT)
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


def test_every_alternative_is_checked_with_all_its_ends():
    wrong = {"one_of": {"fixed": 0.5, "learned": {"start": {"uniform": [0.1, 0.9]}, "low": 0.2}}}
    sweep = SweepConfig.model_validate({"space": {"distillation.label_weight": wrong}})
    with pytest.raises(ValueError, match=r"label_weight: \{'low': 0\.2, 'start': 0\.1\}: .*low 0\.2 < start 0\.1"):
        check_space(sweep, STUDENT)


# --- slots --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "room", "line"),
    [
        ({"lookback": 4}, 4, ""),
        ({"lookback": 4}, 16, "advice: sweep.lookback 4 leaves 12 of 16 slots idle; "),
        ({"lookback": 4, "scheduler": "pbt", "trials": 8}, 10, "advice: sweep.trials 8 leaves 2 of 10 slots idle; "),
    ],
)
def test_idle_slots_are_told_with_the_key(config, room, line):
    told = advice(SWEEP.model_copy(update=config), room)
    assert told.startswith(line)
    assert bool(told) == bool(line)


def test_the_preset_for_tau22_fills_sixteen_slots():
    assert advice(load_config("tau22", ["storage=/unused"]).sweep, 16) == ""
