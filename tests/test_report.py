"""The report of a run: that it can be read, says what it was given, and runs and loads nothing."""

import base64
import html
import importlib.util
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from jaxft.citation import works
from jaxft.data import Frame
from jaxft.evaluate import curves, parity_plot
from jaxft.evaluate.predictions import FrameResult
from jaxft.evaluate.svg import inline, literal, new_figure
from jaxft.report import Judged, Report, environment, render, sections, timings, write
from jaxft.report.html import Markup, facts, table, tag

EVIL = '<script>alert("1")</script>"\'><img src=x onerror=alert(2)>&amp;]]>--></style></title>$_{$'
"""Closes whatever it may stand in, and would run or load something if it were not escaped."""

SIZE_LIMIT = 5_000_000

HISTORY = [
    {
        "epoch": i,
        "is_best": i == 3,
        "valid/loss": 9.0 / (i + 1),
        "valid/energy": 0.05 / (i + 1),
        "valid/forces": 0.2 / (i + 1),
        "replay/energy": 0.01 * (i + 1),
        "replay/forces": 0.02 * (i + 1),
        "seconds": 2.0 if i else 7.0,
        **({"train/loss": 12.0 / i, "learning_rate": 1e-3 / i} if i else {}),
    }
    for i in range(5)
]

PREFLIGHT = {
    "choices": {
        "foundation": {"e0s": {"H": -13.6, "O": -430.0}, "rmse": 812.5, "mae": 700.0, "worst": 900},
        "estimated": {"e0s": {"H": -13.5, "O": -431.0}, "rmse": 4.25, "mae": 3.0, "worst": 9.0},
    },
    "missing": {"isolated_atoms": "no frame is marked"},
    "recommendation": "estimated",
    "notes": ["rank 2 of 2 elements"],
}


def judged(name="test", *, count=6, atoms=3, shift=0.1, seed=0, **options):
    """Frames with labels, results ``shift`` off before and half as much after."""
    rng = np.random.default_rng(seed)
    frames, before, after = [], [], []
    for i in range(count):
        forces, stress = rng.normal(size=(atoms, 3)), rng.normal(size=(3, 3)) * 1e-3
        frames.append(
            Frame(
                np.array([1, 1, 8][:atoms] + [8] * max(atoms - 3, 0)),
                rng.normal(size=(atoms, 3)),
                np.eye(3) * 9,
                (True, True, True),
                energy=-10.0 - i,
                forces=forces,
                stress=stress,
                config_type="liquid" if i % 2 else "ice",
                source=f"{name}:{i}",
            )
        )
        for results, size in ((before, shift), (after, shift / 2)):
            energy = -10.0 - i + size * atoms
            per_atom = np.full(atoms, energy / atoms)
            results.append(FrameResult(energy, per_atom, forces + size, stress + size * 1e-3))
    return Judged(name, frames, before, after, **options)


def full_report(text="plain", **options):
    """Every field filled; ``text`` wherever a person's words can go."""
    return Report(
        title=f"run {text}",
        run=f"0123 {text}",
        summary={text: f"model {text}"},
        warnings=[f"careful {text}"],
        tests=[judged(f"set {text}"), judged(f"base {text}", seed=1, is_base=True)],
        history=[{**row, f"head {text}/forces": 0.02} for row in HISTORY],
        best_epoch=3,
        trained=f"leaf {text}\ntrainable params: 3 || {text}",
        e0s={**PREFLIGHT, "notes": [text], "missing": {text: text}},
        e0s_used={text: {"model": -1.0, "now": -2.0}},
        works=works(also=["kirkpatrick2017ewc"]),
        settings=f"model: a\n# {text}\n",
        environment={"base": text, text: {"nested": text}},
        timings={text: text},
        **options,
    )


class Page(HTMLParser):
    """Tags, attributes, text and ids of a page; refuses elements that are not closed in order."""

    VOID = ("meta", "br", "hr", "img", "link", "input")

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.texts, self.ids = [], [], [], {}, []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        where = self.open[-1] if self.open else ""
        self.texts[where] = self.texts.get(where, "") + data

    @property
    def text(self):
        return " ".join(" ".join(self.texts.values()).split())

    @property
    def numbers(self):
        return json.loads(self.texts["script"])


