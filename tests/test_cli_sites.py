"""``lodbrain sites``: lists that a person and a program can read, and one line for what is wrong."""

import csv
import io
import json
import os
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from data_registry import schema
from data_registry.catalogue import Database, catalogue, catalogue_files
from data_registry.errors import InputError
from lod_model import cli_sites
from lod_model.cli import app


def lodbrain(*words: object):
    return CliRunner().invoke(app, ["sites", *map(str, words)])


def output(*words: object) -> str:
    done = lodbrain(*words)
    assert done.exit_code == 0, done.output
    return done.stdout


def refused(*words: object) -> str:
    error = lodbrain(*words).exception
    assert isinstance(error, InputError) and "\n" not in str(error), error
    return str(error)


def test_a_table_with_options():
    text = output("list", "--country", "netherlands", "--field-strength", "1.5")
    lines = [line for line in text.splitlines() if "Nijmegen" in line]
    assert len(lines) == 1 and "adhd200" in lines[0] and "Siemens Avanto" in lines[0] and "1.5" in lines[0]
    assert lines[0].rstrip().endswith("register") and "Germany" not in text
    unverified = [line for line in output("list", "--database", "iadni").splitlines() if "Italian ADNI" in line]
    assert len(unverified) == 1 and unverified[0].rstrip().endswith("agree*")


def test_a_star_marks_what_no_document_confirms(monkeypatch):
    row = json.loads(output("list", "--database", "bgsp", "--format", "json"))[0]
    monkeypatch.setattr(cli_sites, "_width", lambda: 200)
    (line,) = [line for line in cli_sites._drawn(cli_sites._table([row | {"unverified": ["place", "scans"]}])).splitlines() if "GSP" in line]
    assert f"{row['place']}* " in line and f" {row['scans']}* " in line and line.count("*") == 2


def test_words_of_the_table_and_accents_are_found_too():
    for words in (("--country", "usa"), ("--country", "UK"), ("--access", "register"), ("--place", "universite de montreal")):
        assert json.loads(output("list", *words, "--format", "json"))
    assert refused("list", "--place", "montreal").endswith(" is wanted, as in Montreal Neurological Institute; Université de Montréal")
    assert refused("list", "--place", "nyu") == "--place nyu: no site has it; sites of that name are at New York University"
    assert refused("list", "--place", "UM").endswith(" are at University of Michigan; Université de Montréal")


