"""Which files and subjects of a route are fetched, and where they stand afterwards."""

import json
import shutil
from pathlib import Path

import pytest
from small_route import NAME, T1W, get, known, ledger, scan, there, write

from data_registry.catalogue_schema import LabelSource, Site, SiteRule
from data_registry.errors import InputError
from pipelines import fetch_terms
from pipelines.fetch import Choice
from pipelines.index import index

pytestmark = pytest.mark.usefixtures("route_project")


def test_folders_of_sites_become_one_database(tmp_path):
    """As FCP-INDI's releases are: a BIDS database a site, whose name is its folder's alone."""
    for folder, subject, tesla in (("Site-ASH", "01", 1.5), ("oak", "02", 3.0)):
        write(tmp_path / "release" / folder, {
            f"sub-{subject}/anat/sub-{subject}_T1w.nii.gz": scan(int(subject)), "T1w.json": json.dumps({"MagneticFieldStrength": tesla}).encode(),
            "participants.tsv": f"participant_id\tage\nsub-{subject}\t30\n".encode(),
        })  # fmt: skip
    assert get(tmp_path / "release", choice=Choice(sites=["Oak"])) == {} and not Path("data/small/sub-01").exists()
    assert get(f"file://{tmp_path}/release") == {}
    columns = ("subject", "site", "age_years", "field_strength_tesla")
    assert [tuple(map(row.get, columns)) for row in index([Path("data/small")])] == [("01", "Ash", 30, 1.5), ("02", "Oak", 30, 3)]
    write(tmp_path / "release/oak", {T1W: scan(15)})
    with pytest.raises(InputError, match="sub-01 stands in Site-ASH and in oak"):
        get(tmp_path / "release")


def test_the_release_of_abide_as_its_bucket_has_it(tmp_path, monkeypatch):
    """A site in two folders, ids without their zeros and no column of sites in the tables, JSON files of all people in a folder beside."""
    release = tmp_path / "release"
    for folder, subject in (("Ash_a", "0050642"), ("Ash_b", "0050643"), ("Oak", "0050700")):
        write(release / folder, {
            f"sub-{subject}/anat/sub-{subject}_T1w.nii.gz": scan(int(subject)), "dataset_description.json": b"{}",
            "participants.tsv": f"age_at_scan\tparticipant_id\n{subject[-2:]}\t{int(subject)}\n".encode(),
        })  # fmt: skip
        write(release / f"sidecards/sub-{subject}/ses-x/anat", {f"sub-{subject}_ses-x_T1w.json": b"{}"})
    sites = {"Ash": Site(place="ash", folders=["Ash_a", "ASH_B"]), "Oak": Site(place="oak")}
    known(monkeypatch, sites=sites)
    get(release, choice=Choice(sites=["Ash"]))
    assert sorted(path for path in there() if path.startswith("sub-")) == [f"sub-{one}/anat/sub-{one}_T1w.nii.gz" for one in ("0050642", "0050643")]
    get(release)
    rows = [(row["subject"], row["site"], row["age_years"], row["reason"]) for row in index([Path("data/small")])]
    assert rows == [("0050642", "Ash", 42, None), ("0050643", "Ash", 43, None), ("0050700", "Oak", 0, None)]
    fetch_terms.WITHDRAWN.write_text("database\tsubject\tdate\treason\nsmall\t0050643\t\t\n")
    get(release)
    assert [path for path, content in there().items() if path.endswith("participants.tsv") and b"50643" in content] == []
    before = Path("data/small/fetched.tsv").read_bytes()
    assert get(release) == {} and Path("data/small/fetched.tsv").read_bytes() == before


def test_labels_that_stand_elsewhere_come_too(tmp_path, mirror, monkeypatch):
    """As ABIDE's FreeSurfer outputs do; asked for where the images come from the catalogue's own route."""
    shutil.rmtree(mirror / "derivatives")
    maps = {f"{folder}/mri/{name}": scan(number) for number, (folder, name) in enumerate([
        ("Ash_a_01", "aparc+aseg.mgz"), ("Ash_a_01", "T1.mgz"), ("Oak_02", "aseg.mgz"), ("fsaverage", "aseg.mgz"), ("Oak_77", "aseg.mgz"),
    ])}  # fmt: skip
    elsewhere = write(tmp_path / "outputs", maps)
    labels = LabelSource(source="FreeSurfer", version="5.1", route=str(elsewhere), subject=r".+_(\d\d)")
    known(monkeypatch, labels=labels)
    assert get(mirror) == {} and not [path for path in there() if path.startswith("derivatives")]
    monkeypatch.setattr(fetch_terms, "addresses", lambda _: [str(mirror)])
    fetch_terms.WITHDRAWN.write_text("database\tsubject\tdate\treason\nsmall\t02\t\t\n")
    assert get(mirror) == {}
    came = {path: content for path, content in there().items() if path.startswith("derivatives")}
    assert came == {"derivatives/freesurfer/sub-01/mri/aparc+aseg.mgz": maps["Ash_a_01/mri/aparc+aseg.mgz"]}
    assert ledger()["derivatives/freesurfer/sub-01/mri/aparc+aseg.mgz"]["route"] == str(elsewhere)
    before = Path("data/small/fetched.tsv").read_bytes()
    assert get(mirror) == {} and Path("data/small/fetched.tsv").read_bytes() == before
    write(elsewhere, {"Ash_b_01/mri/aseg.mgz": scan(1)})
    with pytest.raises(InputError, match="Ash_a_01 and Ash_b_01 are both of sub-01"):
        get(mirror)
    known(monkeypatch, labels=labels.model_copy(update={"subject": "(x)"}))
    with pytest.raises(InputError, match=r"outputs: none of its 5 folders is, by labels.subject '\(x\)', of the 2 subjects chosen"):
        get(mirror)


def test_sites_and_subjects_are_chosen_before_anything_comes(mirror, monkeypatch):
    def subjects(**choice) -> set[str]:
        shutil.rmtree("data", ignore_errors=True)
        get(mirror, choice=Choice(labels=False, **choice))
        return {path.split("/")[0].removeprefix("sub-") for path in there() if path.startswith("sub-")}

    assert subjects(sites=["Oak"]) == {"02", "03"} and subjects(subjects=["02"]) == {"02"}
    with pytest.raises(InputError, match="--site Elm: small has no such site; one of Ash, Oak is wanted"):
        subjects(sites=["Elm"])
    with pytest.raises(InputError, match="--subject 09: is not among the 3 at .*; one as 01 is wanted"):
        subjects(subjects=["sub-09"])
    Path("withdrawn.tsv").write_text(f"database\tsubject\tdate\treason\n{NAME}\t01\t2026-01-31\tasked for it\n")
    with pytest.raises(InputError, match="; one as 02 is wanted"):
        subjects(subjects=["sub-09"])
    Path("withdrawn.tsv").unlink()
    known(monkeypatch, site_rule=SiteRule(sidecar="StationName"))
    with pytest.raises(InputError, match="tells a site from 'StationName' of the sidecar"):
        subjects(sites=["Oak"])
    (mirror / "participants.tsv").unlink()
    known(monkeypatch)
    with pytest.raises(InputError, match="--site: small takes its sites from column 'site' of participants.tsv, which is not at"):
        subjects(sites=["Oak"])
