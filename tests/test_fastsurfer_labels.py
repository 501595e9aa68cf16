"""Label tables and what they cannot say: every class has its id, left is left, what DKT does not know is left out, parcels get their side."""

import csv
from pathlib import Path

import numpy as np
import pytest

from data_registry import protocol as protocols
from data_registry import shards
from data_registry.fastsurfer_labels import dkt_ids, sided_white_matter
from data_registry.protocol import IGNORED, load, sagittal_classes
from data_registry.volume import load_labels
from lod_model.lateralise import relateralise

FASTSURFER = ("fastsurfer51", "fastsurfer79", "fastsurfer95")
DK_ONLY = (1001, 1032, 1033, 2001, 2032, 2033)
APARC_ASEG = (  # all that recon-all writes into aparc+aseg and its kin
    0, 2, 3, 4, 5, 7, 8, *range(10, 19), 24, 26, 28, 29, 30, 31, 41, 42, 43, 44, 46, 47, *range(49, 55), 58, 60, 61, 62, 63, 72, *range(77, 83), 85,
    *range(250, 256), *range(1000, 1036), *range(2000, 2036), *range(3000, 3036), *range(4000, 4036), 5001, 5002,
)  # fmt: skip


def rows(path: Path) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def ids(*line: int) -> np.ndarray:
    return np.array([[line]], dtype=np.uint16)


# Tables


@pytest.mark.parametrize("name", protocols.names())
def test_class_to_id_to_class(name):
    table = load(name)
    assert table.classes_of(np.array(table.ids, np.uint16)).tolist() == list(range(table.classes))
    assert len(set(table.class_names)) == table.classes and table.class_names[0] == "background" and table.ids[0] == 0
    assert {len(column) for column in (table.colours, table.sides, table.groups, table.ids, table.cortex)} == {table.classes}


@pytest.mark.parametrize("name", protocols.names())
def test_left_and_right_change_places_and_nothing_else(name):
    table = load(name)
    mirrored = table.mirrored()
    assert mirrored[mirrored].tolist() == list(range(table.classes))
    other = {"left": "right", "right": "left", "none": "none"}
    for index, side in enumerate(table.sides):
        assert table.sides[mirrored[index]] == other[side] and (mirrored[index] == index) == (side == "none")
        words = table.class_names[index].lower()
        assert {"left": "left" in words or "-lh-" in words, "right": "right" in words or "-rh-" in words}.get(side, True)


@pytest.mark.parametrize(("name", "classes", "cortex"), [("fastsurfer79", 79, 45), ("fastsurfer51", 51, 31), ("fastsurfer95", 96, 62)])
def test_every_id_of_a_map_has_a_class_or_is_left_out(name, classes, cortex):
    table = load(name)
    found = table.classes_of(np.array(APARC_ASEG))
    assert set(found.tolist()) == {*range(classes), IGNORED}
    assert table.classes == classes and table.cortex.sum() == cortex and table.cortex[-cortex:].all()  # cortex stands last
    assert set(table.classes_of(np.array(DK_ONLY)).tolist()) == {IGNORED}


def test_synthseg_has_a_class_for_all_that_lod7_names():
    named = np.flatnonzero(load("lod7").table != 65535)
    classes = load("synthseg33").classes_of(named[None, None].astype(np.uint16))  # with white matter of both sides among them
    assert set(classes.ravel().tolist()) == set(range(33))


def test_fastsurfers_source_mapping():
    came = [80, 85, 30, 62, 72, 29, 61, 2003, 1003, 2002, 2025, 78]
    becomes = [77, 0, 2, 41, 24, 0, 0, 1003, 1003, 2002, 2025, 77]
    table = load("fastsurfer79")
    assert [table.ids[c] for c in table.classes_of(np.array(came))] == becomes
    assert table.class_names[table.classes_of(np.array([2003]))[0]] == "ctx-caudalmiddlefrontal"  # both sides: no side in its name
    assert [load("fastsurfer95").ids[c] for c in load("fastsurfer95").classes_of(np.array([2003, 1003]))] == [2003, 1003]


