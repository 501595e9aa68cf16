"""Small BIDS databases for tests of the stages (balls of nested shells as heads, with FreeSurfer ids), and whole-head label maps of boxes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from data_registry.volume import save_volume

CHECKOUT = Path(__file__).parents[1]
IDS = np.array([0, 2, 3, 4, 10, 8, 16, 1012, 2012, 251])


def add_subject(root: Path, subject: str, *, seed: int, voxel_mm: float = 6.0) -> None:
    """A ball of nested shells as a head, with FreeSurfer ids, on an array whose axes point anterior, superior, left."""
    generator = np.random.default_rng(seed)
    shape = (26, 30, 24)
    affine = np.array([[0, 0, -voxel_mm, 70], [voxel_mm, 0, 0, -80], [0, voxel_mm, 0, -90], [0, 0, 0, 1]], dtype=float)
    centre = np.array(shape) / 2 + generator.uniform(-1, 1, 3)
    radius = np.linalg.norm(np.indices(shape) - centre[:, None, None, None], axis=0)
    shell = np.clip(10 - radius, 0, 9).astype(int)
    labels = IDS[shell]
    save_volume(root / f"sub-{subject}/anat/sub-{subject}_T1w.nii.gz", (shell * 20 + generator.normal(0, 3, shape)).astype(np.int16), affine)
    save_volume(root / f"derivatives/freesurfer/sub-{subject}/mri/aparc+aseg.mgz", labels.astype(np.int32), affine)
    (root / "dataset_description.json").write_text(json.dumps({"Name": root.name, "BIDSVersion": "1.10.0"}))


def box_heads(number: int):
    """Anatomies for renderings: soft tissue with a slab of each class in it, asymmetric, each head another order."""
    import torch

    from lod_model.render import Anatomy

    heads = []
    for head in range(number):
        codes = np.zeros((258, 258, 258), dtype=np.uint8)
        codes[41:221, 41:231, 41:221] = 7
        order = np.random.default_rng(head).permutation(6) + 1
        for code, start in zip(order, (60, 80, 110, 130, 150, 170), strict=True):
            codes[61:191, start : start + 30, 71:181] = code
        heads.append(Anatomy(f"box-{head}", torch.from_numpy(codes), np.array([0, 2, 3, 4, 8, 10, 16, 507])))
    return heads


def run(folder: Path, module: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", module, *arguments], cwd=folder, capture_output=True, text=True, timeout=300)
