"""Index: who and where by the catalogue's rule, and one clear line for each way in which a database can be wrong."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_registry.catalogue import load_database, unknown_database
from data_registry.catalogue_schema import Database, Site, SiteRule
from data_registry.errors import InputError
from data_registry.volume import save_volume
from pipelines import hashes
from pipelines import index as stage


def make_database(root, subjects=("01", "02"), participants="participant_id\tsite\tage\tsex\nsub-01\tA\t30\tF\nsub-02\tA\t41.5\tmale\n"):
    for number, subject in enumerate(subjects):
        anat = root / f"sub-{subject}" / "anat"
        data = np.random.default_rng(number).integers(0, 200, (4, 4, 4)).astype(np.int16)
        save_volume(anat / f"sub-{subject}_T1w.nii.gz", data, np.eye(4))
        (anat / f"sub-{subject}_T1w.json").write_text(json.dumps({"Manufacturer": "Siemens", "MagneticFieldStrength": 3}))
        save_volume(root / f"derivatives/freesurfer/sub-{subject}/mri/aseg.mgz", data % 2, np.eye(4))
    (root / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.10.0"}')
    if participants:
        (root / "participants.tsv").write_text(participants)
    return root


def catalogued(name="db", **changes) -> Database:
    sites = {"A": Site(place="Place A", scanner="a1", manufacturer="GE", field_strength_tesla=1.5), "B": Site(place="Place B")}
    return Database(**{"name": name, "title": name, "site_rule": SiteRule(participants="site"), "sites": sites} | changes)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def index_with(monkeypatch, database, root):
    monkeypatch.setattr(stage, "find_database", lambda name: database)
    return stage.index([root])


def test_rows_of_a_catalogued_database(tmp_path, monkeypatch):
    rows = index_with(monkeypatch, catalogued(), make_database(tmp_path / "db"))
    assert [row["scan_id"] for row in rows] == ["db_sub-01", "db_sub-02"]
    first, second = rows
    assert (first["site"], first["place"], first["scanner"], first["person"]) == ("A", "Place A", "a1", "db/01")
    assert (first["age_years"], first["sex"], second["age_years"], second["sex"]) == (30.0, "F", 41.5, "M")
    assert (first["manufacturer"], first["field_strength_tesla"]) == ("Siemens", 3.0)  # the sidecar before the catalogue
    assert [label["source"] for label in first["labels"]] == ["aseg"]
    assert first["t1w_sha256"] != second["t1w_sha256"] and first["reason"] is None


def test_unknown_database_is_one_site(tmp_path, caplog):
    with caplog.at_level("INFO", "lodbrain"):
        rows = stage.index([make_database(tmp_path / "pilot")])
    assert {(row["site"], row["place"]) for row in rows} == {("pilot", "pilot")}
    assert "not in the catalogue" in caplog.text
    assert unknown_database("pilot").known is False


def test_two_sites_for_one_subject(tmp_path, monkeypatch):
    table = "participant_id\tsite\nsub-01\tA\nsub-01\tB\nsub-02\tA\n"
    rows = index_with(monkeypatch, catalogued(), make_database(tmp_path / "db", participants=table))
    assert "sub-01 stands in two sites (A and B)" in rows[0]["reason"]
    assert rows[1]["reason"] is None


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("participant_id\tsite\nsub-01\tA\n", "no site in column 'site' of .*participants.tsv; a value is wanted"),
        ("participant_id\tsite\nsub-01\tA\nsub-02\tn/a\n", "no site in column 'site'"),
        ("participant_id\tsite\nsub-01\tA\nsub-02\tZ\n", "site 'Z' .* is not in the catalogue; one of A, B is wanted"),
    ],
)
def test_a_rule_that_gives_no_site_quarantines(tmp_path, monkeypatch, table, words):
    rows = index_with(monkeypatch, catalogued(), make_database(tmp_path / "db", participants=table))
    assert rows[0]["reason"] is None
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(rows[1]["reason"])


def test_other_rules(tmp_path, monkeypatch):
    root = make_database(tmp_path / "db", participants="")
    sites = {"0": Site(place="P"), "Siemens": Site(place="Q")}
    assert index_with(monkeypatch, catalogued(site_rule=SiteRule(prefix=r"(\d)\d"), sites=sites), root)[0]["place"] == "P"
    assert index_with(monkeypatch, catalogued(site_rule=SiteRule(sidecar="Manufacturer"), sites=sites), root)[0]["place"] == "Q"


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("participant_id\tage\nsub-01\t3\n", "column 'site' is wanted once, it has participant_id, age$"),
        ("SUB_ID\tsite\n01\tA\n02\tA\n", "column 'participant_id' is wanted once, it has SUB_ID, site$"),
        ("participant_id\tsite\tsite\nsub-01\tA\tB\n", r"column 'site' is wanted once, it has participant_id, site, site \(2\)$"),
        ("\n", "there is no such file, or nothing in it$"),
        ("", "there is no such file, or nothing in it$"),
    ],
)
def test_a_declared_column_that_is_not_there_or_stands_twice_stops(tmp_path, monkeypatch, table, words):
    root = make_database(tmp_path / "db", participants=table)
    with pytest.raises(InputError, match=f"participants.tsv: database db takes its sites from column 'site'; .*{words}"):
        index_with(monkeypatch, catalogued(), root)


def test_all_databases_that_cannot_be_used_are_named_at_once_and_the_others_are_still_read(tmp_path, monkeypatch):
    for name in ("good", "poor"):
        make_database(tmp_path / "data" / name, subjects=("01",))
    (tmp_path / "data/void/sub-01/func").mkdir(parents=True)
    (tmp_path / "data/poor/participants.tsv").write_text("participant_id\nsub-01\n")
    entries = {"poor": catalogued("poor")}
    monkeypatch.setattr(stage, "find_database", lambda name: entries.get(name) or unknown_database(name))
    monkeypatch.setattr(hashes, "sha256", lambda path: pytest.fail("bytes are read although the run stops"))
    (tmp_path / "params.yaml").write_text("index: {roots: [data]}\n")
    with pytest.raises(InputError, match="poor/participants.tsv: .*; .*void: no T1w in it"):
        stage.main()
    assert "unknown database\tgood\t" in (tmp_path / "tables/conflicts.tsv").read_text() and not (tmp_path / "tables/scans.parquet").exists()


def test_a_folder_that_cannot_be_read_stops_without_a_traceback(tmp_path, monkeypatch):
    for name in ("closed", "open"):
        make_database(tmp_path / "data" / name, subjects=("01",), participants="")

    def find_labels(base, *_, **__):
        if base.name == "closed":
            raise PermissionError(13, "Permission denied", str(base / "derivatives"))
        return {}

    monkeypatch.setattr(stage, "find_labels", find_labels)
    checks = []
    with pytest.raises(InputError, match="closed/derivatives: Permission denied; a readable folder is wanted$"):
        stage.index([tmp_path / "data"], checks=checks)
    assert [(check.database.name, len(check.rows)) for check in checks] == [("open", 1)]


def test_folders_beside_databases_are_named(tmp_path, caplog):
    make_database(tmp_path / "data" / "db", participants="")
    (tmp_path / "data/abide1/NYU/sub-01/anat").mkdir(parents=True)
    (tmp_path / "data/gone").symlink_to("unmounted")
    (tmp_path / "data/.git").mkdir()
    stage.index([tmp_path / "data"])
    assert [Path(record.args[0]).name for record in caplog.records if "passed over" in record.msg] == ["abide1", "gone"]


def test_many_unusable_scans_are_counted(tmp_path, monkeypatch, caplog):
    root = make_database(tmp_path / "db", subjects=("01", "02", "03", "04"), participants="")
    for subject in ("01", "02", "03"):
        (root / f"sub-{subject}/anat/sub-{subject}_T1w.nii.gz").write_bytes(b"")
    monkeypatch.setattr(stage, "MOST_NAMED", 2)
    stage.index([root])
    lines = [record.getMessage() for record in caplog.records if "quarantined" in record.msg]
    assert len(lines) == 3 and lines[-1] == "quarantined: 1 more, each with its reason in tables/conflicts.tsv"


def test_a_stopped_run_keeps_the_hashes_it_has(tmp_path, monkeypatch):
    root = make_database(tmp_path / "db", participants="")
    read, whole = [], hashes.sha256

    def stopped(path):
        if len(read) == 2:
            raise KeyboardInterrupt
        read.append(path)
        return whole(path)

    monkeypatch.setattr(hashes, "ThreadPoolExecutor", lambda _: ThreadPoolExecutor(1))
    monkeypatch.setattr(hashes, "sha256", stopped)
    with pytest.raises(KeyboardInterrupt):
        stage.index([root])
    monkeypatch.setattr(hashes, "sha256", lambda path: pytest.fail("read again") if path in read else whole(path))
    assert all(row["t1w_sha256"] for row in stage.index([root]))


def test_two_subjects_with_one_file(tmp_path):
    root = make_database(tmp_path / "db", participants="")
    shutil.copy(root / "sub-01/anat/sub-01_T1w.nii.gz", root / "sub-02/anat/sub-02_T1w.nii.gz")
    reasons = [row["reason"] for row in stage.index([root])]
    words = [reason.split(": ")[1] for reason in reasons]
    assert words == [f"the same bytes as db_sub-{other}; one file for one scan is wanted" for other in ("02", "01")]


def test_where_no_scan_can_be_used_the_table_says_why(tmp_path):
    root = make_database(tmp_path / "data/db", participants="")
    for path in root.rglob("*_T1w.nii.gz"):
        path.write_bytes(b"")
    (tmp_path / "params.yaml").write_text("index: {roots: [data]}\n")
    with pytest.raises(InputError, match=r"^data: none of the 2 scans can be used; tables/scans.parquet has the reasons$"):
        stage.main()
    rows = pq.read_table(tmp_path / "tables/scans.parquet").to_pylist()
    assert len(rows) == 2 and all("an empty file" in row["reason"] for row in rows)


def test_one_file_in_two_databases_is_one_person(tmp_path):
    for name in ("one", "two"):
        make_database(tmp_path / "roots" / name, subjects=("01",), participants="")
    make_database(tmp_path / "roots" / "three", subjects=("07", "01"), participants="")
    rows = stage.index([tmp_path / "roots"])
    assert [row["person"] for row in rows] == ["one/01", "three/01", "one/01", "one/01"]
    assert not any(row["reason"] for row in rows)


def test_a_person_merged_across_databases_stays_one_person(tmp_path):
    """two/01 shares one file with one/01 and has a second session of its own: all three scans are one person's."""
    make_database(tmp_path / "roots" / "one", subjects=("01",), participants="")
    two = make_database(tmp_path / "roots" / "two", subjects=("01",), participants="")
    data = np.random.default_rng(9).integers(0, 200, (4, 4, 4)).astype(np.int16)
    save_volume(two / "sub-01/ses-2/anat/sub-01_ses-2_T1w.nii.gz", data, np.eye(4))
    rows = stage.index([tmp_path / "roots"])
    assert [row["scan_id"] for row in rows] == ["one_sub-01", "two_sub-01", "two_sub-01_ses-2"]
    assert {row["person"] for row in rows} == {"one/01"}