@pytest.fixture(scope="module")
def plain():
    return render(full_report())


@pytest.fixture(scope="module")
def hostile():
    return render(full_report(EVIL))


def test_every_section_is_there_and_every_link_leads_somewhere(plain):
    page = Page(plain)
    for title in sections.SECTIONS:
        assert title in page.text
    anchors = {v[1:] for tag, name, v in page.attributes if name == "href" and v.startswith("#")}
    assert anchors <= set(page.ids)
    assert len(anchors) > len(sections.SECTIONS) - 1
    assert page.tags.count("svg") == 3


def test_ids_are_unique_though_figures_share_a_page(plain):
    ids = Page(plain).ids
    assert len(set(ids)) == len(ids)
    used = set(re.findall(r"url\(#([^)]+)\)", plain)) | set(re.findall(r'href="#([^"]+)"', plain))
    assert used <= set(ids)


@pytest.mark.parametrize("which", ["plain", "hostile"])
def test_nothing_runs_and_nothing_is_loaded(which, request):
    text = request.getfixturevalue(which)
    page = Page(text)
    scripts = [dict(pairs) for pairs in attributes_of(page, "script")]
    assert page.tags.count("script") == 1
    assert scripts == [{"type": "application/json", "id": "numbers"}]
    assert not {"link", "iframe", "object", "embed", "img", "base", "form"} & set(page.tags)
    for tag_, name, value in page.attributes:
        assert not name.startswith("on"), (tag_, name)
        if name in ("src", "srcset", "data", "action", "xlink:href", "poster", "background"):
            assert value.startswith(("data:image/png;base64,", "#")), (tag_, value)
        if name == "href":
            assert value.startswith(("#", "https://", "data:application/json")), value
            assert not value.startswith("https://") or tag_ == "a"
        if name == "style":
            assert "http" not in value
    assert "http" not in page.texts["style"]
    assert "@import" not in page.texts["style"]
    policy = [v for _, n, v in page.attributes if n == "content" and "default-src" in v]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def attributes_of(page, tag):
    """One list of pairs, since only one element has that tag."""
    return [[(name, value) for t, name, value in page.attributes if t == tag]]


def test_what_people_wrote_is_shown_as_they_wrote_it(plain, hostile):
    page = Page(hostile)
    assert page.tags == Page(plain).tags, "a text became an element"
    for start in ("run ", "model ", "careful ", "set ", "base ", "leaf ", "# "):
        assert start + EVIL in page.text
    assert page.texts["title"] == f"run {EVIL}"
    assert page.numbers["title"] == f"run {EVIL}"


def test_a_report_of_everything_is_small(tmp_path):
    many = [judged(f"set {i}", count=900, atoms=30, seed=i) for i in range(2)]
    path = write(tmp_path / "report.html", Report(title="big", tests=many, history=HISTORY * 60))
    assert path.stat().st_size < SIZE_LIMIT


def test_plots_that_would_make_the_page_too_large_are_left_out_with_a_word(monkeypatch):
    room = sections.PLOT_LIMIT
    monkeypatch.setattr(sections, "_parity", lambda test, ids: f"<svg>{'x' * (room // 3)}</svg>")
    report = Report(title="t", tests=[judged(str(i)) for i in range(4)])
    page = Page(sections.parity(report, sections.tables(report)))
    assert page.tags.count("svg") == 2
    assert page.text.count("Not drawn: the page would become too large.") == 2


