"""The task of one shard, without Ray: where it refuses to begin, whom it leaves out, what it writes down, how much memory it asks for."""

from pathlib import Path

import numpy as np
import pytest
from small_heads import add_subject, run

from data_registry import shards
from data_registry.errors import InputError
from data_registry.params import Harmonise
from data_registry.schema import read_table, write_table
from data_registry.shard_store import FolderStore
from data_registry.volume import load_image, load_labels, save_volume
from pipelines.harmonise import harmonise_scan, make_shard, task_bytes

SETTINGS = Harmonise(grid="16mm")


@pytest.fixture
def item(tmp_path) -> dict:
    """Two people of one shard."""
    (tmp_path / "shards").mkdir()
    scans = []
    for subject in ("00", "01"):
        add_subject(tmp_path / "db", subject, seed=int(subject))
        label = {"source": "aparc_aseg", "path": f"derivatives/freesurfer/sub-{subject}/mri/aparc+aseg.mgz"}
        scan = {"scan_id": f"db_sub-{subject}", "database": "db", "site": "db", "t1w_path": f"sub-{subject}/anat/sub-{subject}_T1w.nii.gz"}
        scans.append(scan | {"labels": [label]})
    return {"shard": "part-000.parquet", "recipe": "r", "scans": scans}


@pytest.mark.parametrize("darkest", [0, 20])
@pytest.mark.parametrize("grid", ["4mm", "8mm"])
def test_the_same_voxels_have_one_hash_in_any_file(tmp_path, grid, darkest):
    """On the grid of 4 mm uint8 in its axis order passes unchanged; as another type, and in another order, it goes through the window."""
    voxels = np.random.default_rng(0).gamma(2, 20, (64, 64, 64)).clip(darkest, 200).astype(np.uint8)
    lia = np.array([[-4.0, 0, 0, 126], [0, 0, 4, -126], [0, -4, 0, 126], [0, 0, 0, 1]])
    turn = np.array([[0, 0, -1, 63], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1.0]])  # own voxel → that of the first
    turned = voxels[::-1].transpose(1, 2, 0)
    files = {"a.nii.gz": (voxels, lia), "b.nii": (voxels.astype(np.int16), lia), "c.mgz": (turned, lia @ turn), "d.nii": (turned, lia @ turn)}
    said = set()
    for name, (data, affine) in files.items():
        save_volume(tmp_path / name, data, affine)
        scan = {"scan_id": name, "database": "db", "site": "db", "t1w_path": name, "labels": []}
        said.add(harmonise_scan(scan, tmp_path, Harmonise(grid=grid))[1]["voxels_sha256"])
    assert len(said) == 1


@pytest.mark.parametrize("missing", ["shards", "db"])
def test_a_node_that_lacks_a_folder_quarantines_nothing(tmp_path, item, missing):
    (tmp_path / missing).rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=f"{missing}: no such folder on .*; a file system shared by all nodes is wanted"):
        make_shard(FolderStore(tmp_path / "shards"), item, {"db": str(tmp_path / "db")}, SETTINGS)


def test_who_is_left_out_costs_its_neighbours_nothing(tmp_path, item):
    journal, roots = tmp_path / "journal", {"db": str(tmp_path / "db")}
    assert make_shard(FolderStore(tmp_path / "shards"), item, roots, SETTINGS, str(journal), {"db_sub-00": "kills its worker (3 tries)"}) == 1
    assert journal.read_text() == ""
    notes = shards.read_metadata(tmp_path / "shards/part-000.parquet")
    out, kept = notes["samples"]
    assert (out["status"], kept["status"], kept["row_group"]) == ("quarantined", "ok", 0)
    assert out["reason"] == f"{tmp_path}/db/sub-00/anat/sub-00_T1w.nii.gz: kills its worker (3 tries)"
    assert make_shard(FolderStore(tmp_path), item | {"scans": item["scans"][1:]}, roots, SETTINGS) == 0
    alone = shards.read_metadata(tmp_path / "part-000.parquet")["samples"]
    assert alone == [kept] and notes["recipe"] == "r"


