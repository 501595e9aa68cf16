"""What weights say of where they come from, what their licences allow together, and how `lodbrain weights info` tells it."""

import json
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from data_registry.catalogue import catalogue
from data_registry.catalogue_schema import Database, Site, SiteRule
from data_registry.errors import InputError
from data_registry.ledgers import Tombstone, Withdrawn, accepted_licences, bury, withdrawn
from data_registry.licences import ASK, in_words, judge, strictest
from lod_model import lineage, provenance
from lod_model import weights as weight_files
from lod_model.cli import app
from lod_model.networks.lod_brain import LODBrain, LODBrainConfig

OPEN, ALIKE, COMMERCIAL = "CC0", "CC-BY-SA-4.0", "CC-BY-NC-3.0"


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """A folder, and a catalogue of three databases: one free, one by agreement, one whose licence nobody has read."""
    monkeypatch.chdir(tmp_path)
    known = {
        "free": entry("free", licence=ALIKE, citation="Doe & Roe 2020", doi="10.1000/x"),
        "signed": entry("signed", licence="Signed agreement"),
        "unread": entry("unread", licence=OPEN, source=None, unverified=["licence"]),
    }
    for module in (lineage, provenance):
        monkeypatch.setattr(module, "find_database", lambda name: known.get(name) or entry(name, source=None, known=False))
    return known


def entry(name: str, **about) -> Database:
    needed = {"name": name, "title": name.title(), "site_rule": SiteRule(single="A"), "sites": {"A": Site(place="A")}, "source": "hand"}
    return Database(**needed | about)


def scans_of(*scan_ids: str) -> list:
    return [SimpleNamespace(scan_id=name, database=name.split("_")[0], site="A", person=name.split("_ses")[0]) for name in scan_ids]


ROLES = {"train": scans_of("free_sub-1_ses-1", "free_sub-1_ses-2"), "val": scans_of("free_sub-2", "signed_sub-9")}


def test_a_record_counts_scans_and_people_and_names_nobody(project, tmp_path):
    (tmp_path / "licences.tsv").write_text(f"date\tuser\tdatabase\tlicence\troute\n2026-01-02\tme\tfree\t{ALIKE}\ts3://x\n")
    free, signed = provenance.databases_seen(ROLES)
    assert (free["name"], free["scans"], free["people"]) == ("free", {"train": 2, "val": 1}, {"train": 1, "val": 1})
    assert (signed["name"], signed["scans"], signed["licence"]) == ("signed", {"train": 0, "val": 1}, "Signed agreement")  # who chose it saw it
    assert free["accepted"] == {"licence": ALIKE, "date": "2026-01-02"} and signed["accepted"] is None
    assert "sub-" not in json.dumps([free, signed]) and "me" not in free["accepted"].values()
    provenance.write_seen(tmp_path, ROLES)
    lines = (tmp_path / "seen.tsv").read_text().splitlines()
    assert lines[0] == "scan_id\tdatabase\tsite\trole" and lines[3:] == ["free_sub-2\tfree\tA\tval", "signed_sub-9\tsigned\tA\tval"]


@pytest.mark.parametrize(
    ("licences", "answer"),
    [
        ([OPEN, "PDDL-1.0"], "yes"),
        ([OPEN, "cc by 4.0"], "under conditions: attribution"),
        ([COMMERCIAL, ALIKE], "under conditions: attribution, non-commercial use, share alike (cc-by-sa)"),
        (["CC-BY-SA-3.0", ALIKE], "under conditions: attribution, share alike (cc-by-sa)"),  # of one licence, two versions
        (["CC-BY-NC-SA-4.0", ALIKE], "not known"),  # each wants derived works under itself
        ([OPEN, "CC-BY-ND-4.0"], "no"),
        ([OPEN, "House rules"], "not known"),
        ([OPEN, None], "not known"),
        (["House rules", "CC-BY-NC-ND-4.0"], "no"),  # the strictest
        ([], "not known"),
    ],
)
def test_the_strictest_licence_answers(licences, answer):
    assert in_words(strictest([judge(f"db{number}", licence) for number, licence in enumerate(licences)])) == answer


def test_the_catalogues_word_on_weights_goes_before_the_licence():
    assert judge("db", "House rules", weights=True).conditions == ("the terms of db (House rules)",)
    assert judge("db", "House rules", weights=False).answer == judge("db", OPEN, weights=False).answer == "no"
    assert judge("db", OPEN, confirmed=False).reasons == (f"db: 'CC0', which no document confirms; {ASK}",)
    assert judge("db", OPEN, confirmed=False, weights=True).answer == "yes"
    assert judge("db", "ODC-By-1.0 unless otherwise specified").conditions == ("attribution", "what parts of db specify otherwise")


