"""The house style: one look for one thing, everywhere; figures that show all that they were given."""

import base64
import io
import re
from itertools import combinations, pairwise

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from lib import plots
from lib.plots.axes import dress
from lib.plots.figures import _lean, legend, stack
from lib.plots.rows import summary
from lib.plots.style import OWN_LOOK, PALETTE, looks
from lib.study import Shown


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_what_has_a_look_of_its_own_keeps_it_in_any_company():
    for others in ([], ["a", "b"], ["column", "z"]):
        assert looks([*others, "filter", "unstructured"])["filter"] == OWN_LOOK["filter"]
    assert looks(["filters"])["filters"] == OWN_LOOK["filter"]


def test_no_two_names_of_a_figure_look_alike():
    names = ["unstructured", "filter", "column", "kernel", *(f"other {i}" for i in range(14))]
    found = looks([*names, "other 3"])
    assert list(found) == names
    assert len(set(found.values())) == len(names)
    assert len({colour for colour, _ in found.values()}) == len(names)


def test_numbers_are_shaded_by_their_size_in_any_order():
    found = looks([32, 8, 2])
    assert list(found) == [32, 8, 2]
    assert [colour for colour, _ in looks([2, 8, 32]).values()] == [found[n][0] for n in (2, 8, 32)]


# Machado, Oliveira and Fernandes 2009, full strength, on linear RGB
DEFICIENCIES = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}


@pytest.mark.parametrize("kind", DEFICIENCIES)
def test_the_first_colours_are_told_apart_with_every_colour_vision(kind):
    def seen(colour):
        return np.clip(np.array(DEFICIENCIES[kind]) @ np.array(colour) ** 2.2, 0, 1) ** (1 / 2.2)

    nearest = min(np.linalg.norm(seen(a) - seen(b)) for a, b in combinations(PALETTE[:5], 2))
    assert nearest > 0.15


RUNS = pd.DataFrame(
    {"data": "mnist", "arm": ["a", "a", "a", "a", "b"], "step": [2, 2, 8, 8, 2], "rate": [2.0, 2.2, 7.0, 9.0, 2.0]}
).assign(drop=[0.1, 0.3, 0.5, 0.9, 4.0])


def test_a_point_is_the_mean_of_both_quantities_and_its_bar_the_range():
    ax = plots.curves(RUNS, "rate", "drop", line="arm", by="step", interval="range").axes[0]
    assert ax.lines[0].get_xydata() == pytest.approx(np.array([[2.1, 0.2], [8.0, 0.7]]))
    bars = [segment[:, 1] for container in ax.containers for segment in container[2][0].get_segments()]
    assert np.array(bars) == pytest.approx(np.array([[0.1, 0.3], [0.5, 0.9], [4.0, 4.0]]))


def test_every_interval_holds_its_mean():
    """The mean of equal values is not always between the two ends: 0.1 + 0.1 + 0.1 is more than 0.3."""
    rows = pd.DataFrame({"arm": ["a"] * 3 + ["b"], "up": 0.1, "across": 100.3})
    for interval in ("ci", "range", None, ("up", "across")):
        means = summary(rows, "arm", "up", interval)
        assert (means["low"] <= means["mean"]).all()
        assert (means["mean"] <= means["high"]).all()
    assert len(plots.points(rows, "across", "up", line="arm").axes) == 1


def test_words_stand_in_their_order_and_what_is_missing_is_left_out():
    rows = pd.DataFrame({"choice": ["8", "1", "8", "56"], "accuracy": [88.0, 84.0, 90.0, np.nan]})
    ax = plots.curves(rows, "choice", "accuracy").axes[0]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["8", "1"]
    assert ax.lines[0].get_ydata().tolist() == [89.0, 84.0]


def test_published_points_are_drawn_in_their_own_panel_alone():
    two = pd.concat([RUNS, RUNS.assign(data="fashion_mnist")])
    quoted = pd.DataFrame({"data": ["mnist"], "arm": "a", "rate": 8.0, "drop": 0.2, "text": "8x"})
    curves = plots.curves(two, "rate", "drop", line="arm", panel="data", marks=quoted)
    bars = plots.bars(two, "drop", "step", colour="arm", panel="data", marks=quoted.assign(step=8))
    for figure in (curves, bars):
        crosses = {
            ax.get_title(): [line.get_ydata()[0] for line in ax.lines if line.get_marker() == "x"] for ax in figure.axes
        }
        assert crosses == {"mnist": [0.2], "fashion_mnist": []}
        assert [text.get_text() for ax in figure.axes for text in ax.texts if text.get_text()] == ["8x"]
    assert bars.axes[0].lines[-1].get_xdata()[0] == pytest.approx(1 - 0.2)  # on the bar of its arm, left of the middle
    assert (
        plots.curves(two, "rate", "drop", marks=quoted).axes[0].lines[-1].get_marker() == "x"
    )  # no panels: in the one