def test_one_label_map_belongs_to_one_scan(tmp_path):
    root = make_database(tmp_path / "db", subjects=("01",), participants="")
    for session in ("1", "2"):
        data = np.random.default_rng(int(session)).integers(0, 200, (4, 4, 4)).astype(np.int16)
        save_volume(root / f"sub-09/ses-{session}/anat/sub-09_ses-{session}_T1w.nii.gz", data, np.eye(4))
    save_volume(root / "derivatives/freesurfer/sub-09/mri/aseg.mgz", np.ones((4, 4, 4), np.int16), np.eye(4))
    rows = {row["scan_id"]: row for row in stage.index([root])}
    assert [len(rows[f"db_sub-09_ses-{s}"]["labels"]) for s in "12"] == [1, 0]
    save_volume(root / "derivatives/freesurfer/sub-09_ses-2/mri/aseg.mgz", np.ones((4, 4, 4), np.int16), np.eye(4))
    rows = {row["scan_id"]: row for row in stage.index([root])}
    assert rows["db_sub-09_ses-2"]["labels"][0]["path"] == "derivatives/freesurfer/sub-09_ses-2/mri/aseg.mgz"


def test_labels_also_come_from_a_root_of_their_own(tmp_path):
    root = make_database(tmp_path / "db", subjects=("01",), participants="")
    for run in ("1", "2"):
        data = np.random.default_rng(int(run)).integers(0, 200, (4, 4, 4)).astype(np.int16)
        save_volume(root / f"sub-09/anat/sub-09_run-{run}_T1w.nii.gz", data, np.eye(4))
    for path in (root / "derivatives/freesurfer/sub-09", tmp_path / "labels/db/derivatives/freesurfer/sub-09_run-2"):
        save_volume(path / "mri/aseg.mgz", np.ones((4, 4, 4), np.int16), np.eye(4))
    rows = {row["scan_id"]: row["labels"] for row in stage.index([root], labels=tmp_path / "labels")}
    assert [label["path"] for label in rows["db_sub-09_run-1"]] == ["derivatives/freesurfer/sub-09/mri/aseg.mgz"]
    assert [label["path"] for label in rows["db_sub-09_run-2"]] == [f"{tmp_path}/labels/db/derivatives/freesurfer/sub-09_run-2/mri/aseg.mgz"]
    assert rows["db_sub-09_run-2"][0]["sha256"]


