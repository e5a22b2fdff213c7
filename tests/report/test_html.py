"""Tables for notebooks: read back by an HTML parser, with names that try to be more than text."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser

from records import DENSE, PRUNED, report, row

from sparsessm.evaluation.perplexity import Perplexity
from sparsessm.report.html import html_table
from sparsessm.report.record import perplexity_table, removed_table

EVIL = "</td><script>alert(1)</script>&lt;\x1b[31m\u202e\"'"


class Tables(HTMLParser):
    """Tags as they stand, and the text of captions and lines of cells."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[object] = []
        self.captions: list[str] = []
        self.lines: list[list[str]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "tr":
            self.lines.append([])
        elif tag in ("td", "th"):
            self.lines[-1].append("")
        elif tag == "caption":
            self.captions.append("")

    def handle_data(self, data: str) -> None:
        if self.tags[-1] == "caption":
            self.captions[-1] += data
        else:
            self.lines[-1][-1] += data


def test_a_report_shows_the_tables_of_its_record() -> None:
    change = {"mean": 0.05, "low": 0.04, "high": 0.06}
    made = report(row(), perplexity={"dense": DENSE, "pruned": PRUNED, "difference": change})
    seen = Tables(made._repr_html_())
    record = made.record()
    columns, cells = removed_table(record["targets"], record["totals"])
    cost, costs = perplexity_table({"dense": DENSE, "pruned": PRUNED}, {"pruned": change})
    assert seen.captions == ["What was removed", "What it cost"]
    assert seen.lines == [columns, *cells, cost, *costs]
    assert "+5.00 (+4.00 to +6.00)" in seen.lines[-1]
    assert Tables(report(row())._repr_html_()).captions == ["What was removed"]  # nothing was measured


def test_a_perplexity_shows_its_text_and_its_interval() -> None:
    measured = Perplexity("mine.txt", 30, 2, 16, 2.0, 7.389, 7.0, 8.0, 1.25, (1.9, 2.1))
    seen = Tables(measured._repr_html_())
    assert seen.captions == ["2 windows of 16 tokens"]
    assert seen.lines == [
        ["text", "perplexity (95 %)", "bits/byte"],
        ["mine.txt", "7.39 (7.00 to 8.00)", "1.2500"],
    ]
    single = replace(measured, low=float("nan"), high=float("nan"), perplexity=float("inf"))
    assert Tables(single._repr_html_()).lines[1][1] == "- (- to -)"


def test_names_stay_text() -> None:
    shown = "</td><script>alert(1)</script>&lt;\\x1b[31m\\u202e\"'"
    named = Perplexity(EVIL, 30, 2, 16, 2.0, 7.389, 7.0, 8.0, 1.25, (1.9, 2.1))
    for page in (
        html_table(EVIL, [EVIL], [[EVIL], []]),
        named._repr_html_(),
        report(row(target=f"layers.0.{EVIL}"))._repr_html_(),
    ):
        seen = Tables(page)
        assert {*seen.tags} <= {"table", "caption", "tr", "td", "th"} and not seen.attributes
        assert shown in "".join(cell for line in seen.lines for cell in line)