def test_tables_are_the_published_ones(test_data):
    labels = test_data / "labels"
    colour = {int(row["id"]): tuple(int(row[c]) for c in "rgb") for row in rows(labels / "freesurfer_lut.tsv")}
    name = {int(row["id"]): row["name"] for row in rows(labels / "freesurfer_lut.tsv")}
    for ours, file in (("fastsurfer79", "fastsurfer_79.tsv"), ("synthseg33", "synthseg_33.tsv")):
        assert list(load(ours).ids) == [int(row["freesurfer_id"]) for row in rows(labels / file)]
    fused = rows(labels / "fastsurfer_fused_parcels.tsv")
    both, split = load("fastsurfer79"), load("fastsurfer95")
    for row in fused:
        left, right = int(row["left_id"]), int(row["right_id"])
        assert {left, right} <= set(split.ids)
        assert both.sides[both.table[left]] == ("none" if both.table[left] == both.table[right] else "left")
    assert sum(side == "none" and cortex for side, cortex in zip(both.sides, both.cortex, strict=True)) == 17
    for table in map(load, (*FASTSURFER, "synthseg33")):
        assert table.colours == tuple(colour[i] for i in table.ids)
        for i, side, class_name in list(zip(table.ids, table.sides, table.class_names, strict=True))[1:]:
            bare = name[i].removeprefix("Left-").removeprefix("Right-").replace("-lh-", "-").replace("-rh-", "-")
            assert class_name == (bare if side == "none" else name[i])


# Sagittal views


def test_sagittal_classes_are_fastsurfers(test_data):
    reference = np.load(test_data / "reference_networks/fastsurfer_sagittal_views.npz")
    index, number = sagittal_classes(load("fastsurfer79"))
    assert number == 51 and index.tolist() == reference["index_list"].tolist()
    assert index.tolist() == [int(row["sagittal_class_51"]) for row in rows(test_data / "labels/fastsurfer_sagittal_51_to_79.tsv")]
    assert np.array_equal(reference["sagittal_in"][:, index], reference["sagittal_full"])
    assert list(load("fastsurfer79").ids) == reference["lut_labels_full"].tolist()
    assert load("fastsurfer51").classes_of(reference["lut_labels_sagittal"]).tolist() == list(range(51))


@pytest.mark.parametrize(("name", "number"), [("lod7", 7), ("synthseg33", 19), ("fastsurfer51", 51), ("fastsurfer79", 51), ("fastsurfer95", 51)])
def test_a_sagittal_view_sees_no_sides_and_all_else(name, number):
    table = load(name)
    index, count = sagittal_classes(table)
    assert count == number and sorted(set(index.tolist())) == list(range(number))
    assert np.array_equal(index, index[table.mirrored()])
    for seen in range(number):  # one class, a pair, or, where a parcel of both sides is split later, its two sides
        assert len({table.class_names[c].lower().replace("left-", "").replace("right-", "").replace("-lh-", "-").replace("-rh-", "-")
                    for c in np.flatnonzero(index == seen)}) == 1  # fmt: skip


def test_the_view_of_a_map_is_the_map_of_the_view():
    came = np.array(APARC_ASEG)
    for name in ("fastsurfer79", "fastsurfer95"):
        classes, seen = load(name).classes_of(came), load("fastsurfer51").classes_of(came)
        known = classes != IGNORED
        assert np.array_equal(known, seen != IGNORED)
        assert np.array_equal(sagittal_classes(load(name))[0][classes[known]], seen[known])


# What a table cannot say