def test_narrow_terminals_and_those_without_letters(tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    code = "import sys; sys.argv = ['lodbrain', 'sites', 'list', '--country', 'Canada']; from lod_model.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=True)
    assert b"Universit? de Montr?al" in done.stdout
    assert output("list", "--country", "Canada", "-o", tmp_path / "new" / "sites.txt").strip() == str(tmp_path / "new" / "sites.txt")
    assert "Université de Montréal" in (tmp_path / "new" / "sites.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("words", [("show", "corr"), ("stats",), ("list",)], ids=str)
def test_no_line_is_wider_than_the_terminal(monkeypatch, capsys, words):
    monkeypatch.setattr(cli_sites, "_width", lambda: 80)
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda _: True, raising=False)
    app(["sites", *words], standalone_mode=False)
    lines = [line for line in capsys.readouterr().out.splitlines() if "://" not in line]
    assert len(lines) > 20 and max(map(len, lines)) <= 80
    if words == ("list",):  # a line each, whatever the terminal
        assert len(lines) == 4 + sum(len(database.sites) for database in catalogue().values() if database.corpus)
    else:
        assert not any("…" in line for line in lines)


def test_tsv_json_and_parquet_say_the_same(tmp_path):
    options = ("--database", "corr", "--manufacturer", "ge")
    objects = json.loads(output("list", *options, "--format", "json"))
    assert [row["site"] for row in objects] == ["HNU_1", "IACAS_1", "IPCAS_4", "UWM_1"]
    table = list(csv.DictReader(io.StringIO(output("list", *options, "--format", "tsv")), delimiter="\t"))
    assert list(table[0]) == schema.SITES.names == list(objects[0])
    assert [row["scans"] for row in table] == [str(row["scans"]) for row in objects]
    assert table[0]["age_min_years"] == "n/a" and table[0]["lod_brain_rows"] == "1000_FCP_CORR_HNU"
    path = tmp_path / "new" / "sites.parquet"
    assert output("list", *options, "--format", "parquet", "-o", path).strip() == str(path)
    read = pq.read_table(path)
    assert read.schema.equals(schema.SITES) and read.column("place").to_pylist() == [row["place"] for row in objects]
    assert refused("list", "--format", "parquet", "-o", path) == f"{path}: exists already; a new file is wanted (-o)"


def test_all_sites_of_the_corpus_are_listed_and_test_data_only_when_asked_for():
    names = [row["database"] for row in json.loads(output("list", "--format", "json"))]
    assert len(names) == sum(len(database.sites) for database in catalogue().values() if database.corpus)
    assert "georgetown" not in names
    assert len(json.loads(output("list", "--format", "json", "--all"))) == len(names) + 7
    assert json.loads(output("list", "--format", "json", "--database", "georgetown"))[0]["place"] == "Georgetown University"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("list", "--country", "Atlantis"), "--country Atlantis: no site has it; one of Australia"),
        (("list", "--place", "montreal"), "--place montreal: no site has it; one of "),
        (("list", "--access", "public"), "--access public: no site has it; one of agreement, open, registration is wanted"),
        (("list", "--field-strength", "7", "--manufacturer", "GE"), "no site has all of these"),
        (("list", "--format", "parquet"), "--format parquet: is no text; a file is wanted (-o)"),
        (("show", "abide"), "abide: no such database; one of abcd, abide1, abide2"),
        (("check", "none.yaml"), "none.yaml: no such file; a YAML of the catalogue is wanted"),
        (("stats", "--figure", "map.txt"), "map.txt: suffix '.txt'; .png, .svg or .pdf is wanted"),
    ],
)
def test_what_cannot_be_is_one_line(words, line):
    assert refused(*words).startswith(line)


def test_show_has_an_owners_answer_with_its_letter(monkeypatch):
    letter = "letter 2026-03-01, A. Doe, kept by us"
    noted = {"documents": {"answer": letter}, "sources": {"redistribute.weights": "answer"}}
    for rest, line in (({}, "redistribute  -"), ({"images": False}, "redistribute  images no  [a visit]")):
        given = {"source": "a visit", "redistribute": rest | {"weights": True}, "site_rule": {"single": "A"}, "sites": {"A": {"place": "A"}}}
        own = Database.model_validate({"name": "own", "title": "Own"} | given | noted)
        monkeypatch.setattr("data_registry.catalogue.catalogue", lambda own=own: {"own": own})
        text = output("show", "own").splitlines()
        assert line in text and "redistribute.weights yes  [answer]" in text
        assert json.loads(output("show", "own", "--json"))["standing"]["redistribute.weights"]["source"] == letter


def test_show_has_terms_sites_and_where_they_were_read():
    text = output("show", "hcp")
    assert "WU-Minn HCP open access data use terms  [registry]" in text
    assert "redistribute  images yes, labels yes  [terms]" in text
    assert "registry: https://github.com/awslabs/open-data-registry" in text
    assert "Siemens ConnectomS" in text and "HCP (890)" in text
    standing = json.loads(output("show", "hcp", "--json"))["standing"]
    assert standing["licence"]["standing"] == "sourced"
    doi = "10.1016/j.neuroimage.2013.05.041"
    assert standing["doi"] == {"value": doi, "standing": "sourced", "source": f"doi:{doi}"}
    assert standing["sites"]["WashU"]["voxel_mm"]["value"] == [0.7, 0.7, 0.7]
    access = json.loads(output("show", "iadni", "--json"))["standing"]["access"]
    assert (access["standing"], access["source"]) == ("unverified", None)


def test_every_database_can_be_shown():
    for name in catalogue():
        assert output("show", name).startswith(f"{name}: ")


