"""Every field of the schema: its standing by sources, and one clear line for each way in which a YAML can be wrong."""

import copy
import re

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from data_registry.catalogue import load_database, read_database
from data_registry.catalogue_schema import Ages, Database, LabelSource, LodBrainRow, Redistribution, Sexes, Site
from data_registry.catalogue_sources import standing, value_of
from data_registry.catalogue_stats import stats
from data_registry.catalogue_table import site_rows
from data_registry.errors import InputError

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


def test_values_of_parts_without_a_value_are_missing():
    assert value_of(Database.model_validate(WHOLE | {"age_years": {"mean": None}}), None, "age_years") is None


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
        ({"documents": {"d": "a letter"}}, "documents.d: 'a letter' came; https://…, doi:10.…/… or 'letter YEAR-MONTH-DAY, who wrote it, who keeps"),
        ({"documents": {"d": "letter 2026-3-1, A. Doe"}}, "documents.d: 'letter 2026-3-1, A. Doe' came; https://"),
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
