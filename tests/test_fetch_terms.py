"""What may be fetched: licences accepted once, portals to go to first, databases and people that were withdrawn."""

from pathlib import Path

import pytest
from small_route import NAME, WANTED, database, get, known, there, write

from data_registry.catalogue import catalogue, find_database
from data_registry.errors import InputError
from pipelines import fetch_terms
from pipelines.fetch import Choice, fetch

pytestmark = pytest.mark.usefixtures("route_project")


def test_a_licence_is_accepted_by_its_name_once(mirror, monkeypatch):
    known(monkeypatch, licence="OASIS terms")
    with pytest.raises(InputError, match="^small: its licence is 'OASIS terms'; read it, then --accept-licence 'OASIS terms' is wanted, once"):
        fetch(NAME, route=str(mirror))
    with pytest.raises(InputError, match="^--accept-licence 'oasis terms': of small, its licence is 'OASIS terms'"):
        fetch(NAME, route=str(mirror), accepted="oasis terms")
    assert not any(Path().iterdir())
    fetch(NAME, route=str(mirror), accepted="OASIS terms")
    accepted = fetch_terms.LICENCES.read_text()
    assert accepted.splitlines()[0] == "date\tuser\tdatabase\tlicence\troute"
    assert accepted.splitlines()[1].split("\t")[2:] == [NAME, "OASIS terms", str(mirror)]
    fetch(NAME, route=str(mirror))
    fetch(NAME, route=str(mirror), accepted="OASIS terms")
    assert fetch_terms.LICENCES.read_text() == accepted
    known(monkeypatch, licence="OASIS terms of 2030")  # other terms
    with pytest.raises(InputError, match="OASIS terms of 2030"):
        fetch(NAME, route=str(mirror))
    fetch_terms.LICENCES.write_text(accepted.rstrip("\n"))
    fetch(NAME, route=str(mirror), accepted="OASIS terms of 2030")
    assert [line.split("\t")[3] for line in fetch_terms.LICENCES.read_text().splitlines()] == ["licence", "OASIS terms", "OASIS terms of 2030"]


@pytest.mark.parametrize(("fields", "said"), [
    ({"licence": None}, "its licence is not known; read it, then --accept-licence unknown is"),
    ({"unverified": ["licence"]}, "not verified: 'CC0' stands in the catalogue, and no document confirms it; read it, then .* unknown is"),
])  # fmt: skip
def test_a_licence_that_no_document_states_is_accepted_as_unknown(mirror, monkeypatch, fields, said):
    known(monkeypatch, **fields)
    with pytest.raises(InputError, match=said):
        get(mirror)
    assert fetch(NAME, route=str(mirror), accepted="unknown") == {}


@pytest.mark.parametrize(("fields", "said"), [
    ({"access": "agreement", "route": "portal, https://x.org"}, "small wants a signed agreement, first go to portal, https://x.org; then lay out"),
    ({"access": "registration"}, "small wants a registration, first go to its owners"),
    ({"access": "registration", "route": "s3://b/x"}, "wants a registration, see `lodbrain sites show small`; once you have it, give --route s3://b/x$"),
    ({"route": "https://x.org/download"}, "its route is https://x.org/download, which is for people: go there, then lay out what you"),
    ({}, "small: its route is not known: lay out what you download"),
    ({"access": None}, "small may want more than a download, first go to its owners"),
    ({"route": "Harvard Dataverse"}, "its route is Harvard Dataverse, which is for people"),
])  # fmt: skip
def test_where_one_must_go_first_is_said(monkeypatch, fields, said):
    known(monkeypatch, **fields)
    with pytest.raises(InputError, match=said):
        fetch(NAME, accepted="CC0")
    assert not any(Path().iterdir())  # nothing is accepted for what is not fetched


def test_every_database_of_the_catalogue_can_be_fetched_or_says_what_to_do_first():
    for entry in catalogue().values():
        try:
            assert fetch_terms.address_of(entry, None).startswith(("s3://", "https://"))
        except InputError as error:
            assert f"{entry.name}" in str(error) and ("--route" in str(error) or "it is not fetched" in str(error)), error


def test_routes_of_the_catalogue():
    assert fetch_terms.address_of(find_database("la5c"), None) == "s3://openneuro.org/ds000030"
    assert fetch_terms.address_of(database(route="s3://b/x"), None) == "s3://b/x"
    several = database(route="OpenNeuro ds003097, ds002785")
    assert fetch_terms.address_of(several, None) == "s3://openneuro.org/ds003097 s3://openneuro.org/ds002785"
    for name, said in (("no_such_database", "no such database"), ("../x", "letters, digits")):
        with pytest.raises(InputError, match=said):
            fetch(name)


@pytest.mark.parametrize("state", ["withdrawn", "embargoed"])
def test_a_database_that_is_withdrawn_is_refused(mirror, monkeypatch, state):
    known(monkeypatch, state=state)
    with pytest.raises(InputError, match=f"small is {state}, says the catalogue"):
        get(mirror)


def test_people_who_are_withdrawn_are_left_out(mirror, caplog):
    fetch_terms.WITHDRAWN.write_text("database\tsubject\tdate\treason\nsmall\t01\t2026-01-01\tconsent\nother\t\t\t\n")
    with caplog.at_level("INFO"):
        get(mirror)
    assert "small: subjects left out because withdrawn.tsv names them: 1" in caplog.text and not [path for path in there() if "sub-01" in path]
    assert there()["participants.tsv"] == WANTED["participants.tsv"].replace("sub-01\tAsh\tÄ\n".encode(), b"")
    before = Path("data/small/fetched.tsv").read_bytes()
    assert get(mirror) == {} and get(mirror, verify=True) == {} and Path("data/small/fetched.tsv").read_bytes() == before
    newer = b"name\tparticipant_id\tsite\r\nA\t1\tAsh\r\nB\tsub-02\tOak\r\n"
    write(mirror, {"participants.tsv": newer})
    assert get(mirror) == {} and there()["participants.tsv"] == newer.replace(b"A\t1\tAsh\r\n", b"")
    with pytest.raises(InputError, match="--subject 01: is withdrawn from this project"):
        get(mirror, choice=Choice(subjects=["sub-01"]))
    fetch_terms.WITHDRAWN.write_text("database\tsubject\tdate\treason\nsmall\t\t2026-01-01\tconsent\n")
    with pytest.raises(InputError, match=r"withdrawn from this project, says withdrawn.tsv \(2026-01-01, consent\)"):
        get(mirror)
