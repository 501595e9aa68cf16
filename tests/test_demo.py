"""The demo's sites: complete BIDS, sound labels in every orientation, the same bytes for the same seed."""

import csv
import dataclasses
import functools
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from data_registry import protocol
from data_registry.errors import run_stage
from data_registry.volume import Volume, load_image, load_labels
from pipelines import demo, demo_scan
from pipelines.demo_anatomy import TISSUES
from pipelines.demo_sites import SITES

THREE = ("alder", "elm", "rowan")  # PIR, LIA with thick slices, ASR
PAIRS = ((2, 41), (4, 43), (8, 47), (10, 49), (11, 50), (12, 51), (13, 52), (17, 53), (18, 54), (26, 58), (28, 60), (1024, 2024))
MIDLINE = (14, 15, 16, 251, 252, 253, 254, 255)
SITES_AS_SHIPPED = dict(SITES)


def coarse(site):
    """The same scanner with voxels of about 3 mm, which are faster to make."""
    factor = [round(3 / v) for v in site.voxel_mm]
    voxel_mm, shape = np.multiply(site.voxel_mm, factor), np.floor_divide(site.shape, factor)
    return dataclasses.replace(site, voxel_mm=tuple(voxel_mm.tolist()), shape=tuple(shape.tolist()))


@pytest.fixture(scope="module", autouse=True)
def coarse_sites():
    with pytest.MonkeyPatch.context() as patch:
        for name in THREE:
            patch.setitem(SITES, name, coarse(SITES[name]))
        yield


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Three databases with one subject each, the last with a second one; tests leave it as it is."""
    out = tmp_path_factory.mktemp("demo")
    assert demo.build_sites(out, subjects=1, workers=1, databases=THREE) == [out / name for name in THREE]
    assert demo.build_sites(out, subjects=2, workers=1, databases=THREE[2:]) == [out / "rowan"]
    return out


@functools.cache
def scan(out, database):
    labels = out / database / "derivatives/freesurfer/sub-01/mri/aparc+aseg.mgz"
    return load_image(out / database / "sub-01/anat/sub-01_T1w.nii.gz"), load_labels(labels)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stamps(folder):
    """Which file each path is, and when it was last written."""
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def world(volume, where):
    """(n, 3) RAS mm of the voxels where a mask is set."""
    return np.argwhere(where) @ volume.affine[:3, :3].T + volume.affine[:3, 3]


def labels_at(labels, points):
    index = np.rint((points - labels.affine[:3, 3]) @ np.linalg.inv(labels.affine[:3, :3]).T).astype(int)
    return labels.data[tuple(np.clip(index, 0, 255).T)]


@pytest.mark.parametrize("database", THREE)
def test_a_database_is_bids_and_says_that_it_is_synthetic(built, database):
    folder, site = built / database, SITES[database]
    description = json.loads((folder / "dataset_description.json").read_text())
    derivative = json.loads((folder / "derivatives/freesurfer/dataset_description.json").read_text())
    assert description["DatasetType"] == "raw" and derivative["DatasetType"] == "derivative"
    assert "synthetic" in description["Name"] and "synthetic" in derivative["Name"]
    rows = list(csv.DictReader((folder / "participants.tsv").open(), delimiter="\t"))
    subjects = ["sub-01", "sub-02"][: 2 if database == "rowan" else 1]
    assert [(row["participant_id"], row["site"]) for row in rows] == [(subject, site.site) for subject in subjects]
    assert sorted(path.name for path in folder.glob("sub-*")) == subjects
    assert site.ages_years[0] <= int(rows[0]["age"]) <= site.ages_years[1] and rows[0]["sex"] in "FM"
    sidecar = json.loads((folder / "sub-01/anat/sub-01_T1w.json").read_text())
    assert sidecar["Manufacturer"] == site.manufacturer and sidecar["MagneticFieldStrength"] == site.field_tesla
    assert sidecar["SliceThickness"] == site.voxel_mm[site.slice_axis]
    assert "Synthetic" in sidecar["ManufacturersModelName"]
    assert sorted(path.name for path in built.iterdir()) == sorted(THREE)  # nothing is left aside


@pytest.mark.parametrize("database", THREE)
def test_the_grids_are_the_scanners_and_freesurfers(built, database):
    t1w, labels = scan(built, database)
    assert t1w.orientation == SITES[database].orientation and t1w.data.shape == SITES[database].shape
    assert t1w.voxel_mm == pytest.approx(SITES[database].voxel_mm) and not t1w.warnings
    assert labels.orientation == "LIA" and labels.data.shape == (256, 256, 256) and labels.voxel_mm == pytest.approx([1, 1, 1])
    centre = [volume.affine[:3, :3] @ (np.array(volume.data.shape) / 2) + volume.affine[:3, 3] for volume in (t1w, labels)]
    assert centre[0] == pytest.approx(centre[1])  # as mri_convert --conform lays it


@pytest.mark.parametrize("database", THREE)
def test_labels_are_known_complete_and_of_human_size(built, database):
    labels = scan(built, database)[1].data
    classes = protocol.load("lod7").classes_of(labels)  # an id that the table does not name raises
    assert {i for pair in PAIRS for i in pair} | set(MIDLINE) | {24} <= set(np.unique(labels).tolist())
    grey, basal, white, ventricles, cerebellum, brainstem = np.bincount(classes.ravel(), minlength=7)[1:] / 1000  # mL
    assert 350 < grey < 750 and 300 < white < 650 and 20 < basal < 60
    assert 5 < ventricles < 70 and 80 < cerebellum < 200 and 14 < brainstem < 36


@pytest.mark.parametrize("database", THREE)
def test_left_ids_lie_on_the_left(built, database):
    labels = scan(built, database)[1]
    ids, x = labels.data[labels.data > 0], world(labels, labels.data > 0)[:, 0]
    mean_x = np.bincount(ids, weights=x) / np.maximum(np.bincount(ids), 1)
    for left, right in PAIRS:
        assert mean_x[left] + 5 < mean_x[right], f"{left} is at x = {mean_x[left]:.0f} mm, {right} at {mean_x[right]:.0f} mm"
    assert mean_x[2] < 0 < mean_x[41]


@pytest.mark.parametrize("database", THREE)
def test_t1w_and_labels_show_one_head_in_one_world(built, database):
    t1w, labels = scan(built, database)
    points, values = world(t1w, np.ones(t1w.data.shape, bool))[::3], t1w.data.ravel()[::3]

    def explained(offset_mm):
        """Share of the variance of the brain's intensities that white matter, cortex and ventricles explain."""
        ids = labels_at(labels, points + offset_mm)
        groups = [values[np.isin(ids, wanted)] for wanted in ((2, 41), np.r_[1001:1036, 2001:2036], (4, 43))]
        every = np.concatenate(groups)
        assert groups[0].mean() > groups[1].mean() > groups[2].mean() or any(offset_mm)
        return sum(len(g) * (g.mean() - every.mean()) ** 2 for g in groups) / (len(every) * every.var())

    here = explained((0, 0, 0))
    assert here > 0.4
    for offset_mm in np.vstack([np.eye(3), -np.eye(3)]) * 6:  # a flip or a shift would not be best in the right place
        assert explained(offset_mm) < 0.6 * here
    brain = world(labels, labels.data > 0)
    index = (brain - t1w.affine[:3, 3]) @ np.linalg.inv(t1w.affine[:3, :3]).T
    assert index.min() > -0.5 and (index < np.array(t1w.data.shape) - 0.5).all()  # no brain outside the field of view


