"""The commands beside ``segment``: what weights and networks there are, and weights in and out."""

import json

import pytest
import torch
from typer.testing import CliRunner

from data_registry.errors import InputError
from data_registry.intensity import Preparation
from lod_model import weights as weight_files
from lod_model.cli import app
from lod_model.networks.lod_brain import LODBrain, LODBrainConfig


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A folder of two packaged models."""
    folder = tmp_path / "models"
    for name, licence in (("lod7-rendered", "Apache-2.0"), ("another", None)):
        network = LODBrain(LODBrainConfig(widths=(2, 2, 4)))
        provenance = {"licence": licence} if licence else {}
        about = {"name": "lod_brain", "protocol": "lod7", "grid": "8mm", "preparation": Preparation("n4" if name == "another" else "robust")}
        weight_files.save(folder / f"{name}.pt", network, **about, provenance=provenance)
    monkeypatch.setattr(weight_files, "PACKAGED", folder)
    return folder


def lodbrain(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


def json_of(*words: object):
    done = lodbrain(*words)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def refused(*words: object) -> str:
    error = lodbrain(*words).exception
    assert isinstance(error, InputError) and "\n" not in str(error), error
    return str(error)


def test_networks_as_a_list_of_objects():
    rows = {row["name"]: row for row in json_of("networks", "--json")}
    assert list(rows) == ["fastsurfer_cnn", "fastsurfer_vinn", "lod_brain", "neuronet", "unet"]
    assert rows["fastsurfer_cnn"]["parameters"] == {"axial": 1799206, "coronal": 1799206, "sagittal": 1797386}
    assert rows["fastsurfer_vinn"]["parameters"] == {"axial": 1854632, "coronal": 1854632, "sagittal": 1852616}
    assert (rows["fastsurfer_vinn"]["multiple"], rows["fastsurfer_vinn"]["stages"]) == (16, ["fine"])
    ours, plain, tails = rows["lod_brain"], rows["unet"], rows["neuronet"]
    assert ours["parameters"] == 337719 and {"lod7", "malp_em"} < set(ours["protocols"]) == set(plain["protocols"])
    assert tails["parameters"] == 2493171 and tails["protocols"] == ["fsl_fast", "fsl_first", "spm_tissue", "malp_em", "malp_em_tissue"]
    assert (ours["grid"], ours["side"], ours["gmac"], ours["multiple"]) == ("1mm", 256, 1190.2, 8)
    assert (ours["stages"], plain["stages"]) == (["coarse", "fine"], ["fine"])
    assert abs(plain["gmac"] / ours["gmac"] - 1) < 0.05
    named = json_of("networks", "monai:SwinUNETR", "unet", "--json")
    assert [row["name"] for row in named] == ["monai:SwinUNETR", "unet"] and named[1] == plain
    assert isinstance(named[0]["parameters"], int) and named[0]["config"]["net"] == "SwinUNETR" and named[0]["gmac"] > 1000
    assert "network monai:Net: net: 'Net', wanted a class of monai.networks.nets" in refused("networks", "monai:Net")
    header, *lines = lodbrain("networks").stdout.splitlines()
    assert header.split("\t")[:2] == ["name", "parameters"] and lines[0].split("\t")[1] == "axial 1799206, coronal 1799206, sagittal 1797386"
    assert lines[2].startswith("lod_brain\t337719\tfastsurfer51, ") and lines[2].endswith("\t1mm\t256\t1190.2\t8\tcoarse, fine")


def test_list_shows_what_is_packaged_the_default_first(models):
    rows = json_of("weights", "list", "--json")
    assert [row["name"] for row in rows] == ["lod7-rendered", "another"]
    assert rows[0] == json_of("weights", "info", models / "lod7-rendered.pt", "--json")
    assert rows[0]["hash"] == weight_files.load(models / "lod7-rendered.pt").hash
    assert rows[0]["licence"] == "Apache-2.0" and rows[0]["network"] == "lod_brain" and rows[0]["grid"] == "8mm"
    assert rows[0]["parameters"] == sum(p.numel() for p in LODBrain(LODBrainConfig(widths=(2, 2, 4))).parameters())
    header, first, second = (line.split("\t") for line in lodbrain("weights", "list").stdout.splitlines())
    assert header == ["name", "network", "protocol", "grid", "parameters", "hash", "licence", "path"]
    assert first[5] == rows[0]["hash"][:12] and second[6] == "-"


def test_list_of_nothing_and_of_a_folder_with_a_bad_file(models, tmp_path, monkeypatch):
    monkeypatch.setattr(weight_files, "PACKAGED", tmp_path / "absent")
    assert json_of("weights", "list", "--json") == []
    (models / "bad.pt").write_text("no weights")
    done = lodbrain("weights", "list", models, "--json")
    assert done.exit_code == 1 and [row["name"] for row in json.loads(done.stdout)] == ["another", "lod7-rendered"]
    assert done.stderr.count("\n") == 1 and f"error: {models / 'bad.pt'}: neither a checkpoint" in done.stderr
    assert "no such folder" in refused("weights", "list", tmp_path / "absent")


def test_segment_uses_the_packaged_model_or_says_what_can_be_given(models, tmp_path, monkeypatch):
    assert weight_files.default() == models / "lod7-rendered.pt"
    monkeypatch.delenv("LODBRAIN_WEIGHTS", raising=False)
    (tmp_path / "scan.nii.gz").write_bytes(b"")
    done = lodbrain("segment", tmp_path / "scan.nii.gz", "-o", tmp_path / "out")
    assert done.exit_code == 1 and "the file is empty" in done.stderr   # the scan's fault: weights were found
    (models / "lod7-rendered.pt").unlink()
    line = refused("segment", tmp_path / "scan.nii.gz", "-o", tmp_path / "out")
    assert "no weights are named" in line and "--weights" in line and "lodbrain weights import" in line


def test_safetensors_there_and_back(models, tmp_path):
    source = models / "another.pt"
    there, back = tmp_path / "w.safetensors", tmp_path / "w.pt"
    assert lodbrain("weights", "export", source, "-o", there).stdout == f"{there}\n"
    assert lodbrain("weights", "import", there).stdout == f"{back}\n"
    first, last = (torch.load(path, weights_only=True) for path in (source, back))
    assert {k: v for k, v in first.items() if k != "state"} == {k: v for k, v in last.items() if k != "state"}
    assert all(torch.equal(first["state"][name], last["state"][name]) for name in {**first["state"], **last["state"]})
    assert "exists already" in refused("weights", "import", there)
    assert "exists already" in refused("weights", "export", source, "-o", there)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("-o", "w.txt"), "w.txt: suffix '.txt'; .safetensors or .onnx is wanted"),
        (("-o", "w.safetensors", "--side", 8), "--side 8: is of ONNX alone"),
        (("-o", "w.onnx", "--side", 12), "side 12: a positive multiple of 8 is wanted by lod_brain"),
    ],
)
def test_exports_that_cannot_be(models, tmp_path, monkeypatch, words, line):
    monkeypatch.chdir(tmp_path)
    assert line in refused("weights", "export", models / "another.pt", *words)
    assert not list(tmp_path.glob("w.*"))


def test_onnx_without_its_packages_is_one_line(models, tmp_path, monkeypatch):
    monkeypatch.setattr("lod_model.export.find_spec", lambda name: None)
    line = refused("weights", "export", models / "another.pt", "-o", tmp_path / "w.onnx")
    assert line == "onnx, onnxscript is not installed; `pip install 'lodbrain[export]'` is wanted for ONNX"


def test_imported_weights_are_the_authors_and_nothing_is_overwritten(test_data, tmp_path):
    published = test_data / "lod_brain_weights" / "weights_lv1.h5"
    command = ["weights", "import", published, "-o", tmp_path / "imported.pt"]
    assert lodbrain(*command).exit_code == 0
    assert weight_files.load(tmp_path / "imported.pt").hash == weight_files.load(published).hash
    assert "exists already" in refused(*command)
