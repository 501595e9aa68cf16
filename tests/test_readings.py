"""What a written value says: each age, sex, field strength, maker and licence with what was done to it."""

import pytest

from data_registry.readings import canonical_licence, canonical_manufacturer, read_age, read_field_strength, read_sex


@pytest.mark.parametrize(
    ("written", "unit", "value", "kind"),
    [
        ("30", "year", 30, None), (" 30.5 ", "year", 30.5, None), ("0", "year", 0, None), ("110", "year", 110, None),
        ("20-25", "year", None, "age unclear"), ("89+", "year", None, "age unclear"), ("22,23", "year", None, "age unclear"),
        ("inf", "year", None, "age unclear"), ("-1", "year", None, "age impossible"), ("240", "year", None, "age impossible"),
        ("999", "year", None, "age impossible"), ("n/a", "year", None, "missing value"), (None, "year", None, "missing value"),
        ("18", "month", 1.5, "unit"), ("1461", "day", 4, "unit"), ("1500", "month", None, "age impossible"), ("063Y", "year", 63, "spelling"),
    ],
)  # fmt: skip
def test_ages(written, unit, value, kind):
    reading = read_age(written, unit)
    assert (reading.value, reading.kind) == (pytest.approx(value) if value is not None else None, kind)


def test_sexes_and_codes_that_are_declared_or_not():
    assert [read_sex(text, {}).value for text in ("F", "male", "Woman", "1", "2", "F,F", "Fxyz", "other", "n/a")] == ["F", "M", "F"] + [None] * 6
    assert [read_sex(text, {"1": "M", "2": "F"}).value for text in ("1", "2.0", "3", "F")] == ["M", "F", None, "F"]
    assert read_sex("F", {"F": "M"}).value == "M"  # the database's own word goes first
    assert read_sex("2", {}).kind == "sex unclear" and read_sex("", {}).kind == "missing value"


@pytest.mark.parametrize(
    ("written", "tesla", "kind"),
    [
        (3, 3, None), ("1.5", 1.5, None), (0.55, 0.55, None), (4, 4, None), (2.89362, 3, "rounded"), ("2.89", 3, "rounded"), (6.98, 7, "rounded"),
        (3.95064, None, "field strength unclear"), (15000, None, "field strength unclear"), (3000, None, "field strength unclear"),
        ("15000 G", 1.5, "unit"), ("3000 mT", 3, "unit"), ("3T", 3, "unit"), ("high", None, "field strength unclear"),
        ("..", None, "field strength unclear"), (-3, None, "field strength unclear"), (0, None, "field strength unclear"), ("n/a", None, None),
    ],
)  # fmt: skip
def test_field_strengths(written, tesla, kind):
    reading = read_field_strength(written)
    assert (reading.value, reading.kind) == (tesla, kind)


@pytest.mark.parametrize(
    ("maker", "spellings"),
    {
        "Siemens": ["SIEMENS", "Siemens", "siemens healthineers", "Siemens Healthineers", "SIEMENS_Healthineers", "  Siemens"],
        "GE": ["GE", "GE MEDICAL SYSTEMS", "GE_MEDICAL_SYSTEMS", "ge healthcare", "General Electric", "G.E. Medical"],
        "Philips": ["Philips", "Phillips", "PHILIPS MEDICAL SYSTEMS", "Philips Healthcare", "Philips-6PBL1PB"],
        "United Imaging": ["UIH", "United Imaging Healthcare", "Shanghai United Imaging"], "Canon": ["TOSHIBA_MEC", "Canon Medical Systems"],
        "Gefen": ["Gefen"], "Siemensia": ["Siemensia"],
    }.items(),
)  # fmt: skip
def test_makers(maker, spellings):
    assert {canonical_manufacturer(name) for name in spellings} == {maker}


def test_licences():
    assert {canonical_licence(name) for name in ("CC0", "CCo", "cc0", "CC0 1.0", "CC-0", "Creative Commons CC0")} == {"CC0"}
    assert canonical_licence("CC BY-NC-SA 3.0") == canonical_licence("CC-BY-NC-SA-3.0") == "CC-BY-NC-SA-3.0"
    assert canonical_licence("CC-BY-4.0") != canonical_licence("CC-BY-3.0")
    assert canonical_licence("n/a") is None and canonical_licence("ours") == "ours"