def test_corpus_callosum_takes_the_side_of_the_nearest_white_matter():
    # left white matter a single voxel, right a slab: it is nearness that counts, in any direction
    label_map = np.zeros((3, 3, 9), np.uint16)
    label_map[1, 1] = [2, 251, 252, 0, 253, 254, 41, 41, 41]
    expected = [2, 2, 2, 0, 41, 41, 41, 41, 41]
    for turned in (label_map, label_map[:, :, ::-1], label_map.transpose(2, 0, 1), label_map.transpose(1, 2, 0)[:, ::-1]):
        done = dkt_ids(turned)
        assert done[turned > 0].tolist() in ([e for e in expected if e], [e for e in expected if e][::-1])
    assert dkt_ids(label_map)[1, 1].tolist() == expected and (dkt_ids(label_map)[label_map == 0] == 0).all()


def test_unknown_cortex_takes_the_nearest_parcel_of_its_hemisphere():
    assert dkt_ids(ids(1002, 0, 0, 1000, 2005, 2000, 0, 0, 2011, 2004)).ravel().tolist() == [1002, 0, 0, 1002, 2005, 2005, 0, 0, 2011, 2011]
    assert dkt_ids(ids(1001, 1000, 0, 0, 1002)).ravel().tolist() == [1001, 1001, 0, 0, 1002]  # so it may be left out with its neighbour
    assert load("fastsurfer79").classes_of(ids(1001, 1000, 0, 0, 1002)).ravel().tolist() == [IGNORED, IGNORED, 0, 0, 34]


def test_cortex_that_is_left_over_is_background_and_what_has_no_neighbour_is_left_out():
    assert dkt_ids(ids(3, 42, 1002)).ravel().tolist() == [0, 0, 1002]
    assert dkt_ids(ids(251, 1000, 2005)).ravel().tolist() == [251, 1000, 2005]
    assert load("fastsurfer79").classes_of(ids(251, 1000, 2005)).ravel().tolist() == [IGNORED, IGNORED, 66]
    untouched = ids(2, 1002, 16)
    assert dkt_ids(untouched) is untouched and sided_white_matter(untouched) is untouched


def test_white_matter_without_a_side():
    assert sided_white_matter(ids(2, 77, 0, 0, 80, 0, 255, 41)).ravel().tolist() == [2, 2, 0, 0, 41, 0, 41, 41]
    assert load("synthseg33").classes_of(ids(2, 77, 0, 255, 41)).ravel().tolist() == [1, 1, 0, 19, 19]


@pytest.mark.parametrize("seed", range(4))
def test_the_nearest_by_brute_force(seed):
    generator = np.random.default_rng(seed)
    common, rare = (0.7, 0.25, 0.02, 0.01), (0.005,) * 4
    label_map = generator.choice(np.array([0, 16, 251, 1000, 2, 41, 1005, 1006], np.uint16), (5, 6, 30), p=(*common, *rare))
    done = dkt_ids(label_map)
    for wanting, among in ((251, (2, 41)), (1000, (1005, 1006))):
        others = np.argwhere(np.isin(label_map, among))
        for where in np.argwhere(label_map == wanting):
            squares = ((others - where) ** 2).sum(1)
            assert done[tuple(where)] in {label_map[tuple(other)] for other in others[squares == squares.min()]}
    assert np.array_equal(done[~np.isin(label_map, (251, 1000))], label_map[~np.isin(label_map, (251, 1000))])


def test_far_neighbours_and_the_box_around_labels():
    label_map = np.zeros((40, 6, 6), np.uint16)
    label_map[2, 3, 3], label_map[20, 2, 2], label_map[39, 5, 5], label_map[38, 0, 0] = 41, 251, 2, 1002  # 18 voxels to the right, 19.5 to the left
    table = load("fastsurfer95")
    assert table.ids[table.classes_of(label_map)[20, 2, 2]] == 41
    assert np.array_equal(shards.classes_of(label_map, table), table.classes_of(label_map))
    assert not shards.classes_of(np.zeros((4, 4, 4), np.uint16), table).any()
    label_map = np.zeros((40, 20, 6), np.uint16)
    label_map[20, 10, 2], label_map[28, 18, 2], label_map[10, 10, 2] = 251, 41, 2  # √128 voxels to the right, 10 to the left
    assert dkt_ids(label_map)[20, 10, 2] == 2


