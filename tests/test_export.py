"""Exported weights: safetensors come back bit for bit, ONNX computes what torch computes."""

import json
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch

from data_registry.errors import InputError
from data_registry.intensity import ROBUST, Preparation
from lod_model import export, networks
from lod_model.export import MeanOfMeansGroupNorm, grid_side, write_onnx, write_safetensors
from lod_model.networks.group_norm import GroupNorm
from lod_model.weights import WeightsError, load, save, weights_hash

PROVENANCE = {"licence": "Apache-2.0", "data": ["a", "b"], "dice": 0.85, "by": "Çiçek"}
SMALL = {
    "two levels": ("lod_brain", {"classes": 3, "widths": [2, 4, 4]}),
    "three levels": ("lod_brain", {"classes": 3, "widths": [2, 4, 4, 8], "levels": 3, "groups": 2}),
    "one level, pooled": ("lod_brain", {"classes": 3, "widths": [2, 4], "levels": 1, "coarse_pool": 4}),
    "unet": ("unet", {"classes": 3, "widths": [4, 8, 16], "groups": 2}),
}


def found_of(tmp_path, case: str = "two levels", **changes):
    """Weights at random, norms and biases too, as they are read from a checkpoint."""
    name, config = SMALL[case]
    torch.manual_seed(0)
    network = networks.build(name, config)
    for parameter in network.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    content = {"name": name, "protocol": "lod7", "grid": "1mm", "provenance": PROVENANCE} | changes
    return load(save(tmp_path / "w.pt", network, **content))


# safetensors


@pytest.mark.parametrize("case", SMALL)
def test_safetensors_come_back_bit_for_bit(tmp_path, case):
    before = found_of(tmp_path, case, preparation=Preparation("whitestripe", "cubic", tuple(range(10, 230, 20))))
    after = load(write_safetensors(tmp_path / "w.safetensors", before))
    assert replace(after, network=None, path=None) == replace(before, network=None, path=None)
    assert after.network.config == before.network.config and not after.network.training
    x = torch.randn(1, 1, 32, 32, 32)
    assert torch.equal(after.network(x), before.network(x))
    state = before.network.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in after.network.state_dict().items())


def test_safetensors_say_what_they_are_to_any_reader(tmp_path):
    found = found_of(tmp_path)
    content = write_safetensors(tmp_path / "w.safetensors", found).read_bytes()
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    meta = header.pop("__metadata__")
    assert set(header) == set(found.network.state_dict())
    assert (meta["network"], meta["protocol"], meta["grid"], meta["hash"]) == ("lod_brain", "lod7", "1mm", found.hash)
    assert json.loads(meta["config"]) == found.network.config.to_dict() and json.loads(meta["provenance"]) == PROVENANCE


def test_safetensors_without_a_preparation_mean_robust(tmp_path):
    from safetensors.torch import save_file

    found, path = found_of(tmp_path, preparation=Preparation("n4")), tmp_path / "w.safetensors"
    meta = {key: value for key, value in export.metadata(found).items() if key != "preparation"}
    save_file({name: tensor.contiguous() for name, tensor in found.network.state_dict().items()}, path, meta)
    assert load(path).preparation == ROBUST


def test_safetensors_that_are_not_ours_are_one_line(tmp_path):
    from safetensors.torch import save_file

    found, path = found_of(tmp_path), tmp_path / "w.safetensors"
    meta, state = export.metadata(found), found.network.state_dict()
    stem = "levels.0.stem.weight"
    changed = state | {stem: state[stem] + 1}

    def refused(words, state=state, meta=meta):
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, meta)
        with pytest.raises(WeightsError) as raised:
            load(path)
        line = str(raised.value)
        assert str(path) in line and words in line and "\n" not in line, line

    refused("safetensors of format None, wanted 'lodbrain 1'", meta=None)
    refused("safetensors of format 'pt'", meta={"format": "pt"})
    refused(f"wanted {weights_hash(changed)}, that of its tensors", changed)
    refused("no grid in its metadata", meta={key: value for key, value in meta.items() if key != "grid"})
    refused("metadata that is not JSON", meta=meta | {"config": "{"})
    refused("intensity is 'n5'", meta=meta | {"preparation": '{"intensity": "n5"}'})
    refused("'vnet' is not known", meta=meta | {"network": "vnet"})
    refused("network is not {name, config}", meta=meta | {"config": "[]"})
    refused("provenance is a list, wanted a dict", meta=meta | {"provenance": "[]"})
    less = {name: tensor for name, tensor in state.items() if name != stem}
    refused(f"no tensor {stem}", less, meta | {"hash": weights_hash(less)})
    content = write_safetensors(path, found).read_bytes()
    for keep in (5, 100, len(content) - 1):
        path.write_bytes(content[:keep])
        with pytest.raises(WeightsError, match="w.safetensors"):
            load(path)


