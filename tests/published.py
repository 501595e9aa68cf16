"""The authors' network and its answers on three scans, for the tests at 256³."""

from pathlib import Path

import numpy as np
import torch

from lod_model import weights
from lod_model.networks.lod_brain import LODBrain

SCANS = ("georgetown_sub-01", "mrtrixbids_sub-01", "t1w_philips_elition")


def published(test_data: Path, scan: str) -> tuple[LODBrain, torch.Tensor, dict[str, np.ndarray]]:
    """The network, the z-scored image (1, 1, 256, 256, 256), and ``labels``, ``probability_index`` and ``probability`` of the reference."""
    folder = test_data / "lod_brain_weights"
    reference = dict(np.load(folder / "reference" / f"{scan}.npz"))
    volume = reference.pop("volume").astype(np.float64)
    x = torch.from_numpy((volume - volume.mean()) / volume.std()).float()[None, None]
    return weights.load(folder / "weights_lv1.h5").network, x, reference
