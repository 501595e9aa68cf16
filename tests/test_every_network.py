"""Every network trains on the same shards under the same split, lands in the same tables, and segments by the same command."""

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from small_heads import CHECKOUT, IDS, add_subject, run
from typer.testing import CliRunner

from data_registry import protocol
from data_registry.errors import InputError
from data_registry.params import load_params
from data_registry.schema import read_table
from data_registry.volume import load_labels, save_volume
from lod_model import evaluate, weights
from lod_model.begin import grown
from lod_model.cli import app
from lod_model.data import all_folds
from lod_model.runs import fold_folder
from lod_model.train import train

PARAMS = """
networks: [lod_brain, unet, neuronet, fastsurfer_cnn, fastsurfer_vinn, "monai:SegResNet"]
index: {roots: [roots]}
harmonise: {grid: 8mm, shards_per_site: 1}
split: {folds: 2}
train:
  protocol: [lod7, fsl_fast]
  coarse: {epochs: 1, learning_rate: 0.01}
  fine: {epochs: 1, learning_rate: 0.01}
  visits: 1
  crops: {side: 16}
  slices: {per_visit: 2}
  batch_size: 2
  network:
    lod_brain: {widths: [2, 4, 8]}
    unet: {widths: [2, 4, 8]}
    neuronet: {filters: [2, 4, 4, 4], units: 1}
    fastsurfer_cnn: {filters: 4, depth: 2}
    fastsurfer_vinn: {filters: 4, native_filters: 3, depth: 2, inner_size: 32, base_mm: 8}
    monai:SegResNet: {multiple: 8, arguments: {init_filters: 8, blocks_down: [1, 1], blocks_up: [1]}}
"""
NETWORKS = ["lod_brain", "unet", "neuronet", "fastsurfer_cnn", "fastsurfer_vinn", "monai:SegResNet"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Of so little work, threads make more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """Two places of four people; every second one has tissues by another tool as well."""
    folder = tmp_path_factory.mktemp("networks")
    (folder / "params.yaml").write_text(PARAMS)
    (folder / "pipelines").symlink_to(CHECKOUT / "pipelines")
    for number, name in enumerate(("alpha", "beta")):
        for subject in range(4):
            root = folder / "roots" / name
            add_subject(root, f"{subject:02d}", seed=10 * number + subject)
            if subject % 2:
                add_tissues(root, f"{subject:02d}")
    for stage in ("index", "harmonise", "split"):
        done = run(folder, f"pipelines.{stage}")
        assert done.returncode == 0, done.stderr
    return folder


def add_tissues(root: Path, subject: str) -> None:
    """FSL FAST's CSF, grey and white matter in place of the FreeSurfer ids."""
    labels = load_labels(root / f"derivatives/freesurfer/sub-{subject}/mri/aparc+aseg.mgz")
    tissue = np.zeros(int(IDS.max()) + 1, np.uint8)
    tissue[[4, 3, 1012, 2012, 2]] = 1, 2, 2, 2, 3
    save_volume(root / f"derivatives/fsl_fast/sub-{subject}/anat/sub-{subject}_dseg.nii.gz", tissue[labels.data], labels.affine)


@pytest.fixture(scope="module")
def trained(project) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        params, folds = load_params(), all_folds()
        for network in NETWORKS:
            train(network, params, folds)
        evaluate.main()
    return project


def test_all_stand_in_one_table(trained, monkeypatch):
    monkeypatch.chdir(trained)
    rows = read_table("tables/results.parquet", "results").to_pandas()
    runs = {f"{network}-base-0" for network in NETWORKS} | {"neuronet-base-0+fsl_fast", "atlas-base-0", "atlas-base-0+fsl_fast"}
    assert set(rows.run) == runs and rows.split_hash.nunique() == 1
    first = rows[~rows.run.str.endswith("fsl_fast")]
    assert set(first.protocol) == {"lod7"} and set(first.groupby("run").scan_id.nunique()) == {8}
    second = rows[rows.run == "neuronet-base-0+fsl_fast"]
    assert set(second.protocol) == {"fsl_fast"} and second.scan_id.nunique() == 4  # of those that have the labels


@pytest.mark.parametrize("network", NETWORKS)
def test_each_segments_by_the_same_command(trained, monkeypatch, tmp_path, network):
    monkeypatch.chdir(trained)
    scan = "roots/alpha/sub-01/anat/sub-01_T1w.nii.gz"
    path = fold_folder(f"{network}-base-0", 0) / "weights.pt"
    done = CliRunner().invoke(app, ["segment", scan, "-o", str(tmp_path), "--weights", str(path)])
    assert done.exit_code == 0, done.output
    fronts = ["sub-01_seg-lod7", "sub-01_seg-fslfast"] if network == "neuronet" else ["sub-01"]
    for front in fronts:
        found = nibabel.load(tmp_path / f"{front}_desc-lodbrain_dseg.nii.gz")
        assert found.shape == nibabel.load(scan).shape and np.allclose(found.affine, nibabel.load(scan).affine)
        assert (tmp_path / f"{front}_desc-lodbrain_volumes.tsv").is_file()
    said = json.loads((tmp_path / "sub-01_desc-lodbrain_dseg.json").read_text())
    assert said["protocol"] == ("lod7+fsl_fast" if network == "neuronet" else "lod7") and len(said["outputs_sha256"]) == 5 * len(fronts)
    assert len(list(tmp_path.iterdir())) == 5 * len(fronts) + 1


def test_a_scan_without_a_protocol_trains_the_other_tails(project, monkeypatch, tmp_path):
    """With the labels of one tool alone, the other tail stays as it was made."""
    from lod_model import networks
    from lod_model.crops import CropDataset
    from lod_model.module import CropModule

    monkeypatch.chdir(project)
    params = load_params()
    scans = [scan for role in all_folds()[0].values() for scan in role if not scan.has(protocol.load("fsl_fast"))]
    data = CropDataset(scans, protocol_names=["lod7", "fsl_fast"], side=16, multiple=8)
    batch = {name: tensor[None] for name, tensor in data[0, 0].items()}
    assert (batch["fsl_fast"] == 255).all() and set(batch["lod7"].unique().tolist()) <= set(range(7))
    config = networks.config_for("neuronet", [protocol.load("lod7"), protocol.load("fsl_fast")]) | params.train.network_of("neuronet")
    net = networks.build("neuronet", config)
    CropModule(net, level="fine", settings=params.train, recipe=networks.recipe_of("neuronet")).loss(batch).backward()
    gradients = {name: float(p.grad.abs().sum()) for name, p in net.named_parameters()}
    assert gradients["stem.weight"] > 0
    assert all((value == 0) == ("fsl_fast" in name) for name, value in gradients.items() if "tail" in name)


def test_a_name_that_is_no_network_is_refused(project, monkeypatch):
    monkeypatch.chdir(project)
    params = load_params()
    wrong = params.train.model_copy(update={"network": {"nett": {"widths": [2]}}})
    with pytest.raises(InputError, match="train.network.nett: no such network"):
        train("unet", params.model_copy(update={"train": wrong}), all_folds())
    wrong = params.train.model_copy(update={"network": {"unet": 5}})
    with pytest.raises(InputError, match="train.network.unet is 5; settings of that network are wanted below it"):
        train("unet", params.model_copy(update={"train": wrong}), all_folds())
    with pytest.raises(InputError, match="'resnet' is not known; one of .*fastsurfer_cnn.* or monai:<class>"):
        train("resnet", params, all_folds())


@pytest.mark.parametrize(
    ("network", "own", "line"),
    [
        ("neuronet", {"protocols": {"lod7": 7, "fsl_fast": 9}}, "protocols of neuronet is .*'fsl_fast': 9}; it follows from train.protocol"),
        ("unet", {"classes": 9}, "classes of unet is 9; it follows from train.protocol, so 7, or nothing, is wanted"),
        ("fastsurfer_vinn", {"sagittal_classes": 3}, "sagittal_classes of fastsurfer_vinn is 3; .* so 7, or nothing, is wanted"),
        ("monai:DynUNet", {"net": "UNet"}, "network monai:DynUNet: net: 'UNet', wanted DynUNet"),
    ],
)
def test_what_follows_from_other_settings_is_not_set_otherwise(project, monkeypatch, network, own, line):
    monkeypatch.chdir(project)
    params = load_params()
    wrong = params.train.model_copy(update={"network": {network: own}})
    with pytest.raises(InputError, match=line):
        train(network, params.model_copy(update={"train": wrong}), all_folds())


def test_outputs_stand_in_the_order_of_the_protocols(project, monkeypatch):
    """Label maps are told apart by it."""
    monkeypatch.chdir(project)
    params = load_params()
    own = {"neuronet": {**params.train.network_of("neuronet"), "protocols": {"fsl_fast": 4, "lod7": 7}}}
    net = grown("neuronet", "fine", None, params.model_copy(update={"train": params.train.model_copy(update={"network": own})}))
    assert list(net.config.protocols) == ["lod7", "fsl_fast"]


def test_weights_say_all_protocols(trained):
    found = weights.load(trained / fold_folder("neuronet-base-0", 0) / "weights.pt")
    assert found.protocols == ("lod7", "fsl_fast") and found.network.config.protocols == {"lod7": 7, "fsl_fast": 4}
