"""The stages one after another on small real files: index, harmonise (a real Ray), split; what fails, what is redone, what is not."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from small_heads import CHECKOUT, add_subject, run

from data_registry import protocol, shards
from data_registry.conform import conform, labels_to_grid
from data_registry.files import sha256
from data_registry.schema import read_table
from data_registry.volume import load_image, load_labels, save_volume

PARAMS = "index:\n  roots: [roots]\nharmonise: {grid: 8mm, shards_per_site: 3}\nsplit: {folds: 3}\n"
@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """Three databases of three people, with four scans that cannot be used; indexed, harmonised and split once."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "params.yaml").write_text(PARAMS)
    (folder / "pipelines").symlink_to(CHECKOUT / "pipelines")
    for number, name in enumerate(("alpha", "beta", "gamma")):
        for subject in range(3):
            add_subject(folder / "roots" / name, f"{subject:02d}", seed=10 * number + subject)
    bad = folder / "roots" / "alpha"
    for subject in ("90", "91", "92", "93"):
        add_subject(bad, subject, seed=int(subject))
    t1w = bad / "sub-90/anat/sub-90_T1w.nii.gz"
    t1w.write_bytes(t1w.read_bytes()[:200])
    volume = load_image(bad / "sub-91/anat/sub-91_T1w.nii.gz")
    save_volume(bad / "sub-91/anat/sub-91_T1w.nii.gz", np.full(volume.data.shape, 5, np.int16), volume.affine)
    labels = load_labels(bad / "derivatives/freesurfer/sub-92/mri/aparc+aseg.mgz")
    unnamed = np.where(labels.data == 10, 9999, labels.data).astype(np.int32)
    save_volume(bad / "derivatives/freesurfer/sub-92/mri/aparc+aseg.mgz", unnamed, labels.affine)
    moved = labels.affine.copy()
    moved[0, 3] += 200
    save_volume(bad / "derivatives/freesurfer/sub-93/mri/aparc+aseg.mgz", labels.data.astype(np.int32), moved)
    for stage in ("index", "harmonise", "split"):
        done = run(folder, f"pipelines.{stage}")
        assert done.returncode == 0, done.stderr
        (folder / f"{stage}.log").write_text(done.stderr)
    return folder


def samples_of(folder: Path) -> dict[str, dict]:
    return {row["scan_id"]: row for row in read_table(folder / "tables/samples.parquet", "samples").to_pylist()}


def hashes(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256(path) for path in sorted((folder / "shards").rglob("*.parquet"))}


def test_shards_hold_what_conform_gives(project):
    root = project / "roots/beta"
    row = samples_of(project)["beta_sub-01"]
    conformed = conform(load_image(root / "sub-01/anat/sub-01_T1w.nii.gz"), grid="8mm")
    labels = load_labels(root / "derivatives/freesurfer/sub-01/mri/aparc+aseg.mgz")
    read = shards.read_row(project / "shards" / row["shard"], row["row_group"], ["t1w_x1", "t1w_x4", "aparc_aseg_x1", "lod7_classes_x1", "lod7_x4"])
    assert np.array_equal(read["t1w_x1"], conformed.data)
    assert np.array_equal(read["aparc_aseg_x1"], labels_to_grid(labels, conformed.placement))
    assert np.array_equal(read["t1w_x4"], shards.pooled(conformed.data, 4))
    classes = protocol.load("lod7").classes_of(read["aparc_aseg_x1"])
    assert np.array_equal(read["lod7_classes_x1"], classes) and read["lod7_classes_x1"].dtype == np.uint8
    assert np.array_equal(read["lod7_x4"], shards.block_counts(classes, 4, 7))
    assert row["mean"] == pytest.approx(conformed.data.mean()) and row["deviation"] == pytest.approx(conformed.data.std())
    assert np.allclose(np.reshape(row["affine"], (4, 4)), conformed.placement.affine)
    assert sum(row["histogram"]) == conformed.data.size
    assert row["shard_sha256"] == sha256(project / "shards" / row["shard"])
    volumes = {entry["class_name"]: entry["ml"] for entry in row["label_volumes_ml"]}
    assert volumes["brainstem"] == pytest.approx((classes == 6).sum() * 0.512, rel=1e-5)


