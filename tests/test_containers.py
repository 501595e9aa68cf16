"""The recipes of the images, without building them: what they install is the lock's, what they are based on is named, nobody is root."""

import ast
import importlib.metadata
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from small_heads import CHECKOUT

FOLDER = CHECKOUT / "infra/containers"
DOCKERFILES = sorted(FOLDER.glob("*.Dockerfile"))
IMAGES = ("segment", "train")
PYTHON = {"python_version": "3.11", "python_full_version": "3.11.14", "platform_system": "Linux", "sys_platform": "linux", "extra": ""}


def pins(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}


def instructions(path: Path) -> list[tuple[str, str]]:
    """(FROM, COPY, …; the rest) of a Dockerfile."""
    text = "\n".join(line for line in path.read_text().splitlines() if not line.startswith("#")).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line]


def section(path: Path, name: str) -> list[str]:
    """The lines of a section of an Apptainer definition."""
    found = re.search(rf"^%{name}\n((?:[ \t]+.*\n|\n)*)", path.read_text(), re.MULTILINE)
    return [line.strip() for line in found[1].splitlines() if line.strip()] if found else []


def test_segment_installs_what_it_names_and_nothing_else_at_the_locks_versions():
    path = FOLDER / "segment-requirements.txt"
    named = re.search(r"^# Of: (.*)$", path.read_text(), re.MULTILINE)[1].split()
    wanted, todo = set(), list(named)
    while todo:
        if (name := canonicalize_name(todo.pop())) not in wanted:
            wanted.add(name)
            needs = [Requirement(text) for text in importlib.metadata.requires(name) or []]
            todo += [need.name for need in needs if need.marker is None or need.marker.evaluate(PYTHON)]
    lock, installed = pins(CHECKOUT / "requirements.lock"), pins(path)
    expected = {name: lock[name] for name in sorted(wanted)}
    assert installed == expected, "segment-requirements.txt should be\n" + "\n".join(f"{name}=={version}" for name, version in expected.items())
    project = {canonicalize_name(Requirement(text).name) for text in importlib.metadata.requires("lodbrain")}
    assert {canonicalize_name(name) for name in named} <= project


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_a_dockerfile_is_pinned_and_nobody_is_root(path):
    parts = instructions(path)
    bases = [rest.split()[0] for word, rest in parts if word == "FROM"]
    for base in bases:
        assert re.search(r":[^:/]*\d+\.\d+\.\d+", base), f"{base}: a tag with a whole version is wanted"
    assert {word for word, _ in parts} <= {"FROM", "COPY", "ARG", "ENV", "RUN", "USER", "WORKDIR", "ENTRYPOINT", "CMD"}, "no ADD"
    users = [rest for word, rest in parts if word == "USER"]
    assert users and users[-1] == "10001:10001" and parts[-1][0] == "CMD"
    assert not [rest for word, rest in parts[[word for word, _ in parts].index("USER") :] if word == "RUN"]
    for word, rest in parts:
        if word == "COPY" and not rest.startswith("--from="):
            for source in rest.split()[:-1]:
                assert (CHECKOUT / source).exists(), f"{path.name} copies {source}, which is not there"
        if word == "RUN" and "apt-get install" in rest:
            assert "--no-install-recommends" in rest and rest.endswith("rm -rf /var/lib/apt/lists/*")


@pytest.mark.parametrize("image", IMAGES)
def test_apptainer_makes_what_docker_makes(image):
    docker, definition = instructions(FOLDER / f"{image}.Dockerfile"), FOLDER / f"{image}.def"
    base = re.search(r"^From: (.*)$", definition.read_text(), re.MULTILINE)[1]
    assert {base} == {rest.split()[0] for word, rest in docker if word == "FROM"}
    copied = [rest.split() for word, rest in docker if word == "COPY" and not rest.startswith("--from=")]
    targets = {source: target + source if target.endswith("/") else target for *sources, target in copied for source in sources}
    assert dict(line.split() for line in section(definition, "files")) == targets
    steps = [" ".join(step.split()) for word, rest in docker if word == "RUN" for step in rest.split("&&")]
    assert section(definition, "post")[: len(steps)] == steps
    exported = " ".join(line.removeprefix("export ") for line in section(definition, "environment") if line.startswith("export"))
    told = " ".join(rest for word, rest in docker if word == "ENV").split()
    names = {entry.partition("=")[0] for entry in told} - {"LODBRAIN_REVISION", "HOME"}  # no build arguments; the home is the own one
    assert {entry.partition("=")[0] for entry in exported.split()} >= names
    assert all(f"{name}=" in exported for name in names)


def test_the_lock_is_of_the_python_of_the_segment_image():
    assert "python:3.11." in (FOLDER / "segment.Dockerfile").read_text() and PYTHON["python_version"] == "3.11"
    install = (FOLDER / "install_segment.sh").read_text()
    assert re.search(r"pip==([\d.]+)", install)[1] == re.search(r"pip==([\d.]+)", (CHECKOUT / "infra/install.sh").read_text())[1]


def test_segment_installs_what_its_commands_import():
    """Outside the standard library, at the top of modules that ``segment`` and ``weights`` load."""
    named = re.search(r"^# Of: (.*)$", (FOLDER / "segment-requirements.txt").read_text(), re.MULTILINE)[1].casefold().split()
    modules, todo, found = set(), ["lod_model.cli", "lod_model.segment", "lod_model.lineage"], set()
    while todo:
        if (module := todo.pop()) not in modules and (path := CHECKOUT / (module.replace(".", "/") + ".py")).is_file():
            modules.add(module)
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ImportFrom):
                    todo += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                elif isinstance(node, ast.Import):
                    todo += [alias.name for alias in node.names]
        elif module.split(".")[0] not in ("lod_model", "data_registry"):
            found.add(module.split(".")[0])
    others = {name.casefold() for name in found - set(sys.stdlib_module_names)}
    assert {"yaml" if name == "pyyaml" else name for name in named} >= others >= {"torch", "numpy", "yaml"}
