"""The Python interface: the README's three lines, and the same result as the command's."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data_registry.errors import InputError
from data_registry.volume import Volume, load_image, load_labels, save_volume
from lod_model import load, weights
from lod_model.engine import FastLODBrain
from lod_model.networks.lod_brain import LODBrain, LODBrainConfig
from lod_model.networks.unet import UNet, UNetConfig
from lod_model.segment import segment

CHECKOUT = Path(__file__).parents[1]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder with weights at random and a block of a head, oblique to no axis, 5 × 6 × 6 mm."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    for name, network in (("lod_brain", LODBrain(LODBrainConfig(widths=(2, 2, 4)))), ("unet", UNet(UNetConfig(widths=(2, 4))))):
        weights.save(f"{name}.pt", network, name=name, protocol="lod7", grid="8mm", provenance={})
    data = np.random.default_rng(0).uniform(0, 20, (30, 25, 28)).astype(np.float32)
    data[5:-5, 4:-4, 4:-4] += 100
    save_volume(tmp_path / "scan.nii.gz", data, np.diag([-5.0, 6, 6, 1]))
    return tmp_path


def test_the_three_lines_of_the_readme(here, capsys):
    (lines,) = re.findall(r"```python\n(.*?)```", (CHECKOUT / "README.md").read_text(encoding="utf-8"), re.S)
    assert len(lines.splitlines()) == 3
    scope = {}
    exec(lines, scope)
    result = scope["result"]
    assert capsys.readouterr().out == f"{result.volumes}\n"
    assert list(result.volumes) == list(result.classes[1:]) and len(result.classes) == 7
    assert result.labels.shape == (30, 25, 28) and result.labels.dtype == np.uint8
    assert np.array_equal(result.affine, np.diag([-5.0, 6, 6, 1]))
    for index, name in enumerate(result.classes[1:], 1):   # 5 · 6 · 6 mm³ = 0.18 mL
        assert result.volumes[name] == pytest.approx(0.18 * (result.labels == index).sum())
    assert sum(result.volumes.values()) > 0


@pytest.mark.parametrize("network", ["lod_brain", "unet"])
def test_it_is_what_the_command_writes(here, network):
    model = load(f"{network}.pt", engine="plain")
    result = model.segment("scan.nii.gz")
    (outcome,) = segment(["scan.nii.gz"], out="out", weights=f"{network}.pt", engine="plain")
    assert np.array_equal(load_labels(outcome.dseg).data, result.labels)
    assert (result.verdict, result.reasons) == (outcome.verdict, outcome.reasons)
    saved = load_labels(result.save(here / "labels.nii.gz"))
    assert np.array_equal(saved.data, result.labels) and np.array_equal(saved.affine, result.affine)
    again = model.segment(load_image(here / "scan.nii.gz"))
    assert np.array_equal(again.labels, result.labels)


def test_the_fast_engine_is_the_default_of_lod_brain_alone(here, monkeypatch):
    monkeypatch.setattr("lod_model.predict.best_device", lambda: torch.device("cpu"))
    fast, plain = load("lod_brain.pt"), load("lod_brain.pt", engine="plain")
    assert isinstance(fast.weights.network, FastLODBrain) and isinstance(plain.weights.network, LODBrain)
    assert isinstance(load("unet.pt").weights.network, UNet)
    differ = fast.segment("scan.nii.gz", postprocess="none").labels != plain.segment("scan.nii.gz", postprocess="none").labels
    assert differ.mean() < 1e-3


def test_without_a_name_the_packaged_model_is_loaded(here, monkeypatch):
    monkeypatch.setattr(weights, "PACKAGED", here)
    with pytest.raises(InputError, match="no weights are named and no model is packaged"):
        load()
    (here / "unet.pt").rename(here / "lod7-rendered.pt")
    assert load().weights.name == "unet"


def test_what_cannot_be_used_is_one_line(here):
    model = load("unet.pt")
    for action, line in (
        (lambda: load("absent.pt"), "absent.pt: no such file"),
        (lambda: load("unet.pt", engine="slow"), "engine 'slow' is not known; one of fast, fast-bf16, plain is wanted"),
        (lambda: model.segment("absent.nii.gz"), "absent.nii.gz"),
        (lambda: model.segment("scan.nii.gz", postprocess="all"), "postprocess 'all' is not known"),
        (lambda: model.segment(Volume(np.full((20, 20, 20), 7, np.float32), np.diag([8.0, 8, 8, 1]))), "no contrast"),
    ):
        with pytest.raises(InputError, match=line) as raised:
            action()
        assert "\n" not in str(raised.value)


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, lod_model; assert not {'torch', 'numpy', 'nibabel'} & set(sys.modules); lod_model.load; assert 'torch' in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