def test_the_sites_differ():
    sites = SITES_AS_SHIPPED.values()
    assert len(sites) == 6 and all(set(site.means) == set(TISSUES) for site in sites)
    for name in ("database", "site", "orientation", "voxel_mm", "shape", "model", "noise", "scale"):
        assert len({getattr(site, name) for site in sites}) >= 5, name
    assert {site.field_tesla for site in sites} == {1.5, 3.0} and max(max(site.voxel_mm) for site in sites) == 3.0
    assert len({tuple(site.means.values()) for site in sites}) == 6


@pytest.mark.parametrize("site", SITES_AS_SHIPPED.values(), ids=lambda site: site.orientation)
def test_grid_affine_lays_every_orientation_about_the_centre(site):
    affine = demo_scan.grid_affine(site.orientation, site.voxel_mm, site.shape, centre_mm=np.array([1.0, 2.0, 3.0]))
    assert Volume(np.zeros((1, 1, 1)), affine).orientation == site.orientation
    assert affine @ [*(n / 2 for n in site.shape), 1] == pytest.approx([1, 2, 3, 1])


def test_adding_a_subject_repeats_it_and_leaves_the_others(built, tmp_path):
    whole = contents(built / "rowan")
    shutil.copytree(built / "rowan", tmp_path / "rowan")
    table = tmp_path / "rowan" / "participants.tsv"
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:2]))  # as if sub-02 had been interrupted
    (tmp_path / "rowan/sub-02/anat/sub-02_T1w.nii.gz").write_bytes(b"half")
    (tmp_path / "rowan/sub-02/anat/junk").touch()
    before = stamps(tmp_path / "rowan/sub-01")
    assert demo.add_subject(tmp_path, "rowan") == tmp_path / "rowan" / "sub-02"
    assert contents(tmp_path / "rowan") == whole  # the same bytes, whatever was made before it
    assert stamps(tmp_path / "rowan/sub-01") == before
    first, second = (whole[f"sub-0{i}/anat/sub-0{i}_T1w.nii.gz"] for i in (1, 2))
    assert first != second


