"""Weights: the authors' Keras file becomes ours without loss, our file comes back as written, a bad file is one line."""

import hashlib
import pickle
import shutil

import h5py
import numpy as np
import pytest
import torch

from data_registry.errors import InputError
from data_registry.intensity import ROBUST, Preparation
from lod_model import weights
from lod_model.networks.lod_brain import LODBrain, LODBrainConfig
from lod_model.weights import WeightsError, import_keras, load, save, weights_hash

SMALL = LODBrainConfig(classes=3, widths=(2, 4, 4), levels=2, groups=2)
KERAS = {LODBrainConfig(levels=1, coarse_pool=4): "weights_lv0.h5", LODBrainConfig(): "weights_lv1.h5"}


@pytest.fixture
def small() -> LODBrain:
    torch.manual_seed(0)
    return LODBrain(SMALL).eval()


@pytest.fixture
def saved(small, tmp_path):
    return save(tmp_path / "w.pt", small, name="lod_brain", protocol="lod7", grid="1mm", provenance={"run": "a-b-0", "sites": ["x", "y"]})


def keras_file(path, net: LODBrain) -> None:
    """The network in the layout of the published files: layers numbered as made, listed in another order."""
    numbers = {"conv3d": 0, "plain": 0, "up_plain": 0}
    made = {}

    def add(kind, tensors):
        number = numbers.get(kind, 0)
        numbers[kind] = number + 1
        made[f"{kind}_{number}" if number else kind] = tensors

    def conv(module):
        return [("c/kernel:0", module.weight.permute(2, 3, 4, 1, 0)), ("c/bias:0", module.bias)]

    def block(module):
        norm = [("n/gamma:0", module.norm.weight), ("n/beta:0", module.norm.bias)]
        return [*conv(module.conv), *norm, *((f"r/{name}", tensor) for name, tensor in conv(module.resample))]

    for level in net.levels:
        add("conv3d", conv(level.stem))
        for module in (*level.encoder, level.bridge):
            add("plain", block(module))
        for module in level.decoder:
            add("up_plain", block(module))
        add("conv3d", conv(level.out))
    made["main_output"] = conv(net.head)
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [layer.encode() for layer in reversed(made)]
        for layer, tensors in made.items():
            group = file.create_group(layer)
            group.attrs["weight_names"] = [name.encode() for name, _ in tensors]
            for name, tensor in tensors:
                group[name] = tensor.detach().numpy()


def one_line(path, *words: str) -> None:
    with pytest.raises(WeightsError) as raised:
        load(path)
    line = str(raised.value)
    assert "\n" not in line
    assert str(path) in line
    for word in words:
        assert word in line, line
    assert isinstance(raised.value, InputError | ValueError)


# Ours


def test_round_trip(small, saved):
    found = load(saved)
    assert (found.name, found.protocol, found.grid, found.path) == ("lod_brain", "lod7", "1mm", saved)
    assert found.provenance == {"run": "a-b-0", "sites": ["x", "y"]}
    assert found.network.config == SMALL
    assert not found.network.training
    assert found.hash == weights_hash(small.state_dict())
    x = torch.randn(1, 1, 8, 8, 8)
    assert torch.equal(found.network(x), small(x))
    assert [p.name for p in saved.parent.iterdir()] == ["w.pt"]


def test_the_preparation_comes_back_and_a_file_without_one_means_robust(small, saved):
    assert load(saved).preparation == ROBUST
    content = torch.load(saved, weights_only=True)
    del content["preparation"]
    torch.save(content, saved)
    assert load(saved).preparation == ROBUST
    chosen = Preparation("n4_whitestripe", "cubic", tuple(np.linspace(9.5, 200.25, 11).tolist()))
    about = {"name": "lod_brain", "protocol": "lod7", "grid": "1mm", "provenance": {}}
    assert load(save(saved, small, **about, preparation=chosen)).preparation == chosen


@pytest.mark.parametrize(
    ("preparation", "words"),
    [
        ({"intensity": "n5"}, "intensity is 'n5'; one of robust, n4"),
        ({"scale": [1, 2]}, "scale is [1, 2]; 11 landmarks"),
        ({"bias": 1}, "unexpected keyword argument 'bias'"),
        (None, "must be a mapping"),
    ],
)
def test_a_preparation_that_is_none_is_one_line(saved, preparation, words):
    torch.save(torch.load(saved, weights_only=True) | {"preparation": preparation}, saved)
    one_line(saved, "preparation: ", words)


def test_the_name_of_a_file_does_not_matter(saved):
    other = saved.rename(saved.with_name("w.h5"))
    assert load(other).name == "lod_brain"


