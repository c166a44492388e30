"""A figure as a page shows it: wide and as narrow as a phone, with its legend, its caption and what it shows."""

import base64
import html
import io
import os
import re
from collections.abc import Callable
from inspect import signature
from itertools import pairwise
from textwrap import fill
from typing import Any, Literal

import ipywidgets as widgets
import matplotlib.pyplot as plt
from ipywidgets import interactive
from matplotlib.figure import Figure

from lib.study import Shown

NARROW = 4.4
"""Inches of a figure on a phone, which then shows its text at nearly its own size."""


def show(figure: Figure, caption: str, *, alt: str, finding: str = "", kind: Literal["svg", "png"] = "svg") -> Shown:
    """A figure with its caption, what it shows, and a description for who cannot see it, to be a cell's last value.

    On a report's page a phone gets a drawing of its own, with the panels one under another (`stack`).

    Args:
        figure: closed here, so that the notebook does not show it twice.
        caption: below the figure: what is drawn, over how many runs, what the bands are.
        alt: what the figure shows, in a sentence.
        finding: what a reader should take from it, in one or two sentences that the numbers fill.
        kind: ``svg`` for curves, ``png`` for clouds of points and pictures of many cells.

    >>> import matplotlib.pyplot as plt
    >>> from lib.plots import show
    >>> page = show(figure := plt.figure(), "Mean over 3 seeds.", alt="An empty figure").data
    >>> 'alt="An empty figure"' in page, "Mean over 3 seeds.</figcaption>" in page, plt.fignum_exists(figure.number)
    (True, True, False)
    """
    legend(figure)
    tilt(figure)
    drawn, narrow = _saved(figure, kind), ""
    if os.environ.get("WORKBOOK_STUDY") and stack(figure):  # which the batch sets: twice the time
        narrow = f'<source media="(max-width: 40em)" srcset="{_url(_saved(figure, kind), kind)}">'
    plt.close(figure)
    image = f'<img src="{_url(drawn, kind)}" alt="{html.escape(alt)}" style="max-width:100%">'
    caption = f'<figcaption style="max-width:60em">{html.escape(caption)}</figcaption>'
    page = f'<figure style="margin:1em 0"><picture>{narrow}{image}</picture>{caption}</figure>'
    page += f'<p class="finding" style="max-width:46em">{html.escape(finding, quote=False)}</p>' if finding else ""
    return Shown(page, **{"figure": alt, "svg": drawn.decode()} if kind == "svg" else {})


class Played:
    """A figure with controls, to be a cell's last value; where nothing answers to these, as in a report, as it began.

    Args:
        draw: returns a figure (`show`) for values of its arguments, by default the first that is seen.
        controls: of an argument each, as `ipywidgets` has them for short: ``(lowest, highest, step)``, or a list.

    >>> from lib.plots import Played, panels, show
    >>> def empty(share=0.5):
    ...     return show(panels([f"{share:.0%}"])[0], "Nothing.", alt="An empty panel")
    >>> sorted(Played(empty, share=(0.0, 1.0, 0.1))._repr_mimebundle_())[:2]
    ['application/vnd.jupyter.widget-view+json', 'application/vnd.workbook+json']
    """

    def __init__(self, draw: Callable[..., Shown], **controls: Any) -> None:
        self.first = draw()
        asked = {name: signature(draw).parameters[name].default for name in controls}
        chosen = {name: interactive.widget_from_abbrev(controls[name], value) for name, value in asked.items()}
        page = widgets.HTML(self.first.data)

        def again(_: Any) -> None:
            page.value = draw(**{name: control.value for name, control in chosen.items()}).data

        for name, control in chosen.items():
            control.description = name
            control.observe(again, "value")
        self.live = widgets.VBox([*chosen.values(), page])

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:  # IPython's own protocol for several forms of an output
        return self.live._repr_mimebundle_() | self.first._repr_mimebundle_()


def _saved(figure: Figure, kind: str) -> bytes:
    raw = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else None
    figure.savefig(raw, format=kind, bbox_inches="tight", dpi=150, metadata=metadata)
    return _lean(raw.getvalue()) if kind == "svg" else raw.getvalue()


def _lean(svg: bytes) -> bytes:
    """The same picture in three quarters of the bytes, as a page has dozens: hundredths of a point, one font told."""
    svg = re.sub(rb"<!--.*?-->|(?<=\n)\s+", b"", svg, flags=re.DOTALL)
    svg = re.sub(rb"(?<![\d.])([1-9]\d*\.\d\d)\d+", rb"\1", svg)  # factors below 1 keep their digits
    if family := re.search(rb"font-family: [^;]*; ", svg):
        svg = svg.replace(family[0], b"").replace(b"butt}", b"butt} text{" + family[0] + b"}", 1)
    return re.sub(rb' transform="rotate\(-0 [^"]*"', b"", svg)


