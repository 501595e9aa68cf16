"""The catalogue: what it holds, where its values were read, and how its sites are chosen."""

import csv
import re
import subprocess
import sys

import pytest

from data_registry.catalogue import catalogue, find_database, read_database
from data_registry.catalogue_check import findings, lod_brain_table
from data_registry.catalogue_schema import Database
from data_registry.catalogue_sources import MUST_BE_SOURCED, standing, value_of
from data_registry.catalogue_stats import stats
from data_registry.catalogue_table import select, site_rows
from data_registry.errors import InputError
from data_registry.readings import canonical_manufacturer

CORPUS = [database for database in catalogue().values() if database.corpus]


# ---------------------------------------------------------------- what it holds


def test_everything_behind_the_rows_of_lod_brain():
    figures = stats(CORPUS)
    assert (figures["lod_brain_rows"], figures["lod_brain_scans"]) == (78, 26171)
    assert {row: content.scans for database in CORPUS for row, content in database.lod_brain.items()} == lod_brain_table()
    assert figures["sites"] >= 155 and figures["databases"] >= 30


def test_the_table_is_the_published_one(test_data):
    with open(test_data / "sites/lod_brain_databases.csv", encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert {row["id"]: int(row["n"]) for row in rows} == lod_brain_table()
    of = {row: database for database in CORPUS for row in database.lod_brain}
    for row in rows:
        database = of[row["id"]]
        sites = database.lod_brain[row["id"]].sites or list(database.sites)
        if row["country"]:
            assert {database.country_of(site) for site in sites} == {row["country"]}, row["id"]
        scanners = [database.sites[site] for site in sites]
        if row["field_strength"]:
            published = {float(tesla[:-1]) for tesla in row["field_strength"].split(",")} | ({None} if len(sites) > 1 else set())
            assert {site.field_strength_tesla for site in scanners} <= published, row["id"]
        if row["manufacturer"]:
            makers = {canonical_manufacturer(maker) for maker in row["manufacturer"].split(",")}
            assert {site.manufacturer for site in scanners} <= makers | {None}, row["id"]
        if len(sites) == 1:
            assert_the_same_people(database, sites[0], row)


def assert_the_same_people(database, site, row):
    """Ages and sexes of a site, as far as they were read in LOD-Brain's table."""
    age, sexes = (value_of(database, site, field) for field in ("age_years", "sexes"))
    read = [bool(re.search("LOD-Brain", standing(database, site, field)[1] or "")) for field in ("age_years", "sexes")]
    if age and read[0] and (published := re.match(r"([\d.]+) \+/-", row["age_mean_sd"])):
        assert age.mean == float(published[1]), row["id"]
    if sexes and read[1] and (published := re.fullmatch(r"F:(\d+)/M:(\d+)", row["sex"])):
        assert (int(published[1]), int(published[2])) == (sexes.F, sexes.M), row["id"]


def test_the_twelve_of_vinn_and_uk_biobank():
    twelve = {database.name for database in CORPUS if "FastSurferVINN" in database.used_by}
    assert twelve == {"hcp", "hcp_lifespan", "rhineland", "abide1", "abide2", "adni", "ixi", "la5c", "mbb", "miriad", "oasis1", "oasis2"}
    assert [database.name for database in CORPUS if "NeuroNet" in database.used_by] == ["ukb"]
    assert {database.name for database in CORPUS if database.lod_brain} == {database.name for database in CORPUS if "LOD-Brain" in database.used_by}


def test_abide_against_its_published_scanners(test_data):
    def plain(model):
        return re.sub(r"magnetom|3t|\s", "", model.casefold())

    with open(test_data / "meta/abide1_site_table.tsv", encoding="utf-8", newline="") as handle:
        published = {row["site"]: row for row in csv.DictReader(handle, delimiter="\t")}
    sites = catalogue()["abide1"].sites
    assert sites.keys() == published.keys()
    for name, row in published.items():
        assert sites[name].manufacturer == row["vendor"].replace("Phillips", "Philips"), name
        assert plain(sites[name].model) == plain(row["model"]), name
        assert sites[name].scans == int(row["n"]) and sites[name].age_years.mean == pytest.approx(float(row["age_mean"])), name


def test_places_and_scanners_across_databases():
    def of(place):
        return {(row["database"], row["site"].removeprefix("ABIDEII-")) for row in site_rows(CORPUS) if row["place"] == place}

    assert {database for database, _ in of("New York University")} >= {"abide1", "abide2", "adhd200", "corr", "fcon1000"}
    assert of("Kennedy Krieger Institute") >= {("abide1", "KKI"), ("abide2", "KKI_1"), ("adhd200", "KKI")}
    assert ("corr", "UM_1") in of("Université de Montréal") and ("abide1", "UM_1") in of("University of Michigan")
    one = {catalogue()[d].sites[s].scanner for d, s in (("abide1", "NYU"), ("abide2", "ABIDEII-NYU_1"), ("adhd200", "NYU"), ("corr", "NYU_2"))}
    assert one == {"nyu-siemens-allegra-3t"}


def test_no_finding_in_the_whole_catalogue():
    assert findings([(f"{database.name}.yaml", database) for database in catalogue().values()], whole=True) == []


def test_test_data_are_no_part_of_the_corpus():
    names = {database.name for database in catalogue().values()} - {database.name for database in CORPUS}
    assert names == {"brainload", "georgetown", "ixi2mm", "malc", "mneecog", "mrtrixbids", "voxelmorph"}


@pytest.mark.parametrize(("database", "subject", "site"), [("ixi", "IXI012HH1211", "HH"), ("mindboggle101", "NKIRS221", "NKIRS22")])
def test_rules_by_prefix_give_a_site(database, subject, site):
    entry = catalogue()[database]
    assert re.match(entry.site_rule.prefix, subject).group(1) == site and site in entry.sites


def test_it_is_read_without_the_heavy_libraries():
    code = (
        "import sys; from data_registry.catalogue import catalogue; from data_registry.catalogue_table import as_json, site_rows; "
        "as_json(site_rows(catalogue().values())); "
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'pyarrow', 'numpy', 'pandas', 'torch', 'nibabel', 'rich', 'typer', 'matplotlib'}))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_one_database_is_one_file_read(monkeypatch):
    read = []
    monkeypatch.setattr("data_registry.catalogue.read_database", lambda path: read.append(path.name) or read_database(path))
    find_database.cache_clear()
    assert (find_database("ixi").name, find_database("ixi").known, find_database("IXI").known) == ("ixi", True, False)
    assert read == ["ixi.yaml"]
    assert all(find_database(name) == database for name, database in catalogue().items())


# ---------------------------------------------------------------- where it was read


def test_what_must_be_sourced_is_sourced_or_unverified():
    for database in catalogue().values():
        for field in MUST_BE_SOURCED:
            for site in [None] if field in Database.model_fields else database.sites:
                how, where = standing(database, site, field)
                assert how == "missing" or (how == "unverified" and where is None) or (how == "sourced" and where), (database.name, site, field)


def test_rows_are_chosen_by_their_columns():
    rows = site_rows(CORPUS)
    assert {row["database"] for row in select(rows, country="germany", field_strength_tesla=1.5)} == {"fcon1000"}
    assert len(select(rows, used_by="neuronet")) == 4
    with pytest.raises(InputError, match=r"^--field-strength 2.0: no site has it; one of 1.5, 3.0, 7.0 is wanted$"):
        select(rows, field_strength_tesla=2.0)