def test_another_seed_gives_another_person():
    draws = [demo_scan.draw_person(SITES["alder"], np.random.default_rng(seed)) for seed in (0, 0, 1)]
    points = np.random.default_rng(0).uniform(-60, 60, (200, 3))
    at = [person.to_template(points) for person in draws]
    assert np.array_equal(at[0], at[1])
    assert np.linalg.norm(at[0] - at[2], axis=1).mean() > 3  # mm
    # Left and right are not mirror images of each other once the pose is undone.
    person = dataclasses.replace(draws[0], pose=np.eye(3), position_mm=np.zeros(3))
    mirrored = person.to_template(points * [-1, 1, 1]) * [-1, 1, 1]
    assert np.linalg.norm(person.to_template(points) - mirrored, axis=1).mean() > 1


def test_building_again_does_nothing(built, monkeypatch):
    monkeypatch.setattr(demo, "_write_scan", None)  # would raise
    before = stamps(built)
    assert len(before) > 30
    demo.build_sites(built, subjects=1, workers=1, databases=THREE)
    assert stamps(built) == before


def test_a_failure_leaves_no_half_database(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_scan, "make_scan", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        demo.build_sites(tmp_path / "out", subjects=1, workers=1, databases=["alder"])
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--subjects", "0"], "--subjects is 0; at least 1"),
        (["--seed", "-1"], "--seed is -1; at least 0"),
        (["--workers", "0"], "--workers is 0; at least 1"),
        (["--seed", "x"], "--seed: invalid int value"),
        (["--add", "oak"], "'oak' is not one of the demo's; one of alder, birch"),
        (["--add", "birch"], "no such database; build the demo"),
        (["--add", "alder", "--seed", "7"], "was made with --seed 0, --seed 7 is asked for"),
        (["--add", "alder", "--subjects", "3"], "--subjects cannot be given with --add"),
        (["--subjects", "1", "--seed", "7"], "was made with --seed 0, --seed 7 is asked for"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_2(built, arguments, said, capsys):
    assert said in refused(capsys, str(built), *arguments)


def test_a_folder_of_others_is_refused(tmp_path, capsys):
    (tmp_path / "alder").mkdir()
    assert "was not made by this command" in refused(capsys, str(tmp_path))
    (tmp_path / "file").touch()
    assert f"{tmp_path / 'file'}: File exists" in refused(capsys, str(tmp_path / "file"))


def test_help_loads_no_heavy_library():
    code = "import sys, pipelines.demo; print({'torch', 'torchio', 'nilearn', 'nibabel', 'rich'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def refused(capsys, *arguments):
    """The one line on stderr with which the command exits 2."""
    with pytest.raises(SystemExit) as stopped:
        run_stage(lambda: demo.main(arguments))
    said = capsys.readouterr()
    assert stopped.value.code == 2 and said.err.count("\n") == 1 and not said.out
    return said.err