@pytest.mark.parametrize(
    ("values", "options", "ends"),
    [
        ([0.5, 40.0], {"lost": 5.0}, (5.0, -0.2)),
        ([0.5, 2.0], {"lost": 5.0}, (2.2, -0.2)),
        ([-1.0, 40.0], {"lost": 5.0}, (5.0, -1.24)),
        ([-2.0, 60.0], {"lost": float("inf")}, (62.48, -4.48)),
        ([7.0, 40.0], {"lost": 5.0}, (14.0, -0.56)),  # even the best lost more: the axis reaches it
        ([30.0, 89.0], {"below": 10.0, "levels": {"dense": 90.0}}, 80.0),
        ([30.0, 75.0], {"below": 10.0, "levels": {"dense": 90.0}}, 60.0),
    ],
)
def test_an_axis_ends_where_told_but_no_panel_is_empty(values, options, ends):
    ax = plt.figure().add_subplot()
    ax.plot([1, 2], values)
    dress(ax, pd.DataFrame({"x": [1, 2], "y": values}), **options)
    shown = ax.get_ylim() if "lost" in options else ax.get_ylim()[0]
    assert shown == pytest.approx(ends)


def test_an_axis_of_losses_reaches_what_was_published_and_a_single_rate_has_a_scale():
    quoted = pd.DataFrame({"rate": [2.0], "drop": 1.5})
    ax = plots.curves(RUNS[:2], "step", "drop", marks=quoted.assign(step=2), lost=5.0, xscale="log").axes[0]
    assert ax.get_ylim()[0] == pytest.approx(1.7)
    assert ax.get_xlim() == pytest.approx((2 / 1.3, 2 * 1.3))


def test_axes_of_one_quantity_are_shared_and_show_the_best_arm_of_all():
    two = pd.concat([RUNS.assign(data="x", drop=30.0), RUNS])
    shared = plots.curves(two, "rate", "drop", panel="data", lost=2.0).axes
    assert {ax.get_ylim() for ax in shared} == {(2.0, -0.2)}
    own = plots.curves(two, "rate", "drop", panel="data", lost=2.0, sharey=False).axes
    assert own[0].get_ylim()[0] == pytest.approx(31.2)


def test_rows_that_would_vanish_are_refused_and_no_rows_are_an_empty_panel():
    nameless = RUNS.assign(arm=["a", None, "a", "a", "b"])
    for figure in (plots.curves, plots.points, plots.bars):
        options = {"colour": "arm"} if figure is plots.bars else {"line": "arm"}
        with pytest.raises(plots.PlotError, match="no arm in 1 of 5 rows"):
            figure(nameless, "rate", "drop", **options)
        with pytest.raises(plots.PlotError, match="no column lost: the rows have data, arm"):
            figure(RUNS, "lost", "drop", **options)
        with pytest.raises(plots.PlotError, match="no arm in 1 of 5 rows"):
            figure(nameless, "rate", "drop", **dict.fromkeys(options, "data"), panel="arm")
        assert len(figure(RUNS.head(0), "rate", "drop", panel="data", **options).axes) == 1


def test_a_row_without_a_value_is_on_no_front():
    assert plots.pareto(pd.Series([90, np.nan, 80]), pd.Series([5.0, 1.0, 6.0])).tolist() == [True, False, True]


def test_every_level_is_in_the_legend():
    levels = {name: 80.0 + i for i, name in enumerate("abcde")}
    for lost in (None, 5.0):
        ax = plots.curves(RUNS, "step", "drop", levels=levels, lost=lost).axes[0]
        assert set(levels) <= {line.get_label() for line in ax.lines}


def test_options_may_differ_by_panel():
    goals = {"drop": "points lost", "rate": "rate"}
    figure = plots.curves(RUNS, "step", goals, yscale={"rate": "log"}, levels={"dense": {"drop": 0.0, "rate": 1.0}})
    assert [ax.get_yscale() for ax in figure.axes] == ["linear", "log"]
    assert [ax.lines[-1].get_ydata()[0] for ax in figure.axes] == [0.0, 1.0]
    assert [ax.get_ylabel() for ax in figure.axes] == ["points lost", "rate"]


