"""The house style: one look for one thing, everywhere."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest

from lib import plots
from lib.plots.style import OWN_LOOK, PALETTE, looks


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


def test_networks_of_the_same_energy_are_drawn():
    """Their mean is not always between the two ends: 0.1 + 0.1 + 0.1 is more than 0.3."""
    goals = {"accuracy_percent": [0.1] * 3, "energy_nJ": [100.3] * 3, "tolerated_percent": [0.7] * 3}
    figure = plots.joint(pd.DataFrame({"arm": ["a"] * 3} | goals), pd.Series({"a": True}))
    assert len(figure.axes) == 2


def test_published_points_are_drawn_for_their_own_data_set_alone():
    networks = {"dataset": ["mnist", "fashion_mnist"], "arm": "ADMM", "nominal": 10, "rate": 10.0, "drop": [0.1, 3.0]}
    networks = pd.DataFrame(networks | {"data_only": 10.0, "with_index": 5.0})
    marks = {8.0: (0.2, "8x")}
    by_rate = plots.drop_against(networks, ["ADMM"], x="rate", xlabel="rate", marks=marks, of="mnist")
    by_bits = plots.drop_against_compression(networks, ["ADMM"], marks={8.0: "8x"}, of="mnist")
    for figure in (by_rate, by_bits):
        assert {ax.get_title(): [t.get_text() for t in ax.texts] for ax in figure.axes} == {
            "mnist": ["8x"],
            "fashion_mnist": [],
        }
