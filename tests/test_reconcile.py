"""Databases against the catalogue: each kind of conflict is found where it was planted, and nothing is changed without a row that says so."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest

from data_registry.catalogue import unknown_database
from data_registry.catalogue_schema import Database, Site, SiteRule
from data_registry.errors import InputError
from data_registry.schema import CONFLICTS
from pipelines import conflicts
from pipelines import index as stage

SIEMENS = {"Manufacturer": "Siemens", "ManufacturersModelName": "TrioTim", "MagneticFieldStrength": 3}
TABLE = "participant_id\tsite\tage\tsex\n"


def make(root: Path, scans: dict[str, dict | None], table: str | None = None, **files: object) -> Path:
    """A database of files that are not volumes, as the index reads bytes: subject, or subject/session, → sidecar."""
    for number, (name, sidecar) in enumerate(scans.items()):
        parts = [f"sub-{name.split('/')[0]}"] + [f"ses-{session}" for session in name.split("/")[1:]]
        stem = root.joinpath(*parts, "anat", "_".join(parts) + "_T1w")
        stem.parent.mkdir(parents=True)
        Path(f"{stem}.nii.gz").write_bytes(f"{root.name} {number}".encode())
        if sidecar is not None:
            Path(f"{stem}.json").write_text(json.dumps(sidecar))
    for name, content in ({"dataset_description": {"Name": "x", "License": "CC0"}} | files).items():
        (root / f"{name}.json").write_text(json.dumps(content))
    if table:
        (root / "participants.tsv").write_text(table)
    return root


def entry(**changes) -> Database:
    site = Site(place="P", manufacturer="Siemens", model="TrioTim", field_strength_tesla=3.0, voxel_mm=[1.0, 1.0, 1.0])
    base = {"name": "db", "title": "Db", "licence": "CC0", "site_rule": SiteRule(participants="site"), "sites": {"A": site}}
    return Database(**base | changes)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def reconcile(monkeypatch):
    """Index one root with one entry: rows of scans by subject (and session), and conflicts as the table has them."""

    def run(root: Path, database: Database | None = None) -> tuple[dict[str, dict], list[dict]]:
        monkeypatch.setattr(stage, "find_database", lambda name: database or unknown_database(name))
        checks: list = []
        rows = stage.index([root], checks=checks)
        conflicts.write_conflicts(checks)
        with open(conflicts.CONFLICTS_TSV, encoding="utf-8", newline="") as handle:
            found = list(csv.DictReader(handle, delimiter="\t", quoting=csv.QUOTE_NONE))
        return {"/".join(filter(None, (row["subject"], row["session"]))): row for row in rows}, found

    return run


def kinds(found: list[dict], **where: str) -> dict[str, str]:
    """Kind and field → what was found, of the rows with these cells."""
    return {f"{row['kind']}: {row['field']}": row["found"] for row in found if all(row[name] == value for name, value in where.items())}


def test_a_database_as_the_catalogue_says_has_no_conflict(tmp_path, reconcile):
    table = TABLE + "sub-01\tA\t30\tF\nsub-02\tA\t41.5\tM\n"
    _, found = reconcile(make(tmp_path / "db", {"01": SIEMENS, "02": SIEMENS}, table), entry(scans=2, subjects=2))
    assert found == []
    assert "No conflict in 1 database." in conflicts.CONFLICTS_HTML.read_text()


def test_people(tmp_path, reconcile):
    people = ["07\tA\t-4\tM", "01\tA\t240\tF", "02\tA\t20-25\t2", "03\tA\t70\tfemale", "04\tA\tn/a\tn/a", "05\tA\t30\tM", "05\tA\t31\tmale"]
    people += ["06\tA\t30\tM", "06\tA\t30.0\tm"]
    root = make(tmp_path / "db", dict.fromkeys(("01", "02", "03", "04", "05", "06"), SIEMENS), TABLE + "".join(f"sub-{one}\n" for one in people))
    site = entry().sites["A"].model_dump() | {"age_years": {"min": 18.0, "max": 60.0}}
    rows, found = reconcile(root, entry(sites={"A": site}))
    assert kinds(found, subject="01") == {"age impossible: age_years": "240"}
    assert kinds(found, subject="02") == {"age unclear: age_years": "20-25", "sex unclear: sex": "2"}
    assert kinds(found, subject="03") == {"age out of range: age_years": "70", "spelling: sex": "female"}
    assert kinds(found, subject="04") == {"missing value: age_years": "n/a", "missing value: sex": "n/a"}
    assert kinds(found, subject="05") == {"contradicting rows: age_years": "age 30, age 31"}
    assert kinds(found, subject="06") == {}
    assert kinds(found, subject="07") == {"row without scan: subject": "none"}
    known = {subject: (row["age_years"], row["sex"]) for subject, row in rows.items()}
    assert known == {"01": (None, "F"), "02": (None, None), "03": (70, "F"), "04": (None, None), "05": (None, "M"), "06": (30, "M")}


def test_a_column_that_stands_twice_says_nothing_where_the_two_differ(tmp_path, reconcile):
    rows, found = reconcile(make(tmp_path / "pilot", {"01": None, "02": None}, "participant_id\tage\tage\nsub-01\t30\t40\nsub-02\t31\t31\n"))
    assert (rows["01"]["age_years"], rows["02"]["age_years"]) == (None, 31)
    assert kinds(found, subject="01", kind="contradicting rows") == {"contradicting rows: age_years": "age 30, age (2) 40"}


def test_quarantined_scans_name_the_file_and_share_a_line_of_the_page(tmp_path, reconcile):
    root = make(tmp_path / "pilot", {"01": None, "02": None, "03": {}, "04": None})
    for subject in ("01", "02"):
        (root / f"sub-{subject}/anat/sub-{subject}_T1w.nii.gz").write_bytes(b"")
    (root / "sub-03/anat/sub-03_T1w.json").write_text("{")
    _, found = reconcile(root)
    bad = {row["file"]: row["found"] for row in found if row["kind"] == "quarantined"}
    assert list(bad) == ["sub-01/anat/sub-01_T1w.nii.gz", "sub-02/anat/sub-02_T1w.nii.gz", "sub-03/anat/sub-03_T1w.json"]
    assert set(bad.values()) == {"an empty file; a volume is wanted", bad["sub-03/anat/sub-03_T1w.json"]}
    assert "not valid JSON" in bad["sub-03/anat/sub-03_T1w.json"]
    assert conflicts.CONFLICTS_HTML.read_text().count("an empty file; a volume is wanted") == 1


def test_files_and_label_maps_that_two_scans_share_are_said(tmp_path):
    for name in ("one", "two"):
        root = make(tmp_path / "data" / name, {"01/1": None, "01/2": None, "02": None})
        (root / "sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz").write_bytes(b"the same")
        (root / "derivatives/freesurfer/sub-01/mri").mkdir(parents=True)
        (root / "derivatives/freesurfer/sub-01/mri/aseg.mgz").write_text(name)
    checks: list = []
    rows = stage.index([tmp_path / "data"], checks=checks)
    assert {row["person"] for row in rows if row["subject"] == "01"} == {"one/01"}
    found = conflicts.conflict_rows(checks)
    same = {(row["scan"], row["found"]) for row in found if row["kind"] == "same file elsewhere"}
    assert same == {("one_sub-01_ses-1", "two_sub-01_ses-1"), ("two_sub-01_ses-1", "one_sub-01_ses-1")}
    labels = {(row["scan"], row["found"], row["scans"]) for row in found if row["kind"] == "label of another scan"}
    assert labels == {("one_sub-01_ses-2", "aseg", "1"), ("two_sub-01_ses-2", "aseg", "1")}


def test_a_database_that_came_twice_is_a_line_of_the_page_for_each(tmp_path, caplog):
    for name in ("one", "two"):
        make(tmp_path / "data" / name, dict.fromkeys(("01", "02", "03"), SIEMENS))
        for path in (tmp_path / "data" / name).rglob("*.nii.gz"):
            path.write_text(path.name)
    checks: list = []
    stage.index([tmp_path / "data"], checks=checks)
    conflicts.write_conflicts(checks)
    page = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", conflicts.CONFLICTS_HTML.read_text()))
    assert "one one person two one person in all of them 3 one_sub-01" in page and "two two person one one person in all of them 3 two_sub-01" in page
    assert "3 files lie in one and two alike, and each is taken for one person's" in caplog.text
    assert {row["found"] for row in conflicts.conflict_rows(checks) if row["scan"] == "one_sub-02"} >= {"two_sub-02"}


def test_a_unit_of_all_ages_and_rows_that_are_not_there_are_a_line_each(tmp_path, reconcile):
    table = "participant_id\tage\nsub-01\t24\nsub-02\t30\nsub-03\t006M\nsub-04\t1400\n"
    root = make(tmp_path / "kids", dict.fromkeys(("01", "02", "03", "04", "05", "06")), table, participants={"age": {"Units": "months"}})
    rows, found = reconcile(root)
    assert [row["age_years"] for row in rows.values()] == [2, 2.5, 0.5, None, None, None]
    units = {(row["found"], row["done"], row["scans"], row["file"]) for row in found if row["kind"] == "unit"}
    assert units == {("months", "months made years", "2", "participants.json"), ("006M", "months made years: 0.5", "1", "participants.tsv")}
    page = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", conflicts.CONFLICTS_HTML.read_text()))
    assert "no row age and sex are null 2 kids_sub-05" in page


def test_declared_units_codes_and_columns_of_a_session(tmp_path, reconcile):
    table = "participant_id\tGender\t age (months)\tage_ses-2\nsub-01\t1\t24\t36\nsub-02\t2\t30\tn/a\nsub-03\t3\t12\tn/a\n"
    described = {"Gender": {"Levels": {"1": "Male", "2": "female"}}, "age (months)": {"Units": "months"}, "age_ses-2": {"Units": "Months"}}
    root = make(tmp_path / "pilot", {"01/1": None, "01/2": None, "02": None, "03": None}, table, participants=described)
    rows, found = reconcile(root)
    assert {name: (row["age_years"], row["sex"]) for name, row in rows.items()} == {
        "01/1": (2, "M"), "01/2": (3, "M"), "02": (2.5, "F"), "03": (1, None),
    }  # fmt: skip
    assert {row["found"] for row in found if row["kind"] == "column taken"} == {"age (months)", "age_ses-2"}
    assert kinds(found, subject="03", field="sex") == {"sex unclear: sex": "3"}
    by_catalogue, _ = reconcile(root, entry(name="pilot", site_rule=SiteRule(single="A"), sex_codes={"3": "F"}))
    assert by_catalogue["03"]["sex"] == "F"


def test_scanners(tmp_path, reconcile):
    sidecars = {
        "01": {"Manufacturer": "SIEMENS", "ManufacturersModelName": "MAGNETOM Trio Tim", "MagneticFieldStrength": 2.89362},
        "02": {"Manufacturer": "GE MEDICAL SYSTEMS", "ManufacturersModelName": "SIGNA", "MagneticFieldStrength": 1.5, "SliceThickness": 1.3},
        "03": {"Manufacturer": "Acme", "MagneticFieldStrength": 3.95064}, "04": None,
    }  # fmt: skip
    root = make(tmp_path / "db", sidecars, TABLE + "".join(f"sub-{one}\tA\t30\tF\n" for one in sidecars))
    rows, found = reconcile(root, entry())
    values = {subject: (row["manufacturer"], row["model"], row["field_strength_tesla"]) for subject, row in rows.items()}
    assert values == {"01": ("Siemens", "TrioTim", 3), "02": ("GE", "SIGNA", 1.5), "03": ("Acme", "TrioTim", 3), "04": ("Siemens", "TrioTim", 3)}
    assert kinds(found, subject="01") == {
        "spelling: manufacturer": "SIEMENS", "spelling: model": "MAGNETOM Trio Tim", "rounded: field_strength_tesla": "2.89362",
    }  # fmt: skip
    assert kinds(found, subject="02", kind="sidecar against catalogue") == {
        "sidecar against catalogue: manufacturer": "GE", "sidecar against catalogue: model": "SIGNA",
        "sidecar against catalogue: field_strength_tesla": "1.5", "sidecar against catalogue: voxel_mm": "SliceThickness 1.3",
    }  # fmt: skip
    assert kinds(found, subject="03", kind="field strength unclear") and kinds(found, subject="03", kind="unknown manufacturer")
    (taken,) = [row for row in found if row["kind"] == "from the catalogue" and row["field"] == "model"]
    assert (taken["scans"], taken["expected"], taken["scan"]) == ("2", "TrioTim", "db_sub-03")
    (odd,) = [row for row in found if row["kind"] == "contradicting sidecars" and row["field"] == "field_strength_tesla"]
    assert (odd["found"], odd["done"]) == ("1.5 (1), 3 (1)", "each scan keeps its own")
    assert (odd["scan"], odd["file"]) == ("db_sub-01", "sub-01/anat/sub-01_T1w.json")
    assert next(row for row in found if row["subject"] == "02" and row["field"] == "model")["file"] == "sub-02/anat/sub-02_T1w.json"


def test_a_sidecar_against_the_one_it_inherits(tmp_path, reconcile):
    root = make(tmp_path / "pilot", {"01": {"MagneticFieldStrength": 1.5}, "02": {}}, T1w={"MagneticFieldStrength": 3, "Manufacturer": "GE"})
    rows, found = reconcile(root)
    assert (rows["01"]["field_strength_tesla"], rows["02"]["field_strength_tesla"]) == (1.5, 3)
    near = [row for row in found if row["kind"] == "contradicting sidecars" and row["subject"] == "01"]
    assert [(row["expected"], row["found"]) for row in near] == [("3 in T1w.json", "1.5")]


def test_sidecars_between_the_root_and_the_scan(tmp_path, reconcile):
    root = make(tmp_path / "pilot", {"01/1": {}, "02/1": {}, "03": SIEMENS}, T1w={"MagneticFieldStrength": 3})
    (root / "sub-01/ses-1/sub-01_ses-1_T1w.json").write_text('{"MagneticFieldStrength": 1.5}')
    (root / "sub-02/sub-02_T1w.json").write_text("[3]")
    rows, found = reconcile(root)
    assert [row["field_strength_tesla"] for row in rows.values()] == [1.5, 3, 3] and not any(row["reason"] for row in rows.values())
    (odd,) = [row for row in found if row["kind"] == "contradicting sidecars" and row["subject"] == "01"]
    assert (odd["expected"], odd["found"]) == ("3 in T1w.json", "1.5")
    assert kinds(found, file="sub-02/sub-02_T1w.json")["unreadable file: sub-02/sub-02_T1w.json"].startswith("a list")


def test_folders_without_a_scan_and_files_in_anothers_folder(tmp_path, reconcile):
    root = make(tmp_path / "pilot", {"01": SIEMENS, "02": SIEMENS}, TABLE + "sub-01\tA\t30\tF\nsub-02\tA\t30\tF\nsub-04\tA\t30\tF\n")
    for folder in ("sub-03", "sub-04", "sub-01 old"):
        (root / folder / "func").mkdir(parents=True)
    (root / "sub-02/anat/sub-02_T1w.nii.gz").rename(root / "sub-02/anat/sub-05_T1w.nii.gz")
    rows, found = reconcile(root)
    assert rows["05"]["reason"] == "sub-02/anat/sub-05_T1w.nii.gz: its name says sub-05, its folder sub-02; one of the two is wanted"
    assert rows["01"]["reason"] is None
    assert kinds(found, file="sub-03") == {"folder without scan: subject": "a folder without a T1w"}
    assert kinds(found, file="sub-01 old") == {"folder without scan: subject": "a name that is no subject's"}
    assert kinds(found, file="sub-04") == {} and kinds(found, subject="04") == {"row without scan: subject": "none"}


def test_a_folder_with_mixed_sites(tmp_path, reconcile):
    told = {"01": {"InstitutionName": "UZ Gent"}, "02": {"InstitutionName": "uz_gent"}, "03": {"InstitutionName": "MGH"}}
    told["01"]["DeviceSerialNumber"], told["02"]["DeviceSerialNumber"] = "35343", 35426
    table = "participant_id\tsite\nsub-01\tx\nsub-02\tx\nsub-03\ty\n"
    _, found = reconcile(make(tmp_path / "pilot", told, table))
    assert kinds(found, kind="mixed sites") == {
        "mixed sites: InstitutionName": "UZ Gent (2), MGH (1)", "mixed sites: site": "2 values: x, y",
        "mixed sites: DeviceSerialNumber": "35343 (1), 35426 (1)",
    }  # fmt: skip
    assert "site_rule: {participants: site} would part them" in {row["done"].split("; ")[1] for row in found if row["field"] == "site"}


def test_a_way_to_part_sites_is_told_only_where_it_leaves_the_other_sites_alone(tmp_path, reconcile):
    told = {"01": {"InstitutionName": "UZ Gent"}, "02": {"InstitutionName": "MGH"}}
    root = make(tmp_path / "db", told, TABLE + "sub-01\tA\t30\tF\nsub-02\tA\t30\tF\n")
    (row,) = [row for row in reconcile(root, entry())[1] if row["kind"] == "mixed sites"]
    assert row["done"] == "all stay site A, as the site rule says"


def test_counts_sites_and_licence(tmp_path, reconcile):
    sites = {"A": Site(place="P", scans=100), "B": Site(place="Q", scans=7), "C": Site(place="R")}
    scans = {f"{number:03d}": None for number in range(99)}
    table = TABLE + "".join(f"sub-{one}\t{'A' if one < '098' else 'Z'}\t30\tF\n" for one in scans)
    root = make(tmp_path / "db", scans, table, dataset_description={"Name": "x", "Licence": "CCo"})
    rows, found = reconcile(root, entry(sites=sites, licence="CC-BY-4.0", scans=102, subjects=101))
    counted = {(row["kind"], row["site"], row["field"]): (row["expected"], row["found"]) for row in found if row["file"] == "catalogue/db.yaml"}
    assert counted == {  # 98 of A's 100 and 99 of 101 people are within 2 %, 99 of 102 scans are not
        ("absent site", "B", "site"): ("7 scans", "0"), ("absent site", "C", "site"): ("scans", "0"),
        ("fewer than expected", "n/a", "scans"): ("102", "99"),
    }  # fmt: skip
    assert kinds(found, kind="unknown site") == {"unknown site: site": "Z"} and rows["098"]["reason"]
    licence = [(row["kind"], row["found"], row["done"]) for row in found if row["field"] == "licence"]
    assert licence == [
        ("licence", "CC0", "the catalogue's stands"), ("spelling", "CCo", "read as CC0"), ("spelling", "field Licence", "read as License"),
    ]  # fmt: skip
    more = make(tmp_path / "more" / "db", {"1": None, "2": None}, TABLE + "sub-1\tA\t1\tF\nsub-2\tA\t1\tF\n")
    _, found = reconcile(more, entry(sites={"A": Site(place="P", scans=1, subjects=2)}))
    assert kinds(found, kind="more than expected") == {"more than expected: scans": "2"}


def test_missing_tables_columns_rows_and_cells(tmp_path, reconcile):
    _, found = reconcile(make(tmp_path / "bare", {"01": None}))
    assert {"missing table: participants.tsv", "missing value: model", "unknown database: database"} <= set(kinds(found))
    root = make(tmp_path / "pilot", {"01": None, "02": None}, "participant_id\tAgeMRI_W1\nsub-01\t5\t6\n\t7\n")
    (root / "participants.json").write_text("{")
    _, found = reconcile(root)
    there = kinds(found)
    assert there["missing column: age_years"] == "only AgeMRI_W1" and "missing column: sex" in there
    assert there["missing row: participants.tsv"] == "no row" and there["uneven row: participants.tsv"] == "more cells"
    assert there["uneven row: participant_id"] == "1 rows without it" and "unreadable file: participants.json" in there
    root = make(tmp_path / "kin/db", {"01": None}, "participant_id\tsite\tfam\nsub-01\tA\t5\n")
    _, found = reconcile(root, entry(family_column="Family_ID"))                     # else nobody would know that relatives are not kept apart
    assert kinds(found)["missing column: family"] == "participant_id, site, fam"


def test_the_page_has_one_line_for_what_is_one_decision(tmp_path, reconcile):
    """As ABIDE II, whose sex codes nobody declares: 60 rows of the table, at three sites, are two lines of the page."""
    scans = [f"{number:02d}" for number in range(60)]
    table = TABLE + "".join(f"sub-{one}\t{'ABC'[int(one) % 3]}\t30\t{1 + (one > '44')}\n" for one in scans) + "sub-x\tA\t1\tF\nsub-y\tA\t1\tF\n"
    sites = dict.fromkeys("ABCD", Site(place="P")) | {"E": Site(place="Q")}
    _, found = reconcile(make(tmp_path / "db", dict.fromkeys(scans), table), entry(sites=sites))
    assert sum(row["kind"] == "sex unclear" for row in found) == 60
    page = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", conflicts.CONFLICTS_HTML.read_text()))
    done = "null; F or M, or a declared code, is wanted"
    first, second = f"db A, B and 1 more sex F or M 1 {done} 45 db_sub-00", f"db A, B and 1 more sex F or M 2 {done} 15 db_sub-45"
    assert page.index(first) < page.index(second)
    assert "none no row in the scans table sub-x and 1 more" in page
    assert "db D site scans 0" in page and "db E site scans 0" in page


def test_files_are_the_same_bytes_anywhere_and_hold_any_text(tmp_path, reconcile):
    evil = {"Manufacturer": '<script>x</script>\t\n"q', "ManufacturersModelName": '"Trio', "InstitutionName": "=1+1"}
    texts = []
    for place in ("a", "b"):
        _, found = reconcile(make(tmp_path / place / "pilot", {"01": evil, "02": SIEMENS}, TABLE + "sub-02\tA\t=cmd|x\tF\n"))
        texts.append((conflicts.CONFLICTS_TSV.read_bytes(), conflicts.CONFLICTS_HTML.read_bytes()))
    assert texts[0] == texts[1]
    for quoting in (csv.QUOTE_NONE, csv.QUOTE_MINIMAL):  # whatever a program takes double quotes for
        assert list(csv.DictReader(texts[0][0].decode().splitlines(), delimiter="\t", quoting=quoting)) == found
    assert list(found[0]) == CONFLICTS.names and all(None not in row.values() and None not in row for row in found)
    page = texts[0][1].decode()
    assert "<script>x" not in page and "&lt;script&gt;x" in page
    assert page.count("<script>") == 1 and "http" not in page and "src=" not in page and 'href="conflicts.tsv"' in page


def test_the_stage_ends_well_with_conflicts_and_tells_of_unusable_scans(tmp_path, caplog):
    make(tmp_path / "data" / "pilot", {"01": SIEMENS, "02": SIEMENS})
    (tmp_path / "params.yaml").write_text("index: {roots: [data]}\n")
    with caplog.at_level("INFO", "lodbrain"):
        stage.main()
    assert "tables/conflicts.html: conflicts: 2, kinds: 2, databases: 1; conflicts.tsv lists each" in caplog.text
    for path in (tmp_path / "data").rglob("*.nii.gz"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match="none of the 2 scans"):
        stage.main()
    assert conflicts.CONFLICTS_TSV.read_text().count("an empty file; a volume is wanted") == 2


REAL = {  # data set → (its name here, what is found in it)
    "ds000030": ("la5c", {("fewer than expected", "subjects", "265"), ("row without scan", "subject", "none")}),
    "ds000206": ("thp", {("contradicting sidecars", "manufacturer", "Philips (4), Siemens (2)"), ("missing table", "participants.tsv", "no table")}),
    "ds001747": ("bilinguals", {("spelling", "licence", "CCo")}),
    "ds001751": ("flanker", {("spelling", "manufacturer", "SIEMENS")}),
    "ds002330": ("creativity", {("sex unclear", "sex", "Other"), ("spelling", "sex", "female")}),
    "ds002424": ("adhd", {("spelling", "sex", "1"), ("column taken", "age_years", "age_ses-T1")}),
    "ds004484": ("csf", {("rounded", "field_strength_tesla", "6.98"), ("mixed sites", "InstitutionName", "MGH 7T (1), Martinos Center 7T (1)")}),
    "ds004868": ("ps13", {("contradicting sidecars", "manufacturer", "Philips (4), GE (1)")}),
}


def test_real_metadata(tmp_path, test_data):
    meta = test_data / "meta" / "openneuro"
    if not meta.is_dir():
        pytest.skip(f"no metadata at {meta}")
    for number, (name, (folder, _)) in enumerate(REAL.items()):
        root = tmp_path / "data" / folder
        for place, path in enumerate((meta / name / "t1w_paths.txt").read_text().split()):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(f"{number} {place}".encode())
            sidecar = meta / name / (Path(path).name.split(".")[0] + ".json")
            if sidecar.is_file():
                shutil.copyfile(sidecar, (root / path).parent / sidecar.name)
        for file in ("dataset_description.json", "participants.tsv", "participants.json"):
            if (meta / name / file).is_file():
                shutil.copyfile(meta / name / file, root / file)
    checks: list = []
    rows = stage.index([tmp_path / "data"], checks=checks)
    found = conflicts.conflict_rows(checks)
    assert not any(row["reason"] for row in rows)
    for folder, wanted in REAL.values():
        assert wanted <= {(row["kind"], row["field"], row["found"]) for row in found if row["database"] == folder}, folder
    assert {row["sex"] for row in rows if row["database"] == "adhd"} == {"F", "M"}
    assert {row["field_strength_tesla"] for row in rows if row["database"] == "la5c"} == {3.0}
