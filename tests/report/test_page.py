"""The page: complete, accessible, without a request, and inert whatever its names and texts are."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from dataclasses import asdict

import pages
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from sparsessm.data.inert import visible
from sparsessm.report.page import markup, pictures
from sparsessm.report.page.document import is_page, page
from sparsessm.report.page.layers import cells
from sparsessm.report.page.markup import plain, tag
from sparsessm.report.page.measured import Measured
from sparsessm.report.page.words import change, headline, size, times

QUICK = (Phase.explicit, Phase.generate)  # a page takes a second: a failing one is not made smaller
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=40)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def hostile() -> pages.Reader:
    return pages.Reader(pages.whole(pages.HOSTILE))


@pytest.fixture(scope="module")
def friendly() -> pages.Reader:
    return pages.Reader(pages.whole("a friendly text"))


def test_hostile_texts_make_no_element_and_no_attribute(
    hostile: pages.Reader, friendly: pages.Reader
) -> None:
    def shape(reader: pages.Reader) -> Counter[tuple[str, ...]]:
        return Counter((name, *attributes) for name, attributes in reader.elements)

    assert shape(hostile) == shape(friendly)
    assert not hostile.comments and {*hostile.sources} == {"style", "script"}
    assert hostile.sources == friendly.sources
    assert hostile.text.count("alert(1)") > 20 and "https://x.test/a" in hostile.text  # shown, as text


def test_nothing_is_fetched_and_nothing_runs_but_our_script(hostile: pages.Reader) -> None:
    for name, attributes in hostile.elements:
        assert not [one for one in attributes if one.startswith("on") or one in ("style", "src", "srcset")]
        assert str(attributes.get("href", "#")).startswith("#"), name
        for attribute, value in attributes.items():
            if "url(" in str(value):
                assert re.fullmatch(r"url\(#[\w-]+\)", str(value)), attribute
    assert not {name for name, _ in hostile.elements} & {
        "link",
        "img",
        "iframe",
        "object",
        "form",
        "base",
        "image",
    }
    assert not re.search(r"https?:|url\(|@import|fetch|eval|innerHTML", "".join(hostile.sources.values()))


def test_the_policy_names_the_hashes_of_style_and_script(hostile: pages.Reader) -> None:
    (policy,) = [
        m["content"] for m in hostile.all_of("meta") if m.get("http-equiv") == "Content-Security-Policy"
    ]
    rules = dict(rule.split(" ", 1) for rule in str(policy).split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    for kind in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(hostile.sources[kind].encode()).digest()).decode()
        assert rules[f"{kind}-src"] == f"'sha256-{digest}'"
    assert len(rules) == 5 and "unsafe" not in str(policy)


def test_controls_and_bidi_are_written_out() -> None:
    content = pages.whole(pages.HOSTILE)
    content.encode()  # no half of a character
    assert visible(content, allowed="\n") == content
    assert not {"\ufffe", "\U0001fffe", "\ufeff"} & {*content}
    assert "\\x1b[31m" in content and "\\u202e" in content


def test_values_of_the_record_and_of_the_measurement_are_there(friendly: pages.Reader) -> None:
    text = " ".join(friendly.text.replace("\u00a0", " ").split())
    for said in (
        "A third of the bytes, +1.4 % perplexity, 1.7 times as fast",
        "334 bytes", "33 % of 1.00 kB", "95 %: +1.0 % to +2.0 %", "93.0 %", "9.50 to 10.50",
        "100 (90 to 110)",         "1.70 (1.60 to 1.80)", "What was not tested",
        "sparsessm prune --recipe 'a friendly text/pruning.json'",
        "chosen a friendly text", "+8.7 %", "0.500 nats a token lost", "Refused",
    ):  # fmt: skip
        assert said in text, said


def test_headings_come_in_order_and_all_is_named(friendly: pages.Reader) -> None:
    levels = [int(name[1]) for name, _ in friendly.elements if re.fullmatch(r"h\d", name)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(below - above <= 1 for above, below in zip(levels, levels[1:], strict=False))
    assert friendly.all_of("html") == [{"lang": "en", "dir": "ltr"}]
    ids = [attributes["id"] for _, attributes in friendly.elements if "id" in attributes]
    assert len(ids) == len({*ids})
    for _, attributes in friendly.elements:
        if name := attributes.get("aria-labelledby"):
            assert name in ids
    assert len(friendly.all_of("svg")) == 5  # sparsity, bits, error, KL, frontier
    assert all(one["role"] == "img" and one["aria-labelledby"] for one in friendly.all_of("svg"))
    assert len(friendly.all_of("table")) == len(friendly.all_of("caption"))
    assert len(friendly.all_of("figure")) == len(friendly.all_of("figcaption")) == 5


def test_pictures_have_colours_of_the_page_only(friendly: pages.Reader) -> None:
    inside = [attributes for _, attributes in friendly.elements if {*attributes} & {"fill", "stroke"}]
    colours = {str(one[side]) for one in inside for side in ("fill", "stroke") if side in one}
    assert {re.sub(r"--\w+", "--x", colour) for colour in colours} <= {"none", "var(--x)"}
    defined = set(re.findall(r"(--\w+):", friendly.sources["style"]))
    assert {colour[4:-1] for colour in colours if colour != "none"} <= defined
    assert all(role in {name[2:] for name in defined} for role in pictures.ROLES)


def contrast(one: str, other: str) -> float:
    """Of two colours, by WCAG 2."""

    def luminance(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_text_stands_out_in_light_and_in_dark(friendly: pages.Reader) -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    themes = re.findall(r":root \{(.*?)\}", friendly.sources["style"], re.DOTALL)[:2]
    for theme in (dict(re.findall(r"--([\w-]+): (#\w{6})", part)) for part in themes):
        for ground in ("page", "card"):
            for text in ("ink", "soft", "accent"):
                assert contrast(theme[text], theme[ground]) >= 4.5, (text, ground)
            for line in range(1, pictures.SERIES + 1):
                assert contrast(theme[f"s{line}"], theme[ground]) >= 3
        for level in range(1, 5):
            assert contrast(theme["ink"], theme[f"h{level}"]) >= 4.5
        assert contrast(theme["warn"], theme["warn-page"]) >= 4.5


def test_a_page_is_known_by_its_beginning_and_is_small() -> None:
    content = pages.whole("x").encode()
    assert is_page(content[:1024]) and len(content) < 250_000
    assert not is_page(b"<!doctype html><p>sparsessm") and not is_page(b"")


@given(ANY_TEXT)
def test_any_text_is_one_piece_of_text(text: str) -> None:
    made = tag("p", text, title=text).html
    reader = pages.Reader(made)
    assert reader.elements == [("p", {"title": plain(text)})] and reader.text == plain(text)
    made.encode()


@pytest.mark.parametrize(
    "wrong",
    [
        {"onclick": "x"}, {"style": "color: red"}, {"href": "https://x.test"}, {"src": "//x.test"},
        {"href": "javascript:x"}, {"a b": "c"},
    ],
)  # fmt: skip
def test_what_runs_or_fetches_is_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="attribute"):
        tag("a", "x", **wrong)


def test_only_styles_and_scripts_of_ours_are_raw() -> None:
    with pytest.raises(ValueError, match="not a style or script"):
        markup.raw("script", "</script>")
    with pytest.raises(ValueError, match="not a style or script"):
        markup.raw("p", "x")


FIELDS = st.fixed_dictionaries({}, optional={
    name: PLAIN
    for name in "targets totals recipe machine versions seconds structure perplexity calibration".split()
})  # fmt: skip


@settings(max_examples=10, deadline=None, phases=QUICK)
@given(FIELDS, st.dictionaries(ANY_TEXT, PLAIN, max_size=2), st.lists(PLAIN, max_size=2))
def test_any_plain_values_give_a_page(record: dict, facts: dict, rows: list) -> None:  # type: ignore[type-arg]
    known = {"models": rows, "edges": rows, "counts": rows, "dense": facts, "tokens": rows, "cells": rows}
    found = Measured(
        perplexity={**facts, "pruned": facts}, divergence={**facts, **known}, windows=[*rows, known],
        sizes={**facts, "result": facts}, speed={**facts, **known}, tasks={**known, "columns": rows},
        missing=[*rows], machine=facts,
    )  # fmt: skip
    fit = {"points": rows, "chosen": facts, "refused": rows, "why": facts}
    pages.Reader(page(record, found, directory="x", fit=fit))


@settings(max_examples=10, deadline=None, phases=QUICK)
@given(
    st.lists(
        st.tuples(
            st.integers(-3, 10**30), ANY_TEXT, st.integers(-(10**320), 10**320), st.integers(), st.floats()
        ),
        max_size=6,
    )
)
def test_pictures_of_any_numbers_are_drawn(rows: list) -> None:  # type: ignore[type-arg]
    targets = [
        {
            "layer": layer,
            "target": f"x{name}",
            "pruned": pruned,
            "total": total,
            "bits": error,
            "error": error,
            "signal": 2,
        }
        for layer, name, pruned, total, error in rows
    ]
    found = cells({"targets": targets})
    for field in ("sparsity", "bits"):
        pictures.heat("x", "X", found, field)
    pictures.lines("x", "X", found)


def test_a_result_of_which_little_is_known() -> None:
    reader = pages.Reader(page({"targets": [], "totals": {}, "recipe": {}}, Measured(), directory="out"))
    assert "its cost was not measured" in reader.text and not reader.all_of("svg")


def test_what_was_measured_comes_back_from_its_file() -> None:
    found = pages.measured("text")
    content = json.loads(json.dumps(found.record()))
    assert Measured.restored(content) == found
    assert asdict(found).keys() < content.keys()
    for wrong in ({"format": 2}, {"windows": {}}, {"more": 1}):
        assert Measured.restored({**content, **wrong}) is None
    del content["speed"]
    assert Measured.restored(content) is None


@pytest.mark.parametrize(
    ("bytes_", "mean", "ends", "speed", "said"),
    [
        ((235, 1000), 0.0143, (0.01, 0.02), 1.73, "24 % of the bytes, +1.4 % perplexity, 1.7 times as fast"),
        (
            (250, 1000),
            0.001,
            (-0.004, 0.006),
            None,
            "A quarter of the bytes, no measurable loss of perplexity",
        ),
        ((250, 1000), 0.05, (-0.02, 0.2), None, "A quarter of the bytes, perplexity \u22122.0 % to +20 %"),
        ((1000, 1000), 0.21, (0.2, 0.22), 0.7, "As many bytes, +21 % perplexity, 0.70 times as fast"),
        ((5, 0), None, (None, None), None, "A compressed model; its cost was not measured"),
        ((1100, 1000), -0.02, (-0.03, -0.01), None, "110 % of the bytes, \u22122.0 % perplexity"),
    ],
)
def test_the_headline(
    bytes_: tuple[int, int],
    mean: float | None,
    ends: tuple[float | None, float | None],
    speed: float | None,
    said: str,
) -> None:
    sizes = {"result": {"weights": bytes_[0]}, "dense": {"weights": bytes_[1]}}
    difference = {"mean": mean, "low": ends[0], "high": ends[1]}
    assert headline(sizes, difference, {"median": speed}).replace("\u00a0", " ") == said


def test_numbers_in_words() -> None:
    assert size(1_960_123) == "1.96\u00a0MB" and size(999) == "999\u00a0bytes" and size(None) == "–"
    assert (
        change(0.0004) == "+0.04\u00a0%" and change(-0.00001) == "0.00\u00a0%" and change(float("nan")) == "–"
    )
    assert times(1.73) == "1.7\u00a0times" and times(1.02) == "1.02\u00a0times" and times("x") == "–"