# Sides of fused parcels


def toy(side: int = 40) -> np.ndarray:
    """Ids: right white matter twice as large as the left and shifted forward, parcels beside either; axis 0 grows to the left."""
    label_map = np.zeros((side, 20, 24), np.uint16)
    label_map[3:15, 4:16, 8:22], label_map[25:31, 6:14, 2:12] = 41, 2
    label_map[15:17, 5:9, 10:14], label_map[23:25, 6:9, 4:8] = 2007, 1007
    label_map[5:9, 16:18, 10:14], label_map[26:30, 14:16, 4:8] = 2035, 1035
    label_map[1:3, 5:9, 10:14], label_map[31:33, 8:10, 4:8] = 2025, 1025
    label_map[15:17, 12:14, 10:14], label_map[31:33, 11:13, 4:8] = 2012, 1005
    return label_map


def relateralised(label_map: np.ndarray) -> np.ndarray:
    return np.array([*load("fastsurfer95").ids, *[-1] * 159, IGNORED])[relateralise(load("fastsurfer79").classes_of(label_map))]


def test_two_blobs():
    assert relateralised(ids(41, 0, 2031, 0, 0, 0, 0, 1031, 2)).ravel().tolist() == [41, 0, 2031, 0, 0, 0, 0, 1031, 2]


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1)])
def test_sides_of_an_asymmetric_head_in_any_orientation(axes):
    label_map = toy().transpose(axes)
    for turned in (label_map, label_map[::-1], label_map[:, ::-1, ::-1]):
        assert np.array_equal(relateralised(turned), turned)


def test_a_confused_piece_of_a_sided_parcel_goes_to_its_hemisphere():
    label_map = toy()
    confused = np.where(label_map == 2025, 1025, label_map).astype(np.uint16)
    assert np.array_equal(relateralised(confused), label_map)


def test_twins_that_touch_are_split_between_them():
    label_map = np.zeros((24, 9, 9), np.uint16)
    label_map[2:8], label_map[8:11], label_map[11:14], label_map[14:20] = 41, 2026, 1026, 2
    assert np.array_equal(relateralised(label_map), label_map)
    moved = label_map.copy()
    moved[8:14] = 2007
    assert np.array_equal(relateralised(moved) == 2007, label_map == 2026) and np.array_equal(relateralised(moved) == 1007, label_map == 1026)


def test_one_hemisphere_none_and_nothing():
    label_map = toy()
    right = np.where(np.isin(label_map, (2, 1007, 1035, 1025, 1005)), 0, label_map).astype(np.uint16)
    assert np.array_equal(relateralised(right), right)
    assert relateralised(ids(0, 2007, 0)).ravel().tolist() == [0, 1007, 0]
    assert not relateralise(np.zeros((4, 5, 6), np.uint8)).any()
    assert relateralised(ids(2, 1001, 0, 1007)).ravel().tolist() == [2, IGNORED, 0, 1007]


@pytest.mark.parametrize("subject", ["sub-02", "sub-06"])
def test_sides_of_real_labels(test_data, subject):
    label_map = load_labels(test_data / f"bids/georgetown/derivatives/freesurfer/{subject}/mri/aparc+aseg.mgz").data
    truth = shards.classes_of(label_map, load("fastsurfer95"))
    found = relateralise(shards.classes_of(label_map, load("fastsurfer79")))
    cortex = np.append(load("fastsurfer95").cortex, np.zeros(160, bool))[truth]
    assert cortex.sum() > 400_000 and (found[cortex] == truth[cortex]).mean() > 0.9995
    assert np.array_equal(found[~cortex], truth[~cortex])
    assert 0.01 < (truth == IGNORED).sum() / cortex.sum() < 0.05  # parcels that DKT does not have