def test_every_licence_of_the_catalogue_gets_an_answer_and_a_reason():
    for database in catalogue().values():
        verdict = judge(database.name, database.licence, weights=database.redistribute.weights)
        assert verdict.answer == "yes" or verdict.conditions or database.name in verdict.reasons[0]


def test_an_agreement_or_an_unread_licence_is_named(project):
    data = {"databases": provenance.databases_seen({"train": scans_of("free_sub-1_ses-1", "signed_sub-9")})}
    verdict = lineage.lineage({"data": data})["verdict"]
    assert verdict["answer"] == "not known"
    assert verdict["reasons"] == [f"signed: 'Signed agreement' does not say; {ASK}"]
    data["databases"] = data["databases"][:1]
    words = "under conditions: attribution, share alike (cc-by-sa)"
    assert lineage.lineage({"data": data})["verdict"] == {"answer": "under conditions", "words": words, "reasons": []}


def test_of_then_now_and_what_was_accepted_the_strictest(project, tmp_path):
    data = {"databases": provenance.databases_seen({"train": scans_of("free_sub-1_ses-1")})}
    project["free"] = entry("free", licence="CC-BY-ND-4.0")
    found = lineage.lineage({"data": data})
    assert found["verdict"]["answer"] == "no" and f"free: {ALIKE} when they were trained, CC-BY-ND-4.0 in today's catalogue" in found["notes"]
    project["free"] = entry("free", licence=ALIKE, state="withdrawn", unverified=["state"])
    assert lineage.lineage({"data": data})["verdict"]["reasons"] == ["free: withdrawn by its owners since"]
    project["free"] = entry("free", licence=ALIKE)
    data["databases"][0]["accepted"] = {"licence": COMMERCIAL, "date": "2026-01-02"}
    found = lineage.lineage({"data": data})
    assert "non-commercial use" in found["verdict"]["words"] and found["notes"][0].startswith(f"free: accepted as {COMMERCIAL!r} on 2026-01-02")


def test_an_owners_answer_counts_for_weights_that_were_trained_before_it_came(project):
    seen = provenance.databases_seen({"train": scans_of("signed_sub-9")})
    assert lineage.lineage({"data": {"databases": seen}})["verdict"]["answer"] == "not known"
    letter = "letter 2026-03-01, J. Doe of Signed's data office, kept with our agreements"
    project["signed"] = entry("signed", licence="Signed agreement", source=None, redistribute={"weights": True})
    assert lineage.lineage({"data": {"databases": seen}})["verdict"]["reasons"] == [f"signed: 'Signed agreement', which no document confirms; {ASK}"]
    answered = {"redistribute": {"weights": True}, "documents": {"answer": letter}, "sources": {"redistribute.weights": "answer"}}
    project["signed"] = entry("signed", licence="Signed agreement", **answered)
    found = lineage.lineage({"data": {"databases": seen}})
    assert found["verdict"]["words"] == found["databases"][0]["answer"] == "under conditions: the terms of signed (Signed agreement)"
    assert f"signed: on weights, {letter}" in found["notes"]
    assert "Doe" not in json.dumps(provenance.databases_seen({"train": scans_of("signed_sub-9")}))  # who wrote is not given on with weights
    project["signed"] = entry("signed", licence="New agreement", **answered)  # the answer is about other terms than those they were trained under
    assert lineage.lineage({"data": {"databases": seen}})["verdict"]["answer"] == "not known"
    project["signed"] = entry("signed", licence="Signed agreement", **answered | {"redistribute": {"weights": False}})
    assert lineage.lineage({"data": {"databases": seen}})["verdict"]["answer"] == "no"


def test_weights_from_before(project):
    found = lineage.lineage({"trained_on": ["free.A", "free.B", "unread.A", "pilot.pilot"]})
    assert [entry["name"] for entry in found["databases"]] == ["free", "pilot", "unread"]
    assert len(found["notes"]) == 1 and "before weights noted their licences" in found["notes"][0]
    assert found["verdict"]["reasons"] == [f"pilot: no licence is known; {ASK}", f"unread: 'CC0', which no document confirms; {ASK}"]
    assert lineage.lineage({})["verdict"]["reasons"] == ["what trained it is not noted"]


def test_released_weights_and_renderings(project, monkeypatch):
    monkeypatch.undo()
    authors = lineage.lineage(dict(weight_files.AUTHORS))
    assert authors["verdict"]["words"] == "under conditions: attribution" and {"ixi", "abide1"} < {entry["name"] for entry in authors["databases"]}
    assert any("by these alone: not known" in note for note in authors["notes"])
    packaged = lineage.lineage(weight_files.load(weight_files.default()).provenance)
    assert packaged["databases"] == [] and "no scan" in packaged["notes"][0] and packaged["verdict"]["words"] == "under conditions: attribution"


