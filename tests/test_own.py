"""Networks of the user's own code: trained, resumed, stored and asked as others are; and what is refused of them."""

import hashlib
import random
import shutil
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, clip_store, command, joined, new_storage
from safetensors.torch import load_file
from test_tracking import all_runs
from typer.testing import CliRunner

from asc_ray.artifacts import Artifact, read_manifest, write_record
from asc_ray.audio.frontends import front_end
from asc_ray.cli import app
from asc_ray.config.composition import load_config
from asc_ray.data.clips import ClipStore
from asc_ray.data.config import DemoConfig, PartitionConfig
from asc_ray.data.corpus import read_corpus
from asc_ray.data.demo import make_demo_corpus
from asc_ray.data.logits import Ensemble, read_logits
from asc_ray.ensemble.stored import StoredEnsemble
from asc_ray.ensemble.teachers import import_teacher, train_teacher
from asc_ray.errors import ConfigError, UserError
from asc_ray.models import own
from asc_ray.models.own import try_out
from asc_ray.models.registry import build, folded
from asc_ray.plan import Plan
from asc_ray.students.config import StudentConfig
from asc_ray.tracking.config import default_uri
from asc_ray.training import parallel
from asc_ray.training.config import Recipe
from asc_ray.training.dataset import Source

sys.path.insert(0, str(ROOT / "bench"))
from torchaudio_cpu import import_torchaudio

KALDI, WAVE = {"kind": "kaldi_fbank"}, {"kind": "wave", "sample_rate": 16_000}


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module of networks to a folder on Python's path, and return its function's name."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(own, "_imported", {})

    def write(text: str, name: str = "mine") -> str:
        head = "import random\nimport numpy as np\nimport torch\nfrom torch import nn\nF = nn.functional\n"
        (tmp_path / f"{name}.py").write_text(head + textwrap.dedent(text))
        monkeypatch.delitem(sys.modules, name, raising=False)
        return f"{name}:build"

    return write


def recipe(function: str, frontend=WAVE, **settings) -> Recipe:
    optimizer = {"epochs": 3, "batch_size": 8, "learning_rate": 0.01}
    model = {"name": "module", "function": function}
    return Recipe.model_validate({"model": model, "frontend": frontend, "optimizer": optimizer, "seed": 1, **settings})


def tried(function: str, frontend=WAVE) -> None:
    settings = recipe(function, frontend)
    try_out(build(settings.model, 10, 1), settings.frontend.shape(32_000))