def test_inherited_sidecars_and_spellings(tmp_path):
    root = make_database(tmp_path / "db", subjects=("01",), participants="")
    (root / "sub-01/anat/sub-01_T1w.json").write_text('{"ManufacturersModelName": 750}')
    (root / "T1w.json").write_text('{"Manufacturer": "SIEMENS", "MagneticFieldStrength": "1.5"}')
    (row,) = stage.index([root])
    assert (row["manufacturer"], row["model"], row["field_strength_tesla"]) == ("Siemens", "750", 1.5)


def test_text_that_is_not_utf8_and_a_damaged_cache(tmp_path, monkeypatch):
    root = make_database(tmp_path / "db")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/hashes.parquet").write_bytes(b"damaged")
    assert len(stage.index([root])) == 2
    (root / "participants.tsv").write_bytes("participant_id\tsite\nsub-01\tM\u00fcnchen\n".encode("latin-1"))
    with pytest.raises(InputError, match="participants.tsv: cannot be read"):
        index_with(monkeypatch, catalogued(), root)


def test_a_databases_name_is_its_folders_or_its_links(tmp_path):
    root = make_database(tmp_path / "my.db", participants="")
    with pytest.raises(InputError, match="letters, digits"):
        stage.index([root])
    (tmp_path / "my_db").symlink_to(root)
    assert stage.index([tmp_path / "my_db"])[0]["database"] == "my_db"


