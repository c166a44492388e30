"""Reports as a reader meets them: opened from a file in a real browser, wide, on a phone, in the dark, on paper."""

import re

import pandas as pd
import pytest
from axe_playwright_python.sync_playwright import Axe
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output

from lib import reproduce as room
from lib import study
from lib.reproduce.index import _place
from lib.reproduce.links import experiments, link
from lib.reproduce.page import folded

STUDIES = study.studies()[1:]  # with a committed report: the first is a tour


def pages(folder):
    return sorted(folder.glob("*.html"))


@pytest.fixture(scope="module")
def browser(chromium):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield running
        running.close()


@pytest.fixture
def page(browser):
    """A tab that gathers what the browser complains about and what it asks for."""
    tab = browser.new_page()
    tab.complaints, tab.requests = [], []
    tab.on("console", lambda message: tab.complaints.append(message.text))
    tab.on("pageerror", lambda error: tab.complaints.append(str(error)))
    tab.on("request", lambda request: tab.requests.append(request.url))
    yield tab
    tab.close()


def test_text_asks_for_nothing_from_outside(paper):
    for file in pages(paper):
        text = file.read_text("utf-8")
        outside = re.findall(r"""(?:src|href)\s*=\s*["']?(?!data:|#|["'])([^"'\s>]+)""", text)
        linked = re.findall(r'<a[^>]*href="(https?:[^"]+)"', text)
        assert [u for u in outside if ":" in u and u not in linked] == []
        assert "<script" not in text or file.name == "index.html"
        assert "$" not in re.sub(r"<(pre|style|script).*?</\1>|data:[^\"]*", "", text, flags=re.DOTALL)
        assert str(study.PROJECT) not in text
        assert file.stat().st_size < 3_000_000


