"""The shape of the project: imports point one way, heavy dependencies have one door, a stage has one word."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import yaml

CHECKOUT = Path(__file__).parents[1]
ROOMS = ("data_registry", "pipelines", "lod_model")
MODULES = sorted(path for room in ROOMS for path in (CHECKOUT / room).rglob("*.py"))
MAY_IMPORT = {"data_registry": {"data_registry"}, "pipelines": {"pipelines", "data_registry"}, "lod_model": {"lod_model", "data_registry"}}
DOORS = {
    "ray": {"pipelines/parallel.py"},
    "mlflow": {"lod_model/tracking_store.py"},
    "nibabel": {"data_registry/volume.py"},
    "h5py": {"lod_model/weights.py"},
    "fsspec": {"data_registry/shard_store.py", "pipelines/fetch_sources.py"},
}
HEAVY = {"torch", "pytorch_lightning", "torchio", "monai", "mlflow", "ray", "matplotlib"}


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def name(path: Path) -> str:
    return str(path.relative_to(CHECKOUT))


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_imports_point_one_way(path):
    room = path.relative_to(CHECKOUT).parts[0]
    for module in imports(path):
        top = module.split(".")[0]
        assert top not in ROOMS or top in MAY_IMPORT[room], f"{name(path)} imports {module}"
        if top in DOORS:
            assert name(path) in DOORS[top], f"{name(path)} imports {top}; {', '.join(DOORS[top])} is its door"


def test_no_module_imports_itself_by_way_of_others():
    modules = {".".join(path.relative_to(CHECKOUT).with_suffix("").parts): path for path in MODULES if path.name != "__init__.py"}
    TopologicalSorter({module: names_imported(path) & set(modules) for module, path in modules.items()}).prepare()  # CycleError names them


def names_imported(path: Path) -> set[str]:
    """Modules that a file imports, and what it imports from packages, which may be modules too."""
    froms = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)]
    return imports(path) | {f"{node.module}.{alias.name}" for node in froms for alias in node.names}


def test_data_registry_stays_light():
    for path in (CHECKOUT / "data_registry").glob("*.py"):
        assert not {module.split(".")[0] for module in imports(path)} & HEAVY, name(path)


def test_the_command_line_loads_nothing_heavy():
    assert not {module.split(".")[0] for module in imports(CHECKOUT / "lod_model/cli.py", top_level_only=True)} & HEAVY


def test_a_stage_is_one_word():
    stages = yaml.safe_load((CHECKOUT / "dvc.yaml").read_text())["stages"]
    assert list(stages) == ["index", "harmonise", "quality", "split", "train", "evaluate", "report"]
    for stage, content in stages.items():
        room = next(room for room in ("pipelines", "lod_model") if (CHECKOUT / room / f"{stage}.py").is_file())
        assert content["cmd"].startswith(f"python -m {room}.{stage}")
        assert "resources" not in str(content.get("params", [])), "where things run is no part of a result"


def test_the_readme_names_every_file():
    readme = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    for path in [*MODULES, *(CHECKOUT / "infra").rglob("*.*")]:
        if path.name != "__init__.py":
            assert path.name in readme, f"{name(path)} has no line in the README's file map"