def test_what_cannot_be_used_is_quarantined_and_said(project):
    rows = samples_of(project)
    for subject, words in [("90", "cut or damaged"), ("91", "no contrast"), ("92", "label id 9999"), ("93", "in world space")]:
        row = rows[f"alpha_sub-{subject}"]
        assert row["status"] == "quarantined" and row["shard"] is None
        assert words in row["reason"] and f"sub-{subject}" in row["reason"]
        assert row["reason"] in (project / "harmonise.log").read_text()
    assert sum(row["status"] == "ok" for row in rows.values()) == 9
    split = read_table(project / "tables/split.parquet", "split").to_pylist()
    assert {row["scan_id"] for row in split} == {name for name, row in rows.items() if row["status"] == "ok"}


def test_a_shard_never_mixes_sites(project):
    for path, _ in hashes(project).items():
        samples = shards.read_metadata(project / path)["samples"]
        assert {f"site={row['database']}.{row['site']}" for row in samples} == {Path(path).parent.name}


def test_the_proof_stands_beside_the_split(project):
    proof = json.loads((project / "tables/split.json").read_text())
    assert len(proof["folds"]) == 3 and {entry["overlaps"] for entry in proof["proof"]} == {0}
    assert sorted(place for fold in proof["folds"] for place in fold["held_out"]) == ["alpha", "beta", "gamma"]


def test_nothing_is_redone_and_a_lost_shard_comes_back_identical(project):
    before = hashes(project)
    times = {path: (project / path).stat().st_mtime_ns for path in before}
    lost, cut, *_ = before
    (project / lost).unlink()
    (project / cut).write_bytes((project / cut).read_bytes()[:-50])
    leftover = project / "shards/grid=8mm/site=delta.delta/part-000.parquet"
    leftover.parent.mkdir()
    leftover.write_bytes(b"x")
    table = sha256(project / "tables/samples.parquet")
    assert run(project, "pipelines.harmonise").returncode == 0
    assert hashes(project) == before and not leftover.parent.exists()  # also: what the manifest does not name is gone
    assert sha256(project / "tables/samples.parquet") == table
    assert [path for path in before if (project / path).stat().st_mtime_ns != times[path]] == [lost, cut]


def test_one_more_subject_rewrites_one_shard(project, tmp_path):
    subprocess.run(["cp", "-a", f"{project}/.", tmp_path], check=True)
    before = hashes(tmp_path)
    add_subject(tmp_path / "roots/beta", "77", seed=77)
    for stage in ("index", "harmonise", "split"):
        assert run(tmp_path, f"pipelines.{stage}").returncode == 0
    after = hashes(tmp_path)
    changed = [path for path in after if before.get(path) != after[path]]
    assert len(changed) == 1 and "site=beta.beta" in changed[0] and set(before) <= set(after)
    assert samples_of(tmp_path)["beta_sub-77"]["status"] == "ok"


@pytest.mark.parametrize(
    ("module", "change", "words"),
    [
        ("pipelines.index", lambda f: (f / "params.yaml").write_text("index: {roots: [nowhere]}"), "nowhere: no such folder"),
        ("pipelines.index", lambda f: (f / "params.yaml").write_text("index: {root: [x]}"), "index.root is not a known key"),
        ("pipelines.harmonise", lambda f: (f / "tables/scans.parquet").unlink(), "the table scans is wanted"),
        ("pipelines.split", lambda f: (f / "tables/samples.parquet").write_bytes(b"no"), "not a readable Parquet file"),
        ("pipelines.split", lambda f: (f / "params.yaml").write_text(PARAMS.replace("folds: 3", "holdout: [delta]")), "'delta' is no place"),
        ("lod_model.train", lambda f: (f / "tables/split.parquet").unlink(), "the table split is wanted"),
    ],
)
def test_bad_input_is_one_line_and_a_status(project, tmp_path, module, change, words):
    subprocess.run(["cp", "-a", f"{project}/.", tmp_path], check=True)
    change(tmp_path)
    done = run(tmp_path, module, *(["--network", "lod_brain"] if module.endswith("train") else []))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and words in last