def test_families_from_the_declared_column(tmp_path, monkeypatch):
    table = "participant_id\tsite\tFamily_ID\nsub-01\tA\tn/a\nsub-01\tA\tf7\nsub-02\tA\tn/a\n"
    rows = index_with(monkeypatch, catalogued(family_column="family_id"), make_database(tmp_path / "db", participants=table))
    assert [row["family"] for row in rows] == ["db/f7", None]


def test_folders_that_are_not_there_or_hold_nothing(tmp_path):
    with pytest.raises(InputError, match="index.roots in params.yaml is empty"):
        stage.index([])
    with pytest.raises(InputError, match="no such folder"):
        stage.index([tmp_path / "none"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no BIDS database in it"):
        stage.index([tmp_path / "empty"])
    (tmp_path / "empty" / "dataset_description.json").write_text("{}")
    with pytest.raises(InputError, match="no T1w in it"):
        stage.index([tmp_path / "empty"])
    make_database(tmp_path / "x" / "db")
    make_database(tmp_path / "y" / "db")
    with pytest.raises(InputError, match="a second database named db"):
        stage.index([tmp_path / "x" / "db", tmp_path / "y" / "db"])


def test_broken_sidecar_broken_link_and_double_name_are_quarantined(tmp_path):
    root = make_database(tmp_path / "db", subjects=("01", "02", "03", "04"), participants="")
    (root / "sub-01/anat/sub-01_T1w.json").write_text("{")
    (root / "sub-02/anat/sub-02_T1w.nii.gz").unlink()
    (root / "sub-02/anat/sub-02_T1w.nii.gz").symlink_to("nowhere")
    save_volume(root / "sub-03/anat/sub-03_T1w.nii", np.ones((3, 3, 3), np.int16), np.eye(4))
    rows = stage.index([root])
    reasons = {row["scan_id"].split("@")[0]: row["reason"] for row in rows}
    assert "not valid JSON" in reasons["db_sub-01"]
    link = f"{root}/sub-02/anat/sub-02_T1w.nii.gz: a link to a file that is not here (of DataLad's, `datalad get` fetches it)"
    assert reasons["db_sub-02"] == f"{link}; a readable file is wanted"
    assert sum("names the same scan" in (row["reason"] or "") for row in rows) == 2
    assert reasons["db_sub-04"] is None and len({row["scan_id"] for row in rows}) == 5


def test_scans_that_are_gone_since_the_last_index_are_told(tmp_path, caplog):
    root = make_database(tmp_path / "data/db", subjects=("01", "02", "03", "04"), participants="")
    (tmp_path / "params.yaml").write_text("index: {roots: [data]}\n")
    stage.main()
    for subject in ("01", "02"):
        shutil.rmtree(root / f"sub-{subject}")
    (tmp_path / "withdrawn.tsv").write_text("database\tsubject\tdate\treason\ndb\t02\t2026-01-31\tasked for it\n")
    stage.main()
    assert [record.getMessage() for record in caplog.records if "gone" in record.msg] == ["db: gone since the last index: 1 scans, db_sub-01"]
    caplog.clear()
    (tmp_path / "tables/scans.parquet").write_bytes(b"damaged")
    stage.main()
    assert "gone" not in caplog.text


def test_hashes_are_cached_by_path_size_and_time(tmp_path, monkeypatch):
    root = make_database(tmp_path / "db", participants="")
    first = stage.index([root])
    monkeypatch.setattr(hashes, "sha256", lambda path: pytest.fail(f"{path} was read again"))
    assert stage.index([root]) == first


def test_a_broken_catalogue_names_file_and_field(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("name: bad\ntitle: t\nsite_rule: {participants: a, single: b}\nsites:\n  A: {place: P, field_strength_tesla: 30}\n")
    with pytest.raises(InputError, match=r"bad.yaml: site_rule: .*exactly one.*sites.A.field_strength_tesla.*30"):
        load_database(path)
