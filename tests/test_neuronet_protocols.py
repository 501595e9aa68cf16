"""The tables of NeuroNet's five protocols: ids to classes and back, sides, FreeSurfer's names and colours."""

import csv

import numpy as np
import pytest

from data_registry import protocol
from data_registry.errors import InputError
from data_registry.label_sources import find_labels
from lod_model.networks.neuronet import PROTOCOLS

FIRST = [0, 10, 11, 12, 13, 16, 17, 18, 26, 49, 50, 51, 52, 53, 54, 58]


def ids_of(table: protocol.Protocol) -> np.ndarray:
    """The source id of each class; one each in these tables."""
    named = np.flatnonzero(table.table != protocol._UNNAMED)
    assert len(named) == table.classes
    return named[np.argsort(table.table[named])]


@pytest.mark.parametrize("name", PROTOCOLS)
def test_ids_to_classes_and_back(name):
    table = protocol.load(name)
    ids = ids_of(table)
    assert table.classes == PROTOCOLS[name] == len(set(table.class_names)) and table.sources == (name,)
    assert ids.tolist() == (FIRST if name == "fsl_first" else list(range(table.classes)))
    volume = np.random.default_rng(0).choice(ids, (3, 4, 5)).astype(np.uint16)
    classes = table.classes_of(volume)
    assert classes.dtype == np.uint8 and np.array_equal(ids[classes], volume)
    with pytest.raises(InputError, match=f"sub-01: label id 200 .1 voxels. is not in protocol {name}"):
        table.classes_of(np.array([200], dtype=np.uint16), where="sub-01")


@pytest.mark.parametrize("name", PROTOCOLS)
def test_left_and_right_change_places_and_the_rest_stays(name):
    table = protocol.load(name)
    mirrored = table.mirrored()
    assert np.array_equal(mirrored[mirrored], np.arange(table.classes))
    swapped = {"left": "right", "right": "left", "none": "none"}
    for index, other in enumerate(mirrored):
        side = table.sides[index]
        assert table.sides[other] == swapped[side] and (other == index) == (side == "none")
        assert table.class_names[other] == table.class_names[index].replace(side, swapped[side])
        assert side == "none" or table.class_names[index].startswith(side)
    assert sum(side == "left" for side in table.sides) == {"fsl_first": 7, "malp_em": 65}.get(name, 0)


def test_the_order_of_tissues_is_the_releases():
    for name in ("fsl_fast", "spm_tissue"):
        assert protocol.load(name).class_names == ("background", "CSF", "grey matter", "white matter")
    assert protocol.load("malp_em_tissue").class_names[3:] == ("white matter", "cortical grey matter", "other")
    names = protocol.load("malp_em").class_names
    assert (names[9], names[35], names[42], names[138]) == (
        "left caudate", "optic chiasm", "left anterior cingulate gyrus", "left transverse temporal gyrus",
    )  # fmt: skip


def test_first_has_freesurfers_names_and_colours(test_data):
    with open(test_data / "labels" / "freesurfer_lut.tsv", encoding="utf-8") as handle:
        freesurfer = {int(row["id"]): row for row in csv.DictReader(handle, delimiter="\t")}
    table = protocol.load("fsl_first")
    for index, source_id in enumerate(FIRST):
        row = freesurfer[source_id]
        assert table.colours[index] == tuple(int(row[c]) for c in "rgb")
        same = table.class_names[index].replace(" ", "-") == row["name"].lower()
        assert same or source_id in (0, 16)   # Unknown is the background, Brain-Stem the brainstem


def test_a_tools_derivatives_are_its_protocols_source(tmp_path):
    for name in PROTOCOLS:
        anat = tmp_path / "derivatives" / name / "sub-01" / "anat"
        anat.mkdir(parents=True)
        (anat / "sub-01_dseg.nii.gz").touch()
    assert {source for name in PROTOCOLS for source in protocol.load(name).sources} == set(find_labels(tmp_path, "01", ""))