def test_bars_stand_beside_or_on_one_another():
    beside, on = (
        plots.bars(RUNS, "drop", "step", colour="arm", stacked=s, text="{:.1f}").axes[0] for s in (False, True)
    )
    assert [bar.get_height() for bar in beside.patches] == pytest.approx([0.2, 0.7, 4.0])
    spans = [
        (bar.get_x(), bar.get_x() + bar.get_width()) for bar in sorted(beside.patches, key=lambda bar: bar.get_x())
    ]
    assert all(a[1] <= b[0] for a, b in pairwise(spans))
    assert {text.xy[0]: text.get_text() for text in on.texts} == {0.0: "4.2", 1.0: "0.7"}  # whole heights
    assert on.patches[2].get_y() == pytest.approx(0.2)


def test_the_legend_has_every_arm_once_also_those_that_the_first_panel_lacks():
    two = pd.concat([RUNS[RUNS["arm"] == "a"].assign(data="x"), RUNS])
    page = plots.show(plots.curves(two, "rate", "drop", line="arm", dash="data", panel="data"), "", alt="x").data
    svg = base64.b64decode(page.partition("base64,")[2].partition('"')[0]).decode()
    legend = svg[svg.index('id="legend_1"') :]
    assert re.findall(r">([^<>]+)</text>", legend) == ["a", "x", "mnist", "b"]


@pytest.mark.parametrize("panels", [1, 2, 5])
def test_text_has_nine_pixels_on_a_page_for_desktops(panels):
    """Of 968 pixels: what a report at 1,400 has beside its contents."""
    rows = pd.concat([RUNS.assign(panel=f"panel {i}", arm=RUNS["arm"] + f" of many, {i}") for i in range(panels)])
    curves = plots.curves(rows, "rate", "drop", line="arm", panel="panel", xscale="log", xlabel="rate", ylabel="lost")
    bars = plots.bars(rows, "drop", "arm", colour="step", panel="panel", text="{:.2g}x")
    for figure in (curves, bars):
        page = plots.show(figure, "", alt="x").data
        svg = base64.b64decode(page.partition("base64,")[2].partition('"')[0]).decode()
        width = float(re.search(r'<svg[^>]* width="([\d.]+)pt"', svg)[1]) * 96 / 72
        smallest = min(float(size) for size in re.findall(r"font(?:-size)?: (?:\w+ )?([\d.]+)px", svg)) * 96 / 72
        assert smallest * min(1, 968 / width) >= 9


def test_a_phone_sees_the_panels_one_under_another_each_with_its_numbers_and_label():
    figure = plots.curves(RUNS, "step", {"rate": "times", "drop": "points"}, line="arm", sharey=True, columns=2)
    legend(figure)
    assert stack(figure)
    figure.draw_without_rendering()
    assert [ax.get_subplotspec().rowspan.start for ax in figure.axes] == [0, 1]
    assert len(figure.legends) == 1
    assert [ax.get_ylabel() for ax in figure.axes] == ["times", "points"]
    for ax in figure.axes:
        assert any(tick.label1.get_visible() for tick in ax.yaxis.get_major_ticks())
    pictures = plots.pictures({"a": torch.eye(3), "b": torch.eye(4)}, label="weight")
    assert stack(pictures)
    pictures.draw_without_rendering()
    a, b, scale = (ax.get_position() for ax in pictures.axes)
    assert a.y0 > b.y1 > b.y0 > scale.y1  # the scale of colours below both
    assert pictures.axes[-1].get_xlabel() == "weight"
    pictures.add_axes((0, 0, 0.1, 0.1))
    assert not stack(pictures)


def test_a_figure_that_is_played_with_is_drawn_again_and_a_report_has_the_first():
    played = plots.Played(lambda share=0.5: Shown(f"<p>{share:g}</p>"), share=(0.0, 1.0, 0.1))
    slider, page = played.live.children
    slider.value = 0.3
    assert page.value == "<p>0.3</p>"
    assert played._repr_mimebundle_()["text/html"] == "<p>0.5</p>"


def test_a_lean_picture_is_drawn_alike(chromium, tmp_path):
    from playwright.sync_api import sync_playwright

    rows = pd.DataFrame({"a": [0.001, 1.0, 10.0] * 2, "b": range(6), "k": list("xxxyyy")})
    figure = plots.curves(rows, "a", "b", line="k")
    raw = io.BytesIO()
    figure.savefig(raw, format="svg", bbox_inches="tight")
    lean, seen = _lean(raw.getvalue()), []
    assert len(lean) < 0.85 * len(raw.getvalue())
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for i, svg in enumerate((raw.getvalue(), lean)):
            (tmp_path / f"{i}.svg").write_bytes(svg)
            page = browser.new_page()
            page.goto(f"file://{tmp_path}/{i}.svg")
            seen.append(np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("L"), dtype=int))
        browser.close()
    assert seen[0].min() < 128 < seen[0].max()
    assert (abs(seen[0] - seen[1]) > 64).mean() < 1e-4
