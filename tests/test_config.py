"""Configurations: composition, overrides, and one clear line for everything that is wrong."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from asc_ray.config.composition import PRESETS, load_config
from asc_ray.errors import ConfigError
from asc_ray.plan import Plan
from asc_ray.search.proposals import propose

TWELVE = [
    f"{kind}_{number}"
    for kind in ("passt_dirfms", "passt_fms", "cpr_128k_dirfms", "cpr_128k_fms")
    for number in (1, 2, 3)
]


@pytest.mark.parametrize("name", [path.stem for path in sorted(PRESETS.glob("*.yaml"))])
def test_every_preset_loads_and_has_the_twelve_teachers(name):
    config = load_config(name)
    small = [name.replace("passt", "bsconv") for name in TWELVE]  # where a PaSST learns little
    assert list(config.teachers.recipes) == (TWELVE if name in ("tau22", "demo") else small)
    assert config.storage.is_absolute()


def test_the_twelve_recipes_are_those_of_the_reading():
    recipes = load_config("tau22").teachers.recipes
    passt, cpr = recipes["passt_dirfms_2"], recipes["cpr_128k_dirfms_3"]
    assert (passt.seed, cpr.seed) == (2, 3)
    assert (passt.optimizer.epochs, passt.optimizer.batch_size) == (25, 80)
    assert (cpr.optimizer.epochs, cpr.optimizer.batch_size) == (150, 256)
    assert (passt.optimizer.learning_rate, passt.optimizer.weight_decay) == (1e-5, 1e-3)
    assert (cpr.optimizer.learning_rate, cpr.optimizer.weight_decay) == (1e-3, 1e-3)
    assert tuple(passt.optimizer.schedule.model_dump().values()) == (3, 3, 10, 0.01)
    assert tuple(cpr.optimizer.schedule.model_dump().values()) == (15, 50, 85, 0.005)
    assert (passt.augment.roll, passt.augment.freq_mask, passt.augment.time_mask) == (10000, 48, 20)
    assert (cpr.augment.roll, cpr.augment.freq_mask, cpr.augment.time_mask) == (4000, 48, 0)
    assert (passt.augment.freq_mixstyle.p, cpr.augment.freq_mixstyle.p) == (0.4, 0.8)
    for name, recipe in recipes.items():
        p = (0.6 if name.startswith("passt") else 0.4) if "dirfms" in name else 0.0
        assert recipe.augment.dir.p == p
        assert recipe.augment.dir.apply_to == ("a",)
        assert recipe.augment.freq_mixstyle.alpha == 0.4


def test_base_files_merge_mapping_by_mapping_and_overrides_come_last(tmp_path):
    (tmp_path / "below.yaml").write_text("base: sub/lower.yaml\nstudent: {optimizer: {epochs: 7}}\n")
    (tmp_path / "sub").mkdir()
    lower = yaml.safe_load((PRESETS / "demo.yaml").read_text())
    lower["base"] = str(PRESETS / "tau22.yaml")
    (tmp_path / "sub" / "lower.yaml").write_text(yaml.safe_dump(lower))
    config = load_config(tmp_path / "below.yaml", ["student.optimizer.batch_size=8", "storage=/tmp/x"])
    assert config.student.optimizer.epochs == 7
    assert config.student.optimizer.batch_size == 8
    assert config.student.optimizer.learning_rate == load_config("demo").student.optimizer.learning_rate
    assert config.storage == Path("/tmp/x")
    (tmp_path / "above.yaml").write_text("base: [demo, below.yaml]\nname: above\n")  # a preset by its name, a file
    assert load_config(tmp_path / "above.yaml").student == load_config(tmp_path / "below.yaml").student


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "student.optimizer.epoch=3",
            r"student\.optimizer\.epoch: unknown key; allowed here: .*epochs.* did you mean epochs",
        ),
        ("studnet.seed=3", r"studnet: unknown key; allowed here: .* did you mean student"),
        ("student.model.depth=3", r"student\.model\.depth: unknown key; allowed here: name, normalization, plan, size"),
        ("teachers.recipes.passt_fms_1.model.size=3", r"passt_fms_1\.model\.size: unknown key; allowed here: depth"),
        ("student.optimizer.epochs=many", r"student\.optimizer\.epochs: found 'many'"),
        ("student.optimizer.epochs=0", r"student\.optimizer\.epochs: found 0: .*greater than or equal to 1"),
        ("student.optimizer.learning_rate=-1", r"learning_rate: found -1"),
        ("student.model.size=sm9", r"student\.model\.size: found 'sm9': .*'sm1', 'sm2', 'sm3' or 'sm4'"),
        ("student.model.name=resnet", r"student\.model: .*'passt', 'cp_resnet', 'cp_mobile', 'ds_flexinet'"),
        (
            "student.distillation.soft_target=fuzed",
            r"soft_target: 'fuzed' is unknown; allowed: none, average, fused, passt",
        ),
        ("teachers.systems=[passt_fms_9]", r"unknown teacher 'passt_fms_9'; did you mean passt_fms_\d\?"),
        ("teachers.systems=[passt_fms_1, passt_fms_1]", "a name occurs twice"),
        ("teachers.systems=[]", "teachers: recipes, imported: no system"),
        ("teachers.override.resnet.seed=1", r"teachers\.override\.resnet: unknown model; allowed: passt, cp_resnet"),
        ("sweep.space.augment.rol.uniform=[0,1]", r"sweep\.space"),
        ("storage=s3://bucket/x", "tracking.uri: must be given where storage is a URI"),
        ("student.augment.freq_mask=300", r"student: augment\.freq_mask is 300, but the front end's log-mel has 256"),
        ("teachers.recipes.passt_fms_1.frontend.mels=64", r"passt_fms_1: frontend makes 64 mels x 100 frames"),
        ("data.mode=ram", r"data\.mode: found 'ram': .*'auto'.*mapped"),
        ("data.resident_share=2", r"data\.resident_share: found 2: .*less than or equal to 1"),
        (
            "data={mode: stream, cache: /tmp}",
            r"data\.cache: a stream copies no clip store of a folder; leave cache null",
        ),
        ("student.seed", r"expected KEY\.PATH=VALUE"),
        ("student.seed=[", "not valid YAML"),
    ],
)
def test_a_wrong_configuration_is_one_line_with_the_key(override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config("demo", [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a list", "expected a mapping"),
        ("a: [", "not valid YAML"),
        ("base: absent.yaml", r"base: absent\.yaml: no such file"),
        ("base: this.yaml", "lead back to the file itself"),
        ("storage: x", r"teachers: is required"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, content, message):
    file = tmp_path / "this.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(file)
    assert str(file) in str(caught.value)


def test_keys_follow_what_an_artifact_is_made_of_and_nothing_else(tmp_path):
    def keys(*overrides):
        plan = Plan(load_config("demo", [f"storage={tmp_path}", *overrides]))
        return {stage: [a.key for a in artifacts] for stage, artifacts in plan.by_stage().items()}

    base = keys()
    assert keys("name=other", "cluster.retries=9", "tracking.experiment=x", "student_resources.cpus=2") == base
    assert keys("data.mode=resident", "data.cache=/tmp/x") == base
    qat = keys("qat.epochs=5")
    assert {stage for stage in base if qat[stage] != base[stage]} == {"qat", "evaluate", "report"}
    teacher = keys("teachers.recipes.passt_fms_2.seed=9")
    assert sum(a != b for a, b in zip(teacher["teachers"], base["teachers"], strict=True)) == 1
    assert teacher["ingest"] == base["ingest"]
    assert teacher["fuse"] != base["fuse"]
    corpus = keys("corpus.demo.seed=1")
    assert all(corpus[stage] != base[stage] for stage in base if base[stage])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["pipeline", "--set", "student.optimizer.epoch=3"], 2, "student.optimizer.epoch: unknown key"),
        (["teachers", "--config", "absent.yaml"], 2, "presets demo"),
        (["pipeline", "--set", "corpus.path=/nowhere"], 1, "/nowhere/meta.csv"),
        (["teachres"], 2, "No such command"),
        (["pipeline", "--set", "storage=/proc/nothing"], 2, "storage: /proc/nothing cannot be written"),
        (["student", "--confg", "demo"], 2, "No such option"),
        (["pipeline", "--set", "corpus.train_split=split5.csv"], 2, "corpus.train_split: chooses among the clips of"),
        (["corpus", "download", "tau23", "out"], 2, "tau22"),
        (["verify", "/nowhere"], 1, "/nowhere: no manifest.json"),
    ],
)
def test_the_command_line_says_what_is_wrong_without_a_traceback(tmp_path, arguments, code, message):
    command = [sys.executable, "-m", "asc_ray.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_demo_corpus_is_one_command_and_never_overwrites(tmp_path):
    sizes = ["corpus.demo.train_clips_per_scene=4", "corpus.demo.train_places_per_scene=2"]
    sizes += ["corpus.demo.test_seconds_per_scene=1", "corpus.demo.test_places_per_scene=1"]
    arguments = [sys.executable, "-m", "asc_ray.cli", "corpus", "demo", str(tmp_path / "out")]
    arguments += [word for size in sizes for word in ("--set", size)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert "--set corpus.path=" in done.stdout
    assert len(list((tmp_path / "out" / "audio").glob("*.wav"))) == 10 * 4 + 10 * 9
    again = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert str(tmp_path / "out") in again.stderr
    assert "Traceback" not in again.stderr


def test_a_stage_names_the_one_that_it_needs(tmp_path):
    command = [sys.executable, "-m", "asc_ray.cli", "student", "--set", f"storage={tmp_path}/s"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert "run `asc-ray fuse`" in done.stderr


def test_a_student_s_preset_gives_way_to_what_else_is_given(tmp_path):
    """Its network and front end take the place of those below, whatever the order of the overrides."""
    overrides = ["student.model.width=48", "student.preset=cp_mobile", f"storage={tmp_path}"]
    student = load_config("demo", overrides).student
    assert (student.model.name, student.model.width) == ("cp_mobile", 48)
    assert student.optimizer == load_config("demo", [f"storage={tmp_path}"]).student.optimizer
    file = tmp_path / "mine.yaml"
    file.write_text(
        f"base: {PRESETS / 'demo.yaml'}\nstudent: {{preset: dcase22_baseline, augment: {{freq_mask: 8}}}}\n"
    )
    student = load_config(file).student
    assert (student.model.name, student.frontend.mels, student.augment.freq_mask) == ("dcase22_baseline", 40, 8)
    with pytest.raises(ConfigError, match="cp_mobil: no such network; did you mean cp_mobile"):
        load_config("demo", ["student.preset=cp_mobil"])


def test_a_student_s_recipe_takes_the_place_of_another_and_keeps_the_soft_target(tmp_path):
    overrides = ["student.optimizer.epochs=30", "student.distillation.soft_target=none", "student.recipe=cpjku"]
    student = load_config("small", overrides).student
    assert (student.augment.dir.apply_to, student.augment.dir.threshold) == (("a",), None)
    assert (student.optimizer.epochs, student.optimizer.batch_size) == (30, 256)
    assert (student.distillation.soft_target, student.distillation.label_weight) == ("none", 0.1695)
    assert student.model == load_config("small").student.model
    file = tmp_path / "mine.yaml"
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "ours.yaml").write_text("optimizer: {epochs: 9}\n")
    file.write_text(f"base: {PRESETS / 'small.yaml'}\nstudent: {{recipe: ours, optimizer: {{batch_size: 4}}}}\n")
    student = load_config(file).student
    assert (student.optimizer.epochs, student.optimizer.batch_size, student.augment.roll) == (9, 4, 0)
    with pytest.raises(
        ConfigError, match=r"papr: no such recipe; did you mean paper\? known: cpjku, cpjku_short, paper, short"
    ):
        load_config("demo", ["student.recipe=papr"])


def test_a_search_s_preset_gives_the_space(tmp_path):
    def space(*overrides):
        return load_config("demo", [*overrides, f"storage={tmp_path}"]).sweep.space

    assert set(space("sweep.preset=fms")) == {"augment.freq_mixstyle.p", "augment.freq_mixstyle.alpha"}
    key = "sweep.space.optimizer.learning_rate"
    more = space(f"{key}={{loguniform: [0.001, 0.002]}}", "sweep.preset=fms")
    assert more["optimizer.learning_rate"].loguniform == (0.001, 0.002)
    assert len(more) == 3
    full, parts = space("sweep.preset=full"), [space(f"sweep.preset={name}") for name in ("kd", "adir", "fms")]
    assert all(full[name] == own for part in parts for name, own in part.items())
    with pytest.raises(
        ConfigError, match=r"student\.distillation\.soft_target: 'all' is unknown; allowed: none, average"
    ):
        space("sweep.space.distillation.soft_target={choice: [fused, all]}")
    with pytest.raises(ConfigError, match="fmz: no such search; did you mean fms"):
        space("sweep.preset=fmz")


def test_a_parameter_and_a_label_weight_replace_those_below_and_do_not_mix_with_them(tmp_path):
    file = tmp_path / "mine.yaml"
    space = "{distillation.temperature: {uniform: [1, 2]}, optimizer.learning_rate: {loguniform: [0.001, 0.01]}}"
    file.write_text(f"base: {PRESETS / 'demo.yaml'}\nsweep: {{preset: kd, space: {space}}}\n")
    found = load_config(file).sweep.space
    assert found["distillation.temperature"].uniform == (1, 2)
    assert "distillation.label_weight" in found
    file.write_text(f"base: {PRESETS / 'demo.yaml'}\nsweep: {{preset: kd}}\n")
    (tmp_path / "own.yaml").write_text(f"base: mine.yaml\nsweep: {{space: {space}}}\n")
    assert set(load_config(tmp_path / "own.yaml").sweep.space) == {
        "distillation.temperature",
        "optimizer.learning_rate",
    }
    (tmp_path / "learned.yaml").write_text("student: {distillation: {label_weight: {start: 0.3, low: 0.1}}}\n")
    (tmp_path / "cp.yaml").write_text("student: {preset: cp_mobile}\n")
    bases = f"[{PRESETS / 'demo.yaml'}, learned.yaml, cp.yaml]"
    file.write_text(f"base: {bases}\nstudent: {{distillation: {{label_weight: {{start: 0.5, end: 0.1}}}}}}\n")
    student = load_config(file).student
    assert student.model.name == "cp_mobile"  # in place of the demo's, sizes and all
    assert student.distillation.label_weight.end == 0.1


def test_soft_targets_inside_an_alternative_are_known_and_checked():
    def config(target):
        one_of = f"{{kd: {{soft_target: {target}, temperature: {{uniform: [1, 4]}}}}, plain: {{soft_target: none}}}}"
        return load_config("demo", [f"sweep.space={{distillation: {{one_of: {one_of}}}}}"])

    assert set(config("average").soft_target_names) == {"fused", "average", "none"}
    with pytest.raises(ConfigError, match=r"student\.distillation\.soft_target: 'nosuch' is unknown"):
        config("nosuch")


def test_the_order_of_a_space_changes_neither_its_key_nor_its_search():
    parts = ["augment.dir.p: {choice: [0.1, 0.2]}", "augment.freq_mixstyle.p: {choice: [0.3, 0.4]}"]
    one_of = ["a: {p: {uniform: [0, 1]}}", "b: {p: 0.0}"]
    configs = [
        load_config("demo", [f"sweep.space={{augment.dir: {{one_of: {{{', '.join(own)}}}}}}}"]).sweep
        for own in (one_of, one_of[::-1])
    ]
    swapped = [load_config("demo", [f"sweep.space={{{', '.join(own)}}}"]).sweep for own in (parts, parts[::-1])]
    for one, other in (configs, swapped):
        assert [propose(one, n, []) for n in range(4)] == [propose(other, n, []) for n in range(4)]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("student.preset=bsconv_cnn", "student.model.channels"),
        ("qat.frozen_epochs=4", "frozen_epochs: 4 of 4 epochs leaves none"),
    ],
)
def test_what_would_fail_hours_later_is_refused_at_once(override, message):
    more = ["student.model.channels=[-1]"] if "bsconv" in override else []
    with pytest.raises(ConfigError, match=message):
        load_config("demo", [override, *more])


def test_a_network_too_deep_for_its_front_end_is_refused(tmp_path):
    done = command(
        "pipeline", "--config", "demo", "--set", f"storage={tmp_path}/s", "--set", "student.preset=cp_resnet_64k",
        "--set", "student.frontend.hop=16000",
    )  # fmt: skip
    assert done.returncode == 2
    assert re.search(r"student\.model: cp_resnet does not work on the \d+ mels x \d+ frames", done.stderr)


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "asc_ray.cli", *arguments], capture_output=True, text=True, check=False
    )


def test_complexity_counts_and_refuses():
    small = command("complexity", "sm1")
    assert small.returncode == 0, small.stderr
    assert "parameters        13,728\n" in small.stdout
    assert "within the limits: 128,000 bytes as int8, 30,000,000 MACs" in small.stdout
    over = command("complexity", "sm1", "--limit", "macs=1e6", "--limit", "bytes=20000")
    assert over.returncode == 1
    assert over.stderr == "asc-ray: sm1: over the limits: limits.macs: 3,892,630, allowed 1,000,000\n"
    wrong = command("complexity", "sm1", "--limit", "watts=3")
    assert (wrong.returncode, "expected bytes=NUMBER or macs=NUMBER" in wrong.stderr) == (2, True)


def test_a_student_over_the_limits_is_refused_before_any_work(tmp_path):
    arguments = ["--config", "demo", "--set", f"storage={tmp_path}/s", "--set", "student.model={name: cp_resnet}"]
    done = command("pipeline", *arguments, "--set", "limits.bytes=100000")
    assert done.returncode == 2
    assert "student.model: cp_resnet is too large for the device (limits.bytes: 127,684, allowed 100,000" in done.stderr
    assert not (tmp_path / "s").exists()


def test_a_student_without_int8_form_is_refused_before_any_work(tmp_path):
    done = command("pipeline", "--config", "demo", "--set", f"storage={tmp_path}/s", "--set", "student.preset=cnn_gru")
    assert (done.returncode, done.stdout) == (2, "")
    assert "student.model: cnn_gru has no int8 form, because a GRU feeds its state back" in done.stderr
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("2", "student.distillation.label_weight: found 2: input should be less than or equal to 1"),
        ("{start: 0.5, end: 2}", "student.distillation.label_weight.end: found 2: input should be less than or equal"),
        ("{start: 0.5, low: 0.6}", "student.distillation.label_weight: low 0.6 < start 0.5 < high 1 must hold"),
        ("{start: 0.5, end: 0.1, shap: cosine}", "label_weight.shap: unknown key; allowed here: .*did you mean shape"),
    ],
)
def test_a_wrong_label_weight_is_told_in_the_form_that_was_meant(value, message):
    with pytest.raises(ConfigError, match=message) as refused:
        load_config("demo", ["storage=/tmp/none", f"student.distillation.label_weight={value}"])
    assert ";" not in str(refused.value).replace("; allowed", "").replace("; did", "")  # one finding
