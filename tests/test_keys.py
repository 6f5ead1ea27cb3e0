"""Which stages' keys each leaf of the configuration changes. A leaf that nobody thought of fails here."""

import json
import re
import shutil
from itertools import product
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
import soundfile as sf
from conftest import ROOT, TINY
from safetensors.torch import save_file

from asc_ray.config.composition import load_config
from asc_ray.config.configuration import Config
from asc_ray.data.config import TableConfig
from asc_ray.data.demo import make_demo_corpus
from asc_ray.errors import UserError
from asc_ray.models.registry import build
from asc_ray.plan import Plan
from asc_ray.search.config import Parameter
from asc_ray.section import Section
from asc_ray.training.config import Recipe

# What is made from what; a changed key changes all that follow.
FOLLOWS = {
    "corpus": {"ingest"},
    "ingest": {"teachers", "logits", "sweep", "student"},
    "teachers": {"logits"},
    "logits": {"fuse", "evaluate"},
    "fuse": {"sweep", "student", "evaluate"},
    "sweep": {"student"},
    "student": {"specialize", "qat", "evaluate"},
    "specialize": {"evaluate"},
    "qat": {"evaluate"},
    "evaluate": {"report"},
    "report": set(),
}
# The first stage that a leaf belongs to, by the longest matching beginning of its path; "" is none.
FIRST = {
    "name": "",
    "storage": "",
    "corpus.path": "ingest",
    "corpus.train_split": "ingest",
    "corpus.on_bad_clip": "ingest",
    "corpus.shard_clips": "",
    "corpus.impulse_responses": "ingest",
    "corpus.demo": "corpus",
    "data": "",
    "partition": "teachers",
    "teachers.checkpoints": "teachers",
    "teachers.recipes": "teachers",
    "teachers.imported": "logits",
    "teachers.resources": "",
    "teachers.resources_for": "",
    "teachers.allow_missing": "",
    "logits.precision": "logits",
    "logits.batch_size": "",
    "logits.resources": "",
    "fusion.data": "teachers",
    "fusion.folds": "",
    "fusion.ridge": "fuse",
    "fusion.scene_prior": "fuse",
    "fusion.nonnegative": "fuse",
    "sweep": "sweep",
    "student": "sweep",
    "student.seeds": "report",
    "student.specialize": "specialize",
    "student_resources": "",
    "limits": "sweep",
    "qat": "qat",
    "tracking": "",
    "cluster": "",
}
NO_SWEEP = "sweep=null"
OWN_PLAN = {"stem": [8, 16], "stages": [{"channels": 16, "blocks": 1}]}
OWN_NETWORK = {"name": "module", "function": "json:loads"}
# Configurations that have every kind of section somewhere.
BASES: dict[str, list[str]] = {
    "tiny": [],
    "crossfit": ["fusion.data=crossfit", NO_SWEEP],
    "no search": [NO_SWEEP],
    "scheduled lambda": ["student.distillation.label_weight={start: 0.5, end: 0.1}", NO_SWEEP],
    "learned lambda": ["student.distillation.label_weight={start: 0.5}", NO_SWEEP],
    "cp_mobile": ["student.preset=cp_mobile", NO_SWEEP],
    "bsconv_cnn": ["student.preset=bsconv_cnn", NO_SWEEP],
    "dcase22_baseline": ["student.preset=dcase22_baseline", "student.augment.freq_mask=8", NO_SWEEP],
    "tf_sepnet": ["student.preset=tf_sepnet", NO_SWEEP],
    "cnn_gru": ["student.preset=cnn_gru", NO_SWEEP],
    "own plan": [f"student.model={json.dumps({'name': 'ds_flexinet', 'size': None, 'plan': OWN_PLAN})}", NO_SWEEP],
    "specialized": ["student.specialize={epochs: 2}", NO_SWEEP],
    "logits from a file": [f"teachers.imported={{beats_1: {{logits: {TINY}}}}}", NO_SWEEP],
    "own networks": [
        f"teachers.recipes.{name}={json.dumps({'model': OWN_NETWORK, 'frontend': {'kind': kind}})}"
        for name, kind in {"fbanks": "kaldi_fbank", "waves": "wave"}.items()
    ]
    + [NO_SWEEP],
    "resources for a model": ["teachers.resources_for={passt: {cpus: 1}}"],
}
# Where neighbors of the present value are not allowed, or there is none.
OTHERS: dict[str, list[Any]] = {
    "storage": ["/tmp/elsewhere"],
    "teachers.allow_missing": [1],
    "teachers.imported.beats_1.logits": [str(ROOT / "README.md")],
    "teachers.imported.beats_1.ids": [str(ROOT / "README.md")],
    "teachers.imported.beats_1.labels": [["a", "b"]],
    "teachers.resources.workers": [2],
    "teachers.resources_for": [{"passt": {"cpus": 2}}],
    "fusion.scene_prior": ["uniform"],
    "fusion.ridge": [0.1],
    "sweep.space": [{"optimizer.learning_rate": {"uniform": [0.001, 0.002]}}],
    "sweep.scheduler": ["none"],
    "sweep.validation.devices": [["a"]],
    "sweep.budget.epochs": [100],
    "sweep.sampler": ["random"],
    "sweep.cost": ["macs"],
    "data.mode": ["mapped"],
    "data.cache": ["/tmp/cache"],
    "tracking.uri": ["http://localhost:1"],
    "cluster.address": ["auto"],
    "logits.precision": ["bf16"],
    "student.distillation.soft_target": ["average"],
    "student.specialize": [{"epochs": 3}],
    "student.model.plan": [OWN_PLAN],
    "student.model.normalization.places": [["stages", "last"]],
    "student.augment.dir.apply_to": [["a"]],
    "teachers.recipes.*.augment.dir.apply_to": ["all"],
    "teachers.recipes.*.model.mels": [120],
    "teachers.recipes.*.model.function": ["json:dumps"],
    "teachers.recipes.*.model.source": ["0" * 64],
    "teachers.recipes.*.frontend.mels": [120],
    "student.model.plan.stages": [[{"channels": 24, "blocks": 1}]],
    "sweep": [{"space": {"optimizer.learning_rate": {"uniform": [0.001, 0.002]}}}],
}
# What else must change with a leaf.
WITH = {
    "student.model.plan": "student.model.size=null",
    "teachers.recipes.*.model.mels": "teachers.recipes.{}.frontend.mels=120",
    "teachers.recipes.*.frontend.mels": "teachers.recipes.{}.model.mels=120",
}
# Leaves with a test of their own below.
APART = {
    "corpus.path", "corpus.train_split", "corpus.impulse_responses", "teachers.checkpoints", "student.checkpoint",
    "teachers.recipes.*.model.pretrained", "teachers.imported", "teachers.recipes.*.init", "student.init",
    "corpus.layout", "corpus.table", "corpus.test", "corpus.test_share", "corpus.test_seed", "corpus.place_pattern",
    "corpus.segment_seconds",
}  # fmt: skip