def test_a_failed_save_leaves_what_was_there(small, saved, monkeypatch):
    before = saved.read_bytes()

    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr(weights.torch, "save", fails)
    with pytest.raises(OSError, match="disk full"):
        save(saved, small, name="lod_brain", protocol="lod7", grid="1mm", provenance={})
    assert saved.read_bytes() == before
    assert len(list(saved.parent.iterdir())) == 1


@pytest.mark.parametrize("provenance", [{"dice": np.float64(0.9)}, {"at": {"path": object()}}, {"scans": [{1, 2}]}])
def test_provenance_that_could_not_be_read_back_is_refused(small, tmp_path, provenance):
    with pytest.raises(WeightsError, match="wanted plain values"):
        save(tmp_path / "w.pt", small, name="lod_brain", protocol="lod7", grid="1mm", provenance=provenance)
    assert not list(tmp_path.iterdir())


def test_the_hash_is_of_names_types_shapes_and_values():
    a = {"w": torch.arange(6.0).view(2, 3), "b": torch.zeros(2)}
    assert weights_hash(a) == weights_hash({"b": a["b"], "w": a["w"].T.contiguous().T})   # order and strides
    others = [
        {**a, "b": torch.tensor([0.0, 1e-30])}, {**a, "b": torch.zeros(2, dtype=torch.float64)}, {**a, "w": a["w"].view(3, 2)},
        {"w": a["w"], "c": a["b"]}, {"w": a["w"]}, {**a, "b": torch.zeros(2, dtype=torch.bfloat16)},
    ]  # fmt: skip
    assert len({weights_hash(state) for state in (a, *others)}) == 1 + len(others)
    digest = hashlib.sha256(b"b\0torch.float32\0(1,)\0" + np.float32(2).tobytes()).hexdigest()
    assert weights_hash({"b": torch.tensor([2.0])}) == digest


# Keras's


def test_keras_layout_of_any_depth(tmp_path):
    torch.manual_seed(1)
    net = LODBrain(LODBrainConfig(classes=3, widths=(2, 4, 4, 2), levels=3, groups=2)).eval()
    for p in net.parameters():
        p.data.uniform_(-1, 1)
    keras_file(tmp_path / "w.h5", net)
    found, meta = import_keras(tmp_path / "w.h5")
    assert found.config.widths == (2, 4, 4, 2)
    assert found.config.levels == 3
    assert weights_hash(found.state_dict()) == weights_hash(net.state_dict())
    assert meta["name"] == "lod_brain"


@pytest.mark.parametrize(("config", "name"), KERAS.items(), ids=KERAS.values())
def test_published_weights_use_every_tensor_once(test_data, config, name):
    path = test_data / "lod_brain_weights" / name
    found = load(path)
    assert found.network.config == config
    assert (found.name, found.protocol, found.grid) == ("lod_brain", "lod7", "1mm")
    assert found.provenance["licence"] == "MIT"
    assert found.provenance["source"] == "rockNroll87q/LOD-Brain"
    stored = []
    with h5py.File(path) as file:
        file.visititems(lambda _, item: stored.append(item[()]) if isinstance(item, h5py.Dataset) else None)
    ours = [p.detach() for p in found.network.parameters()]
    assert sum(a.size for a in stored) == sum(p.numel() for p in ours)

    def fingerprints(arrays):
        return sorted((a.size, float(np.sort(a.ravel()).astype(np.float64) @ np.arange(a.size))) for a in arrays)

    assert fingerprints(stored) == fingerprints([p.numpy() for p in ours])


def test_published_weights_become_ours_with_the_same_hash(test_data, tmp_path):
    found = load(test_data / "lod_brain_weights" / "weights_lv1.h5")
    ours = save(tmp_path / "w.pt", found.network, name=found.name, protocol=found.protocol, grid=found.grid, provenance=found.provenance)
    again = load(ours)
    assert (again.hash, again.provenance) == (found.hash, found.provenance)


# Bad files


class Hostile:
    def __reduce__(self):
        return (print, ("the file ran its code",))


def test_what_is_no_weights_file(tmp_path, capsys):
    one_line(tmp_path / "missing.pt", "no such file")
    one_line(tmp_path, "no such file")
    (tmp_path / "empty.pt").touch()
    one_line(tmp_path / "empty.pt", "0 bytes")
    (tmp_path / "text.pt").write_text("not weights")
    one_line(tmp_path / "text.pt", "neither a checkpoint nor Keras weights")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Hostile()))
    one_line(tmp_path / "pickle.pt", "neither")
    torch.save({"format": 1, "state": Hostile()}, tmp_path / "hostile.pt")
    one_line(tmp_path / "hostile.pt", "not a checkpoint of tensors and plain values")
    assert "ran its code" not in capsys.readouterr().out
    torch.save([1, 2], tmp_path / "list.pt")
    one_line(tmp_path / "list.pt", "has list")
    torch.save({"epoch": 3, "state_dict": {}}, tmp_path / "lightning.pt")
    one_line(tmp_path / "lightning.pt", "has epoch, state_dict", "wanted format, network")


