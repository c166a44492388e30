"""Claims: whose they are, what they are judged by, and that no verdict says more than was tested."""

import re

import numpy as np
import pandas as pd
import pytest

from lib import plots
from lib.reproduce import write_index
from lib.reproduce.index import statements
from lib.study import (
    CLAIM_COLUMNS,
    JUDGED,
    OURS,
    Criterion,
    ParameterError,
    Study,
    at_least,
    at_most,
    common_error,
    interval,
    near,
    open_study,
    papers,
)
from lib.study.claims import Claim, judged

NAME = "01_lottery_ticket_vs_finetuning"
FIVE = [1.0, 2.0, 3.0, 2.0, 2.0]


@pytest.fixture
def study():
    return Study("s", {"dataset": "fashion_mnist", "model": "vgg"}, {"commit": "c"})


def test_results_contract(tmp_path):
    opened = open_study(NAME, {"report_dir": str(tmp_path / "paper"), "seeds": 5})
    opened.expect("1", "a > b", at_least(0), paper="PatDNN", source="abstract", published="+1", unit="points")
    opened.expect("2", "never measured", at_least(0), paper="PatDNN", published="")
    opened.settle("1", FIVE)
    opened.measure(lambda_of_rows, [{"seed": 0}])
    opened.save()
    ledger = pd.read_csv(tmp_path / "paper" / "claims" / f"{NAME}.csv", keep_default_na=False)
    assert ", ".join(ledger.columns) == (
        "study, paper, claim, kind, fixed, source, published, measured, low, high, n, over, criterion, condition, "
        "verdict, setting, dataset, model, preset, commit, sign, bound, value, within, cell"
    )
    assert (*ledger.columns,) == (*CLAIM_COLUMNS, *JUDGED)
    assert (*opened.ledger().columns,) == (*CLAIM_COLUMNS, *JUDGED)
    assert ledger[["sign", "bound", "value"]].values.tolist() == [[">=", 0.0, ""]] * 2
    assert list(ledger["verdict"]) == ["reproduced", "inconclusive"]  # a claim without a measurement stays
    assert list(ledger["preset"]) == ["paper", "paper"]
    rows = pd.read_csv(tmp_path / "paper" / "results" / f"{NAME}.csv")
    assert rows[["experiment", "seed", "accuracy"]].values.tolist() == [["lambda_of_rows", 0, 0.5]]


def lambda_of_rows(seed):
    return {"accuracy": 0.5}


def test_the_answer_takes_its_numbers_from_the_claims(study):
    study.expect("2 of a", "a > b", at_least(0), kind="ours")
    study.settle("2 of a", FIVE)
    page = study.answer("a < b", "by {2 of a} points", "c by {7}", caveat="so far").data
    numbers = "<li>by <strong>2.00 [1.12, 2.88]</strong> points</li><li>c by <strong>not measured</strong></li>"
    assert page == f'<div class="answer">a &lt; b<ul>{numbers}</ul> <span class="soft">so far</span></div>'


def test_ratios_are_averaged_as_logarithms(study):
    study.expect("r", "ratio", at_least(0.4), kind="ours")
    study.settle("r", [0.5, 1.0, 2.0, 1.0, 1.0], geometric=True)
    row = study.ledger().iloc[-1]
    assert row["measured"] == pytest.approx(1.0)
    assert row["low"] * row["high"] == pytest.approx(1.0)
    assert row["verdict"] == "reproduced"


def test_claims_are_stated_once_and_before_they_are_settled(study):
    study.expect("1", "a", at_least(0), kind="ours")
    with pytest.raises(ParameterError, match="stated twice"):
        study.expect("1", "b", at_least(0), kind="ours")
    for asked in (lambda: study.settle("2", [1.0]), lambda: study.met("2")):
        with pytest.raises(ParameterError, match="'2' was never stated: allowed are 1"):
            asked()


