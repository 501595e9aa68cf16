"""The catalogue: what it holds, where its values were read, and one clear line for each way in which a YAML can be wrong."""

import copy
import csv
import re
import subprocess
import sys

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from data_registry.catalogue import catalogue, find_database, load_database, read_database
from data_registry.catalogue_check import findings, lod_brain_table
from data_registry.catalogue_schema import Ages, Database, LabelSource, LodBrainRow, Redistribution, Sexes, Site, SiteRule
from data_registry.catalogue_sources import MUST_BE_SOURCED, standing, value_of
from data_registry.catalogue_stats import stats
from data_registry.catalogue_table import select, site_rows
from data_registry.errors import InputError
from data_registry.readings import canonical_manufacturer

CORPUS = [database for database in catalogue().values() if database.corpus]
WHOLE = {
    "name": "whole", "title": "every field filled", "corpus": False, "used_by": ["NeuroNet"], "countries": ["Italy", "Malta"], "licence": "CC0",
    "access": "open", "route": "a shop", "redistribute": {"images": True, "labels": True, "weights": False}, "state": "available",
    "citation": "A 2020", "doi": "10.1000/x", "sex_codes": {"1": "M", "2": "F"},
    "labels": {"source": "FreeSurfer", "version": "7.1", "route": "s3://b/x", "subject": "A_(.+)"},
    "defaced": True, "family_column": "family", "note": "n", "subjects": 3, "scans": 4,
    "age_years": {"mean": 30.0, "sd": 2.0, "min": 20.0, "max": 40}, "sexes": {"F": 1, "M": 2}, "site_rule": {"prefix": "(A)"},
    "same_people": [{"database": "ixi"}],
    "sites": {"A": {
        "place": "P", "country": "Malta", "folders": ["a_1", "a_2"], "scanner": "s", "manufacturer": "GE", "model": "M", "field_strength_tesla": 1.5,
        "voxel_mm": [1.0, 1.0, 1.2], "subjects": 3, "scans": 4,
        "age_years": {"mean": 30.0, "sd": 2.0, "min": 20.0, "max": 40.0}, "sexes": {"F": 1, "M": 2}, "note": "n",
    }},
    "lod_brain": {"IXI": {"scans": 569, "sites": ["A"]}}, "source": "here", "documents": {"d": "https://example.org/d"}, "sources": {"licence": "d"},
    "unverified": ["sites.*.model"], "known": True,
}  # fmt: skip
UNNAMED = {"documents", "sources", "sites", "lod_brain"}  # what stands in them has names of the user's


def written(folder, content, name="own.yaml"):
    path = folder / name
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, allow_unicode=True, sort_keys=False), encoding="utf-8")
    return path


def refusal(path) -> str:
    with pytest.raises(InputError) as caught:
        load_database(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def leaves(content, path=()):
    """Paths of all fields, those that hold others included."""
    for key, value in content.items() if isinstance(content, dict) else ():
        yield (*path, key)
        yield from leaves(value, (*path, key))


def at(content, path):
    for key in path:
        content = content[key]
    return content


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


def test_the_exact_goes_before_the_star():
    database = Database.model_validate(WHOLE | {
        "source": None, "sources": {"sites.*.place": "d", "sites.A.model": "d"}, "unverified": ["sites.A.place", "sites.*.model", "licence"],
    })  # fmt: skip
    assert standing(database, "A", "place") == ("unverified", None)
    assert standing(database, "A", "model") == ("sourced", "https://example.org/d")
    assert standing(database, None, "licence")[0] == standing(database, None, "route")[0] == "unverified"
    assert standing(database.model_copy(update={"redistribute": Redistribution()}), None, "redistribute") == ("missing", None)


def test_columns_that_no_document_confirms_are_named():
    unverified = ["sites.*.place", "sites.*.scans", "sites.*.age_years", "sexes"]
    (row,) = site_rows([Database.model_validate(WHOLE | {"unverified": unverified})])
    assert row["unverified"] == ["place", "scans", "age_mean_years", "age_min_years", "age_max_years"]
    alone = {"A": {key: value for key, value in WHOLE["sites"]["A"].items() if key != "sexes"}}  # the database lends it its own
    (row,) = site_rows([Database.model_validate(WHOLE | {"unverified": unverified, "sites": alone})])
    assert row["unverified"][-2:] == ["female", "male"] and row["female"] == 1


def test_a_value_without_a_source_is_refused_and_with_the_mark_counts_as_missing(tmp_path):
    content = {key: value for key, value in WHOLE.items() if key not in ("source", "sources", "documents", "unverified")}
    line = refusal(written(tmp_path, content))
    for field in ("licence: 'CC0'", "access: 'open'", "route: 'a shop'", "sites.A.field_strength_tesla: 1.5"):
        assert f"{field} came without a source" in line
    marked = load_database(written(tmp_path, content | {"unverified": ["licence", "access", "route", "sites.*.field_strength_tesla"]}))
    filled = stats([marked])["filled"]
    assert filled["databases"]["licence"] == {"sourced": 0, "unverified": 1, "missing": 0, "share": 0.0}
    assert filled["sites"]["field_strength_tesla"]["share"] == 0.0 and site_rows([marked])[0]["unverified"][:3] == ["access", "licence", "route"]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"sources": {"licence": "e"}}, "sources.licence: 'e' came; a document is wanted: d"),
        ({"sources": {}}, "documents.d: is named by no field"),
        ({"sources": {"licence": "d", "sites.B.model": "d"}}, "sources: 'sites.B.model' came, no field of whole"),
        (
            {"documents": {"d": "letter 2026-03-01, A. Doe, kept by us"}, "sources": {"licence": "d", "redistribute.weights": "d"}},
            "sources.licence: 'd' came, a letter; that is a source of redistribute.weights alone",
        ),
        ({"documents": {"d": "a letter"}}, "documents.d: 'a letter' came"),
        ({"unverified": ["licences"]}, "unverified: 'licences' came, no field of whole"),
        ({"unverified": ["licence"]}, "unverified: 'licence' came, which has a source too"),
    ],
)
def test_sources_that_do_not_fit(tmp_path, change, line):
    assert line in refusal(written(tmp_path, WHOLE | change))