def test_a_file_cut_short(saved, tmp_path, small):
    content = saved.read_bytes()
    for keep in (10, len(content) // 2, len(content) - 30):
        (tmp_path / "cut.pt").write_bytes(content[:keep])
        one_line(tmp_path / "cut.pt")
    keras_file(tmp_path / "w.h5", small)
    content = (tmp_path / "w.h5").read_bytes()
    for keep in (600, len(content) // 2):
        (tmp_path / "cut.h5").write_bytes(content[:keep])
        one_line(tmp_path / "cut.h5", "HDF5")


def test_a_checkpoint_that_contradicts_itself(saved, tmp_path):
    good = torch.load(saved, weights_only=True)
    stem = "levels.0.stem.weight"
    rest = {name: tensor for name, tensor in good["state"].items() if name != stem}
    config = good["network"]["config"]
    cases = [
        ({"format": 2}, "format 2, wanted 1"),
        ({"network": "lod_brain"}, "network is not"),
        ({"network": {"name": "unet3000", "config": {}}}, "'unet3000' is not known"),
        ({"network": {"name": "lod_brain", "config": {**config, "depth": 1}}}, "no depth"),
        ({"network": {"name": "lod_brain", "config": {**config, "classes": 4}}}, "head.weight is (3, 8, 1, 1, 1), wanted (4, 8, 1, 1, 1)"),
        ({"protocol": 7}, "protocol is a int, wanted a str"),
        ({"state": rest}, f"no tensor {stem}"),
        ({"state": {**good["state"], "extra": torch.zeros(1)}}, "unknown tensor extra"),
        ({"state": {**good["state"], stem: "text"}}, f"{stem} is str"),
        ({"state": {**rest, stem: good["state"][stem] * torch.nan}}, "not finite"),
    ]
    for change, words in cases:
        torch.save(good | change, tmp_path / "bad.pt")
        one_line(tmp_path / "bad.pt", words)


def test_keras_weights_that_do_not_fit(small, tmp_path):
    good, bad = tmp_path / "w.h5", tmp_path / "bad.h5"
    keras_file(good, small)

    def refused(change, *words):
        shutil.copy(good, bad)
        with h5py.File(bad, "r+") as file:
            change(file)
        one_line(bad, *words)

    def drop(name):
        return lambda file: file.__delitem__(name)

    def put(name, values):
        def change(file):
            if name in file:
                del file[name]
            file[name] = values
        return change

    def swapped(file):
        file["plain"].attrs["weight_names"] = file["plain"].attrs["weight_names"][[0, 1, 3, 2, 4, 5]]

    refused(drop("plain_1/n/gamma:0"), "no tensor plain_1/n/gamma:0")
    refused(drop("up_plain"), "no layer up_plain")
    misshapen = np.zeros((3, 3, 3, 5, 4), np.float32)
    refused(put("plain/c/kernel:0", misshapen), "levels.0.encoder.0.conv.weight is (4, 5, 3, 3, 3), wanted (4, 8, 3, 3, 3)")
    refused(put("conv3d/c/more:0", np.zeros(3)), "unknown tensor conv3d/c/more:0")
    refused(put("head_2/kernel:0", np.zeros(3)), "unknown tensor head_2/kernel:0")
    refused(put("up_plain/c/bias:0", np.full(4, np.nan)), "not finite")
    refused(swapped, "plain has kernel, bias, beta, gamma, kernel, bias; wanted kernel, bias, gamma, beta")
    refused(lambda file: file.attrs.__delitem__("layer_names"), "not Keras weights (no layer_names)")
    refused(lambda file: file.attrs.__setitem__("layer_names", [b"main_output", b"conv3d"]), "unknown tensor")


def test_hdf5_of_something_else(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["image"] = np.zeros((2, 2))
    one_line(tmp_path / "x.h5", "not Keras weights")
    with h5py.File(tmp_path / "y.h5", "w") as file:
        file.attrs["layer_names"] = [b"dense"]
        file.create_group("dense").attrs["weight_names"] = [b"kernel:0"]
        file["dense/kernel:0"] = np.zeros((2, 2))
    one_line(tmp_path / "y.h5", "not of LOD-Brain", "dense")