@pytest.mark.parametrize(
    ("details", "said"),
    [
        ({"paper": "PatDN"}, "'PatDN' is no key of papers.csv: near are PatDNN"),
        ({"paper": "Sun 2024"}, "'Sun 2024' is no key of papers.csv: none is near; add its line first"),
        ({}, "paper = 'this workbook': such a claim is of kind='ours'"),
        ({"paper": "PatDNN", "kind": "our"}, "kind = 'our': allowed are number, direction"),
        ({"paper": "PatDNN", "units": "points"}, "units: allowed are unit, condition"),
        ({"paper": "PatDNN", "criterion": 0.5}, "criterion = 0.5: expected at_least, at_most or near"),
        ({"paper": "PatDNN", "kind": "ours"}, "paper = 'PatDNN', kind = 'ours': such a claim names no paper"),
        ({"paper": "PatDNN", "kind": "fact"}, "kind = 'fact': allowed are number, direction"),
        ({"paper": "PatDNN", "fixed": "later"}, "fixed = 'later': allowed are before, after pilot"),
        ({"paper": "PatDNN", "setting": "toy"}, "setting = 'toy': allowed are as published"),
        ({"paper": "PatDNN", "condition": "points lost"}, "a condition has words and a criterion"),
        (
            {"paper": "PatDNN", "condition": "ratio", "holding": near(1.93, 0.05, at_least(1))},
            "a condition is a bound; a number to be near is a claim of its own",
        ),
    ],
)
def test_a_claim_is_somebodys_and_of_a_kind(study, details, said):
    with pytest.raises(ParameterError, match=said):
        study.expect("1", "a", **{"criterion": at_least(0)} | details)


def test_chips_are_no_networks():
    """Five values of one network give no verdict that asks for five, unless the claim says what they are of."""
    study = Study("09_mine", {"seeds": 1}, {"commit": ""})
    study.expect("chips", "a", at_least(0), kind="ours", over="chips")
    study.settle("chips", [1.0, 1.1, 1.2, 0.9, 1.0])
    study.expect("networks", "a", at_least(0), kind="ours")
    with pytest.raises(ParameterError, match="'networks' is given 5 values, and seeds = 1 networks are trained: say"):
        study.settle("networks", [1.0, 1.1, 1.2, 0.9, 1.0])


@pytest.mark.parametrize(
    ("sign", "low", "high", "n", "verdict"),
    [
        (">=", 0.1, 0.5, 5, "reproduced"),
        (">=", 0.0, 0.5, 5, "reproduced"),
        (">=", -0.1, 0.5, 5, "inconclusive"),
        (">=", -0.5, -0.1, 5, "not reproduced"),
        ("<=", -0.5, -0.1, 5, "reproduced"),
        ("<=", 0.1, 0.5, 9, "not reproduced"),
        (">=", 0.1, 0.5, 4, "inconclusive"),
        (">=", np.nan, np.nan, 5, "inconclusive"),
    ],
)
def test_verdicts(sign, low, high, n, verdict):
    assert Criterion(sign, 0.0).verdict(low, high, n) == verdict


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (1.8, 2.0, "reproduced"),
        (1.73, 2.13, "reproduced"),
        (1.8, 2.2, "direction only"),  # it may be this number
        (2.5, 6.0, "direction only"),  # more than the paper says is not what it says
        (1.0, 1.1, "direction only"),
        (0.9, 2.0, "inconclusive"),
        (0.5, 0.9, "not reproduced"),
    ],
)
def test_a_number_is_reproduced_by_that_number_alone(low, high, verdict):
    assert near(1.93, 0.2, at_least(1.0)).verdict(low, high, 5) == verdict


@pytest.mark.parametrize(
    ("bounds", "condition", "verdict"),
    [
        ((4.7, 5.0), (0.1, 0.9), "reproduced"),
        ((4.7, 5.0), (11.9, 13.2), "not reproduced"),  # 4.7 times less energy, 12.6 points lost
        ((4.7, 5.0), (0.5, 1.5), "inconclusive"),
        ((4.7, 5.0), None, "inconclusive"),
        ((2.0, 3.0), (0.1, 0.9), "not reproduced"),
        ((4.0, 5.0), (0.1, 0.9), "inconclusive"),
        ((4.0, 5.0), (1.4, 4.3), "not reproduced"),  # whether it gains is open, that it costs too much is not
        ((float("nan"), float("nan")), (1.4, 4.3), "inconclusive"),
    ],
)
def test_what_is_claimed_together_is_judged_together(bounds, condition, verdict):
    claim = Claim("1", "a", "Early-Bird", "direction", "", "", at_least(4.5), "", "points lost", at_most(1.0))
    assert judged(claim, bounds, 5, condition and (*condition, 5)) == verdict