# It draws from every generator that a process has, when it is made and in training.
DRAWING = """
    print("a network is made")

    class Net(nn.Module):
        def __init__(self, scenes):
            super().__init__()
            self.first, self.head = nn.Linear(160, 24), nn.Linear(24, scenes)
            self.register_buffer("scale", torch.tensor(1 + random.random() + np.random.rand()))

        def forward(self, wave):
            x = F.relu(self.first(wave.unflatten(1, (100, 160)).abs() * self.scale)).mean(1)
            if self.training:
                x = F.dropout(x, 0.3) * (1 + 0.1 * np.random.rand()) + 0.01 * random.random()
            return self.head(x)

    def build(scenes):
        return Net(scenes)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Source:
    folder = tmp_path_factory.mktemp("corpus")
    make_demo_corpus(
        folder / "corpus",
        DemoConfig(
            train_clips_per_scene=4, train_places_per_scene=4, test_seconds_per_scene=1, test_places_per_scene=1
        ),
    )
    return Source(clip_store(folder, read_corpus(folder / "corpus")), PartitionConfig(fusion=0.25, validation=0.25))


def trained(artifact: Artifact, source: Source, settings: Recipe, until: int | None = None) -> dict[str, torch.Tensor]:
    def stop(metrics):
        if metrics["epoch"] == until:
            raise KeyboardInterrupt

    try:
        train_teacher(artifact, source, settings, on_epoch=stop)
    except KeyboardInterrupt:
        return {}
    return load_file(artifact.path / "model.safetensors")


def artifact(folder, name: str) -> Artifact:
    return Artifact(folder, "teachers", name, "0123456789abcdef", {}, {})


@pytest.mark.parametrize("cut", [1, 2])
def test_what_foreign_code_draws_comes_from_the_seed_and_a_resumed_training_equals_a_whole_one(
    module, source, tmp_path, cut
):
    settings = recipe(module(DRAWING))
    random.seed(7), np.random.seed(7), torch.manual_seed(7)  # which say nothing
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    whole = trained(artifact(tmp_path, "whole"), source, settings)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])

    random.seed(8), np.random.seed(8), torch.manual_seed(8)
    assert trained(artifact(tmp_path, "cut"), source, settings, until=cut) == {}
    resumed = trained(artifact(tmp_path, "cut"), source, settings)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    other = trained(artifact(tmp_path, "other"), source, settings.model_copy(update={"seed": 2}))
    assert not torch.equal(whole["network.scale"], other["network.scale"])


def test_steps_draw_different_numbers(module, source, tmp_path):
    """A network that notes what it draws: no two steps have the same."""
    noting = """
        class Net(nn.Module):
            drawn = []

            def __init__(self, scenes):
                super().__init__()
                self.head = nn.Linear(100, scenes)

            def forward(self, wave):
                if self.training:
                    self.drawn.append((float(torch.rand(())), np.random.rand(), random.random()))
                return self.head(wave.unflatten(1, (100, 160)).mean(2))

        def build(scenes):
            return Net(scenes)
    """
    trained(artifact(tmp_path, "noting"), source, recipe(module(noting)))
    drawn = sys.modules["mine"].Net.drawn
    assert len(drawn) > 5
    for each in zip(*drawn, strict=True):
        assert len(set(each)) == len(drawn)


NET = """
    class Net(nn.Module):
        def __init__(self, scenes):
            super().__init__()
            self.scenes, self.head = scenes, nn.Linear(16000, scenes)

        def forward(self, wave):
            {body}

    def build(scenes):
        {made}