def test_every_page_opens_without_a_complaint_and_every_link_leads_somewhere(paper, page):
    assert len(pages(paper)) == len(STUDIES) + 1
    for file in pages(paper):
        page.goto(file.as_uri())
        ids = set(page.eval_on_selector_all("[id]", "all => all.map(e => e.id)"))
        assert len(ids) == page.eval_on_selector_all("[id]", "all => all.length"), "two elements share an id"
        for href in page.eval_on_selector_all("a[href]", "all => all.map(e => e.getAttribute('href'))"):
            target, _, anchor = href.partition("#")
            if target.startswith("http"):
                continue
            other = file.parent / target if target else file
            assert other.is_file(), href
            if anchor:
                there = set(re.findall(r' id="([^"]+)"', other.read_text("utf-8"))) if target else ids
                assert anchor in there, href
        assert page.eval_on_selector_all("img:not([alt]), img[alt='']", "all => all.length") == 0
        assert page.title()
    assert page.complaints == []
    assert [url for url in page.requests if not url.startswith(("file:", "data:"))] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_overflows_a_phone(paper, page, scheme):
    page.set_viewport_size({"width": 390, "height": 844})
    page.emulate_media(color_scheme=scheme)
    for file in pages(paper):
        page.goto(file.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, file.name
        wide = page.evaluate(
            """() => [...document.querySelectorAll("main *")]
                .filter(e => e.checkVisibility() && !e.closest(".scroll, table, figure, pre, math"))
                .filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"""
        )
        assert wide == [], file.name


def contrast(page, selector):
    """WCAG's ratio of a text's luminance to that of the page behind it."""
    return page.evaluate(
        """selector => {
          const light = colour => {
            const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
            const [r, g, b] = colour.match(/[\\d.]+/g).map(v => linear(v / 255));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const a = light(getComputedStyle(document.querySelector(selector)).color);
          const b = light(getComputedStyle(document.body).backgroundColor);
          return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        }""",
        selector,
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes(paper, page, scheme):
    page.emulate_media(color_scheme=scheme)
    for file, selectors in (
        ("index.html", ["p", "a", ".soft", "td.inconclusive", "th"]),
        (None, ["p", "main a", "td", "summary"]),
    ):
        page.goto((paper / (file or f"{STUDIES[-1]}.html")).as_uri())
        for selector in selectors:
            assert contrast(page, selector) >= 4.5, (scheme, file, selector)


def test_the_ledger_is_filtered_and_sorted(paper, page):
    page.goto((paper / "index.html").as_uri())
    rows = page.locator("tr.claim:visible")
    every = page.locator("tr.claim").count()
    assert every > 50
    assert rows.count() == 0  # papers first
    page.click(".ledger .open >> nth=0")
    assert 0 < rows.count() < every
    page.click("#all")
    assert rows.count() == every
    page.click("#all")
    page.fill("#find", "isaac tile")
    few = rows.count()
    assert 0 < few < every
    assert page.inner_text("#count") == f"{few} of {every} claims"
    assert "find=isaac+tile" in page.url
    page.fill("#find", "Tanha isaac")  # no beginning of a word that is finished counts
    assert rows.count() == 0
    page.fill("#find", "")
    page.select_option("select[name=kind]", "ours")
    assert set(rows.evaluate_all("all => all.map(e => e.dataset.kind)")) == {"ours"}
    page.reload()
    assert page.input_value("select[name=kind]") == "ours"
    assert set(rows.evaluate_all("all => all.map(e => e.dataset.kind)")) == {"ours"}
    page.select_option("select[name=kind]", "")
    head = page.locator(".ledger thead th", has_text="measured")
    for direction in ("ascending", "descending"):
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == direction
        found = page.locator("tr.claim:visible td[data-label=measured]").evaluate_all(
            "all => all.map(e => +e.dataset.sort)"
        )
        values = [v for v in found if v is not None and v == v]
        assert len(found) == every  # all claims, whosever they are
        assert values == sorted(values, reverse=direction == "descending")
    head.locator("button").click()
    assert rows.count() == 0


def test_every_claim_has_a_mark_that_leads_to_its_row(paper, page):
    page.goto((paper / "index.html").as_uri())
    assert page.locator(".forest .mark").count() == page.locator("tr.claim").count()
    page.set_viewport_size({"width": 390, "height": 844})
    places = page.locator(".forest .mark").evaluate_all(
        "all => all.map(e => e.getBoundingClientRect()).map(r => [r.left, r.right])"
    )
    assert all(left >= 0 and right <= 390 for left, right in places)


@pytest.mark.parametrize(
    ("row", "at", "number"),
    [
        ({"measured": 2.0, "low": 1.0, "high": 3.0}, 0.62, None),
        ({"sign": "<=", "measured": 2.0, "low": 1.0, "high": 3.0}, 0.38, None),
        ({"value": 3.0, "measured": 2.0, "low": 1.0, "high": 3.0}, 0.62, 0.74),
        ({"measured": 99.0, "low": 98.0, "high": 100.0}, 0.98, None),
        ({"measured": 2.0, "low": float("nan"), "high": 3.0}, 0.5, None),
        ({"sign": "<=", "measured": 2.0, "low": 2.0, "high": 2.0, "kind": "arithmetic"}, 0.02, None),
        ({"measured": float("nan"), "low": float("nan"), "high": float("nan")}, 0.5, None),
    ],
)
def test_a_mark_lies_by_its_interval_on_its_side_of_the_criterion(row, at, number):
    row = {"kind": "direction", "sign": ">=", "bound": 1.0, "value": float("nan")} | row
    assert _place(row) == {"at": pytest.approx(at), "number": number and pytest.approx(number)}


def test_a_claim_leads_to_its_row(paper, page):
    page.goto((paper / "index.html").as_uri())
    page.click("#all")
    row = page.locator("tr.claim").last
    claim = row.locator("td").first.evaluate("e => e.firstChild.textContent")
    row.locator("td:last-child a").click()
    assert page.locator(":target td").first.evaluate("e => e.firstChild.textContent") == claim


def test_a_report_begins_with_its_answer_and_ends_with_its_provenance(paper, page):
    for name in STUDIES:
        page.goto((paper / f"{name}.html").as_uri())
        run = room.last_run(name, paper)
        if run.answer:
            assert page.locator(".summary", has_text="Answer.").count() == 1
        place = page.evaluate("['.provenance', 'h2'].map(e => document.querySelector(e).getBoundingClientRect().top)")
        assert place[0] > place[1]
        assert page.locator("footer").inner_text().count("commit") >= 1
        assert page.locator("details.code[open]").count() == 0
        drawn = len(re.findall(r"(?m)^plots\.show\(", study.parameters.python_of(name)))  # what a cell always draws
        assert page.locator("figure").count() == page.locator("figure figcaption").count() >= drawn > 0


def test_a_verdict_leads_to_a_figure_and_a_figure_to_its_rows(paper, page):
    linked = every = 0
    for name in STUDIES:
        page.goto((paper / f"{name}.html").as_uri())
        verdicts = page.locator(".claims td.verdict")
        linked, every = linked + verdicts.locator("a").count(), every + verdicts.count()
        rows = pd.read_csv(paper / "results" / f"{name}.csv")
        named = page.locator("figcaption a ~ code").all_inner_texts()
        assert named
        assert {*named} <= {*rows["experiment"]}
    assert linked > 0.7 * every  # what is settled in a section without figure or table leads nowhere


def test_a_verdict_leads_to_the_first_figure_after_what_settled_it_in_its_section_or_to_a_table():
    figure = [new_output("display_data", {"text/html": "<figure><figcaption></figcaption></figure>"})]
    shown = [new_output("display_data", {"text/html": "<table></table>"})]
    row = '<tr id="claim-{}"><td>said</td><td class="verdict inconclusive">inconclusive</td></tr>'
    rows = "".join(map(row.format, range(1, 5)))
    table = [new_output("display_data", {"text/html": f'<table class="claims">{rows}</table>'})]
    cells = [
        new_markdown_cell("## One"),
        new_code_cell("a = study.measure(made, []), study.measure(unasked, [])", execution_count=1),
        new_code_cell("plots.show(a)", execution_count=2, outputs=figure),
        new_code_cell("b = 1", execution_count=3),
        new_markdown_cell("## Two"),
        new_code_cell("c = 2", execution_count=4, outputs=shown),
        new_code_cell("table", execution_count=5, outputs=table),
    ]
    link(cells, [1.0, 3.0, 4.0, float("nan")], "results/s.csv", {"made"})
    assert "Rows</a> of <code>made</code>.</figcaption>" in cells[2].outputs[0].data["text/html"]
    text = cells[-1].outputs[0].data["text/html"]
    found = re.findall(r'claim-(\d)"><td>said</td><td class="[^"]+"><a href="#([^"]+)"', text)
    assert found == [("1", "figure-1"), ("2", "figure-1"), ("3", "table-1")]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (["a = study.measure(made, [])", "def f():\n    return a", "f()"], ["made"]),
        (["def ask(what):\n    return study.measure(what, [])", "a = ask(made)", "a"], ["made"]),
        (["a = study.measure(made, [])", "b = {}\nb['x'] = a", "b"], ["made"]),
        (["a = study.measure(made, [])", "for x in a:\n    y = x", "y"], ["made"]),
        (["a = study.measure(made, [])", "c = [a for a in range(3)]", "c"], []),
        (["a = study.measure(made, [])", "a = 1", "a"], []),
        (["a = study.measure(made, [])", "b = study.measure(other, [{'x': a}])", "b"], ["other"]),
        (["%time 1", "a = study.measure(made, [])", "a"], ["made"]),
    ],
)
def test_rows_are_followed_through_names(code, expected):
    cells = [new_code_cell(source, execution_count=i) for i, source in enumerate(code)]
    assert experiments(cells)[2] == expected


