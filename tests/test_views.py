"""Slices of three views and what they agree on: by hand on volumes small enough to print, and as the public code aggregates."""

import numpy as np
import pytest
import torch
from torch import nn

from data_registry.errors import InputError
from lod_model.networks.competitive import VIEWS, ViewsConfig
from lod_model.networks.fastsurfer_vinn import FastSurferVINN, FastSurferVINNConfig
from lod_model.views import AXES, WEIGHTS, as_slices, segment_views, slices_of


def volume(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 200, shape, dtype=np.uint8)


class Stub(nn.Module):
    """Three networks of nothing but a function of (slices, scale)."""

    def __init__(self, classes: int, sagittal_classes: int | None = None, **functions):
        super().__init__()
        self.config = ViewsConfig(classes=classes, sagittal_classes=sagittal_classes, kernels=(1, 1))
        for view in VIEWS:
            self.add_module(view, Function(self.config, functions[view]))


class Function(nn.Module):
    def __init__(self, config: ViewsConfig, function):
        super().__init__()
        self.config, self.function = config, function

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        assert x.shape[1] == 7 and scale.shape == (len(x),) and not any(side % 16 for side in x.shape[2:])
        return self.function(x)


def test_where_each_view_looks():
    """Voxel (left 1, down 2, front 3) in a slice of each view."""
    v = np.arange(3 * 4 * 5).reshape(3, 4, 5)
    voxel = v[1, 2, 3]
    assert as_slices(v, "axial").shape == (4, 5, 3) and as_slices(v, "axial")[2, 3, 1] == voxel
    assert as_slices(v, "coronal").shape == (5, 3, 4) and as_slices(v, "coronal")[3, 1, 2] == voxel
    assert as_slices(v, "sagittal").shape == (3, 5, 4) and as_slices(v, "sagittal")[1, 3, 2] == voxel
    for view in VIEWS:
        assert np.array_equal(as_slices(torch.from_numpy(v), view).numpy(), as_slices(v, view))
        assert as_slices(np.zeros((3, 4, 5, 2)), view).shape == (*as_slices(v, view).shape, 2)


@pytest.mark.parametrize("view", VIEWS)
def test_slices_put_back_are_the_volume(view):
    v = volume(3, 4, 5)
    back = np.zeros_like(v)
    for index in reversed(range(v.shape[AXES[view][0]])):
        as_slices(back, view)[[index]] = slices_of(v, view, [index], thickness=1)[:, 0]
    assert np.array_equal(back, v)


def test_thick_slices_repeat_the_ends():
    v = np.zeros((2, 9, 2), dtype=np.uint8)
    v[:] = np.arange(9)[:, None]
    assert slices_of(v, "axial", [0, 4, 8])[:, :, 1, 0].tolist() == [[0, 0, 0, 0, 1, 2, 3], [1, 2, 3, 4, 5, 6, 7], [5, 6, 7, 8, 8, 8, 8]]
    assert slices_of(v, "axial", [0]).shape == (1, 7, 2, 2) and slices_of(v, "coronal", [1]).shape == (1, 7, 2, 9)


@pytest.mark.parametrize("batch", [None, 1, 4, 100])
def test_left_stays_left(batch):
    """Networks that answer with the grey value of the middle slice: the classes are the volume, whichever views speak."""
    v = volume(5, 18, 7) % 9 + 1
    v[:, 0] = v[0] = v[-2:] = 0                                                # outside the scan
    v[2, 9:, :3] = 0                                                           # and a hole in it

    def grey(x):
        return 10 * nn.functional.one_hot((x[:, 3] * 255).round().long(), 10).movedim(-1, 1).float()

    def nothing(x):
        return torch.zeros(len(x), 10, *x.shape[2:])

    for speaks in (VIEWS, *((view,) for view in VIEWS)):
        network = Stub(10, 10, **{view: grey if view in speaks else nothing for view in VIEWS})
        assert np.array_equal(segment_views(network, v, voxel_mm=1.0, batch=batch), v), speaks


