"""The lines of the house: who imports whom, who alone touches ray, mlflow and the terminal, how long a module is."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "asc_ray"
# A module may import from its own layer and from those above it in this list. A package's module that is named here by
# itself lies in another layer than its package.
LAYERS = (
    {"errors"},
    {"files", "shown", "provenance", "disk", "places", "objects", "remote"},
    {"runtime"},
    {"embedded"},
    {"section", "artifacts", "lock", "claims", "resources", "config.yaml_text", "config.overrides"},
    {"audio", "models"},
    {"predict"},
    {"data"},
    {"training"},
    {"students", "ensemble", "search", "int8", "evaluation", "challenge"},
    {"report"},
    {"cluster", "tracking"},
    {"config"},
    {"plan", "progress"},
    {"stages"},
    {"run"},
    {"tables", "preview", "status"},
    {"comparison"},
    {"cli"},
)
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" or path.parent.name == "runtime")
LONGEST = 350  # lines of a module
SAYS = {
    "stages",
    "run",
    "tables",
    "comparison",
    "status",
    "progress",
    "cli",
    "predict",
}  # what writes texts for the terminal


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def layer(name: str) -> int:
    two = ".".join(name.split(".")[:2])
    found = [i for i, names in enumerate(LAYERS) if two in names]
    return found[0] if found else next(i for i, names in enumerate(LAYERS) if name.split(".", maxsplit=1)[0] in names)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_run_one_way(path):
    for name in imports(path):
        if name.startswith("asc_ray.") and name != "asc_ray.config":  # the package holds nothing itself
            other = name.removeprefix("asc_ray.")
            assert layer(other) <= layer(name_of(path)), f"{name_of(path)} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_the_cluster_imports_ray_and_only_tracking_imports_mlflow(path):
    roots = {name.split(".")[0] for name in imports(path)}
    room = name_of(path).split(".")[0]
    assert "ray" not in roots or room == "cluster"
    assert "mlflow" not in roots or room == "tracking"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_long_module_says_why_in_its_first_lines(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= LONGEST or "This module is long because" in "\n".join(lines[:6])


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_stages_and_the_command_line_speak_to_the_terminal(path):
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    spoken = [call for call in calls if ast.unparse(call).endswith(("print", "typer.echo", "progress.note"))]
    assert not spoken or name_of(path).split(".")[0] in SAYS


def test_packages_hold_nothing_but_their_modules():
    """Whoever looks for a thing finds it in the module that is named for it.

    The runtime is small enough for one, and the package itself has `asc_ray.results`.
    """
    holding = [path.parent.name for path in PACKAGE.rglob("__init__.py") if path.read_text().strip()]
    assert set(holding) <= {"asc_ray", "runtime"}


def test_a_plan_its_states_and_a_preview_import_nothing_that_takes_a_second(tmp_path):
    """So that `asc-ray status`, `--dry-run` and a finished `asc-ray pipeline` answer at once."""
    code = """
import sys
from asc_ray.config.composition import load_config
from asc_ray.plan import STAGES, Plan
from asc_ray.preview import preview
from asc_ray.run import run
from asc_ray.status import states
plan = Plan(load_config("demo", ["storage=" + sys.argv[1]]))
assert len(list(states(plan))) == len(list(preview(plan, STAGES)))
print({"torch", "ray", "mlflow", "optuna", "pandas", "matplotlib", "soundfile"} & set(sys.modules))
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"


def test_a_packages_sections_of_the_configuration_lie_in_its_config():
    holding = {name_of(path) for path in MODULES if re.search(r"^class \w+Config\(", path.read_text(), re.M)}
    assert {name for name in holding if "." in name and not name.endswith(".config")} == set()


def test_what_a_configuration_may_name_is_what_is_built():
    from asc_ray.audio.config import FRONT_END_KINDS
    from asc_ray.audio.frontends import FRONT_ENDS
    from asc_ray.models.config import NETWORK_NAMES
    from asc_ray.models.registry import NETWORKS

    assert sorted(NETWORK_NAMES) == sorted(NETWORKS)
    assert sorted(FRONT_END_KINDS) == sorted(FRONT_ENDS)


def test_importing_the_package_imports_no_other_package():
    import subprocess
    import sys

    code = (
        "import sys; before = {*sys.modules}; import asc_ray;"
        "print({name.partition('.')[0] for name in {*sys.modules} - before} - sys.stdlib_module_names)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "{'asc_ray'}"


def test_a_training_on_stored_clips_needs_torch_and_few_others():
    """So that bench/gpu.py runs where a card is and little else: what else is installed here is not to be found."""
    code = """
import sys
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name in {"ray", "mlflow", "soundfile", "soxr", "torchao", "torchinfo", "onnx", "pandas", "yaml"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Nothing())
import asc_ray.training.loop, asc_ray.training.dataset, asc_ray.models.registry
"""
    subprocess.run([sys.executable, "-c", code], check=True)