def leaves(section: Section, path: str = ""):
    """(path, class and field) of every leaf of a configuration; a search's space is one leaf."""
    for name in type(section).model_fields:
        value, here = getattr(section, name), f"{path}{name}"
        if isinstance(value, Section):
            yield from leaves(value, f"{here}.")
        elif isinstance(value, dict) and value and all(isinstance(v, Section) for v in value.values()):
            if any(isinstance(v, Parameter) for v in value.values()):
                yield here, (type(section), name)
            else:
                for key, own in value.items():
                    yield from leaves(own, f"{here}.{key}.")
        else:
            yield here, (type(section), name)


def known(annotation: Any, found: set) -> set:
    """(class, field) of every leaf that a configuration can have."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        for name, field in annotation.model_fields.items():
            inner = sections_in(field.annotation)
            if not inner or Parameter in inner or get_origin(field.annotation) is tuple:
                found.add((annotation, name))
            else:
                if any(not (isinstance(a, type) and issubclass(a, Section)) for a in plain_in(field.annotation)):
                    found.add((annotation, name))
                for section in inner:
                    known(section, found)
    return found


def sections_in(annotation: Any) -> list[Any]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [s for argument in get_args(annotation) for s in sections_in(argument)]


def plain_in(annotation: Any) -> list[Any]:
    """The alternatives of an annotation that are no sections and no None; a dict of sections is none."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return plain_in(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return [a for argument in get_args(annotation) for a in plain_in(argument)]
    if annotation is type(None) or origin is dict or sections_in(annotation):
        return []
    return [annotation]