def test_views_outvote_each_other_by_their_weights():
    def says(*logits):
        return lambda x: torch.tensor(logits).view(1, -1, 1, 1).expand(len(x), -1, *x.shape[2:]).clone()

    v = np.ones((2, 3, 4), dtype=np.uint8)
    assert WEIGHTS == {"axial": 0.4, "coronal": 0.4, "sagittal": 0.2}
    for sagittal, winner in ((1.9, 1), (2.1, 2)):                              # 0.4 · 1 against 0.2 · sagittal
        network = Stub(3, 3, axial=says(0.0, 1.0, 0.0), coronal=says(0.0, 0.0, 0.0), sagittal=says(0.0, 0.0, sagittal))
        assert (segment_views(network, v, voxel_mm=1.0) == winner).all()
    network = Stub(3, 2, axial=says(0.0, 0.0, 1.0), coronal=says(0.0, 0.0, 0.0), sagittal=says(0.0, 5.0))   # it cannot tell 1 from 2
    assert (segment_views(network, v, voxel_mm=1.0, sagittal_class=[0, 1, 1]) == 2).all()


def test_it_is_the_public_aggregation(test_data):
    path = test_data / "reference_networks" / "fastsurfer_sagittal_views.npz"
    if not path.is_file():
        pytest.skip(f"no outputs of the public code at {path}")
    file = np.load(path)

    def replayed(name):
        rest = list(torch.from_numpy(file[name]))                              # larger than the slices, as padded ones are

        def network(x):
            return torch.stack([rest.pop(0) for _ in x])

        return network

    network = Stub(79, 51, **{view: replayed(f"agg_{view}{'51' if view == 'sagittal' else ''}") for view in VIEWS})
    found = segment_views(network, volume(4, 5, 6), voxel_mm=1.0, sagittal_class=file["index_list"], batch=2)
    assert np.array_equal(found, file["agg_class"])


def small() -> FastSurferVINN:
    torch.manual_seed(0)
    config = FastSurferVINNConfig(classes=7, sagittal_classes=4, filters=6, native_filters=4, inner_size=32, depth=2)
    return FastSurferVINN(config).train()


def test_it_is_the_sum_of_logits_in_float64():
    """But where the two largest sums are nearly equal: what is kept is in float16."""
    network, v, class_of = small(), volume(30, 36, 33), [0, 1, 1, 2, 2, 3, 3]
    found = segment_views(network, v, voxel_mm=0.8, sagittal_class=class_of)
    assert network.training
    total = torch.zeros(*v.shape, 7, dtype=torch.float64)
    for view, net in network.eval().named_children():
        x = torch.from_numpy(slices_of(v, view, range(len(as_slices(v, view))))).float() / 255
        h, w = x.shape[2:]
        with torch.no_grad():
            logits = net(nn.functional.pad(x, (0, -w % 4, 0, -h % 4)), torch.full((len(x),), 1.25))[:, :, :h, :w].double()
        as_slices(total, view).add_(WEIGHTS[view] * (logits[:, class_of] if view == "sagittal" else logits).permute(0, 2, 3, 1))
    wanted = total.argmax(-1).numpy()
    assert len(np.unique(wanted)) > 2
    largest = total.topk(2, -1)[0]
    margin = (largest[..., 0] - largest[..., 1]).numpy()[found != wanted]
    assert (found != wanted).mean() < 1e-3 and (margin < 1e-2 * total.std().item()).all()


def test_the_voxel_size_is_seen():
    network, v = small(), volume(8, 16, 16)
    at = {mm: segment_views(network, v, voxel_mm=mm, sagittal_class=[0, 1, 1, 2, 2, 3, 3]) for mm in (0.7, 1.0)}
    assert not np.array_equal(at[0.7], at[1.0])


def test_bfloat16_is_near():
    network, v = small(), volume(16, 16, 16)
    whole, half = (segment_views(network, v, voxel_mm=1.0, sagittal_class=[0, 1, 1, 2, 2, 3, 3], dtype=d) for d in (torch.float32, torch.bfloat16))
    assert (whole == half).mean() > 0.7


def test_what_does_not_fit_is_refused():
    network = small()
    with pytest.raises(InputError, match="every voxel is 0"):
        segment_views(network, np.zeros((4, 4, 4), np.uint8), voxel_mm=1.0, sagittal_class=[0] * 7)
    for wrong in (None, [0, 1, 2], [0, 1, 2, 3, 4, 4, 4], [0, 1, 2, 3, -1, 0, 0]):
        with pytest.raises(ValueError, match="for each of 7 classes, one of the sagittal network's 4"):
            segment_views(network, volume(4, 4, 4), voxel_mm=1.0, sagittal_class=wrong)
