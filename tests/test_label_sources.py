"""Label maps as tools write them: found by their names, made of their tissues, understood by the protocols, and refused where they do not fit."""

import csv
from pathlib import Path

import numpy as np
import pytest

from data_registry import label_sources, protocol
from data_registry.conform import conform, labels_to_grid
from data_registry.label_fit import check_fit, explained
from data_registry.label_sources import FREESURFER_FILES, LABEL_GLOBS, find_labels
from data_registry.tissue_maps import load_label_map
from data_registry.volume import Volume, VolumeError, load_image, load_labels, save_volume

FREESURFER = "derivatives/freesurfer/sub-01/mri"
CASES = {  # files → source: file
    ("aparc+aseg.mgz", "aseg.mgz", "wmparc.mgz", "aparc.DKTatlas+aseg.mgz", "orig.mgz"): {
        "aparc_aseg": "aparc+aseg.mgz", "aparc_dkt_aseg": "aparc.DKTatlas+aseg.mgz",
    },
    ("aparc.a2009s+aseg.mgz", "aseg.mgz"): {"aparc_a2009s_aseg": "aparc.a2009s+aseg.mgz"},
    ("wmparc.mgz", "aseg.mgz"): {"wmparc": "wmparc.mgz"},
    ("aseg.mgz", "aseg.presurf.mgz", "synthseg.rca.mgz"): {"aseg": "aseg.mgz", "synthseg": "synthseg.rca.mgz"},
    ("aparc.DKTatlas+aseg.deep.mgz", "aparc.DKTatlas+aseg.deep.withCC.mgz", "mask.mgz"): {"aparc_dkt_aseg": "aparc.DKTatlas+aseg.deep.withCC.mgz"},
    ("aparc.DKTatlas40+aseg.mgz", "aparc.a2009s+aseg.mgz", "aseg.mgz"): {"aparc_dkt_aseg": "aparc.DKTatlas40+aseg.mgz"},
}  # fmt: skip
DERIVATIVES = {
    ("fmriprep", "sub-01_desc-aparcaseg_dseg", "sub-01_desc-aseg_dseg", "sub-01_dseg", "sub-01_space-MNI152NLin2009cAsym_dseg",
     "sub-01_label-GM_probseg", "sub-01_desc-brain_mask"): {"aparc_aseg": "sub-01_desc-aparcaseg_dseg", "fmriprep": "sub-01_dseg"},
    ("smriprep", "sub-01_space-MNI152Lin_desc-aseg_dseg", "sub-01_desc-aseg_dseg"): {"aseg": "sub-01_desc-aseg_dseg"},
    ("hand", "sub-01_desc-a_dseg", "sub-01_desc-b_dseg"): {"hand_a": "sub-01_desc-a_dseg", "hand_b": "sub-01_desc-b_dseg"},
    ("fsl", "sub-01_T1w_brain_seg", "sub-01_T1w_brain_pveseg", "sub-01_T1w_brain_pve_0", "sub-01_T1w_all_fast_firstseg",
     "sub-01_T1w_all_fast_origsegs"): {"fsl_fast": "sub-01_T1w_brain_pveseg", "fsl_first": "sub-01_T1w_all_fast_firstseg"},
    ("fsl_anat", "sub-01_subcort_seg", "sub-01_fast_seg"): {"fsl_first": "sub-01_subcort_seg", "fsl_fast": "sub-01_fast_seg"},
    ("malpem", "sub-01_T1w_MALPEM", "sub-01_T1w_MALPEM_tissues", "sub-01_T1w_Report"): {
        "malp_em": "sub-01_T1w_MALPEM", "malp_em_tissue": "sub-01_T1w_MALPEM_tissues",
    },
    ("spm12", "c1sub-01_T1w", "c2sub-01_T1w", "c3sub-01_T1w"): {"spm_tissue": "c1sub-01_T1w"},
    ("spm_bids", "sub-01_label-GM_probseg", "sub-01_label-WM_probseg"): {"spm_tissue": "sub-01_label-GM_probseg"},
    ("fsl_fast", "sub-01_dseg"): {"fsl_fast": "sub-01_dseg"},
    ("mri_synthseg", "sub-01_T1w_synthseg", "sub-01_T1w_posteriors"): {"synthseg": "sub-01_T1w_synthseg"},
    ("fsl", "sub-01_T1w.anat/T1_fast_pveseg", "sub-01_T1w.anat/T1_fast_seg", "sub-01_T1w.anat/first_results/T1_first_all_fast_firstseg",
     "sub-01_T1w.anat/T1_fast_pve_1"): {
        "fsl_fast": "sub-01_T1w.anat/T1_fast_pveseg", "fsl_first": "sub-01_T1w.anat/first_results/T1_first_all_fast_firstseg",
    },
}  # fmt: skip


