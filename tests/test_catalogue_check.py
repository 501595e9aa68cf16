"""What only the entries of a catalogue together show to be wrong."""

import pytest

from data_registry.catalogue_check import findings
from data_registry.catalogue_schema import Ages, Database, LodBrainRow, Site, SiteRule


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
        ({"place": "P"}, {"place": "P", "field_strength_tesla": 2.89}, "sites.B.field_strength_tesla: 2.89 came; 3.0, as it is sold, is wanted"),
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