def test_the_journal_names_the_scan_at_work(tmp_path, item, monkeypatch):
    seen = []
    monkeypatch.setattr("pipelines.harmonise.harmonise_scan", lambda *_: seen.append((tmp_path / "journal").read_text()) or 1 / 0)
    assert make_shard(FolderStore(tmp_path / "shards"), item, {"db": str(tmp_path / "db")}, SETTINGS, str(tmp_path / "journal")) == 2
    assert seen == ["db_sub-00", "db_sub-01"]


def test_memory_grows_with_the_grid_and_not_with_the_scans():
    fixed = 0.4e9 + 17 * 320**3
    scan = {"labels": [{"source": "aparc_aseg"}, {"source": "synthseg"}]}
    stored = (1 + 1 / 8 + 1 / 64) + 2 * 2 + 1 + 7 * (1 / 8 + 1 / 64)  # bytes a voxel: T1w at three levels, two label maps, lod7 and its counts
    for grid, side in (("1mm", 256), ("2mm", 128), ("native", 320)):
        for number in (1, 5):
            assert task_bytes([scan] * number, Harmonise(grid=grid)) == pytest.approx(fixed + side**3 * (10 + stored), abs=1)


def test_labels_coarser_than_the_grid_are_flagged_and_others_leave_no_trace(item, tmp_path):
    scan = item["scans"][0]                                                 # T1w and labels of 6 mm
    for grid, flagged in (("16mm", False), ("6mm", False), ("native", False), ("4mm", True)):
        _, sample = harmonise_scan(scan | {"t1w_sha256": ""}, tmp_path / "db", Harmonise(grid=grid))
        said = [warning for warning in sample["warnings"] if "no truth" in warning]
        assert said == (["aparc_aseg: labels of 6 mm voxels on a grid of 4 mm, no truth at its resolution"] if flagged else [])
        assert sample.get("label_voxel_mm") == (6 if flagged else None) and ("label_voxel_mm" in sample) == flagged
    write_table(tmp_path / "samples.parquet", "samples", [sample | {"status": "ok"}])
    assert read_table(tmp_path / "samples.parquet", "samples")["label_voxel_mm"].to_pylist() == [6]


def test_labels_that_do_not_fit_cost_the_scan_only_if_they_are_wanted(item, tmp_path):
    root, scan = tmp_path / "db", item["scans"][0] | {"t1w_sha256": ""}
    t1w, labels = load_image(root / scan["t1w_path"]), load_labels(root / scan["labels"][0]["path"])
    t1w.data[8:18, 10:20, 3:9], labels.data[8:18, 10:20, 3:9] = 190, 10      # a bright part on the right alone
    save_volume(t1w.path, t1w.data, t1w.affine)
    save_volume(labels.path, labels.data, labels.affine)
    save_volume(root / "mirrored.mgz", labels.data[..., ::-1], labels.affine)
    why = f"{root}/mirrored.mgz: the labels fit the T1w better with its left-right axis reversed "
    mirrored = {"source": "another", "path": "mirrored.mgz"}
    for spare in ("another", "synthseg"):                                       # lod7 reads the second, but aparc+aseg before it
        arrays, sample = harmonise_scan(scan | {"labels": [*scan["labels"], mirrored | {"source": spare}]}, root, SETTINGS)
        assert sample["label_sources"] == ["aparc_aseg"] and f"{spare}_x1" not in arrays
        assert [warning.startswith(why) for warning in sample["warnings"] if "mirrored" in warning] == [True]
    with pytest.raises(InputError, match=f"^{why}"):
        harmonise_scan(scan | {"labels": [mirrored | {"source": "aseg"}]}, root, SETTINGS)


def test_a_project_elsewhere(tmp_path):
    done = run(Path(__file__).parents[1], "pipelines.harmonise", "--project", str(tmp_path / "none"))
    assert done.returncode == 2 and done.stderr == f"error: {tmp_path}/none: no such folder; the one that holds params.yaml is wanted (--project)\n"
    (tmp_path / "params.yaml").write_text("index: {roots: [nowhere]}")
    done = run(Path(__file__).parents[1], "pipelines.harmonise", "--project", str(tmp_path))
    assert done.returncode == 2 and done.stderr.startswith("error: tables/scans.parquet: no such file; ")  # of that project