@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (390, "dark")])
def test_axe_finds_no_violation(paper, page, width, scheme):
    page.set_viewport_size({"width": width, "height": 844})
    page.emulate_media(color_scheme=scheme)
    for file in pages(paper):
        if scheme == "dark" and file.stem not in ("index", STUDIES[-1]):
            continue  # one style sheet for all pages, and a page takes ten seconds
        page.goto(file.as_uri())
        found = Axe().run(page)
        assert found.violations_count == 0, f"{file.name}: {found.generate_report()}"


def test_a_phone_gets_a_figure_of_its_own(paper, page):
    page.goto((paper / "03_fault_tolerance.html").as_uri())
    image = page.locator("figure source + img").first
    natural = "e => e.naturalWidth / e.naturalHeight"
    wide = image.evaluate(natural)
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_function("e => e.currentSrc !== e.src", arg=image.element_handle())
    page.wait_for_timeout(100)
    assert image.evaluate(natural) < wide / 2  # two panels side by side, now one under the other


def test_paper_shows_no_code_and_no_navigation(paper, page):
    page.goto((paper / f"{STUDIES[-1]}.html").as_uri())
    page.emulate_media(media="print")
    assert page.locator("nav:visible").count() == 0
    assert page.locator("details.code:visible").count() == 0
    assert page.locator("figure:visible").count() > 0


def test_figures_stand_alone_for_the_index(paper):
    figure = (paper / "figures" / "01_lottery_ticket_vs_finetuning.svg").read_text("utf-8")
    assert "large rate" in figure  # a curve's title, not one of the page's icons
    index = (paper / "index.html").read_text("utf-8")
    assert index.count("data:image/svg+xml") == len(STUDIES)


def test_neighbouring_code_is_one_fold():
    shown = [new_output("stream", text="seen")]
    cells = [new_code_cell("a"), new_code_cell("b"), new_code_cell("c", outputs=shown), new_code_cell("d")]
    cells += [new_markdown_cell("text"), new_code_cell(" "), new_code_cell("e", outputs=shown)]
    assert [cell.source for cell in folded(cells)] == ["a\n\nb\n\nc", "d", "text", "e"]