def test_who_was_withdrawn_from_the_project(project, tmp_path):
    """By the list of scans where there is one; weights that were trained without them are not accused."""
    project["free"] = entry("free", licence=OPEN)
    data = {"data": {"databases": provenance.databases_seen({"train": scans_of("free_sub-1", "free_sub-2_ses-1", "free_sub-2_ses-2")})}}
    for folder, names in (("old", ("free_sub-1", "free_sub-2_ses-1", "free_sub-2_ses-2")), ("new", ("free_sub-1",))):
        (tmp_path / folder).mkdir()
        provenance.write_seen(tmp_path / folder, {"train": scans_of(*names)})
    bury([Tombstone("free", "2", "2026-03-01", "asked for it"), Tombstone("other", "", "2026-03-01", "ended")])
    old, new, moved = (lineage.lineage(data, tmp_path / folder / "seen.tsv")["verdict"] for folder in ("old", "new", "elsewhere"))
    assert old["reasons"] == ["free: these weights saw 1 of its people, withdrawn from this project, says withdrawn.tsv"]
    assert (old["answer"], new["answer"], moved["answer"]) == ("not known", "yes", "yes")
    bury([Tombstone("free", "", "2026-03-02", "ended")])
    assert lineage.lineage(data, tmp_path / "none")["verdict"]["reasons"] == [
        "free: these weights saw it, withdrawn from this project, says withdrawn.tsv"]  # fmt: skip


def test_info_on_the_command_line(project, tmp_path):
    path = tmp_path / "w.pt"
    noted = {"run": "r", "trained_on": ["free.A"], "data": {"split_hash": "s", "data_hash": "d", "databases": provenance.databases_seen(ROLES)}}
    network = LODBrain(LODBrainConfig(widths=(2, 2, 4)))
    weight_files.save(path, network, name="lod_brain", protocol="lod7", grid="8mm", provenance=noted)

    def info(*words: str) -> str:
        done = CliRunner().invoke(app, ["weights", "info", str(path), *words])
        assert done.exit_code == 0, done.output
        return done.stdout

    lines = info().splitlines()
    assert "free\t2 scans of 1 people\t1 scans of 1 people\tCC-BY-SA-4.0\tunder conditions: attribution, share alike (cc-by-sa)" in lines
    assert "cite\tfree: Doe & Roe 2020, doi:10.1000/x" in lines and "cite\tsigned: no citation is known" in lines
    assert "may they be shared?\tnot known" in lines and lines[-1].endswith("no legal advice.")
    assert json.loads(info("--json"))["lineage"]["verdict"]["answer"] == "not known"
    provenance.write_seen(tmp_path, ROLES)
    bury([Tombstone("free", "2", "2026-03-01", "asked for it")])
    assert "because\tfree: these weights saw 1 of its people, withdrawn from this project, says withdrawn.tsv" in info().splitlines()
    assert info("--bibtex").splitlines() == [
        "@misc{free,", "  title = {Free},", r"  note = {Doe \& Roe 2020},", "  doi = {10.1000/x},", "}", "% signed: no citation is known",
    ]  # fmt: skip
    both = CliRunner().invoke(app, ["weights", "info", str(path), "--json", "--bibtex"])
    assert isinstance(both.exception, InputError)


def test_ledgers(tmp_path):
    assert withdrawn().tombstones == [] and accepted_licences() == {}
    assert len(bury([Tombstone("db", "01", "2026-01-01", "asked\tfor\nit")])) == 1
    first = (tmp_path / "withdrawn.tsv").read_bytes()
    assert bury([Tombstone("db", "01", "2026-09-09", "again")]) == [] and (tmp_path / "withdrawn.tsv").read_bytes() == first
    bury([Tombstone("db", "02", "2026-01-02", "")])
    lines = (tmp_path / "withdrawn.tsv").read_text().splitlines()
    assert lines == ["database\tsubject\tdate\treason\tt1w_sha256", "db\t01\t2026-01-01\tasked for it\t", "db\t02\t2026-01-02\t\t"]
    assert withdrawn().has("db", "02") and not withdrawn().has("db", "2") and not withdrawn().has("db")
    assert Withdrawn([Tombstone("db", "", "", "")]).has_scan("db_sub-7") and not withdrawn().has_scan("db_sub-010_run-1")
    (tmp_path / "withdrawn.tsv").write_text("database\tsubject\tdate\treason\ndb\t01\t2026-01-01\t\n")  # of an earlier release
    bury([Tombstone("db", "03", "2026-01-02", "", "abc")])
    assert withdrawn().has("db", "03") and withdrawn().whose("abc") is None
    nameless = "database\tsubject\tdate\treason\n\t01\t\t\n"
    for content, words in [("database\tdate\n", "column subject is missing"), (nameless, "a line without a database")]:
        (tmp_path / "withdrawn.tsv").write_text(content)
        with pytest.raises(InputError, match=words):
            withdrawn()
    (tmp_path / "withdrawn.tsv").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"withdrawn\.tsv: cannot be read"):
        withdrawn()
