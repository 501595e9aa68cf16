"""Training: nothing held out is ever read, finished folds stand, augmentation knows (seed, epoch, sample) alone, what is logged is there."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from small_heads import CHECKOUT, add_subject, run

from data_registry import protocol
from data_registry.errors import InputError
from data_registry.params import load_params
from data_registry.schema import read_table
from data_registry.split import data_hash
from lod_model import evaluate, weights
from lod_model.data import EpochOrder, SampleDataset, Windows, all_folds
from lod_model.module import VolumeModule
from lod_model.runs import fold_folder
from lod_model.train import train

PARAMS = """
index: {roots: [roots]}
harmonise: {grid: 16mm, shards_per_site: 2}
split: {folds: 3}
train:
  coarse: {epochs: 2, learning_rate: 0.01}
  fine: {epochs: 2, learning_rate: 0.01}
  network: {widths: [2, 4, 8]}
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """Three places of four people, harmonised and split."""
    folder = tmp_path_factory.mktemp("training")
    (folder / "params.yaml").write_text(PARAMS)
    (folder / "pipelines").symlink_to(CHECKOUT / "pipelines")
    for number, name in enumerate(("alpha", "beta", "gamma")):
        for subject in range(4):
            add_subject(folder / "roots" / name, f"{subject:02d}", seed=10 * number + subject)
    for stage in ("index", "harmonise", "split"):
        done = run(folder, f"pipelines.{stage}")
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def inside(project, monkeypatch) -> Path:
    monkeypatch.chdir(project)
    return project


@pytest.fixture
def trained(inside) -> Path:
    """The project with all folds trained and scored."""
    params, folds = load_params(), all_folds()
    train("lod_brain", params, folds)
    evaluate.main()
    return inside


def test_what_is_held_out_is_never_read(inside, monkeypatch):
    """Fold 0 gives the same weights when no held-out file can be opened."""
    params, folds = load_params(), all_folds()
    train("lod_brain", params, {0: folds[0]})
    first = weights.load(fold_folder("lod_brain-base-0", 0) / "weights.pt")
    assert first.grid == "16mm" and first.protocol == "lod7"
    assert not {scan.site for scan in folds[0]["external_test"]} & {site.split(".")[1] for site in first.provenance["trained_on"]}
    (fold_folder("lod_brain-base-0", 0) / "fold.json").unlink()
    held = {Path("shards", scan.shard) for scan in folds[0]["external_test"]}
    unseen = {scan.scan_id for scan in folds[0]["internal_test"]}
    for path in held:
        path.rename(path.with_suffix(".away"))
    try:
        monkeypatch.setattr("data_registry.shard_store.read_row", guarded(unseen, folds))
        train("lod_brain", params, {0: folds[0]})
    finally:
        for path in held:
            path.with_suffix(".away").rename(path)
    assert weights.load(fold_folder("lod_brain-base-0", 0) / "weights.pt").hash == first.hash


def guarded(unseen: set[str], folds):
    """read_row that refuses the rows of scans that training must not see."""
    from data_registry.shards import read_row

    forbidden = {(scan.store.root / scan.shard, scan.row_group) for role in folds[0].values() for scan in role if scan.scan_id in unseen}
    assert forbidden

    def read(path, row_group, columns, *, scan_id):
        assert (path, row_group) not in forbidden, f"training read row {row_group} of {path}"
        return read_row(path, row_group, columns, scan_id=scan_id)

    return read