"""
WRONG = {
    "returns tuple; expected a tensor of logits": ("return self.head(wave), wave", "return Net(scenes)"),
    r"returns shape \(3, 1\) for an input of shape \(3, 16000\); expected logits \(3, 10\)": (
        "return self.head(wave)[:, :1]",
        "return Net(scenes)",
    ),
    "answers noise with values that are not finite": ("return self.head(wave) / 0", "return Net(scenes)"),
    r"returns torch.int64; expected logits in floating point": ("return self.head(wave).long()", "return Net(scenes)"),
    r"fails on an input of shape \(3, 16000\): RuntimeError: mat1 .*mine.py, line \d+\)": (
        "return self.head(wave[:, 1:])",
        "return Net(scenes)",
    ),
    r"mine:build\(10\) failed: ValueError: no such thing \(.*mine.py, line \d+\)": (
        "return self.head(wave)",
        "raise ValueError('no such thing')",
    ),
    r"mine:build\(10\) returns int; expected a torch.nn.Module": ("return self.head(wave)", "return scenes"),
    "answers a clip differently when others stand beside it": (
        "return self.head(F.batch_norm(wave, None, None, training=True))",
        "return Net(scenes)",
    ),
    "answers the same clips differently when it is asked again": (
        "return self.head(F.dropout(wave, 0.5, training=True)) * 100",
        "return Net(scenes)",
    ),
    "has no parameter to train": ("return self.head(wave)", "return Net(scenes).requires_grad_(False)"),
}


@pytest.mark.parametrize("message", WRONG)
def test_networks_that_cannot_be_trained_are_one_line(module, message):
    body, made = WRONG[message]
    function = module(NET.format(body=body, made=made))
    with pytest.raises(UserError, match=message) as error:
        tried(function)
    assert "mine:build" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_network_that_answers_otherwise_in_training_is_one_line(module, source, tmp_path):
    """One column would be a loss of 0 for every clip, and nothing would be learned in silence."""
    function = module(
        NET.format(body="return self.head(wave)[:, :1 if self.training else None]", made="return Net(scenes)")
    )
    with pytest.raises(UserError, match=r"mine:build: the network returns shape \(8, 1\)"):
        train_teacher(artifact(tmp_path, "odd"), source, recipe(function))


def test_modules_that_cannot_be_imported_are_one_line(module, tmp_path):
    with pytest.raises(ValueError, match=r"mine:build: Python's path has no module mine; put the folder"):
        recipe("mine:build")
    with pytest.raises(ValueError, match=r"json.nothing:build: Python's path has no module json.nothing"):
        recipe("json.nothing:build")
    with pytest.raises(ValueError, match="sys is no file"):
        recipe("sys:exit")
    with pytest.raises(ValueError, match="String should match pattern"):
        recipe("mine.py")
    for text, message in {
        "import nothing_like_it": "mine cannot be imported: ModuleNotFoundError: No module named 'nothing_like_it'",
        "def other(): pass": "the module has no such function",
        "def build(:": "mine cannot be imported: SyntaxError",
    }.items():
        function = module(text)
        own._imported.clear()
        with pytest.raises(UserError, match=message):
            build(recipe(function).model, 10)


def test_what_a_module_sets_for_the_whole_process_is_undone(module):
    setting = """
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)

        def build(scenes):
            torch.set_num_threads(3)
            return nn.Linear(16000, scenes, dtype=torch.float32)
    """
    threads = torch.get_num_threads()
    tried(module(setting))
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32
    assert torch.get_num_threads() == threads


def test_the_source_is_in_the_key_and_another_source_is_refused(module, tmp_path, monkeypatch):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("raise SystemExit('a configuration is read without any import')")
    (tmp_path / "package" / "networks.py").write_text("def build(scenes): ...")
    config = tmp_path / "own.yaml"
    config.write_text(
        f"base: demo\nstorage: {tmp_path}\n"
        "teachers: {systems: [cpr_128k_fms_1, {name: mine, module: 'package.networks:build'}]}\n"
    )
    one = Plan(load_config(config))
    model = one.teachers["mine"].config["recipe"]["model"]
    assert model["source"] == hashlib.sha256(b"def build(scenes): ...").hexdigest()
    (tmp_path / "package" / "networks.py").write_text("def build(scenes): ... # another")
    two = Plan(load_config(config))
    assert one.teachers["mine"].key != two.teachers["mine"].key
    assert one.logits["mine"].key != two.logits["mine"].key
    assert one.teachers["cpr_128k_fms_1"].key == two.teachers["cpr_128k_fms_1"].key

    function = module(NET.format(body="return self.head(wave)", made="return Net(scenes)"))
    settings = recipe(function)
    build(settings.model, 10)
    (tmp_path / "mine.py").write_text("def build(scenes): ...")
    with pytest.raises(UserError, match=r"the module's file has SHA-256 .* was asked for"):
        build(settings.model, 10)
    with pytest.raises(UserError, match="mine has changed since this process has imported it"):
        build(recipe(function).model, 10)


def test_entries_of_systems_are_checked(module, tmp_path):
    function, config = module("def build(scenes): ..."), tmp_path / "own.yaml"

    def plan(*entries: str, also: str = "") -> Plan:
        config.write_text(
            f"base: demo\nstorage: {tmp_path}\nteachers:\n  systems: [cpr_128k_fms_1, {', '.join(entries)}]\n{also}"
        )
        return Plan(load_config(config))

    mine = f"{{name: mine, module: '{function}'"
    with pytest.raises(ConfigError, match="a name occurs twice"):
        plan(mine + "}", mine + "}")
    with pytest.raises(ConfigError, match="a name occurs twice"):
        plan(mine.replace("mine,", "cpr_128k_fms_1,") + "}")
    with pytest.raises(ConfigError, match=r"teachers.recipes.mine.optimiser: unknown key; .* did you mean optimizer"):
        plan(mine + ", optimiser: {epochs: 3}}")
    with pytest.raises(ConfigError, match=r"system 'a/b': allowed are letters"):
        plan(mine.replace("mine,", "a/b,") + "}")
    with pytest.raises(ConfigError, match=r"frontend: unknown kind; allowed: logmel, kaldi_fbank, wave"):
        plan(mine + ", frontend: {kind: mfcc}}")
    with pytest.raises(ConfigError, match=r"recipes.mine.frontend.n_fft: unknown key; allowed here: .*window_type"):
        plan(mine + ", frontend: {kind: kaldi_fbank, n_fft: 512}}")
    with pytest.raises(ConfigError, match=r"freq_mixstyle.p change a log-mel, and frontend.kind: wave makes none"):
        plan(mine + ", frontend: {kind: wave}, augment: {freq_mask: 8}}")
    with pytest.raises(ValueError, match=r"frontend.kind: wave, and cp_resnet takes a log-mel"):
        Recipe.model_validate({"model": {"name": "cp_resnet"}, "frontend": WAVE})
    with pytest.raises(ConfigError, match=r"imported.mine.logits: is required"):
        plan("{name: mine}")
    changed = plan(mine + ", seed: 3}", also="  override: {module: {optimizer: {epochs: 7}}}\n")
    assert changed.config.teachers.recipes["mine"].optimizer.epochs == 7
    assert changed.config.teachers.recipes["mine"].seed == 3


def test_a_student_is_of_no_code_of_one_s_own_and_has_the_devices_front_end(module):
    function = module("def build(scenes): ...")
    with pytest.raises(ValueError, match="Input tag 'module' found using 'name' does not match"):
        StudentConfig.model_validate({"model": {"name": "module", "function": function}})
    for frontend in (KALDI, WAVE):
        with pytest.raises(ValueError, match="kind"):
            StudentConfig.model_validate({"model": {"name": "ds_flexinet"}, "frontend": frontend})


def test_batch_statistics_that_workers_do_not_share_are_refused(monkeypatch):
    monkeypatch.setattr(parallel, "world", lambda: 2)
    with pytest.raises(UserError, match="the network has a BatchNorm1d, whose statistics workers on CPUs do not share"):
        parallel.distributed(torch.nn.Sequential(torch.nn.Conv1d(1, 2, 3), torch.nn.BatchNorm1d(2)))


EXAMPLES = {"WaveNetwork": WAVE, "Transformer": KALDI, "Conformer": KALDI}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_networks_answer(name, monkeypatch):
    if name == "Conformer":
        try:
            import_torchaudio()
        except ImportError as error:
            pytest.skip(f"torchaudio does not import: {error}")
    monkeypatch.setattr(sys, "path", [str(ROOT / "examples"), *sys.path])
    tried(f"own_networks:{name}", EXAMPLES[name])


CONFIG = f"""
base: [{ROOT / "examples" / "own_networks.yaml"}, {TINY}]
storage: STORAGE
sweep: null
student: {{distillation: {{soft_target: none}}}}
teachers:
  systems:
    - {{name: transformer, module: "own_networks:Transformer", frontend: {{kind: kaldi_fbank}}}}
    - {{name: waves, module: "own_networks:WaveNetwork", frontend: {{kind: wave, sample_rate: 16000}}}}
  override:
    module: {{optimizer: {{epochs: 3, batch_size: 32, learning_rate: 0.002}}}}