def test_the_numbers_in_the_page_are_those_of_the_run(plain):
    page = Page(plain)
    numbers = page.numbers
    assert numbers["history"][4]["replay/forces"] == HISTORY[4]["replay/forces"]
    assert numbers["tests"]["set plain"]["before"]["total"]["energy"]["rmse"] == pytest.approx(100)
    assert numbers["tests"]["set plain"]["after"]["total"]["energy"]["rmse"] == pytest.approx(50)
    assert numbers["works"] == ["jaxft", "batatia2022mace", "kirkpatrick2017ewc"]
    (link,) = [v for _, name, v in page.attributes if name == "href" and v.startswith("data:")]
    assert json.loads(base64.b64decode(link.partition("base64,")[2])) == numbers


def test_numbers_that_are_not_finite_are_null_in_json_and_words_on_the_page():
    row = {"epoch": 0, "valid/energy": float("nan"), "valid/forces": float("inf"), "seconds": 1.0}
    page = Page(render(Report(title="t", history=[row, {**row, "epoch": 1}])))
    assert page.numbers["history"][0]["valid/energy"] is None
    assert "nan" in page.text
    assert "inf" in page.text


def rows_of(markup):
    """Texts of the cells of each row."""
    rows = re.findall(r"<tr>(.*?)</tr>", markup)
    return [
        [html.unescape(re.sub("<[^>]*>", "", c)) for c in re.findall(r"<t[dh].*?</t[dh]>", row)]
        for row in rows
    ]


def test_the_table_of_changes_holds_the_errors_in_their_units():
    report = Report(title="t", tests=[judged("water", shift=0.1)])
    rows = rows_of(sections.changes(report, sections.tables(report)))
    energy, forces, stress = rows[1:4]
    assert energy == [
        "water",
        "energy, meV/atom",
        "6",
        "100.00",
        "50.00",
        "100.00",
        "50.00",
        "0.50",
    ]
    assert forces[:3] == ["water", "forces, meV/Å", "6"]
    assert forces[5:] == ["100.00", "50.00", "0.50"]
    assert stress[5:] == ["0.10", "0.05", "0.50"]
    assert ["ice", "energy, meV/atom", "3", "100.00", "50.00", "100.00", "50.00", "0.50"] in rows


def test_errors_that_grow_are_red_and_those_that_shrink_green():
    def colours(shift):
        item = judged(shift=shift)
        swapped = Judged(item.name, item.frames, item.after, item.before)
        found = [Report(title="t", tests=[x]) for x in (item, swapped)]
        return [set(re.findall("good|bad", sections.changes(r, sections.tables(r)))) for r in found]

    assert colours(0.1) == [{"good"}, {"bad"}]


def test_labels_that_are_absent_are_in_no_row():
    item = judged()
    for frame in item.frames:
        object.__setattr__(frame, "stress", None)
    report = Report(title="t", tests=[item])
    assert "stress" not in sections.changes(report, sections.tables(report))


def test_forgetting_compares_base_sets_and_watched_sets_with_their_start():
    report = Report(
        title="t",
        tests=[judged("target"), judged("base", is_base=True)],
        history=HISTORY,
        best_epoch=3,
    )
    rows = rows_of(sections.forgetting(report, sections.tables(report)))
    assert ["base", "energy, meV/atom", "100.00", "50.00", "0.50"] in rows
    assert ["replay", "forces, meV/Å", "20.00", "80.00", "4.00"] in rows
    assert not any(row[0] in ("target", "valid", "train") for row in rows)


def test_isolated_atoms_show_what_was_used_and_what_was_recommended():
    used = {"H": {"model": -13.6, "now": -13.5}}
    report = Report(title="t", e0s=PREFLIGHT, e0s_used=used)
    rows = rows_of(sections.isolated_atoms(report, ()))
    assert ["H", "-13.6000", "-13.5000"] in rows
    assert ["estimated (recommended)", "4.25", "3.00", "9.00"] in rows
    assert ["O", "-430.0000", "-431.0000"] in rows


def test_an_empty_report_is_a_page_with_a_title():
    page = Page(render(Report(title="nothing yet")))
    assert page.texts["h1"] == "nothing yet"
    assert "h2" not in page.tags