def test_check_of_the_projects_own_finds_nothing():
    done = lodbrain("check")
    assert (done.exit_code, done.stdout) == (0, "")
    assert f"{len(catalogue_files())} files: nothing is wrong" in done.stderr


def test_check_of_ones_own_files(tmp_path):
    good = tmp_path / "clinic.yaml"
    good.write_text("name: clinic\ntitle: Our clinic\nsource: in-house\nsite_rule: {single: A}\nsites:\n  A: {place: Our clinic, manufacturer: GE}\n")
    assert lodbrain("check", good).exit_code == 0
    bad = tmp_path / "second.yaml"
    bad.write_text(
        "name: third\ntitle: t\nsource: in-house\nsite_rule: {single: A}\nlod_brain: {IXI: {scans: 569}}\n"
        "sites:\n  A: {place: New York Univ. , scanner: nyu-siemens-allegra-3t, manufacturer: SIEMENS, model: Prisma}\n"
    )
    worse = tmp_path / "worse.yaml"
    worse.write_text("name: worse\naccess: public\nsite_rule: {single: A}\nsites:\n  A: {place: P, field_strength_tesla: 30}\n")
    done = lodbrain("check", good, bad, worse)
    assert done.exit_code == 1
    lines = done.stdout.splitlines()
    assert [line for line in lines if str(worse) in line] == [
        f"{worse}: title: nothing came; a value is wanted",
        f"{worse}: access: 'public' came; 'open', 'registration' or 'agreement' is wanted",
        f"{worse}: sites.A.field_strength_tesla: 30 came; less than 12 is wanted",
    ]
    own = [line.removeprefix(f"{bad}: ") for line in lines if str(bad) in line]
    assert "name: 'third' came; the file's name, 'second', is wanted" in own
    assert "sites.A.manufacturer: 'SIEMENS' came; 'Siemens' is wanted" in own
    assert any(line.startswith("sites.A.model: 'Prisma' came for scanner nyu-siemens-allegra-3t; 'Allegra', as in sites.") for line in own)
    assert any(line.startswith("lod_brain.IXI: stands in ") for line in own)
    assert not any(str(good) in line for line in lines) and "3 files: " in done.stderr


def test_stats_as_json_and_as_text():
    figures = json.loads(output("stats", "--json"))
    assert {"databases", "sites", "places", "scans", "lod_brain_rows", "lod_brain_sites", "lod_brain_scans", "filled"} <= figures.keys()
    assert (figures["lod_brain_rows"], figures["lod_brain_scans"]) == (78, 26171)
    assert sum(figures["by"]["field_strength_tesla"].values()) == figures["sites"] > figures["places"]
    for fields in figures["filled"].values():
        for filled in fields.values():
            total = filled["sourced"] + filled["unverified"] + filled["missing"]
            assert filled["share"] == pytest.approx(filled["sourced"] / total, abs=1e-3)
    assert "LOD-Brain scans      26171" in output("stats")


def test_the_map_is_drawn(tmp_path):
    path = tmp_path / "new" / "map.png"
    assert output("stats", "--figure", path).splitlines()[-1] == str(path)
    assert path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 30_000
    assert list(path.parent.iterdir()) == [path]


def test_circles_of_the_map_stand_at_their_age_and_do_not_overlap():
    from data_registry.catalogue_table import site_rows
    from lod_model import sites_figure as map_

    rows = [row for row in site_rows(catalogue().values()) if row["age_mean_years"] is not None]
    placed = map_._swarm(rows)
    assert len(placed) == len(rows) > 50
    for i, (row, x, y, radius) in enumerate(placed):
        assert x == pytest.approx(map_.LEFT_IN + map_.AGES_IN * row["age_mean_years"] / 90)
        for _, other_x, other_y, other_radius in placed[:i]:
            assert (x - other_x) ** 2 + (y - other_y) ** 2 >= (radius + other_radius) ** 2


def test_help_reads_no_catalogue():
    code = "import sys, lod_model.cli; print([m for m in sys.modules if m.startswith(('data_registry.catalogue', 'pydantic', 'yaml', 'rich.table'))])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