def test_a_condition_needs_as_many_networks_as_its_criterion_asks_for(study):
    for i, (claim, holding) in enumerate([(5, 5), (1, 1), (1, 5)]):
        joint = {"condition": "points lost", "holding": at_most(0.5, n=holding)}
        study.expect(f"{i}", "faster", at_least(1, n=claim), kind="ours", **joint)
    study.settle("0", FIVE, condition=[0.1, 0.1])
    assert study.verdicts["0"]["verdict"] == "inconclusive"
    assert study.verdicts["0"]["condition"] == "points lost <= 0.5: 0.100 [0.100, 0.100] (n = 2)"
    study.settle("0", FIVE, condition=[9.0, 9.1, 9.0, 9.1])
    assert study.verdicts["0"]["verdict"] == "inconclusive"
    for i, verdict in (("1", "reproduced"), ("2", "inconclusive")):  # a sum is decided by its single value
        study.settle(i, [2.0], condition=[0.1])
        assert study.verdicts[i]["verdict"] == verdict
    study.settle("1", [2.0], condition=[0.6])
    assert study.verdicts["1"]["verdict"] == "not reproduced"


def test_what_an_interval_is_over_is_told_where_it_is_not_networks(study):
    study.expect("1", "faster", at_least(1), kind="ours", over="layers")
    study.settle("1", FIVE)
    assert study.ledger()["over"].tolist() == ["layers"]
    assert study.criteria()["criterion"].tolist() == [">= 1, from 5 or more layers"]
    assert 'data-label="networks" style="text-align:left">5 layers</td>' in plots.ledger_table(study.ledger()).data


def test_too_few_networks_is_told_alike_everywhere(tmp_path):
    """Of three claims on fewer networks than a verdict needs, one is a sum and one is decided by its single value."""
    opened = open_study(NAME, {"report_dir": str(tmp_path / "paper"), "seeds": 5})
    opened.expect("1", "faster", at_least(1), kind="ours")
    opened.expect("2", "exact", at_most(1, n=1), kind="ours")
    opened.expect("3", "sum", at_most(1, n=1), kind="arithmetic", paper="FORMS", published="1", source="nowhere")
    opened.settle("1", [2.0, 2.5, 3.0])
    for i in "23":
        opened.settle(i, [0.5])
    opened.save()
    in_study = [
        cell.partition("<")[0]
        for cell in plots.ledger_table(opened.ledger()).data.split('data-label="networks" style="text-align:left">')[1:]
    ]
    assert in_study == ["3 of 5", "1", ""]
    write_index(tmp_path / "paper", {NAME: "complete"})
    page = (tmp_path / "paper" / "index.html").read_text()
    cells = [re.sub("<.*", "", part) for part in re.findall('data-label="networks" data-sort="[^"]*">(.*?)</td>', page)]
    assert sorted(cells) == ["", "1", "3 of 5"]
    assert len(re.findall(r'class="mark \w+ few ', page)) == 1
    assert " 1 claim has fewer networks so far" in page


def test_an_end_that_misses_the_bound_is_not_shown_at_it(study):
    """1.11 [0.997, 1.245] is not 1.11 [1.00, 1.25], where a criterion asks for 1."""
    study.expect("1", "faster", at_least(1), kind="ours")
    study.settle("1", [0.95, 1.05, 1.11, 1.17, 1.22])
    low = study.verdicts["1"]["low"]
    study.settle("1", np.array([0.95, 1.05, 1.11, 1.17, 1.22]) - low + 0.998)
    assert "[0.998, 1.260]" in plots.ledger_table(study.ledger()).data
    study.expect("2", "better", at_least(0), kind="ours", condition="points lost", holding=at_most(1))
    study.settle("2", FIVE, condition=np.array([0.95, 1.05, 1.11, 1.17, 1.22]) - low + 0.998)
    assert "<= 1: 1.129 [0.998, 1.260]" in study.verdicts["2"]["condition"]