def test_without_matplotlib_the_tables_stay_and_a_sentence_says_why(monkeypatch):
    real = importlib.util.find_spec
    absent = lambda name, *rest: None if name == "matplotlib" else real(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", absent)
    page = Page(render(full_report()))
    assert "svg" not in page.tags
    assert page.text.count("matplotlib is not installed") == 2
    assert "100.00" in page.text


def test_a_report_replaces_one_of_the_same_run_and_nothing_else(tmp_path):
    path = tmp_path / "report.html"
    write(path, Report(title="first", run='a "run"'))
    write(path, Report(title="second", run='a "run"'))
    assert "second" in path.read_text()
    for other in (Report(title="third", run="another"), Report(title="fourth")):
        with pytest.raises(FileExistsError, match=r"report\.html"):
            write(path, other)
    path.write_text('a page of someone else <body><meta name="jaxft-run" content="a">')
    with pytest.raises(FileExistsError):
        write(path, Report(title="fifth", run="a"))
    assert [found.name for found in tmp_path.iterdir()] == ["report.html"]


def test_timings_tell_the_compiling_epoch_from_the_others():
    history = [{"epoch": i, "seconds": s} for i, s in enumerate((9.0, 30.0, 2.0, 3.0, 2.5))]
    assert timings(history) == {
        "epochs": "4",
        "first epoch, with compilation": "30.0 s",
        "median epoch": "2.8 s",
        "all epochs": "37.5 s",
    }
    assert timings(history[:1]) == {}


def test_the_environment_names_versions_and_devices():
    found = environment()
    assert found["devices"].endswith("(cpu)")
    assert re.match(r"\d+\.\d+", found["jax"])


def test_markup_is_escaped_unless_it_says_that_it_is_markup():
    assert tag("p", "a<b", Markup("<br>"), title='"') == '<p title="&quot;">a&lt;b<br></p>'
    assert "<td>&lt;b&gt;</td>" in table(["x", "y"], [["a", "<b>"]])
    assert "&lt;i&gt;" in facts({"<i>": 1})


def test_curves_leave_out_what_a_logarithm_does_not_know():
    rows = [
        {"epoch": 0, "valid/energy": 0.0, "valid/forces": 0.5, "learning_rate": 0.0},
        {"epoch": 1, "valid/energy": float("nan"), "valid/forces": 0.25, "learning_rate": 0.001},
    ]
    assert curves.series(rows) == {
        "forces": {"valid": ([0, 1], [500.0, 250.0])},
        "learning_rate": {"": ([1], [0.001])},
    }
    assert curves.curves_svg([{"epoch": 0, "seconds": 1.0}]) == ""


def test_a_figure_is_the_same_in_every_run_and_takes_the_colours_of_its_page():
    rows = [{k: v for k, v in row.items() if "energy" in k or k == "epoch"} for row in HISTORY]
    first, second = (curves.curves_svg(rows, best=3) for _ in range(2))
    assert first == second
    texts = re.findall(r"<text[^>]*>", first)
    assert texts
    assert all("currentColor" in text for text in texts)
    assert "http" not in first
    assert "xmlns" not in first
    assert ">replay</text>" in first


def test_labels_show_dollars_and_underscores():
    def draw():
        figure = new_figure(2, 2)
        axes = figure.subplots()
        for name in ("_hidden", "a $x_1$ b", "<b>"):
            axes.plot([1, 2], [1, 2], label=literal(name))
        axes.legend()
        return figure

    texts = re.findall(r"<text[^>]*>([^<]*)</text>", inline(draw, ids="f", label="a < b"))
    shown = {text.strip("\u200b") for text in map(html.unescape, texts)}
    assert {"_hidden", "a $x_1$ b", "<b>"} <= shown


def test_drawing_for_a_page_leaves_pictures_for_files_alone(tmp_path):
    item = judged()
    paths = [tmp_path / "before.png", tmp_path / "after.png"]
    parity_plot(item.frames, {"model": item.after}, paths[0])
    render(Report(title="t", tests=[item]))
    parity_plot(item.frames, {"model": item.after}, paths[1])
    assert paths[0].read_bytes() == paths[1].read_bytes()