# ---------------------------------------------------------------- what can be wrong


def test_the_example_has_every_field_and_is_right(tmp_path):
    parts = {
        (): Database, ("sites", "A"): Site, ("sites", "A", "age_years"): Ages, ("sites", "A", "sexes"): Sexes, ("age_years",): Ages,
        ("sexes",): Sexes, ("redistribute",): Redistribution, ("labels",): LabelSource, ("lod_brain", "IXI"): LodBrainRow,
    }  # fmt: skip
    for path, model in parts.items():
        assert set(at(WHOLE, path)) == set(model.model_fields), path
    assert load_database(written(tmp_path, WHOLE)).name == "whole"


junk = st.one_of(
    st.just(""), st.booleans(), st.integers(-9, -1), st.just(float("nan")), st.just(float("inf")), st.just([]), st.just({}), st.just([[]]),
    st.just({"x": 1}), st.just("ßß no such choice ßß"), st.just(10**9 + 0.5),
)  # fmt: skip


def is_right(path, value) -> bool:
    """May this value stand in the field? (Said here anew: a text anywhere where text is free, no number where it is not, and so on.)"""
    name = path[-1] if path[0] not in UNNAMED or len(path) != 2 else path[0] + ".*"
    if value == {}:
        return name in ("documents", "sources", "lod_brain", "redistribute", "age_years", "sexes", "sex_codes")
    if value == []:
        return name in ("used_by", "countries", "unverified", "same_people", "folders") or (name == "sites" and path[0] == "lod_brain")
    if isinstance(value, bool):
        return name in ("corpus", "known", "defaced", "images", "labels", "weights") and path != ("labels",)
    if isinstance(value, str) and value:
        of_database = ("title", "licence", "route", "citation", "source", "version", "note", "family_column")
        return name in (*of_database, "place", "scanner", "manufacturer", "model")
    return False


@settings(max_examples=400, deadline=None)
@given(path=st.sampled_from(sorted(leaves(WHOLE), key=str)), value=junk)
def test_each_field_broken_in_turn_is_one_line_that_names_it(tmp_path_factory, path, value):
    content = copy.deepcopy(WHOLE)
    at(content, path[:-1])[path[-1]] = value
    database, wrong = read_database(written(tmp_path_factory.mktemp("broken"), content))
    if is_right(path, value) and path[0] not in ("documents", "sources", "unverified", "countries"):
        assert database is not None and wrong == [], (path, value)
        return
    if not is_right(path, value):
        assert wrong, (path, value)
    for line in wrong:
        assert "\n" not in line and "wanted" in line, line
    if wrong and path[0] not in ("site_rule", "countries") and database is None:
        assert any(line.startswith(".".join(path)) or path[-1] in line for line in wrong), (path, value, wrong)


@pytest.mark.parametrize(
    "path", [("name",), ("title",), ("site_rule",), ("sites",), ("sites", "A", "place"), ("labels", "source"), ("lod_brain", "IXI", "scans")]
)
def test_a_field_that_must_be_there(tmp_path, path):
    content = copy.deepcopy(WHOLE)
    del at(content, path[:-1])[path[-1]]
    assert f"own.yaml: {'.'.join(path)}: nothing came; a value is wanted" in refusal(written(tmp_path, content))