def test_words_end_a_statement_once(study):
    """However often a cell is run again."""
    study.expect("1", "faster", at_least(1), kind="ours")
    for _ in range(2):
        study.settle("1", FIVE, words=", on one thread")
    assert study.ledger()["claim"].tolist() == ["1 faster, on one thread"]
    study.settle("1", FIVE)
    assert study.ledger()["claim"].tolist() == ["1 faster"]


def test_the_index_says_how_many_claims_are_of_other_things_than_networks(tmp_path):
    opened = open_study(NAME, {"report_dir": str(tmp_path / "paper"), "seeds": 5})
    for i, over in enumerate(("layers", "networks", "sizes")):
        opened.expect(f"{i}", "faster", at_least(1), kind="ours", over=over)
        opened.settle(f"{i}", FIVE)
    opened.save()
    write_index(tmp_path / "paper", {})
    page = (tmp_path / "paper" / "index.html").read_text("utf-8")
    assert " 2 claims count something other than networks," in page
    assert "5 layers</td>" in page
    assert "5 networks</td>" not in page


def test_a_condition_is_told_with_what_was_measured_of_it(study):
    joint = {"condition": "points lost", "holding": at_most(1.0)}
    study.expect("1", "energy saved", at_least(4.5), paper="Early-Bird", unit="x", **joint)
    with pytest.raises(ParameterError, match="claim '1' has a condition"):
        study.settle("1", FIVE)
    study.settle("1", [v + 4 for v in FIVE], condition=[0.1, 0.2, 0.3, 0.2, 0.2])
    row = study.ledger().iloc[0]
    assert (row["verdict"], row["condition"]) == ("reproduced", "points lost <= 1: 0.20 [0.11, 0.29]")


def test_a_claim_with_a_condition_is_met_as_its_verdict_is(study):
    """Faster, but perhaps not as accurate: no sentence may call that a win."""
    joint = {"condition": "points lost", "holding": at_most(1.0)}
    for id, lost, met in (("1", [0.1, 0.2, 0.1], True), ("2", [0.5, 1.5, 1.0], None), ("3", [2.0, 2.1, 2.2], False)):
        study.expect(id, "faster", at_least(1.0), kind="ours", **joint)
        study.settle(id, [v + 1 for v in FIVE], condition=[*lost, lost[0], lost[-1]])
        assert study.met(id) is met
        assert study.says(id, yes="wins", no="loses", open="open") == {True: "wins", None: "open", False: "loses"}[met]


def test_rounding_decides_no_verdict():
    assert 0.2 * 3 / 3 > 0.2
    assert at_most(0.2).verdict(0.1, 0.2 * 3 / 3, 5) == "reproduced"
    assert at_most(0.2).verdict(0.2 + 1e-9, 0.3, 5) == "not reproduced"
    assert near(0.3, 0.1, at_least(0)).verdict(0.1 + 0.1, 0.4, 5) == "reproduced"


@pytest.mark.parametrize("n", [3, 5, 30])
def test_an_interval_covers_the_mean_as_often_as_it_says(n):
    rng = np.random.default_rng(n)
    hits = [low <= 0 <= high for _, low, high in (interval(rng.normal(size=n)) for _ in range(1000))]
    assert 0.93 < np.mean(hits) < 0.97  # of three values a bootstrap covers it in 75 % of cases


def test_an_interval_counts_what_all_values_have_in_common():
    """Networks that met the same chips are no independent witnesses of what chips do."""
    rng, hits, alone = np.random.default_rng(1), [], []
    for _ in range(1000):
        values = rng.normal(size=5) + 2 * rng.normal()
        hits.append(abs(interval(values, also=2.0)[0]) <= np.diff(interval(values, also=2.0)[1:])[0] / 2)
        alone.append(interval(values)[1] <= 0 <= interval(values)[2])
    assert np.mean(alone) < 0.7
    assert np.mean(hits) > 0.94