def test_all_folds_then_scores_then_nothing_more(trained, caplog):
    params, folds = load_params(), all_folds()
    done = [json.loads((fold_folder("lod_brain-base-0", fold) / "fold.json").read_text()) for fold in folds]
    assert [list(fold["stages"]) for fold in done] == [["coarse", "fine"]] * 3
    assert sorted(p.name for p in fold_folder("lod_brain-base-0", 1).iterdir()) == ["fold.json", "seen.tsv", "weights.pt"]
    for fold, roles in folds.items():
        seen = (fold_folder("lod_brain-base-0", fold) / "seen.tsv").read_text().splitlines()[1:]
        assert seen == [f"{scan.scan_id}\t{scan.database}\t{scan.site}\t{role}" for role in ("train", "val") for scan in roles[role]]
        noted = weights.load(fold_folder("lod_brain-base-0", fold) / "weights.pt").provenance["data"]
        assert noted == done[fold]["data"] and noted["data_hash"] == data_hash(Path("tables"))
        assert sum(database["scans"]["train"] for database in noted["databases"]) == len(roles["train"]) == done[fold]["train_scans"]
    with caplog.at_level("INFO", "lodbrain"):
        train("lod_brain", params, folds)
    assert "3 folds, 0 to train" in caplog.text
    rows = read_table("tables/results.parquet", "results").to_pandas()
    table = protocol.load("lod7")
    scans = {scan.scan_id for fold in folds.values() for scan in fold["external_test"]}
    for run_name in ("lod_brain-base-0", "atlas-base-0"):
        external = rows[(rows.run == run_name) & (rows.role == "external_test") & (rows.metric == "dice")]
        assert sorted(external.scan_id) == sorted(list(scans) * 6) and set(external.structure) == set(table.foreground)
    check_one_row_by_hand(folds, rows)
    times = Path("tables/results.parquet").stat().st_mtime_ns
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "_score", lambda *_: pytest.fail("a row that stands was scored again"))
        evaluate.main()
    assert Path("tables/results.parquet").stat().st_mtime_ns > times
    assert read_table("tables/results.parquet", "results").to_pandas().equals(rows)


def test_reference_weights_stand_beside_the_folds(trained):
    """Any weights of this grid are scored under every fold's roles, others are refused by name."""
    inside = trained
    path = fold_folder("lod_brain-base-0", 0) / "weights.pt"
    text = (inside / "params.yaml").read_text()
    try:
        (inside / "params.yaml").write_text(f"{text}evaluate: {{reference_weights: [{path}]}}\n")
        evaluate.main()
        rows = read_table("tables/results.parquet", "results").to_pandas()
        reference = rows[rows.run == "reference-weights"]
        assert set(reference.fold) == {0, 1, 2} and reference.seed.isna().all() and set(reference.network) == {"lod_brain"}
        own = rows[(rows.run == "lod_brain-base-0") & (rows.fold == 0)]
        assert own.value.tolist() == pytest.approx(reference[reference.fold == 0].value.tolist(), nan_ok=True)
        other = weights.load(path)
        weights.save(inside / "other.pt", other.network, name="lod_brain", protocol="lod7", grid="1mm", provenance={})
        (inside / "params.yaml").write_text(f"{text}evaluate: {{reference_weights: [other.pt]}}\n")
        with pytest.raises(InputError, match="other.pt: weights for grid 1mm .* this project's are 16mm"):
            evaluate.main()
    finally:
        (inside / "params.yaml").write_text(text)


def test_weights_of_another_split_are_not_scored(trained, monkeypatch):
    """After the split or a setting has changed, what an old fold saw may be held out: evaluation refuses until training has run."""
    monkeypatch.setattr("lod_model.runs.tracking_tags", lambda: {"split_hash": "another", "data_hash": ""})
    with pytest.raises(InputError, match="fold 0 of lod_brain-base-0 is not trained on this split"):
        evaluate.main()


