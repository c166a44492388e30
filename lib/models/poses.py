"""A bottom-up pose network: a backbone, and a branch each for heat maps of points and for affinities of limbs."""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from lib.models.errors import ModelError


class PoseNet(nn.Module):
    """Maps at a quarter of the image's sides: `backbone`, then `heat` and `affinities` side by side.

    The form of lightweight bottom-up networks after OpenPose, with one stage. Its three parts can be pruned apart: a
    plan's names begin with the part's.

    Args:
        shape: of an image, ``(C, H, W)``, sides multiples of 4.
        points: heat maps, ``K``. limbs: pairs of affinity maps, ``L``.
        width: channels of the first convolution; the others have two times and four times as many.
        depth: 3x3 convolutions at a quarter of the sides in the backbone; 1 or more.
        separable: 3x3 convolutions there and in the branches are depthwise, each followed by one of 1x1.

    Raises:
        ModelError: sides or a depth that are not allowed.

    >>> from lib.models import PoseNet
    >>> from lib.shapes import prunable
    >>> net = PoseNet((1, 64, 64), points=14, limbs=13)
    >>> tuple(net(torch.zeros(1, 1, 64, 64)).shape), sorted({name.split(".")[0] for name in prunable(net)})
    ((1, 40, 16, 16), ['affinities', 'backbone', 'heat'])
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        points: int,
        limbs: int,
        width: int = 16,
        depth: int = 4,
        separable: bool = False,
    ) -> None:
        super().__init__()
        if any(side % 4 for side in shape[1:]):
            raise ModelError(f"images of {shape[1]}x{shape[2]}: sides that are multiples of 4 are allowed")
        if depth < 1:
            raise ModelError(f"depth = {depth}: allowed are whole numbers from 1")
        wide = 4 * width
        layers = _convolution("conv1", shape[0], width, 3, 2) | _convolution("conv2", width, 2 * width, 3, 2)
        for i in range(depth):
            layers |= _block(f"conv{i + 3}", 2 * width if i == 0 else wide, wide, separable)
        self.backbone = nn.Sequential(layers)
        self.heat, self.affinities = (
            nn.Sequential(
                _block("conv1", wide, wide, separable)
                | _convolution("conv2", wide, 2 * width, 1)
                | OrderedDict(out=nn.Conv2d(2 * width, maps, 1))
            )
            for maps in (points, 2 * limbs)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` -> ``(N, K + 2 L, H/4, W/4)``."""
        x = self.backbone(x)
        return torch.cat([self.heat(x), self.affinities(x)], 1)


def _convolution(name: str, c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> OrderedDict:
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return OrderedDict({name: conv, f"{name}_bn": nn.BatchNorm2d(c_out), f"{name}_relu": nn.ReLU()})


def _block(name: str, c_in: int, c_out: int, separable: bool) -> OrderedDict:
    if not separable:
        return _convolution(name, c_in, c_out, 3)
    return _convolution(f"{name}_depth", c_in, c_in, 3, groups=c_in) | _convolution(f"{name}_point", c_in, c_out, 1)
