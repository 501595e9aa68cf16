"""One scan in, its labels out on its own grid: names, sides, refusals and exit statuses, with networks of a few parameters."""

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data_registry.conform import place_grid, probabilities_to_native
from data_registry.errors import InputError
from data_registry.files import sha256
from data_registry.volume import Volume, load_image, load_labels, save_volume
from lod_model import weights as weight_files
from lod_model.cli import main
from lod_model.networks.lod_brain import LODBrain, LODBrainConfig
from lod_model.segment import classes_of, find_scans, output_names, segment

MARKER, BODY = 5, 3
SUFFIXES = ("dseg.nii.gz", "dseg.tsv", "dseg.json", "lut.txt", "volumes.tsv", "overlay.png")


class Threshold(torch.nn.Module):
    """Bright is the marker, middling the body: what it says can be checked by eye."""

    config = SimpleNamespace(multiple=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(1, 1, D, H, W) → (1, 7, D, H, W)."""
        level = (x - x.amin()) / (x.amax() - x.amin())
        logits = torch.zeros(1, 7, *x.shape[2:])
        logits[:, 0] = 20 * (level[:, 0] <= 0.2)
        logits[:, BODY] = 20 * ((level[:, 0] > 0.2) & (level[:, 0] <= 0.7))
        logits[:, MARKER] = 20 * (level[:, 0] > 0.7)
        return logits


def _stub(network: torch.nn.Module, grid: str) -> weight_files.Weights:
    return weight_files.Weights(network=network, name="stub", protocol="lod7", grid=grid, hash="0" * 64, provenance={}, path=None)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """Weights of a small network at random, the same each time."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    network = LODBrain(LODBrainConfig(widths=(2, 2, 4)))
    weight_files.save(path, network, name="lod_brain", protocol="lod7", grid="8mm", provenance={"made": "by a test"})
    return path


def _phantom(shape=(30, 25, 28), voxel_mm=(5.0, 6.0, 6.0)) -> Volume:
    """A block of a body with a bright marker on the patient's left, at the front, high up; voxel order RAS."""
    data = np.zeros(shape, dtype=np.float32)
    data[5:-5, 4:-4, 4:-4] = 100
    data[7:12, 15:19, 18:23] = 200  # a low first index is left
    affine = np.diag([*voxel_mm, 1.0])
    affine[:3, 3] = [-70, -60, -40]
    return Volume(data, affine)


def _reordered(scan: Volume, order: tuple[int, ...], flips: tuple[bool, ...]) -> Volume:
    """The same scan in the same place, its voxels stored in another order."""
    data = scan.data.transpose(order)[tuple(slice(None, None, -1 if flip else 1) for flip in flips)]
    step = np.zeros((4, 4))
    step[3, 3] = 1
    for axis, (source, flip) in enumerate(zip(order, flips, strict=True)):
        step[source, axis] = -1 if flip else 1
        step[source, 3] = scan.data.shape[source] - 1 if flip else 0
    return Volume(np.ascontiguousarray(data), scan.affine @ step)


def _centre_mm(mask: np.ndarray, affine: np.ndarray) -> np.ndarray:
    return affine[:3, :3] @ np.argwhere(mask).mean(axis=0) + affine[:3, 3]


def _saved(path: Path, scan: Volume) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_volume(path, scan.data, scan.affine)
    return path


# --- left is left -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("flips", list(itertools.product((False, True), repeat=3)))
def test_left_is_left_in_all_48_orientations(tmp_path, order, flips):
    phantom = _phantom()
    path = _saved(tmp_path / "scan.nii.gz", _reordered(phantom, order, flips))
    scan = load_image(path)
    classes, *_ = classes_of(scan, weights=_stub(Threshold(), "4mm"), postprocess="components")
    centre = _centre_mm(classes == MARKER, scan.affine)
    assert np.allclose(centre, _centre_mm(phantom.data == 200, phantom.affine), atol=1.0), scan.orientation
    assert centre[0] < _centre_mm(classes == BODY, scan.affine)[0], "the patient's left has the lower x in RAS"
    wanted = _reordered(Volume(np.where(phantom.data == 200, MARKER, np.where(phantom.data == 100, BODY, 0)), phantom.affine), order, flips)
    assert (classes == wanted.data).mean() > 0.97


@pytest.mark.parametrize("degrees", [-20, 8, 44])
def test_left_is_left_in_an_oblique_scan(degrees):
    phantom = _phantom()
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn = np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    scan = Volume(phantom.data, turn @ phantom.affine)
    classes, *_ = classes_of(scan, weights=_stub(Threshold(), "4mm"))
    assert np.allclose(_centre_mm(classes == MARKER, scan.affine), _centre_mm(phantom.data == 200, scan.affine), atol=1.0)


@pytest.mark.parametrize("voxel_mm", [(1.0, 1.0, 7.5), (0.7, 0.7, 0.7), (3.0, 2.0, 1.0)])
def test_anisotropic_and_finer_scans_come_back_on_their_own_grid(voxel_mm):
    shape = tuple(int(160 / edge) for edge in voxel_mm)
    affine = np.diag([*voxel_mm, 1.0])
    data = np.zeros(shape, dtype=np.float32)
    body = tuple(slice(int(0.2 * n), int(0.8 * n)) for n in shape)
    data[body] = 100
    data[tuple(slice(int(0.3 * n), int(0.5 * n)) for n in shape)] = 200
    classes, *_ = classes_of(Volume(data, affine), weights=_stub(Threshold(), "2mm"))
    assert classes.shape == shape
    assert np.allclose(_centre_mm(classes == MARKER, affine), _centre_mm(data == 200, affine), atol=1.0)
    both = 2 * ((classes == MARKER) & (data == 200)).sum() / ((classes == MARKER).sum() + (data == 200).sum())
    assert both > 0.9


def test_a_scan_larger_than_the_grid_keeps_its_shape_and_says_so(tmp_path):
    data = np.zeros((60, 60, 100), dtype=np.float32)  # 400 mm along the last axis
    data[10:50, 10:50, 10:90] = 100
    data[20:30, 20:30, 40:50] = 200
    path = _saved(tmp_path / "scan.nii.gz", Volume(data, np.diag([4.0, 4, 4, 1])))
    (outcome,) = segment([path], out=tmp_path / "out", weights=_stub(Threshold(), "4mm"))
    labels = load_labels(outcome.dseg).data
    assert labels.shape == data.shape and (labels[data == 200] == MARKER).mean() > 0.9
    assert not labels[:, :, :15].any()  # outside the grid of 256 mm
    assert outcome.verdict != "pass" and any("longer than the grid" in reason for reason in outcome.reasons)


def test_air_beyond_the_grid_is_noted_but_asks_for_no_review():
    data = np.zeros((66, 60, 60), dtype=np.float32)  # 264 mm along the first axis
    data[20:45, 20:45, 20:45] = 100
    data[22:30, 22:30, 22:30] = 200
    _, warnings, grave = classes_of(Volume(data, np.diag([4.0, 4, 4, 1]), warnings=("left and right?",)), weights=_stub(Threshold(), "2mm"))
    assert warnings == ("left and right?", "the scan is 8 mm longer than the grid and is cut at both ends")
    assert grave == ("left and right?",)


def test_the_way_back_leaves_the_probabilities_alone():
    """On the scan's own grid nothing is interpolated, and what is not copied could be overwritten."""
    scan = Volume(np.zeros((64, 64, 64), dtype=np.float32), np.array([[-4.0, 0, 0, 0], [0, 0, 4, 0], [0, -4, 0, 0], [0, 0, 0, 1]]))
    placement = place_grid(scan, "4mm")
    probabilities = np.random.default_rng(0).random((3, 64, 64, 64), dtype=np.float32)
    before = probabilities.copy()
    assert np.array_equal(probabilities_to_native(probabilities, placement), before.argmax(axis=0))
    assert np.array_equal(probabilities, before)


# --- names --------------------------------------------------------------------------------------------------------------


def test_a_bids_scan_gets_all_outputs_under_bids_names(tmp_path, tiny):
    path = _saved(tmp_path / "sub-01_ses-1_T1w.nii.gz", _phantom())
    (outcome,) = segment([path], out=tmp_path / "out", weights=tiny)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(f"sub-01_ses-1_desc-lodbrain_{s}" for s in SUFFIXES)
    labels = load_labels(outcome.dseg)
    assert labels.stored_dtype == "uint8" and labels.data.max() <= 6
    assert np.allclose(labels.affine, load_image(path).affine)
    sidecar = json.loads(outcome.dseg.with_name("sub-01_ses-1_desc-lodbrain_dseg.json").read_text())
    assert sidecar["input"] == str(path) and len(sidecar["input_sha256"]) == 64
    assert sidecar["weights_hash"] == weight_files.load(tiny).hash and sidecar["protocol"] == "lod7" and sidecar["grid"] == "8mm"
    assert sidecar["verdict"] == outcome.verdict and sidecar["reasons"] == list(outcome.reasons)
    ml = np.prod(_phantom().voxel_mm) / 1000
    assert sidecar["volumes_ml"]["white matter"] == pytest.approx((labels.data == 3).sum() * ml, abs=1e-3)
    table = outcome.dseg.with_name("sub-01_ses-1_desc-lodbrain_dseg.tsv").read_text().splitlines()
    assert table[0] == "index\tname\tcolor" and table[4] == "3\twhite matter\t#e6e6e6" and len(table) == 8


@pytest.mark.parametrize("backwards", [False, True])
def test_inputs_of_one_name_never_share_an_output(tmp_path, backwards):
    places = ["a/scan.nii.gz", "b/scan.nii.gz", "b/scan.mgz", "db1/sub-1/anat/sub-1_T1w.nii", "db2/sub-1/anat/sub-1_T1w.nii", "c/Scan.nii"]
    paths = [tmp_path / place for place in places]
    names = output_names(paths[::-1] if backwards else paths, tmp_path / "out")
    assert len({name.casefold() for name in names.values()}) == len(paths)
    assert names[paths[3]] == "db1_sub-1_desc-lodbrain"


def test_two_scans_of_one_name_give_two_results(tmp_path):
    other = _phantom()
    other.data[7:12, 15:19, 18:23] = 100
    paths = [_saved(tmp_path / "a" / "sub-1_T1w.nii.gz", _phantom()), _saved(tmp_path / "b" / "sub-1_T1w.nii.gz", other)]
    outcomes = segment(paths, out=tmp_path / "out", weights=_stub(Threshold(), "8mm"))
    assert len({outcome.dseg for outcome in outcomes}) == 2
    assert [outcome.dseg.name for outcome in outcomes] == ["a_sub-1_desc-lodbrain_dseg.nii.gz", "b_sub-1_desc-lodbrain_dseg.nii.gz"]


def test_an_earlier_result_of_another_scan_stays(tmp_path):
    weights, out = _stub(Threshold(), "8mm"), tmp_path / "out"
    (first,) = segment([_saved(tmp_path / "a" / "scan.nii.gz", _phantom())], out=out, weights=weights)
    before = first.dseg.read_bytes()
    (second,) = segment([_saved(tmp_path / "b" / "scan.nii.gz", _phantom())], out=out, weights=weights)
    assert second.dseg != first.dseg and first.dseg.read_bytes() == before
    (again,) = segment([tmp_path / "a" / "scan.nii.gz"], out=out, weights=weights)
    assert again.dseg == first.dseg


def test_an_input_is_never_overwritten(tmp_path):
    """Even one that bears the very name of an output."""
    plain = _saved(tmp_path / "x.nii.gz", _phantom())
    like_output = _saved(tmp_path / "x_desc-lodbrain_dseg.nii.gz", _phantom())
    before = [path.read_bytes() for path in (plain, like_output)]
    outcomes = segment([plain, like_output], out=tmp_path, weights=_stub(Threshold(), "8mm"))
    assert [path.read_bytes() for path in (plain, like_output)] == before
    assert len({o.dseg for o in outcomes} | {plain, like_output}) == 4


def test_folders_are_searched_for_t1w(tmp_path):
    wanted = [_saved(tmp_path / name, _phantom()) for name in ("sub-1/anat/sub-1_T1w.nii.gz", "sub-2/ses-1/anat/sub-2_ses-1_T1w.nii")]
    for name in ("sub-1/anat/sub-1_T2w.nii.gz", "derivatives/x/sub-1_T1w.nii.gz", ".git/sub-9_T1w.nii.gz"):
        _saved(tmp_path / name, _phantom())
    assert find_scans([tmp_path, wanted[0]]) == (wanted, {})
    scans, problems = find_scans([tmp_path / ".git" / "absent", tmp_path / "sub-1" / "anat"])
    assert scans == wanted[:1] and list(problems) == [tmp_path / ".git" / "absent"]


# --- refusals -----------------------------------------------------------------------------------------------------------


def test_one_bad_scan_does_not_stop_the_batch(tmp_path):
    flat = Volume(np.full((8, 8, 8), 7, dtype=np.float32), np.diag([20.0, 20, 20, 1]))
    paths = [_saved(tmp_path / "flat.nii.gz", flat), tmp_path / "absent.nii.gz", _saved(tmp_path / "good.nii.gz", _phantom())]
    heard = []
    outcomes = segment(paths, out=tmp_path / "out", weights=_stub(Threshold(), "8mm"), on_done=lambda outcome, total: heard.append(total))
    assert heard == [3, 3, 3]
    by_name = {outcome.path.name: outcome for outcome in outcomes}
    assert by_name["good.nii.gz"].dseg.is_file()
    assert by_name["flat.nii.gz"].dseg is None and "no contrast" in by_name["flat.nii.gz"].reasons[0]
    assert "no such file" in by_name["absent.nii.gz"].reasons[0]
    sidecar = json.loads((tmp_path / "out" / "flat_desc-lodbrain_dseg.json").read_text())
    assert sidecar["verdict"] == "fail" and sidecar["reasons"] == list(by_name["flat.nii.gz"].reasons)
    assert not list((tmp_path / "out").glob("flat*.nii.gz"))


def test_an_unforeseen_error_is_a_refusal_and_leaves_no_older_labels(tmp_path):
    class Broken(Threshold):
        def forward(self, x):
            raise RuntimeError("out of\nmemory")

    path = _saved(tmp_path / "scan.nii.gz", _phantom())
    segment([path], out=tmp_path / "out", weights=_stub(Threshold(), "8mm"))
    (outcome,) = segment([path], out=tmp_path / "out", weights=_stub(Broken(), "8mm"))
    assert outcome.reasons == (f"{path}: RuntimeError: out of memory",)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["scan_desc-lodbrain_dseg.json"]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"paths": ["absent.nii.gz"]}, "absent.nii.gz: no such file or folder"),
        ({"paths": []}, "no scan is given"),
        ({"postprocess": "crf"}, "one of none, components, release is wanted"),
        ({"engine": "turbo"}, "one of fast, fast-bf16, plain is wanted"),
    ],
)
def test_nothing_can_be_done(tmp_path, change, line):
    path = _saved(tmp_path / "scan.nii.gz", _phantom())
    arguments = {"paths": [path], "out": tmp_path / "out", "weights": _stub(Threshold(), "8mm")} | change
    with pytest.raises(InputError, match=line):
        segment(arguments.pop("paths"), **arguments)