def general(path: str) -> str:
    return re.sub(r"recipes\.\w+\.", "recipes.*.", path)


def candidates(value: Any, annotation: Any):
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (value + 1, value - 1, value + 2, value * 2, value // 2, value + 8)
    elif isinstance(value, float):
        yield from (value * 0.9, value + 0.125, value * 1.1, 0.5, 0.25)
    elif value is None:
        yield from (1, 0.5, "a", 100.0)
    elif isinstance(value, str):
        literal = [a for a in (annotation, *get_args(annotation)) if get_origin(a) is Literal]
        yield from (other for a in literal for other in get_args(a) if other != value)
        yield f"{value}x"
    elif isinstance(value, tuple | list):
        yield [value[0] + 8, *value[1:]] if value and isinstance(value[0], int) else ["a"]
        yield list(value[:-1])
        yield []


def keys(plan: Plan) -> dict[str, tuple]:
    found = {stage: tuple(a.key for a in artifacts) for stage, artifacts in plan.by_stage().items()}
    # How many seeds there are is no part of a student's key: the first is the same.
    for stage in ("student", "specialize", "qat"):
        found[stage] = found[stage][:1]
    scored = [plan.evaluations[next(iter(models))].key for models in plan.forms.values() if models]
    found["evaluate"] = (plan.evaluation.key, *scored)
    return found


def following(first: str) -> set[str]:
    found, waiting = set(), [first] if first else []
    while waiting:
        stage = waiting.pop()
        found.add(stage)
        waiting += FOLLOWS[stage] - found
    return found


def first_stage(path: str, config: Config) -> str:
    beginnings = [b for b in FIRST if path == b or path.startswith(f"{b}.")]
    assert beginnings, f"{path}: a new key of the configuration; say in FIRST which stage's key it is part of"
    first = FIRST[max(beginnings, key=len)]
    if config.fusion.data == "crossfit":  # the folds take the place of the part `fusion`
        first = {"fusion.folds": "teachers", "partition.fusion": ""}.get(path, first)
    if first == "sweep" and config.sweep is None and path != "sweep":
        return "" if path.startswith("limits") else "student"
    return first


def changed(base: list[str], path: str, value: Any, annotation: Any) -> tuple[Config, Any] | None:
    """The configuration with another allowed value of the leaf, and that value."""
    kind = general(path)
    more = [WITH[kind].format(path.split(".")[2])] if kind in WITH else []
    for other, also in product([*OTHERS.get(kind, ()), *candidates(value, annotation)], [more, []]):
        if other == value:
            continue
        try:
            config = load_config(TINY, [*base, *also, f"{path}={json.dumps(other)}"])
        except (UserError, TypeError):
            continue
        found = config
        for part in path.split("."):
            found = found[part] if isinstance(found, dict) else getattr(found, part)
        if found != value:
            return config, other
    return None


def test_every_leaf_changes_the_keys_of_its_stage_and_of_what_follows(tmp_path):
    seen, done, wrong = set(), set(), []
    for name, more in BASES.items():
        base = [f"storage={tmp_path}", *more]
        config = load_config(TINY, base)
        before = keys(plan := Plan(config))
        for path, place in leaves(config):
            section, field = place
            seen.add(place)
            kind = general(path), section, config.sweep is None
            only_one = len(get_args(section.model_fields[field].annotation)) == 1  # the name of a kind of section
            if general(path) in APART or kind in done or only_one:
                continue
            done.add(kind)
            value = config
            for part in path.split("."):
                value = value[part] if isinstance(value, dict) else getattr(value, part)
            found = changed(base, path, value, section.model_fields[field].annotation)
            if found is None:
                wrong.append(f"{name}: {path}: no other allowed value than {value!r} was found; give one in OTHERS")
                continue
            altered, other = found
            another = Plan(altered)
            differ = {stage for stage, own in keys(another).items() if own != before[stage]}
            expected = following(first_stage(path, config))
            expected -= set() if config.sweep or altered.sweep else {"sweep"}
            expected -= set() if config.student.specialize or altered.student.specialize else {"specialize"}
            if differ != expected:
                wrong.append(
                    f"{name}: {path}: {value!r} -> {other!r}: changes {sorted(differ)}, not {sorted(expected)}"
                )
            if (another.key != plan.key) != bool(differ):
                wrong.append(f"{name}: {path}: the configuration's own key does not follow")
    assert not wrong, "\n".join(wrong)
    seen |= {(TableConfig, name) for name in TableConfig.model_fields}  # of corpora that are not the demo's
    missed = {f"{section.__name__}.{field}" for section, field in known(Config, set()) - seen}
    assert not missed, f"no configuration in BASES has {sorted(missed)}"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus") / "corpus"
    make_demo_corpus(root, load_config(TINY, ["storage=/tmp/unused"]).corpus.demo)
    return root


def differing(storage, one: list[str], other: list[str]) -> set[str]:
    base = [f"storage={storage}", "student.specialize={epochs: 2}"]
    plans = [keys(Plan(load_config(TINY, [*base, *more]))) for more in (one, other)]
    return {stage for stage, own in plans[0].items() if own != plans[1][stage]}


def test_a_corpus_and_its_training_split_are_part_of_the_clips(corpus, tmp_path):
    path = f"corpus.path={corpus}"
    assert differing(tmp_path, [], [path]) >= following("ingest")
    lines = (corpus / "evaluation_setup" / "fold1_train.csv").read_text().splitlines(keepends=True)
    (tmp_path / "fewer.csv").write_text("".join(lines[:-1]))
    assert differing(tmp_path, [path], [path, f"corpus.train_split={tmp_path}/fewer.csv"]) == following("ingest")


def test_how_a_corpus_is_read_is_part_of_the_clips(corpus, tmp_path):
    tau = [f"corpus.path={corpus}", NO_SWEEP]
    assert differing(tmp_path, tau, [*tau, "corpus.segment_seconds=1.0"]) == following("ingest") - {"sweep"}
    table = {"file": "meta.csv", "path": "filename", "scene": "scene_label", "place": "identifier"}
    table = [*tau, "corpus.layout=table", f"corpus.table={json.dumps(table | {'device': 'source_label'})}"]
    assert differing(tmp_path, tau, table) == following("ingest") - {"sweep"}
    for key in ("test_seed=1", "test_share=0.4", "table.device=null"):
        assert differing(tmp_path, table, [*table, f"corpus.{key}"]) == following("ingest") - {"sweep"}
    (corpus / "again.csv").write_text((corpus / "meta.csv").read_text())
    assert differing(tmp_path, table, [*table, "corpus.table.file=again.csv"]) == set()


@pytest.mark.parametrize("with_corpus", [True, False], ids=["corpus", "demo"])
def test_impulse_responses_count_by_their_contents_whatever_their_suffix(corpus, tmp_path, with_corpus):
    base = [f"corpus.path={corpus}"] if with_corpus else []
    for folder in ("one", "same", "changed", "renamed"):
        shutil.copytree(corpus / "dirs", tmp_path / folder)
    last = sorted((corpus / "dirs").iterdir())[-1].name
    samples, rate = sf.read(tmp_path / "changed" / last)
    sf.write(tmp_path / "changed" / last, -samples, rate, subtype=sf.info(tmp_path / "one" / last).subtype)
    (tmp_path / "renamed" / last).rename(tmp_path / "renamed" / last.replace(".wav", ".WAV"))

    def given(folder):
        return [*base, f"corpus.impulse_responses={tmp_path / folder}"]

    assert (tmp_path / "changed" / last).stat().st_size == (tmp_path / "one" / last).stat().st_size
    assert differing(tmp_path, given("one"), given("same")) == set()
    assert differing(tmp_path, given("one"), given("changed")) == following("ingest")
    assert differing(tmp_path, given("one"), given("renamed")) == following("ingest")
    assert differing(tmp_path, base, given("changed")) == following("ingest")


def test_weights_from_elsewhere_count_by_their_contents_and_with_the_front_end(tmp_path):
    config = load_config(TINY, [f"storage={tmp_path}"])
    names = {"one": 1, "same": 1, "other": 2}
    for folder, seed in names.items():
        (tmp_path / folder).mkdir()
        for name, recipe in config.teachers.recipes.items():
            save_file(build(recipe.model, 10, seed).state_dict(), tmp_path / folder / f"{name}.safetensors")

    def given(folder, *more):
        return [f"teachers.checkpoints={tmp_path / folder}", *more]

    assert differing(tmp_path, [], given("one")) == following("teachers")
    assert differing(tmp_path, given("one"), given("same")) == set()
    assert differing(tmp_path, given("one"), given("other")) == following("teachers")
    hop = "teachers.override.cp_resnet.frontend.hop=1000"
    assert differing(tmp_path, given("one"), given("one", hop)) == following("teachers")
    epochs = "teachers.override.cp_resnet.optimizer.epochs=9"  # of a training that there is not
    assert differing(tmp_path, given("one"), given("one", epochs)) == set()

    start = "teachers.override.passt.model.pretrained={}/{}/passt_dirfms_1.safetensors"
    started = {name: [start.format(tmp_path, name)] for name in names}
    assert differing(tmp_path, [], started["one"]) == following("teachers")
    assert differing(tmp_path, started["one"], started["same"]) == set()
    assert differing(tmp_path, started["one"], started["other"]) == following("teachers")

    student = "student.checkpoint={}/student-{}.safetensors"
    for name, seed in names.items():
        save_file(build(config.student.model, 10, seed).state_dict(), tmp_path / f"student-{name}.safetensors")
    taken = {name: [NO_SWEEP, student.format(tmp_path, name)] for name in names}
    assert differing(tmp_path, [NO_SWEEP], taken["one"]) == following("student")
    assert differing(tmp_path, taken["one"], taken["same"]) == set()
    assert differing(tmp_path, taken["one"], taken["other"]) == following("student")


def test_fields_that_went_or_have_another_name_are_still_read_and_stand_in_keys():
    old = load_config("demo", ["fusion.class_prior=uniform", "fusion.tasks=1", "sweep.budget.minutes=null"])
    new = load_config("demo", ["fusion.scene_prior=uniform"])
    assert old.fusion == new.fusion
    assert old.sweep == new.sweep
    assert Plan(old).key == Plan(new).key != Plan(load_config("demo")).key
    assert new.fusion.for_key() == {
        "data": "holdout", "folds": 4, "ridge": "auto", "class_prior": "uniform", "nonnegative": False, "tasks": 1,
    }  # fmt: skip
    assert new.sweep.for_key()["budget"] == {"epochs": None, "minutes": None}
    for gone in ("fusion.tasks=8", "sweep.budget.minutes=5"):
        key = gone.partition("=")[0]
        with pytest.raises(UserError, match=f"{key}: unknown key"):
            load_config("demo", [gone])
    with pytest.raises(UserError, match=r"fusion\.class_prior: unknown key"):  # which of the two is meant?
        load_config("demo", ["fusion.class_prior=uniform", "fusion.scene_prior=empirical"])


def test_fields_that_came_later_are_in_no_key_while_they_have_their_default():
    """What was made before they were there is recognized: recipes are nested, and a search has one, too."""
    config = load_config(TINY)
    plan = Plan(config)
    sections = [plan.students["student"].config["student"], next(iter(plan.teachers.values())).config["recipe"]]
    assert Recipe.later == {"precision", "deterministic", "label_smoothing", "init"}
    assert not any(Recipe.later & set(section) for section in sections)
    students = [Plan(load_config(TINY, [f"student.deterministic={value}"])).students for value in ("false", "true")]
    assert students[0]["student"].key == plan.students["student"].key != students[1]["student"].key
    assert students[1]["student"].config["student"]["deterministic"] is True
    assert "deterministic" in config.student.model_dump()