def _url(drawn: bytes, kind: str) -> str:
    mime = {"svg": "image/svg+xml", "png": "image/png"}[kind]
    return f"data:{mime};base64,{base64.b64encode(drawn).decode()}"


def stack(figure: Figure) -> bool:
    """Put the panels of a drawn figure one under another, as narrow as a phone; False if it has other axes than panels.

    A scale of colours beside the panels goes below them.

    >>> from lib.plots import panels
    >>> from lib.plots.figures import stack
    >>> figure, axes = panels(["a", "b", "c"])
    >>> stack(figure), [ax.get_subplotspec().rowspan.start for ax in axes], float(figure.get_figwidth())
    (True, [0, 1, 2], 4.4)
    """
    scales = [image.colorbar for ax in figure.axes for image in ax.images if image.colorbar]
    scales = [(scale, scale.mappable, scale.ax.get_ylabel()) for scale in scales]
    for scale, *_ in scales:
        scale.remove()
    places = [ax.get_subplotspec() for ax in figure.axes]
    if not places or None in places:
        return False
    order = list(dict.fromkeys(place.num1 for place in places))  # two axes of one panel share it
    height = max(2.2, 0.7 * figure.get_figheight() / places[0].get_gridspec().nrows)
    figure.set_size_inches(NARROW, height * len(order))
    grid, first = figure.add_gridspec(len(order), 1), figure.axes[0]
    for ax, place in zip(figure.axes, places, strict=True):
        ax.set_subplotspec(grid[order.index(place.num1)])
        ax.set_title(fill(ax.get_title(), 40))
        if ax.get_shared_y_axes().joined(ax, first):  # whose label and numbers stood for all in its line
            ax.tick_params(labelleft=True)
            ax.set_ylabel(fill(ax.get_ylabel() or first.get_ylabel(), 28))
    for _, mappable, label in scales:
        figure.colorbar(mappable, ax=figure.axes, label=label, location="bottom", aspect=40)
    for old in [*figure.legends]:
        old.remove()
    legend(figure, letters=52)
    tilt(figure, 60)
    return True


def tilt(figure: Figure, degrees: float = 25) -> None:
    """Turn the labels below those panels of a drawn figure in which they would run into each other.

    >>> from lib.plots import panels
    >>> from lib.plots.figures import tilt
    >>> figure, axes = panels(["a", "b", "c"])
    >>> for ax, name in zip(axes, ("x", "mobilenet_v2", "1"), strict=True):
    ...     ticks = ax.set_xticks(range(5), [name] * 5)
    >>> tilt(figure)
    >>> [ax.get_xticklabels()[0].get_rotation() for ax in axes]
    [0.0, 25.0, 0.0]
    """
    words = {ax: [tick for tick in ax.get_xticklabels() if tick.get_text()] for ax in figure.axes}
    if any(sum(len(tick.get_text()) for tick in ticks) > 20 for ticks in words.values()):  # drawing takes a while
        figure.canvas.draw()
        for ax, ticks in words.items():
            places = [tick.get_window_extent() for tick in ticks]
            if any(right.x0 < left.x1 + 4 for left, right in pairwise(places)):
                ax.tick_params(axis="x", labelrotation=degrees)


def legend(figure: Figure, letters: int = 110) -> None:
    """One legend for all panels: beside one or two, below more, so many letters wide. None where panels have their own.

    >>> from lib.plots import panels
    >>> from lib.plots.figures import legend
    >>> figure, axes = panels(["a", "b"])
    >>> lines = [ax.plot([0, 1], label="filter") for ax in axes]
    >>> legend(figure)
    >>> [text.get_text() for text in figure.legends[0].get_texts()]
    ['filter']
    """
    entries: dict[str, Any] = {}
    for ax in figure.axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if not entries or figure.legends or any(ax.get_legend() for ax in figure.axes):
        return
    spec, longest = figure.axes[0].get_subplotspec(), max(map(len, entries))
    if spec is None or (figure.get_figwidth() > NARROW and spec.get_gridspec().ncols <= 2 and longest < 32):
        figure.legend(entries.values(), entries.keys(), loc="outside right upper")
        return
    columns = max(1, min(len(entries), letters // (longest + 6)))
    figure.set_figheight(figure.get_figheight() + 0.25 * -(-len(entries) // columns))
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns)
