"""T1w and their sidecars in trees as people make them."""

import pytest

from pipelines.bids_files import T1w, find_t1w, read_object


def tree(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text("{}")
    return root


def test_t1w_by_path_at_any_depth_and_nothing_else(tmp_path):
    root = tree(
        tmp_path / "my [own] sét",  # no pattern, whatever it holds
        "sub-02/anat/sub-02_T1w.nii", "sub-01/ses-1/anat/sub-01_ses-1_acq-a_T1w.nii.gz", "sub-01/ses-1/anat/sub-01_ses-1_T2w.nii.gz",
        "sub-01/ses-1/anat/.sub-01_T1w.nii.gz", "sub-01/ses-1/anat/sub-01_ses-1_desc-T1w_mask.nii.gz", "derivatives/x/sub-03/anat/sub-03_T1w.nii.gz",
    )  # fmt: skip
    found, without = find_t1w(root)
    assert found == [
        T1w("sub-01/ses-1/anat/sub-01_ses-1_acq-a_T1w.nii.gz", "01", "1", ()), T1w("sub-02/anat/sub-02_T1w.nii", "02", "", ()),
    ]  # fmt: skip
    assert without == {}


def test_folders_that_give_none_are_named(tmp_path):
    root = tree(tmp_path, "sub-01/anat/sub-01_T1w.nii.gz", "sub-02/func/sub-02_bold.nii.gz", "sub-01 copy/anat/sub-01_T1w.nii.gz", "sub-notes.txt")
    found, without = find_t1w(root)
    assert [t1w.subject for t1w in found] == ["01"]
    assert without == {"sub-01 copy": "a name that is no subject's", "sub-02": "a folder without a T1w"}


def test_sidecars_from_the_root_down_the_general_before_the_particular(tmp_path):
    anat = "sub-01/ses-1/anat/sub-01_ses-1"
    root = tree(
        tmp_path, f"{anat}_run-1_T1w.nii.gz", f"{anat}_run-2_T1w.nii.gz", f"{anat}_run-1_T1w.json", f"{anat}_T1w.json", "acq-x_T1w.json", "T1w.json",
        "sub-01/sub-01_T1w.json", "sub-01/ses-1/sub-01_ses-2_T1w.json", "bold.json",
    )  # fmt: skip
    first, second = find_t1w(root)[0]
    assert first.sidecars == ("T1w.json", "sub-01/sub-01_T1w.json", f"{anat}_T1w.json", f"{anat}_run-1_T1w.json")
    assert second.sidecars == first.sidecars[:-1]


@pytest.mark.parametrize(
    ("content", "line"), [(b"[1]", "a list, where fields"), (b"[" * 100_000, "nested too deeply"), (b"{", "Expecting"), (b"\xff\xfe", "utf-8")]
)
def test_files_without_fields(tmp_path, content, line):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=line):
        read_object(tmp_path / "a.json")


def test_a_byte_order_mark_is_no_fault(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_object(tmp_path / "a.json") == {"a": 1}