@pytest.mark.parametrize(
    ("path", "known"),
    [
        ((), "name, title"),
        (("sites", "A"), "place, country"),
        (("sites", "A", "sexes"), "F, M"),
        (("lod_brain", "IXI"), "scans, sites"),
        (("site_rule",), "participants, sidecar"),
    ],
)
def test_a_field_that_nobody_knows(tmp_path, path, known):
    content = copy.deepcopy(WHOLE)
    at(content, path)["colour"] = "red"
    line = refusal(written(tmp_path, content))
    fields = ".".join((*path, "colour"))
    assert f"{fields}: an unknown field came ('red'); one of " in line
    assert all(one in line for one in known.split(", "))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"access": "public"}, "access: 'public' came; 'open', 'registration' or 'agreement' is wanted"),
        ({"sites": {"A": WHOLE["sites"]["A"] | {"field_strength_tesla": 30}}}, "sites.A.field_strength_tesla: 30 came; less than 12 is wanted"),
        ({"sites": {"A": WHOLE["sites"]["A"] | {"field_strength_tesla": "3T"}}}, "sites.A.field_strength_tesla: '3T' came; a valid number is wanted"),
        ({"sites": {"A": WHOLE["sites"]["A"] | {"voxel_mm": [1.0, 1.0, 30]}}}, "sites.A.voxel_mm.2: 30 came; less than 20 is wanted"),
        ({"sites": {"A": WHOLE["sites"]["A"] | {"voxel_mm": [0, 1.0, 1.0]}}}, "sites.A.voxel_mm.0: 0 came; greater than 0 is wanted"),
        ({"sites": {}, "lod_brain": {}}, "sites: {} came"),
        ({"used_by": ["nnU-Net"]}, "used_by.0: 'nnU-Net' came"),
        ({"countries": ["Italy", "Malta", 3]}, "countries.2: 3 came"),
        ({"countries": ["Italy", "Malta", "Malta "]}, "countries.2: 'Malta ' came; one line without blanks at its ends is wanted"),
        ({"sites": {"A": {"place": "New\nYork"}}}, r"sites.A.place: 'New\\nYork' came; one line without blanks at its ends is wanted"),
        ({"sites": {"A ": {"place": "P"}}}, "sites.A : 'A ' came; one line without blanks at its ends is wanted"),
        ({"scans": 10**12}, "scans: 1000000000000 came; less than or equal to 10000000 is wanted"),
        ({"defaced": "yes"}, "defaced: 'yes' came; a valid boolean is wanted"),
        ({"redistribute": {"images": 1}}, "redistribute.images: 1 came; a valid boolean is wanted"),
        (
            {"sites": {"A": WHOLE["sites"]["A"] | {"country": "Malte"}}},
            "own.yaml: sites.A.country is 'Malte'; one of the countries Italy, Malta is wanted",
        ),
        ({"sites": {"A": None}}, "sites.A: None came; fields and their values are wanted"),
        ({"site_rule": {"single": "B"}}, "own.yaml: site_rule.single 'B' is no site; one of A is wanted"),
        ({"site_rule": {"prefix": "("}}, "site_rule: .* a regular expression in prefix is wanted"),
        ({"site_rule": {"prefix": "A"}}, "with a group, the site, in prefix is wanted"),
        ({"labels": {"source": "s", "route": "s3://b/x"}}, "labels: .* came; route and subject are wanted both, or neither"),
        ({"labels": {"source": "s", "route": "s3://b/x", "subject": "A"}}, "with a group, the subject's label, in subject is wanted"),
        ({"sites": {"A": {"place": "P"}, "B": {"place": "P", "folders": ["a"]}}}, "sites.B.folders has 'a', which is A; a folder of one site"),
        ({"site_rule": {}}, "exactly one of participants, sidecar, prefix, single is wanted"),
        ({"lod_brain": {"IXI": {"scans": 569, "sites": ["HH"]}}}, "lod_brain.IXI.sites names 'HH', which is no site; one of A is wanted"),
        ({"documents": {"d": "seen it somewhere"}}, "documents.d: 'seen it somewhere' came"),
    ],
)
def test_values_that_cannot_be(tmp_path, change, line):
    assert re.search(line, refusal(written(tmp_path, WHOLE | change)))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("name: a\nsites:\n  A: {place: P}\n  A: {place: Q}\n", "'A' stands twice; it is wanted once at line 4, column 3"),
        ("name: a\nsites:\n  1: {place: P}\n", "the name 1 is no text; quotes around it are wanted"),
        ("name: [", "not valid YAML"),
        ("", "the file: None came; fields and their values are wanted"),
        ("- a\n", "the file: .'a'. came"),
        ("!!python/object:os.system {}\n", "not valid YAML"),
    ],
)
def test_files_that_are_no_entry(tmp_path, text, line):
    assert re.search(line, refusal(written(tmp_path, text)))


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "own.yaml").write_bytes(b"title: M\xfcnchen\n")
    assert "not UTF-8 text" in refusal(tmp_path / "own.yaml")
    assert "cannot be read (No such file or directory)" in refusal(tmp_path / "none.yaml")