def touch(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def found(root: Path, *scan: str, **more: str) -> dict[str, str]:
    return {source: str(path.relative_to(root)) for source, path in find_labels(root, *scan, **more).items()}


@pytest.mark.parametrize("files", CASES)
def test_freesurfers_subject_folders(tmp_path, files):
    touch(tmp_path, *(f"{FREESURFER}/{name}" for name in files))
    assert found(tmp_path, "01", "") == {source: f"{FREESURFER}/{name}" for source, name in CASES[files].items()}


@pytest.mark.parametrize("files", DERIVATIVES, ids=lambda files: files[0])
def test_derivatives(tmp_path, files):
    tool, *names = files
    for anat, session in ((f"derivatives/{tool}/sub-01/anat", ""), (f"derivatives/{tool}/sub-01/ses-2/anat", "2")):
        touch(tmp_path, *(f"{anat}/{name}.nii.gz" for name in names))
        assert found(tmp_path, "01", session, scan="sub-01") == {source: f"{anat}/{name}.nii.gz" for source, name in DERIVATIVES[files].items()}
    assert found(tmp_path, "02", "") == {} == found(tmp_path, "0", "")


def test_a_map_that_a_protocol_prefers_is_taken_beside_the_others(tmp_path, monkeypatch):
    names = ("aparc+aseg.mgz", "aparc.a2009s+aseg.mgz", "wmparc.mgz", "aseg.mgz")
    touch(tmp_path, *(f"{FREESURFER}/{name}" for name in names))
    assert set(found(tmp_path, "01", "")) == {"aparc_aseg"}
    monkeypatch.setattr(label_sources, "_first_choices", lambda: {"aparc_a2009s_aseg"})  # as a table of Destrieux's parcels would
    assert set(found(tmp_path, "01", "")) == {"aparc_aseg", "aparc_a2009s_aseg"}


def test_fastsurfers_whole_run_is_one_map(tmp_path):
    mri = tmp_path / "derivatives/fastsurfer/sub-01/mri"
    touch(mri, "aparc.DKTatlas+aseg.mapped.mgz", "aseg.mgz", "wmparc.DKTatlas.mapped.mgz", "aparc.DKTatlas+aseg.deep.mgz")
    for link, file in (("aparc+aseg", "aparc.DKTatlas+aseg.mapped"), ("aparc.DKTatlas+aseg", "aparc.DKTatlas+aseg.mapped"),
                       ("wmparc", "wmparc.DKTatlas.mapped")):  # fmt: skip
        (mri / f"{link}.mgz").symlink_to(f"{file}.mgz")
    assert find_labels(tmp_path, "01", "") == {"aparc_dkt_aseg": mri / "aparc.DKTatlas+aseg.mgz"}


def test_fastsurfers_map_comes_beside_freesurfers(tmp_path):
    free, fast = f"{FREESURFER}/aparc+aseg.mgz", "derivatives/fastsurfer/sub-01/mri/aparc.DKTatlas+aseg.deep.mgz"
    touch(tmp_path, free, fast, fast.replace("aparc.DKTatlas+aseg.deep", "aparc+aseg"))
    assert found(tmp_path, "01", "") == {"aparc_aseg": free, "aparc_dkt_aseg": fast}


def test_fsl_anats_folders_are_the_scans_by_their_names(tmp_path):
    file = "derivatives/fsl_anat/{}.anat/T1_fast_seg.nii.gz".format
    touch(tmp_path, file("sub-01_ses-1_run-2"), file("sub-01_ses-1"), file("sub-011"), "derivatives/other/sub-01.anat/T1_fast_seg.nii.gz")
    assert found(tmp_path, "01", "1", scan="sub-01_ses-1_run-2") == {"fsl_fast": file("sub-01_ses-1_run-2")}
    assert found(tmp_path, "01", "1", scan="sub-01_ses-1_run-1") == {"fsl_fast": file("sub-01_ses-1")}
    assert found(tmp_path, "01", "", scan="sub-01") == {}
    assert any(path.match("sub-011.anat/*") for pattern in LABEL_GLOBS for path in tmp_path.glob(pattern))


def test_the_patterns_fit_what_is_found_and_the_protocols_sources(tmp_path):
    touch(tmp_path, *(f"derivatives/fastsurfer/sub-01/mri/{name}" for names in FREESURFER_FILES.values() for name in names))
    for tool, *names in DERIVATIVES:
        touch(tmp_path, *(f"derivatives/{tool}/sub-01/anat/{name}.nii.gz" for name in names))
    matched = {str(path.relative_to(tmp_path)) for pattern in LABEL_GLOBS for path in tmp_path.glob(pattern)}
    assert set(found(tmp_path, "01", "").values()) < matched and not [path for path in matched if "mask" in path or "pve_0" in path]
    assert {f"derivatives/spm12/sub-01/anat/c{n}sub-01_T1w.nii.gz" for n in (1, 2, 3)} <= matched
    named = set(FREESURFER_FILES) | {rule.source for rule in label_sources.DERIVATIVE_RULES}
    assert {source for name in protocol.names() for source in protocol.load(name).sources} <= named


def test_a_run_has_its_own_and_sessions_fall_back(tmp_path):
    mri = "derivatives/freesurfer/{}/mri/aseg.mgz".format
    touch(tmp_path, mri("sub-01_ses-1_run-2"), mri("sub-01_ses-1"), mri("sub-01"), *(
        f"derivatives/hand/sub-01/ses-1/anat/sub-01_ses-1_{name}_dseg.nii.gz" for name in ("run-1", "run-2", "acq-mpr_run-3")))  # fmt: skip
    hand = "derivatives/hand/sub-01/ses-1/anat/sub-01_ses-1_{}_dseg.nii.gz".format
    assert found(tmp_path, "01", "1", scan="sub-01_ses-1_run-2") == {"aseg": mri("sub-01_ses-1_run-2"), "hand": hand("run-2")}
    assert found(tmp_path, "01", "1", scan="sub-01_ses-1_run-1") == {"aseg": mri("sub-01_ses-1"), "hand": hand("run-1")}
    assert found(tmp_path, "01", "1", scan="sub-01_ses-1_acq-mpr_run-3")["hand"] == hand("acq-mpr_run-3")
    assert found(tmp_path, "01", "3", scan="sub-01_ses-3") == {"aseg": mri("sub-01")}


def test_protocols_know_all_ids_of_their_sources(test_data):
    with open(test_data / "labels/freesurfer_lut.tsv", encoding="utf-8") as file:
        names = {int(row["id"]): row["name"] for row in csv.DictReader(file, delimiter="\t")}
    destrieux = [i for i in names if 11100 <= i <= 11175 or 12100 <= i <= 12175]
    white = [i for i in names if 3000 <= i <= 3035 or 4000 <= i <= 4035 or i in (5001, 5002)]
    assert (len(destrieux), len(white)) == (152, 74)
    for name in protocol.names():
        table = protocol.load(name)
        for source, ids in (("aparc_a2009s_aseg", destrieux), ("wmparc", white)):
            if source not in table.sources:
                continue
            for i, index in zip(ids, table.classes_of(np.array(ids, dtype=np.uint16), where=name), strict=True):
                unknown = names[i] in ("ctx_lh_Unknown", "ctx_rh_Unknown", "ctx_lh_Medial_wall", "ctx_rh_Medial_wall")
                wanted = "background" if unknown else "cortex" if i > 10000 else "white_matter"
                side = "left" if i // 1000 in (3, 11) or i == 5001 else "right"
                assert table.groups[index] == wanted or (unknown and table.groups[index] == "cortex"), (name, i, names[i])
                assert table.sides[index] in (side, "none"), (name, i, names[i])


def test_spms_tissues_become_one_map(tmp_path):
    affine = np.diag([-2.0, 2, 2, 1])
    grey, white, csf = np.zeros((3, 4, 5, 6), np.float32)
    grey[0], white[0], csf[0] = 0.5, 0.3, 0.1
    white[1], csf[2] = 0.6, 0.9
    grey[3, 0] = 0.4                                                            # background has .6
    for part, data in (("c1", grey), ("c2", white), ("c3", csf)):
        save_volume(tmp_path / f"{part}sub-01_T1w.nii", data, affine)
    labels = load_label_map(tmp_path / "c1sub-01_T1w.nii")
    assert labels.data.dtype == np.uint16 and np.array_equal(labels.affine, affine)
    assert [set(labels.data[i].ravel().tolist()) for i in range(4)] == [{2}, {3}, {1}, {0}]
    assert protocol.load("spm_tissue").class_names[1:] == ("CSF", "grey matter", "white matter")
    for name, data in (("GM", grey), ("WM", white), ("CSF", csf)):
        save_volume(tmp_path / f"sub-01_label-{name}_probseg.nii.gz", data, affine)
    assert np.array_equal(load_label_map(tmp_path / "sub-01_label-GM_probseg.nii.gz").data, labels.data)

    save_volume(tmp_path / "c3sub-01_T1w.nii", 255 * csf, affine)
    with pytest.raises(VolumeError, match=r"c3sub-01_T1w\.nii: values from 0 to 229\.5; probabilities from 0 to 1 are wanted"):
        load_label_map(tmp_path / "c1sub-01_T1w.nii")
    save_volume(tmp_path / "c3sub-01_T1w.nii", csf[:3], affine)
    with pytest.raises(VolumeError, match=r"c3sub-01_T1w\.nii: another grid than c3sub|c1sub-01_T1w\.nii: another grid than c3sub"):
        load_label_map(tmp_path / "c1sub-01_T1w.nii")
    (tmp_path / "c2sub-01_T1w.nii").unlink()
    with pytest.raises(VolumeError, match=r"c2sub-01_T1w\.nii: No such file"):
        load_label_map(tmp_path / "c1sub-01_T1w.nii")


@pytest.fixture(scope="module")
def head() -> tuple[Volume, Volume]:
    """An egg of a head, RAS+ at 4 mm, off the centre; inside it white matter, grey matter, and a ventricle on the left alone."""
    shape, affine = (48, 56, 44), np.diag([4.0, 4, 4, 1])
    affine[:3, 3] = -100, -115, -70
    i, j, k = np.indices(shape)
    radius = np.sqrt(((i - 22) / 16) ** 2 + ((j - 27) / 22) ** 2 + ((k - 24) / 15) ** 2) + 0.004 * (j - 27)
    labels = np.select([radius < 0.5, radius < 0.75], [2, 3], 0).astype(np.uint16)
    labels[(np.abs(i - 17) < 3) & (np.abs(j - 25) < 7) & (np.abs(k - 26) < 4)] = 4
    t1w = np.select([labels == 2, labels == 3, labels == 4, radius < 1], [200, 130, 40, 90], 0) + np.random.default_rng(0).normal(0, 4, shape)
    return Volume(t1w.astype(np.float32), affine, Path("t1w.nii.gz")), Volume(labels, affine, Path("labels.nii.gz"))


def refused(head: tuple[Volume, Volume], data: np.ndarray, affine: np.ndarray) -> str:
    """Why a label map is refused; empty if it is not."""
    conformed = conform(head[0], grid="4mm")
    labels = Volume(data, affine, Path("labels.nii.gz"))
    try:
        labels_to_grid(labels, conformed.placement)
        check_fit(labels, conformed.data, conformed.placement)
    except VolumeError as error:
        assert str(error).startswith("labels.nii.gz: ") and " wanted" in str(error) and "\n" not in str(error)
        return str(error)
    return ""


def moved(affine: np.ndarray, *mm: float) -> np.ndarray:
    affine = affine.copy()
    affine[:3, 3] += mm
    return affine


def test_labels_that_do_not_fit_the_head_are_refused(head):
    data, affine = head[1].data, head[1].affine
    assert refused(head, data, affine) == ""
    assert "with its left-right axis reversed" in refused(head, data[::-1], affine)
    assert "with its back-front axis reversed" in refused(head, data[:, ::-1], affine)
    assert "with its inferior-superior axis reversed" in refused(head, data[:, :, ::-1], affine)
    assert refused(head, data, np.diag([-1.0, 1, 1, 1]) @ affine) and refused(head, data, np.diag([-1.0, -1, 1, 1]) @ affine)
    assert "% of the labelled voxels lie where the T1w shows a head; at least 70% are wanted" in refused(head, data, moved(affine, 52, 0, 0))
    assert "0% of the labelled voxels lie inside the scan's field of view" in refused(head, data, moved(affine, 0, 0, 400))
    assert "no voxel is labelled" in refused(head, np.zeros_like(data), affine)


def test_another_grid_or_handedness_of_the_same_space_is_fine(head):
    data, affine = head[1].data, head[1].affine
    flip = np.eye(4)
    flip[0, 0], flip[0, 3] = -1, data.shape[0] - 1
    assert np.linalg.det(affine) > 0 > np.linalg.det(affine @ flip)
    assert refused(head, data[::-1], affine @ flip) == ""                       # stored from right to left: the same world
    turned = affine[:, [2, 0, 1, 3]]
    assert refused(head, data.transpose(2, 0, 1), turned) == "" and "left-right" in refused(head, data.transpose(2, 0, 1)[:, ::-1], turned)
    fine = affine @ np.diag([0.5, 0.5, 0.5, 1])
    fine[:3, 3] = affine[:3, 3] - 1
    assert refused(head, data.repeat(2, 0).repeat(2, 1).repeat(2, 2), fine) == ""
    for structure in (4, 3):                                                    # alone they may explain more on the other side
        assert refused(head, np.where(data == structure, data, 0).astype(np.uint16), affine) == ""


def test_real_maps_lie_as_they_should_and_their_mirrors_do_not(test_data):
    for name in ("brainload/sub-1", "ixi2mm/sub-IXI014"):
        database, subject = name.split("/")
        root = test_data / "bids" / database
        t1w = conform(load_image(root / f"{subject}/anat/{subject}_T1w.nii.gz"), grid="4mm")
        labels = load_labels(next(iter(find_labels(root, subject.removeprefix("sub-"), "").values())))
        check_fit(labels, t1w.data, t1w.placement)
        axis = int(np.abs(labels.affine[0, :3]).argmax())
        with pytest.raises(VolumeError, match="better with its left-right axis reversed"):
            check_fit(Volume(np.flip(labels.data, axis), labels.affine, labels.path), t1w.data, t1w.placement)


def test_no_contrast_explains_nothing():
    assert explained(np.full((2, 2, 2), 7, np.uint8), np.arange(8).reshape(2, 2, 2)) == 0
