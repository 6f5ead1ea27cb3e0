"""The lines of the architecture: who may import whom, and who alone touches ray and mlflow."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "asc_ray"
# A module may import from its own layer and from those to its left.
LAYERS = (
    {"errors"},
    {"files", "shown"},
    {"runtime"},
    {"section", "artifacts", "yaml_text"},
    {"audio", "models"},
    {"predict"},
    {"data"},
    {"training", "fusion"},
    {"report"},
    {"cluster", "tracking"},
    {"config", "progress"},
    {"plan"},
    {"pipeline"},
    {"comparison", "export", "status"},
    {"cli"},
)
# `config` reads the cluster's section, which imports no ray.
EXCEPTIONS = {("config", "cluster")}
MODULES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def layer(name: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if name in names)


@pytest.mark.parametrize("path", [p for p in MODULES if p.parent != PACKAGE or p.name != "__init__.py"], ids=str)
def test_imports_run_one_way(path):
    own = part(path)
    for name in imports(path):
        if name.startswith("asc_ray."):
            other = name.split(".")[1]
            assert layer(other) <= layer(own) or (own, other) in EXCEPTIONS, f"{path.name} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_only_the_cluster_imports_ray_and_only_tracking_imports_mlflow(path):
    roots = {name.split(".")[0] for name in imports(path)}
    assert "ray" not in roots or part(path) == "cluster"
    assert "mlflow" not in roots or path == PACKAGE / "tracking.py"


def test_reading_a_configuration_imports_neither_ray_nor_mlflow():
    import subprocess
    import sys

    code = "import sys, asc_ray.config, asc_ray.status; print({'ray', 'mlflow'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"


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
    import subprocess
    import sys

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