def test_what_trials_in_common_leave_is_not_averaged_over_networks():
    random = np.random.default_rng(1)
    chips, own = random.normal(size=50), random.normal(size=(200, 50))
    alike = np.tile(chips, (200, 1))
    error = common_error(np.mean, alike)
    assert error == pytest.approx(chips.std(ddof=1) / 50**0.5, rel=0.1)
    assert common_error(np.mean, own) < error / 5
    assert common_error(lambda one, other: (one - other).mean(), alike + own, alike) < error / 5  # on the same chips


def test_interval_of_few_values():
    assert interval([2.0])[0] == 2
    assert np.isnan(interval([2.0])[1])
    assert interval([1.0, 1.0, 1.0]) == (1, 1, 1)


def test_a_claim_may_be_tested_on_its_own_network(study):
    study.expect("a", "x", at_least(99), kind="ours")
    study.expect("b", "y", at_least(99), kind="ours", dataset="mnist", model="lenet5")
    assert study.ledger()[["dataset", "model"]].to_numpy().tolist() == [["fashion_mnist", "vgg"], ["mnist", "lenet5"]]


def test_a_claim_without_chance_is_settled_by_one_value(study):
    """Sums of a table need no networks; a measured claim with one value stays inconclusive."""
    study.expect("a", "sum", at_most(1, n=1), paper="ISAAC", kind="arithmetic")
    study.expect("b", "measured", at_most(1), kind="ours")
    study.settle("a", [0.5])
    study.settle("b", [0.5])
    assert [study.verdicts[c]["verdict"] for c in "ab"] == ["reproduced", "inconclusive"]
    assert study.criteria()["criterion"].tolist() == ["<= 1, arithmetic", "<= 1, from 5 or more networks"]


def test_every_paper_is_told_whole_and_what_is_named_exists():
    import importlib

    table = papers()
    assert OURS not in table.index
    for named in filter(None, "; ".join(table["implemented"]).split("; ")):
        room, _, name = named.rpartition(".")
        assert hasattr(importlib.import_module(room), name), named


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("PatDNN,A title,,ASPLOS,2020,https://x,,abstract,verified", "line 2 .PatDNN.: authors is missing"),
        (",A title,N. N.,ASPLOS,2020,https://x,,abstract,verified", "line 2 .no key.: paper is missing"),
        ("a,b", "line 2 .a.: authors is missing"),
    ],
)
def test_a_paper_with_a_missing_field_is_named(tmp_path, monkeypatch, line, said):
    path = tmp_path / "papers.csv"
    path.write_text("paper,title,authors,venue,year,link,implemented,source,status\n" + line + "\n")
    monkeypatch.setitem(papers.__wrapped__.__globals__, "PATH", path)
    papers.cache_clear()
    try:
        with pytest.raises(ParameterError, match=said):
            papers()
    finally:
        papers.cache_clear()


def test_a_statement_of_a_paper_counts_once_however_often_it_is_tested():
    tests = {
        ("P", "wins"): ["reproduced", "inconclusive"],
        ("P", "by 4x"): ["direction only"],
        ("Q", "wins"): ["reproduced", "not reproduced"],
        ("Q", "costs little"): ["not reproduced"] * 2,
        ("Q", "adds up"): ["reproduced"],
        ("Q", "scales"): ["inconclusive"],
    }
    rows = [(*said, verdict) for said, verdicts in tests.items() for verdict in verdicts]
    ledger = pd.DataFrame(rows, columns=["paper", "published", "verdict"]).assign(kind="direction")
    ledger.loc[ledger["published"] == "adds up", "kind"] = "arithmetic"
    mine = ledger.iloc[:1].assign(kind="ours", published="ours")
    counts = {"all": 6, "reproduced": 2, "arithmetic": 1, "no": 1, "part": 2, "open": 1}
    assert statements(pd.concat([ledger, mine])) == counts