@pytest.mark.parametrize("epoch", [0, 1, 2, 3])
def test_a_stopped_training_goes_on_where_it_was(project, tmp_path, monkeypatch, epoch):
    """Stopped after any epoch of either stage and started again: the same epochs, the same best epoch, no finished stage trained again."""
    for name in ("tables", "shards"):
        (tmp_path / name).symlink_to(project / name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text(PARAMS.replace("fine: {epochs: 2", "fine: {epochs: 3").replace("[2, 4, 8]}", "[2, 4, 8], dropout: 0.0}"))
    params, folds = load_params(), all_folds()
    train("lod_brain", params, {0: folds[0]})
    whole = (fold_folder("lod_brain-base-0", 0) / "fold.json").read_text()
    digest = weights.load(fold_folder("lod_brain-base-0", 0) / "weights.pt").hash
    shutil.rmtree("checkpoints")
    seen = []

    class Stopped(Exception):
        pass

    def stop(self, run, values, *, step=0):
        seen.append(values)
        if len(seen) == epoch + 2:  # in the epoch after: the one before is on disk
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr("lod_model.tracking.Tracker.metrics", stop)
        with pytest.raises(Stopped):
            train("lod_brain", params, {0: folds[0]})
    assert not (fold_folder("lod_brain-base-0", 0) / "fold.json").exists()
    train("lod_brain", params, {0: folds[0]})
    again = json.loads((fold_folder("lod_brain-base-0", 0) / "fold.json").read_text())
    for level, stage in json.loads(whole)["stages"].items():
        assert again["stages"][level]["epochs"] == stage["epochs"]
        assert again["stages"][level]["val_dice"] == pytest.approx(stage["val_dice"], abs=1e-6)
    assert weights.load(fold_folder("lod_brain-base-0", 0) / "weights.pt").hash == digest


def test_a_training_that_is_asked_to_stop_goes_on_at_its_next_batch(project, tmp_path, monkeypatch):
    """SIGTERM in the middle of an epoch of each stage: the weights, and the one MLflow run, of a training that nobody disturbed."""
    for name in ("tables", "shards"):
        (tmp_path / name).symlink_to(project / name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text(PARAMS.replace("[2, 4, 8]}", "[2, 4, 8], dropout: 0.0}\n  min_samples_per_epoch: 6"))
    params, folds = load_params(), all_folds()
    steps, undisturbed = [], VolumeModule.training_step

    def step(self, batch, index):
        steps.append(self.level)
        if steps.count(self.level) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return undisturbed(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(VolumeModule, "training_step", step)
        for _ in ("coarse", "fine"):
            with pytest.raises(SystemExit) as stopped:
                train("lod_brain", params, {0: folds[0]})
            assert stopped.value.code == 75
        train("lod_brain", params, {0: folds[0]})
    assert [steps.count(level) for level in ("coarse", "fine")] == [2 * len(EpochOrder(folds[0]["train"], seed=0, at_least=6))] * 2
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow/mlflow.db'}")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert sorted((run.info.run_name, run.info.status) for run in runs) == [("lod_brain-base-0", "FINISHED"), ("lod_brain-base-0-fold-0", "FINISHED")]
    digest = weights.load(fold_folder("lod_brain-base-0", 0) / "weights.pt").hash
    shutil.rmtree("checkpoints")
    train("lod_brain", params, {0: folds[0]})
    assert weights.load(fold_folder("lod_brain-base-0", 0) / "weights.pt").hash == digest


def check_one_row_by_hand(folds, rows):
    """One scan of the atlas: a vote over the fold's training scans, and Dice, written out."""
    scan, table = folds[1]["external_test"][0], protocol.load("lod7")
    votes = np.stack([s.classes(table) for s in folds[1]["train"]])
    atlas = np.stack([(votes == c).sum(axis=0) for c in range(7)]).argmax(axis=0)
    truth = scan.classes(table)
    mine = 2 * ((atlas == 3) & (truth == 3)).sum() / ((atlas == 3).sum() + (truth == 3).sum())
    dice = rows[(rows.run == "atlas-base-0") & (rows.fold == 1) & (rows.metric == "dice") & (rows.structure == "white matter")]
    row = dice[dice.scan_id == scan.scan_id]
    assert row.value.item() == pytest.approx(mine)


def test_mlflow_has_a_parent_and_a_child_a_fold(trained):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{trained / 'mlflow/mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "base"]
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    for name in ("lod_brain-base-0", "atlas-base-0"):
        parent = runs[name]
        children = [run for run in runs.values() if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
        assert sorted(run.info.run_name for run in children) == [f"{name}-fold-{fold}" for fold in range(3)]
        assert {run.info.status for run in children} == {"FINISHED"}
    parent = runs["lod_brain-base-0"]
    assert parent.data.tags["evaluate.postprocess"] == "components"
    assert parent.data.params["train.fine.epochs"] == "2" and not any(key.startswith("resources") for key in parent.data.params)
    assert 0 <= parent.data.metrics["external_dice"] <= 1 and len(parent.data.metrics) <= 50
    assert parent.info.status == "FINISHED" and len(parent.data.tags["split_hash"]) == 64


@pytest.mark.parametrize("level", ["coarse", "fine"])
def test_a_sample_depends_on_seed_epoch_and_name_alone(inside, level):
    scans = all_folds()[0]["train"]
    data = SampleDataset(scans, level=level, protocol="lod7", augmentation="light", seed=3)
    torch.manual_seed(1)
    first = data[4, 1]
    state = torch.get_rng_state()
    again = SampleDataset(scans, level=level, protocol="lod7", augmentation="light", seed=3)[4, 1]
    assert torch.equal(torch.get_rng_state(), state)  # and it draws from nobody else's generator
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["image"], data[5, 1]["image"])
    plain = SampleDataset(scans, level=level, protocol="lod7")[4, 1]
    if level == "fine":
        assert abs(float(plain["image"].mean())) < 1e-5 and float(plain["image"].std(correction=0)) == pytest.approx(1, abs=1e-4)
    else:
        assert torch.allclose(first["target"].sum(0), torch.ones(()), atol=1e-4)


def test_a_network_without_a_coarse_stage_trains_its_fine_one(project, tmp_path, monkeypatch):
    """The plain U-Net under the same settings: no coarse stage, everything else as ever."""
    for name in ("tables", "shards"):
        (tmp_path / name).symlink_to(project / name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text(PARAMS.replace("fine: {epochs: 2", "fine: {epochs: 4"))
    train("unet", load_params(), {0: all_folds()[0]})
    found = weights.load(fold_folder("unet-base-0", 0) / "weights.pt")
    stages = json.loads((fold_folder("unet-base-0", 0) / "fold.json").read_text())["stages"]
    assert found.name == "unet" and found.network.config.widths == (2, 4, 8) and list(stages) == ["fine"]
    losses = [row["train_loss"] for row in stages["fine"]["history"]]
    assert len(losses) == 4 and losses[-1] < losses[0]


def test_augmenting_before_pooling_is_the_same_without_augmentation(inside):
    """What stands in the coarse columns is what pooling the full grid gives; with augmentation the two ways differ, each a pure function."""
    scans = all_folds()[0]["train"]
    before = SampleDataset(scans, level="coarse", protocol="lod7", augmented="before")[0, 1]
    after = SampleDataset(scans, level="coarse", protocol="lod7")[0, 1]
    full = SampleDataset(scans, level="fine", protocol="lod7")[0, 1]
    for key, value in before.items():
        assert torch.equal(value, after[key])
    assert torch.allclose(after["image"], torch.nn.functional.max_pool3d(full["image"], 4), atol=1e-5)
    augmented = [SampleDataset(scans, level="coarse", protocol="lod7", augmentation="light", augmented=how)[0, 1] for how in ("before", "after")]
    assert augmented[0]["image"].shape == augmented[1]["image"].shape and not torch.allclose(augmented[0]["image"], augmented[1]["image"])
    assert torch.allclose(augmented[0]["target"].sum(0), torch.ones(()))
    one = SampleDataset(scans, level="coarse", protocol="lod7", augmentation="light", augmented="before")[0, 1]
    seen = SampleDataset(scans, level="fine", protocol="lod7", augmentation="light")[0, 1]
    assert torch.allclose(one["image"], torch.nn.functional.max_pool3d(seen["image"], 4), atol=1e-5)
    counts = torch.nn.functional.one_hot(seen["target"], 7).movedim(-1, 0).float()
    assert torch.allclose(one["target"], torch.nn.functional.avg_pool3d(counts[None], 4)[0], atol=1e-6)


def test_windows_are_a_function_of_seed_epoch_and_name(inside):
    scans, windows = all_folds()[0]["train"], Windows(8, 4, until=6)
    made = [SampleDataset(scans, level="fine", protocol="lod7", augmentation="light", seed=3, windows=windows) for _ in range(2)]
    whole = SampleDataset(scans, level="fine", protocol="lod7", augmentation="light", seed=3)
    seen = set()
    for epoch in range(6):
        first, second, all_of_it = made[0][epoch, 1], made[1][epoch, 1], whole[epoch, 1]
        d, h, w = first["window"].tolist()
        assert first["window"].tolist() == second["window"].tolist() and not {d % 4, h % 4, w % 4} - {0}
        assert torch.equal(first["image"], all_of_it["image"])                       # levels before the finest see the whole head
        assert torch.equal(first["target"], all_of_it["target"][d : d + 8, h : h + 8, w : w + 8]) and first["target"].any()
        seen.add((d, h, w))
    assert len(seen) > 1
    assert "window" not in made[0][6, 1] and made[0][6, 1]["target"].shape == whole[6, 1]["target"].shape


def test_windows_then_whole_heads_with_checkpoints_and_a_frozen_level(project, tmp_path, monkeypatch):
    """All of it in one training: it ends, on whole heads, and the coarse level is the coarse stage's."""
    for name in ("tables", "shards"):
        (tmp_path / name).symlink_to(project / name)
    monkeypatch.chdir(tmp_path)
    settings = "  fine_patch: 8\n  whole_epochs: 1\n  checkpointing: blocks\n  coarse_level: frozen\n"
    settings += "  coarse_augmentation: before\n  stop_patience: 1\n"
    (tmp_path / "params.yaml").write_text(PARAMS.replace("fine: {epochs: 2", "fine: {epochs: 4") + settings)
    sides, losses = [], VolumeModule.loss

    def seen(self, batch):
        if self.training and self.level == "fine":
            sides.append(batch["target"].shape[-1])
        return losses(self, batch)

    monkeypatch.setattr(VolumeModule, "loss", seen)
    folds = all_folds()
    train("lod_brain", load_params(), {0: folds[0]})
    number = len(folds[0]["train"])
    side = folds[0]["train"][0].t1w().shape[0]
    assert sides == [8] * 3 * number + [side] * number and side > 8
    assert json.loads((fold_folder("lod_brain-base-0", 0) / "fold.json").read_text())["stages"]["fine"]["epochs"] == 4


@pytest.mark.parametrize(
    ("network", "settings", "words"),
    [
        ("lod_brain", {"fine_patch": 12}, "train.fine_patch is 12: null or a multiple of 8 is wanted"),
        ("unet", {"fine_patch": 16, "network": {}}, "train.fine_patch is 16: network unet has no level that sees the whole head; null"),
        ("unet", {"checkpointing": "blocks", "network": {}}, "train.checkpointing is blocks: network unet has none to keep"),
        ("lod_brain", {"fine_patch": 64}, "train.fine_patch is 64: .* has 16 × 16 × 16 voxels; null or at most 16 is wanted"),
    ],
)
def test_settings_that_do_not_fit_are_refused(project, tmp_path, monkeypatch, network, settings, words):
    for name in ("tables", "shards"):
        (tmp_path / name).symlink_to(project / name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text(PARAMS.replace("coarse: {epochs: 2", "coarse: {epochs: 0"))
    params = load_params()
    folds = all_folds()
    params = params.model_copy(update={"train": params.train.model_copy(update=settings)})
    with pytest.raises(InputError, match=words):
        train(network, params, {0: folds[0]})