# ---------------------------------------------------------------- what only the entries together show


def entry(name="own", **sites) -> tuple[str, Database]:
    return f"{name}.yaml", Database(name=name, title=name, site_rule=SiteRule(participants="site"), sites={k: Site(**v) for k, v in sites.items()})


@pytest.mark.parametrize(
    ("first", "second", "line"),
    [
        ({"place": "University of Utah"}, {"place": "Utah, University"}, "sites.B.place: 'Utah, University' came; 'University of Utah', if"),
        ({"place": "Université de Montréal"}, {"place": "Universite de Montreal"}, "if it is the same, is wanted"),
        ({"place": "P", "model": "TrioTim"}, {"place": "P", "model": "MAGNETOM Trio_Tim"}, "sites.B.model: 'MAGNETOM Trio_Tim' came; 'TrioTim'"),
        (
            {"place": "P", "scanner": "s", "model": "Verio"},
            {"place": "P", "scanner": "s", "model": "Skyra"},
            "sites.B.model: 'Skyra' came for scanner s; 'Verio', as in sites.A of one.yaml, is wanted",
        ),
        ({"place": "P", "scanner": "s"}, {"place": "Q", "scanner": "s"}, "sites.B.place: 'Q' came for scanner s; 'P'"),
        ({"place": "P"}, {"place": "P", "manufacturer": "SIEMENS"}, "sites.B.manufacturer: 'SIEMENS' came; 'Siemens' is wanted"),
    ],
)
def test_entries_that_contradict_each_other(first, second, line):
    found = findings([entry("one", A=first, C=first), entry("two", B=second)], whole=False)
    assert [file for file, _ in found] == ["two.yaml"] and line in found[0][1]


def test_names_counts_and_ages_that_do_not_fit():
    file, database = entry("one", A={"place": "P", "scans": 3, "age_years": Ages(mean=70, max=60)})
    found = [what for _, what in findings([(file, database.model_copy(update={"scans": 2})), ("other.yaml", database)], whole=False)]
    assert "name: 'one' names 2 databases; a name of its own is wanted" in found
    assert "name: 'one' came; the file's name, 'other', is wanted" in found
    assert "scans: 2 came, but its sites' make 3; no fewer are wanted" in found
    assert "sites.A.age_years: min None, mean 70.0, max 60.0 came; them in this order is wanted" in found


def test_rows_of_lod_brain_missing_double_wrong_and_unknown():
    one, two = (entry(name, A={"place": name})[1] for name in ("one", "two"))
    one = one.model_copy(update={"lod_brain": {"IXI": LodBrainRow(scans=569), "IBSR": LodBrainRow(scans=17), "XII": LodBrainRow(scans=1)}})
    two = two.model_copy(update={"lod_brain": {"IXI": LodBrainRow(scans=569)}})
    found = findings([("one.yaml", one), ("two.yaml", two)], whole=True)
    assert ("two.yaml", "lod_brain.IXI: stands in one.yaml too; it is wanted once") in found
    assert ("one.yaml", "lod_brain.IBSR.scans: 17 came; 18, as in LOD-Brain's table, is wanted") in found
    assert any("lod_brain.XII: is no row" in what for _, what in found)
    assert sum("is missing" in what for _, what in found) == 76
    assert not any("is missing" in what for _, what in findings([("one.yaml", one)], whole=False))


def test_rows_are_chosen_by_their_columns():
    rows = site_rows(CORPUS)
    assert {row["database"] for row in select(rows, country="germany", field_strength_tesla=1.5)} == {"fcon1000"}
    assert len(select(rows, used_by="neuronet")) == 4
    with pytest.raises(InputError, match=r"^--field-strength 2.0: no site has it; one of 1.5, 3.0, 7.0 is wanted$"):
        select(rows, field_strength_tesla=2.0)


def test_values_of_parts_without_a_value_are_missing():
    assert value_of(Database.model_validate(WHOLE | {"age_years": {"mean": None}}), None, "age_years") is None
