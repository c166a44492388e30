"""Pictures of matrices: weights, masks, errors, distances."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from lib.plots.axes import panels


def pictures(
    images: Mapping[str, Tensor], *, columns: int = 4, height: float = 1.4, label: str = "", **style: Any
) -> Figure:
    """Matrices as images on one scale, by title, NaN white; what has more dimensions than two is drawn as a matrix.

    Args:
        images: weights, masks, differences: their first dimension is drawn downwards, all others to the right.
        label: of the scale of colours; none is drawn without it.
        style: of matplotlib's ``imshow``: ``cmap``, ``vmin`` and ``vmax`` (by default those of all), ``extent``.

    >>> from lib.plots import pictures
    >>> figure = pictures({"weights": torch.eye(4), "kernels": torch.ones(4, 2, 3, 3)}, label="weight")
    >>> [ax.images[0].get_array().shape for ax in figure.axes[:2]], figure.axes[2].get_ylabel()
    ([(4, 4), (4, 18)], 'weight')
    """
    shown = {title: image.detach().flatten(1).float().cpu().numpy() for title, image in images.items()}
    values = np.concatenate([image.ravel() for image in shown.values()])
    style = {"cmap": "Blues", "vmin": np.nanmin(values), "vmax": np.nanmax(values), "aspect": "auto"} | style
    figure, axes = panels(list(shown), columns=columns, height=height)
    for ax, image in zip(axes, shown.values(), strict=True):
        drawn = ax.imshow(image, interpolation="nearest", **style)
        ax.grid(visible=False)
        ax.spines[:].set_visible(True)
        if "extent" not in style:
            ax.set(xticks=[], yticks=[])
    if label:
        figure.colorbar(drawn, ax=axes, label=label, shrink=0.85)
    return figure
