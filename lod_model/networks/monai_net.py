"""Any 3-D network of MONAI, by the name of its class: ``monai:DynUNet``, ``monai:SegResNet``, ``monai:SwinUNETR`` …

They are not rewritten and not changed: MONAI's class is made with one channel in, the protocol's classes out, the window where it wants to know
an image's size, what ``DEFAULTS`` says where it has no defaults of its own, and ``arguments`` of the configuration. They are trained on cubes
with LOD-Brain's soft Dice over the classes that a cube has, and predict in overlapping windows, since most of them do not fit a whole head into
memory.

Source: Project MONAI, ``monai.networks.nets``; each class names its paper.
"""

from __future__ import annotations

import inspect
from dataclasses import asdict, dataclass, field

import torch
from monai.networks import nets
from torch import Tensor, nn

from data_registry.errors import InputError
from lod_model.networks.conventions import check_image, is_integer
from lod_model.networks.recipe import Recipe

RECIPE = Recipe(samples="crops", loss="dice", visits=2)
DEFAULTS = {
    "AttentionUnet": {"channels": (16, 32, 64, 128, 256), "strides": (2, 2, 2, 2)},
    "DynUNet": {"kernel_size": [3] * 5, "strides": [1, 2, 2, 2, 2], "upsample_kernel_size": [2] * 4, "res_block": True},
    "UNet": {"channels": (16, 32, 64, 128, 256), "strides": (2, 2, 2, 2), "num_res_units": 2},
}
"""Of classes that cannot be made without, by the first of their names: MONAI has Unet for UNet, too."""


@dataclass(frozen=True)
class MONAIConfig:
    """Which network, and what it is made with.

    net        class of ``monai.networks.nets``
    classes    output channels, background included
    multiple   every side of the image, in voxels, must be a multiple of this
    window     side of the windows it predicts in, as it was trained: most of them normalise by what a window holds
    arguments  of the class, over those of ``DEFAULTS``
    """

    net: str = "DynUNet"
    classes: int = 7
    multiple: int = 32
    window: int = 128
    arguments: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not is_integer(self.classes, 2):
            raise ValueError(f"classes: {self.classes!r}, wanted an integer of at least 2")
        if not is_integer(self.multiple, 1):
            raise ValueError(f"multiple: {self.multiple!r}, wanted a positive integer")
        if not is_integer(self.window, 1):
            raise ValueError(f"window: {self.window!r}, wanted a positive integer")
        if not isinstance(self.arguments, dict):
            raise ValueError(f"arguments: {self.arguments!r}, wanted a mapping")
        made = getattr(nets, self.net, None) if isinstance(self.net, str) else None
        if not (inspect.isclass(made) and issubclass(made, nn.Module)):
            raise ValueError(f"net: {self.net!r}, wanted a class of monai.networks.nets, e.g. DynUNet, SegResNet, SwinUNETR, UNet")

    def to_dict(self) -> dict:
        """Plain values, for a checkpoint."""
        return asdict(self)


class MONAINet(nn.Module):
    """The network of a ``MONAIConfig``.

    >>> import torch
    >>> net = MONAINet(MONAIConfig("SegResNet", classes=4)).eval()
    >>> net(torch.zeros(1, 1, 32, 32, 64)).shape
    torch.Size([1, 4, 32, 32, 64])
    """

    predicts = "windows"

    def __init__(self, config: MONAIConfig) -> None:
        super().__init__()
        self.config = config
        made = getattr(nets, config.net)
        takes = inspect.signature(made).parameters
        offered = {"spatial_dims": 3, "dimensions": 3, "in_channels": 1, "out_channels": config.classes, "num_classes": config.classes}
        offered |= dict.fromkeys(("img_size", "input_image_size"), (config.window,) * 3)
        given = {name: value for name, value in offered.items() if name in takes} | DEFAULTS.get(made.__name__, {}) | config.arguments
        try:
            self.net = made(**given)
        except Exception as error:  # MONAI's classes raise what they like
            raise ValueError(f"{config.net} cannot be made ({' '.join(str(error).split())}); arguments that it takes are wanted") from None

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 1, D, H, W), z-scored over all voxels → logits (B, classes, D, H, W); of several outputs the first, as in deep supervision.

        ValueError for an image that is none of ours, InputError where MONAI's class does not take it or gives something else.
        """
        check_image(x, self.config.multiple)
        try:
            logits = self.net(x)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # as when it is made
            failed = f"fails on {' × '.join(map(str, x.shape[2:]))} voxels ({' '.join(str(error).split())})"
            raise InputError(f"network monai:{self.config.net}: {failed}; other arguments, multiple or crops are wanted") from error
        if isinstance(logits, list | tuple):
            logits = logits[0]
        if getattr(logits, "ndim", 0) == 6:  # DynUNet stacks the outputs of its levels
            logits = logits[:, 0]
        wanted, came = (len(x), self.config.classes, *x.shape[2:]), tuple(getattr(logits, "shape", ()))
        if came != wanted:
            raise InputError(f"network monai:{self.config.net}: gives {came}; a network for segmentation, which gives {wanted}, is wanted")
        return logits

    @classmethod
    def from_dict(cls, config: dict) -> MONAINet:
        """The network of a plain dict, as a checkpoint or ``params.yaml`` has it."""
        known = MONAIConfig.__dataclass_fields__
        unknown = sorted(str(key) for key in config if key not in known)
        if unknown:
            raise ValueError(f"a network of MONAI has no {', '.join(unknown)}; known: {', '.join(known)}")
        return cls(MONAIConfig(**config))