"""


@pytest.mark.campaign
def test_a_killed_training_of_own_networks_goes_on_and_the_ensemble_is_asked(tmp_path, monkeypatch):
    """Through Ray's workers, which look for modules where the driver was started; kill -9 of the driver between."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "examples"), *sys.path])
    storages = [new_storage(tmp_path / name) for name in ("cut", "whole")]
    for storage in storages:
        storage.with_suffix(".yaml").write_text(CONFIG.replace("STORAGE", str(storage)))
    words = command("pipeline", "--config", tmp_path / "cut.yaml")
    where = {"env": joined(), "cwd": ROOT / "examples"}
    driver = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **where)
    while not list(storages[0].glob("teachers/*.partial/checkpoints/epoch-*")):
        assert driver.poll() is None
        time.sleep(0.05)
    driver.kill()
    driver.wait()
    for stage in ("corpus", "clips"):
        shutil.copytree(storages[0] / stage, storages[1] / stage)
    plans = []
    for name, stage in {"cut": "pipeline", "whole": "teachers"}.items():
        words = command(stage, "--config", tmp_path / f"{name}.yaml")
        done = subprocess.run(words, capture_output=True, text=True, **where, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        plans.append(Plan(load_config(tmp_path / f"{name}.yaml")))
    cut = plans[0]
    for name in ("transformer", "waves"):
        ours, theirs = (load_file(plan.teachers[name].path / "model.safetensors") for plan in plans)
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
        assert cut.teachers[name].facts()["history"][-1]["epoch"] == 3
    assert {*cut.fusion.facts()["weights"]} == {"transformer", "waves"}
    run = {one.data.tags["asc_ray.run"]: one for one in all_runs(default_uri(storages[0]))}[
        f"waves-{cut.teachers['waves'].key}"
    ]
    assert run.data.params["model.function"] == "own_networks:WaveNetwork"
    assert run.data.params["model.source"] == cut.config.teachers.recipes["waves"].model.source

    store = ClipStore(cut.clips.path)
    some = np.flatnonzero(store.split == "test")[::10]
    stored = Ensemble([read_logits(a.path) for a in cut.logits.values()], store.ids[some]).read()
    ensemble = StoredEnsemble(cut.fusion.path, code=["own_networks"])
    np.testing.assert_allclose(ensemble.logits(store.pcm(some)), ensemble.fusion.apply(stored), atol=1e-4)

    # No storage brings code to run: without the module's name it is refused, and so is another name than it has.
    refused = "is a network of the code own_networks:Transformer, and code runs only where you name its module"
    for code in ([], ["another"]):
        with pytest.raises(UserError, match=refused):
            StoredEnsemble(cut.fusion.path, code)
    words = ["predict", "--with", "ensemble", str(cut.fusion.path), str(cut.demo.path / store.ids[some[0]])]
    said = CliRunner().invoke(app, words)
    assert refused in str(said.exception)
    said = CliRunner().invoke(app, [*words, "--code", "own_networks"])
    assert said.exit_code == 0, said.exception
    forge(cut.teachers["transformer"], tmp_path)
    with pytest.raises(UserError, match="is a network of the code canary:build"):
        StoredEnsemble(cut.fusion.path, code=["own_networks"])
    assert not (tmp_path / "ran").exists()


def forge(teacher: Artifact, folder) -> None:
    """Have a teacher's manifest name a module that leaves a mark when it is imported."""
    (folder / "canary.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\ndef build(scenes): ...\n")
    sys.path.insert(0, str(folder))
    manifest = read_manifest(teacher.path)
    manifest["config"]["recipe"]["model"] = {"name": "module", "function": "canary:build"}
    write_record(teacher.path / "manifest.json", manifest)


def test_a_published_checkpoint_is_of_no_network_of_one_s_own(module, tmp_path):
    settings = recipe(module(NET.format(body="return self.head(wave)", made="return Net(scenes)")))
    with pytest.raises(UserError, match=r"teachers.checkpoints: .*mine.pt is of your own code, mine:build"):
        import_teacher(artifact(tmp_path, "mine"), tmp_path / "mine.pt", settings, ["a", "b"])


def test_foreign_networks_are_not_folded(module):
    """Folding follows one call of a network, and what that has drawn or chosen would stay."""
    function = module(NET.format(body="return self.head(wave)", made="return nn.Sequential(nn.BatchNorm2d(1))"))
    network = build(recipe(function).model, 10)
    assert folded(network) is network


def test_front_ends_give_the_shapes_that_they_say():
    wave = torch.randn(2, 1, 32_000)
    for frontend in ({}, KALDI, WAVE, {"kind": "wave"}):
        settings = Recipe.model_validate(
            {"model": {"name": "module", "function": "own_networks:x", "source": "0" * 64}, "frontend": frontend}
        ).frontend
        assert front_end(settings)(wave).shape[1:] == settings.shape(32_000)
    assert torch.equal(front_end(settings)(wave), wave[:, 0])