def test_a_folder_without_t1w_and_a_file_as_out(tmp_path):
    path = _saved(tmp_path / "scan.nii.gz", _phantom())
    with pytest.raises(InputError, match="no \\*_T1w.nii or \\*_T1w.nii.gz in this folder"):
        segment([tmp_path], out=tmp_path / "out", weights=_stub(Threshold(), "8mm"))
    with pytest.raises(InputError, match="a folder to write to is wanted"):
        segment([path], out=path, weights=_stub(Threshold(), "8mm"))


# --- the command --------------------------------------------------------------------------------------------------------


def _lodbrain(*arguments: object) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "LODBRAIN_WEIGHTS"} | {"NO_COLOR": "1"}
    command = [sys.executable, "-c", "from lod_model.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def _is_one_error_line(stderr: str) -> bool:
    return stderr.startswith("error: ") and stderr.count("\n") == 1


def test_help_loads_nothing_heavy():
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom lod_model.cli import app\n"
        "for words in (['--help'], ['segment', '--help']):\n    assert CliRunner().invoke(app, words).exit_code == 0\n"
        "heavy = {'torch', 'numpy', 'scipy', 'nibabel', 'matplotlib', 'pyarrow', 'h5py', 'mlflow', 'ray'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_command_goes_on_after_a_bad_scan_and_exits_1(tmp_path, tiny):
    good, bad = _saved(tmp_path / "good.nii.gz", _phantom()), tmp_path / "bad.nii.gz"
    bad.write_bytes(b"")
    done = _lodbrain("segment", bad, good, "-o", tmp_path / "out", "--weights", tiny, "--threads", 1)
    assert done.returncode == 1
    label_map, verdict, seconds, _ = done.stdout.rstrip("\n").split("\t")
    assert Path(label_map).is_file() and verdict in ("review", "fail") and seconds.endswith(" s")
    error, summary = done.stderr.splitlines()
    assert error == f"error: {bad}: the file is empty (0 bytes); a .nii.gz volume is wanted"
    assert summary.startswith("2 scans: 0 pass, ") and summary.endswith(", 1 refused")


@pytest.mark.parametrize(
    ("scan", "weights", "status", "error"),
    [
        ("good.nii.gz", "tiny.pt", 0, ""),
        ("bad.nii.gz", "tiny.pt", 1, "bad.nii.gz: the file is empty"),
        ("good.nii.gz", "bad.nii.gz", 2, "bad.nii.gz: neither a checkpoint nor"),
        ("absent.nii.gz", "tiny.pt", 2, "absent.nii.gz: no such file or folder"),
        ("good.nii.gz", "absent.pt", 2, "absent.pt: no such file"),
    ],
)
def test_command_statuses(tmp_path, tiny, monkeypatch, capsys, scan, weights, status, error):
    _saved(tmp_path / "good.nii.gz", _phantom())
    (tmp_path / "bad.nii.gz").write_bytes(b"")
    weights_path = tiny if weights == tiny.name else tmp_path / weights
    monkeypatch.setattr(sys, "argv", ["lodbrain", "segment", str(tmp_path / scan), "-o", str(tmp_path / "out"), "--weights", str(weights_path)])
    with pytest.raises(SystemExit) as exit_:
        main()
    captured = capsys.readouterr()
    assert exit_.value.code == status
    assert bool(captured.out) == (status == 0)
    assert (_is_one_error_line(captured.err) and error in captured.err) if error else not captured.err


# --- read ahead, compute, write behind ------------------------------------------------------------------------------------


def test_a_batch_is_finished_in_order_while_the_next_scan_is_read(tmp_path):
    """Scan 2 is being read while the network has scan 1, and scan 0 has been announced before scan 2 is computed."""
    seen, heard = [], []

    class Watching(Threshold):
        def forward(self, x):
            deadline = time.monotonic() + 10
            while len(seen) == 1 and not heard and time.monotonic() < deadline:   # scan 0 is written behind scan 1's network
                time.sleep(0.01)
            seen.append(list(heard))
            return super().forward(x)

    paths = [_saved(tmp_path / f"{name}.nii.gz", _phantom()) for name in "abcd"]
    paths[2].write_bytes(b"")
    outcomes = segment(paths, out=tmp_path / "out", weights=_stub(Watching(), "8mm"), on_done=lambda outcome, total: heard.append(outcome.path))
    assert [outcome.path for outcome in outcomes] == heard == paths
    assert [outcome.dseg is None for outcome in outcomes] == [False, False, True, False]
    assert seen[:2] == [[], paths[:1]] and len(seen) == 3


def test_an_interrupt_leaves_only_whole_results(tmp_path):
    """Scan a is written to its end, b is not begun, and what an earlier run made of c stands."""

    class Interrupted(Threshold):
        calls = 0

        def forward(self, x):
            Interrupted.calls += 1
            if Interrupted.calls == 2:
                raise KeyboardInterrupt
            return super().forward(x)

    paths, out = [_saved(tmp_path / f"{name}.nii.gz", _phantom()) for name in "abc"], tmp_path / "out"
    (earlier,) = segment(paths[2:], out=out, weights=_stub(Threshold(), "8mm"))
    before = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(KeyboardInterrupt):
        segment(paths, out=out, weights=_stub(Interrupted(), "8mm"))
    assert {path.name for path in out.iterdir() if path not in before} == {f"a_desc-lodbrain_{suffix}" for suffix in SUFFIXES}
    assert all(path.read_bytes() == content for path, content in before.items()) and earlier.dseg in before
    hashes = json.loads((out / "a_desc-lodbrain_dseg.json").read_text())["outputs_sha256"]
    assert all(sha256(out / name) == digest for name, digest in hashes.items()) and len(hashes) == 5


def test_a_callback_that_fails_ends_the_batch(tmp_path):
    def stop(outcome, total):
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        segment([_saved(tmp_path / "a.nii.gz", _phantom())], out=tmp_path / "out", weights=_stub(Threshold(), "8mm"), on_done=stop)


# --- engines ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("engine", "dtype"), [("fast", "float32"), ("fast-bf16", "bfloat16"), ("plain", "float32")])
def test_the_sidecar_names_the_engine(tmp_path, tiny, engine, dtype):
    (outcome,) = segment([_saved(tmp_path / "a.nii.gz", _phantom())], out=tmp_path / "out", weights=tiny, engine=engine)
    sidecar = json.loads(outcome.dseg.with_name("a_desc-lodbrain_dseg.json").read_text())
    assert sidecar["engine"] == engine and 0 < sidecar["network_seconds"] <= sidecar["seconds"] + 0.01
    if not torch.cuda.is_available():
        assert (sidecar["engine_dtype"], sidecar["engine_device"]) == (dtype, "cpu")