def test_an_export_that_fails_leaves_nothing(tmp_path, monkeypatch):
    found = found_of(tmp_path)
    (tmp_path / "w.pt").unlink()
    monkeypatch.setattr("pathlib.Path.write_bytes", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_safetensors(tmp_path / "w.safetensors", found)
    assert not list(tmp_path.iterdir())


# ONNX


def session(path):
    runtime = pytest.importorskip("onnxruntime")
    return runtime.InferenceSession(path, providers=["CPUExecutionProvider"])


def inputs(side: int) -> list[torch.Tensor]:
    """Noise, a head-like ball on air, a far outlier, and no contrast at all."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(1, 1, side, side, side, generator=generator)
    axis = torch.linspace(-1, 1, side)
    ball = ((axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis[None, None] ** 2) < 0.5).float()[None, None] * (2 + noise.abs())
    outlier = noise.clone()
    outlier[0, 0, 3, 4, 5] = 50
    return [noise, (ball - ball.mean()) / ball.std(), outlier, torch.zeros_like(noise)]


@pytest.mark.parametrize("case", SMALL)
def test_onnx_computes_what_torch_computes(tmp_path, case):
    found = found_of(tmp_path, case)
    run = session(write_onnx(tmp_path / "w.onnx", found, side=32))
    for x in inputs(32):
        with torch.inference_mode():
            expected = found.network(x.clone()).numpy()
        (logits,) = run.run(None, {"image": x.numpy()})
        assert logits.shape == (1, 3, 32, 32, 32) and logits.dtype == np.float32
        np.testing.assert_allclose(logits, expected, atol=1e-4 * max(1, np.abs(expected).max()), rtol=0)


def test_onnx_of_the_published_weights(test_data, tmp_path):
    found = load(test_data / "lod_brain_weights" / "weights_lv1.h5")
    run = session(write_onnx(tmp_path / "w.onnx", found, side=32))
    for x in inputs(32)[:3]:
        with torch.inference_mode():
            expected = found.network(x.clone()).numpy()
        (logits,) = run.run(None, {"image": x.numpy()})
        np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)


def test_onnx_says_what_it_is_and_nothing_of_the_machine(tmp_path):
    onnx = pytest.importorskip("onnx")
    found = found_of(tmp_path, grid="8mm")
    path = write_onnx(tmp_path / "w.onnx", found)
    model = onnx.load(path)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", export.OPSET)]
    meta = {prop.key: prop.value for prop in model.metadata_props}
    assert (meta["network"], meta["protocol"], meta["grid"], meta["side"], meta["hash"]) == ("lod_brain", "lod7", "8mm", "32", found.hash)
    assert json.loads(meta["config"]) == found.network.config.to_dict() and json.loads(meta["provenance"]) == PROVENANCE
    sizes = {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in (*model.graph.input, *model.graph.output)}
    assert sizes == {"image": [1, 1, 32, 32, 32], "logits": [1, 3, 32, 32, 32]}
    assert b"lod_model" not in path.read_bytes()   # no stack traces
    assert not found.network.training and any(isinstance(m, GroupNorm) for m in found.network.modules())   # as it was
    with pytest.raises(WeightsError, match="neither"):
        load(path)


def test_sides_that_cannot_be(tmp_path):
    with pytest.raises(InputError, match="side 48: a positive multiple of 32 is wanted by lod_brain"):
        write_onnx(tmp_path / "w.onnx", found_of(tmp_path, "three levels"), side=48)
    with pytest.raises(InputError, match="grid 'native' has no side of its own; --side N is wanted"):
        grid_side("native")
    assert not (tmp_path / "w.onnx").exists()


def test_the_norm_of_the_graph_keeps_its_variance_at_256_cubed(tmp_path):
    """Mean 30, deviation 1, 17 million voxels: where a float32 sum of squares is lost."""
    pytest.importorskip("onnxruntime")
    norm = GroupNorm(1, 1)
    x = torch.randn(1, 1, 256, 256, 256, generator=torch.Generator().manual_seed(2)).add_(30)
    path = tmp_path / "norm.onnx"
    path.write_bytes(export.traced(MeanOfMeansGroupNorm(norm), 256).SerializeToString())
    with torch.inference_mode():
        expected = norm(x).numpy()
    (got,) = session(path).run(None, {"image": x.numpy()})
    assert np.abs(got - expected).max() < 2e-5
