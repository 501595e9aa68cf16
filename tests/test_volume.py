"""Reading and writing volumes: the refusals, the warnings, and bytes that depend on nothing but the content."""

import gzip

import nibabel as nib
import numpy as np
import pytest

from data_registry.volume import VolumeError, axes_to_lia, load_image, load_labels, save_volume


def nifti(path, data, *, sform=None, qform=None, pixdim=None, kind=nib.Nifti1Image):
    image = kind(data, None)
    if sform is not None:
        image.set_sform(sform, 1)
    if qform is not None:
        image.set_qform(qform, 1)
    if pixdim is not None:
        image.header["pixdim"][1:4] = pixdim
    path.write_bytes(image.to_bytes())
    return path


@pytest.fixture
def scan() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 1000, (6, 7, 8)).astype(np.int16)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mgz", ".mgh"])
def test_written_and_read_back(tmp_path, scan, suffix):
    affine = np.array([[0, 0, -1.5, 20], [2, 0, 0, -30], [0, -1, 0, 5], [0, 0, 0, 1]], dtype=float)
    save_volume(tmp_path / f"a{suffix}", scan, affine)
    volume = load_image(tmp_path / f"a{suffix}")
    assert np.array_equal(volume.data, scan)
    assert np.allclose(volume.affine, affine, atol=1e-5)
    assert volume.orientation == "AIL"
    save_volume(tmp_path / f"b{suffix}", scan, affine)
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_slope_intercept_and_byte_order(tmp_path):
    stored = np.array([[[0, 10], [20, 30]], [[40, 50], [60, 70]]], dtype=np.int16)
    image = nib.Nifti1Image(stored, np.eye(4))
    image.header.set_slope_inter(0.5, 100)
    image.to_filename(tmp_path / "slope.nii")
    raw = nib.load(tmp_path / "slope.nii")
    expected = np.asarray(raw.dataobj)
    assert np.array_equal(load_image(tmp_path / "slope.nii").data, expected)
    swapped = nib.Nifti1Image(stored.astype(">i2"), np.eye(4), header=nib.Nifti1Header(endianness=">"))
    (tmp_path / "big.nii").write_bytes(swapped.to_bytes())
    assert np.array_equal(load_image(tmp_path / "big.nii").data, stored)


def test_mirrored_forms_are_read_by_the_sform_with_a_warning(tmp_path, scan):
    sform = np.diag([1.0, 1, 1, 1])
    path = nifti(tmp_path / "a.nii", scan, sform=sform, qform=np.diag([-1.0, 1, 1, 1]))
    volume = load_image(path)
    assert volume.orientation == "RAS"
    assert "mirror" in volume.warnings[0]
    assert load_image(nifti(tmp_path / "b.nii", scan, sform=sform, qform=sform)).warnings == ()


def test_no_orientation_is_a_warning(tmp_path, scan):
    assert "left and right are not certain" in load_image(nifti(tmp_path / "a.nii", scan)).warnings[0]


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda p, d: p.write_bytes(b""), "empty"),
        (lambda p, d: p.write_bytes(b"<html>no</html>"), "not gzip"),
        (lambda p, d: p.write_bytes(gzip.compress(b"text" * 200)), "no Nifti1 or Nifti2 header"),
        (lambda p, d: p.write_bytes(gzip.compress(nib.Nifti1Image(d, np.eye(4)).to_bytes())[:-200]), "cut or damaged"),
        (lambda p, d: p.write_bytes(gzip.compress(nib.Nifti1Image(d, np.eye(4)).to_bytes()[:-200])), "cannot be read"),
        (lambda p, d: save_raw(p, np.stack([d, d], axis=-1)), "holds 2 volumes"),
        (lambda p, d: save_raw(p, d[:, :, :1]), "at least 2 voxels"),
        (lambda p, d: save_raw(p, d.astype(np.complex64)), "complex"),
        (lambda p, d: save_raw(p, d, np.diag([1000.0, 1000, 1000, 1])), "millimetres"),
        (lambda p, d: save_raw(p, d, np.array([[1, 0.5, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])), "sheared"),
        (lambda p, d: save_raw(p, np.where(d > 500, np.nan, d).astype(np.float32)), "NaN or infinite"),
    ],
)
def test_refused_in_one_line_that_names_the_file(tmp_path, scan, build, words):
    path = tmp_path / "scan.nii.gz"
    build(path, scan)
    with pytest.raises(VolumeError, match=words) as caught:
        load_image(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def save_raw(path, data, affine=None):
    nib.Nifti1Image(data, np.eye(4) if affine is None else affine).to_filename(path)


def test_missing_file_and_unknown_suffix(tmp_path):
    with pytest.raises(VolumeError, match="No such file"):
        load_image(tmp_path / "none.nii.gz")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(VolumeError, match="unknown kind"):
        load_image(tmp_path / "a.txt")


def test_singleton_fourth_axis_and_few_nans_are_kept(tmp_path, scan):
    save_raw(tmp_path / "a.nii.gz", scan[..., None])
    assert load_image(tmp_path / "a.nii.gz").data.shape == scan.shape
    data = scan.astype(np.float32)
    data[0, 0, 0] = np.inf
    save_raw(tmp_path / "b.nii.gz", data)
    volume = load_image(tmp_path / "b.nii.gz")
    assert volume.data[0, 0, 0] == 0
    assert volume.warnings == ("1 NaN or infinite voxels read as 0",)


def test_labels_must_be_whole_ids(tmp_path):
    for data, words in [(np.full((2, 2, 2), 1.5, np.float32), "fractional"), (np.full((2, 2, 2), -1, np.int16), "from -1"),
                        (np.full((2, 2, 2), 70000, np.int32), "70000"), (np.full((2, 2, 2), np.nan, np.float32), "nan")]:  # fmt: skip
        save_raw(tmp_path / "l.nii.gz", data)
        with pytest.raises(VolumeError, match=words):
            load_labels(tmp_path / "l.nii.gz")
    save_raw(tmp_path / "l.nii.gz", np.full((2, 2, 2), 2035, np.float32))
    assert load_labels(tmp_path / "l.nii.gz").data.dtype == np.uint16


def test_axes_to_lia_against_nibabel():
    generator = np.random.default_rng(1)
    for ornt in np.array(np.meshgrid(*[[0, 1, 2]] * 3)).reshape(3, -1).T:
        if len(set(ornt)) < 3:
            continue
        signs = generator.choice([-1, 1], 3)
        affine = np.eye(4)
        affine[:3, :3] = np.eye(3)[:, ornt] * signs
        source, flip = axes_to_lia(affine)
        data = generator.random((3, 4, 5))
        ours = data.transpose(source)[tuple(slice(None, None, -1) if f else slice(None) for f in flip)]
        to_lia = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt("LIA"))
        assert np.array_equal(ours, nib.orientations.apply_orientation(data, to_lia))
