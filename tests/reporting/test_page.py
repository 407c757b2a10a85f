"""The report page: its charts, its texts, and how it stands in a browser."""

import html
import json
import os
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser
from importlib import resources
from itertools import combinations, pairwise
from xml.etree import ElementTree

import pytest
from jinja2 import UndefinedError

from stages.params import ChooseParams
from stages.reporting import charts
from stages.reporting.page import page as drawn
from stages.reporting.plane import Mark, plane
from stages.reporting.results import Details, Model, Similarities
from stages.reporting.sections import HUES, MOST_SEARCHES, Subject
from stages.reporting.svg import Axis, Box, cut, label_boxes, picture, px, spread, text
from stages.reporting.templating import html as filled
from tests.stages.test_report import DETAILS, Folder, at_width, in_format, metrics_of, with_ends

STUDENTS = ["kd", "ckd", "kd-finetuned"]
MODELS = ["teacher", "half", *STUDENTS]
SECTIONS = [
    "trade-off",
    "models",
    "quality",
    "training",
    "similarity",
    "disagreements",
    "searches",
    "origin",
]
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
SCRIPT = "<script>document.title = 'taken'</script><img src=x onerror=alert(1)>"
TEXTS = [
    SCRIPT,
    "طريقة حساب المتوسط الحسابي لمجموعة من الأرقام " * 4,
    "👩‍👩‍👧‍👦 a family \u202e reversed",
    "x" * 5_000,
    "Remove whitespace at both ends of a string.",
    "漢字だけの文章で空白がないもの" * 30,
]


def details_of(name, texts=TEXTS):
    """All that `evaluate` can leave, with a few hundred points."""
    draw = random.Random(name)
    edges = [round(-0.3 + 0.05 * place, 2) for place in range(27)]
    trained = name != "teacher"
    searches = [
        {
            "set": "docs",
            "query": f"{text[:60]} {place}",
            "results": [
                {"text": found, "score": 0.7 - 0.1 * rank, "relevant": rank == 1}
                for rank, found in enumerate(draw.sample(texts, 4))
            ],
        }
        for place, text in enumerate([*texts, "one more"])
    ]
    return {
        "texts": 583,
        "similarities": {
            "edges": edges,
            "teacher": [draw.randrange(900) for _ in edges[1:]],
            "model": [draw.randrange(900) for _ in edges[1:]],
        },
        "scatter": [[x / 400, x / 400 + draw.gauss(0, 0.05)] for x in range(400)] * trained,
        "disagreements": [
            {"first": a, "second": b, "teacher": 0.81, "model": 0.32} for a, b in pairwise(texts)
        ]
        * trained,
        "searches": searches,
    }


def curve_of(score, *parts):
    head = ",".join(["step", *(f"loss_{part}" for part in parts), score, "learning_rate"])
    rows = [f"0{',' * len(parts)},0.58,0.0"]
    rows += [
        f"{50 * n}{''.join(f',{1 / n}' for _ in parts)},{0.9 - 0.3 / n},0.0001" for n in range(1, 9)
    ]
    return "\n".join([head, *rows, ""])


class Site(Folder):
    """A folder in which models were trained and evaluated."""

    def trained(self, name, curve):
        (self.root / f"{name}.csv").write_text(curve)
        ends = {"minutes": 7.94, "steps": 400, "best_step": 350, "device": "cpu"}
        (self.root / f"{name}.training.json").write_text(json.dumps(ends))

    def fill(self, models=MODELS, students=STUDENTS):
        for place, name in enumerate(models):
            speed = 214.4 if name == "teacher" else 400.0 + place
            metrics = metrics_of(72.9 - 0.2 * place, 0.87, 0.95, 0.76, speed)
            self.evaluated(name, metrics, details_of(name))
            if name in students:
                finetuned = name.endswith("-finetuned")
                self.trained(
                    name,
                    curve_of("dev", "infonce") if finetuned else curve_of("agreement", "kd", "ckd"),
                )
        return self

    def drawn(self, models=MODELS, students=STUDENTS, made_of=None, choose=None, **facts):
        self.report(models, students, made_of, choose, **facts)
        return self.page.read_text()


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


@pytest.fixture
def full(site):
    return site.fill().drawn(Teacher="all-MiniLM-L6-v2", Corpus="24,310 texts")


class Outline(HTMLParser):
    """What stands in a page: tags, sections, text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.sections, self.words = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append((tag, found))
        if tag == "section":
            self.sections.append(found["id"])

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join("".join(self.words).split())

    def all(self, tag):
        return [found for name, found in self.tags if name == tag]


def shapes(svg, tag, kind=None):
    """Attributes of the elements of one kind, in order. An SVG that is no XML fails here."""
    found = [element for element in ElementTree.fromstring(svg).iter() if element.tag == tag]
    return [e.attrib for e in found if kind is None or kind in e.get("class", "").split()]


def words(svg):
    return [e.text for e in ElementTree.fromstring(svg).iter() if e.tag == "text"]


# --- what charts are drawn with


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("<b>&\"'", "&lt;b&gt;&amp;&#34;&#39;"),
        ("a\n\tb\x00\x1b[31m\ud800", "a b��[31m�"),
        ("👩‍👧 שלום", "👩‍👧 שלום"),  # joiners stay
        ("a\u202eb\u2066c\u200fd\u2028e", "a�b�c�d e"),
        (" 104\N{NO-BREAK SPACE}% \n of", "104\N{NO-BREAK SPACE}% of"),
        ("{{ 7 * 7 }}{% raw %}", "{{ 7 * 7 }}{% raw %}"),
    ],
)
def test_texts_of_strangers_are_made_harmless(words, shown):
    assert text(1, 2, words) == f'<text x="1" y="2">{shown}</text>'
    assert f' aria-label="{shown}">' in picture(1, 2, words, [])
    page = drawn(Subject({}, []), facts={"project": words}, made_of={})
    assert f"<title>{shown}: which student to serve</title>" in page
    assert f"<dd>{shown}</dd>" in page
    page.encode()


def test_a_value_that_a_template_lacks_is_an_error():
    with pytest.raises(UndefinedError, match="'project' is undefined"):
        filled("page.html")


def test_the_style_has_a_class_for_each_hue():
    sheet = (resources.files("stages.reporting") / "templates" / "style.css").read_text()
    assert sorted(set(re.findall(r"\.(hue\d+) ", sheet))) == [f"hue{n}" for n in range(HUES)]


def test_long_names_are_cut():
    assert cut("kd-finetuned", 12) == "kd-finetuned"
    assert cut("kd-finetuned", 9) == "kd-f…uned"
    assert cut("kd-finetuned", 2) == "k…"


def test_coordinates_are_short():
    assert [px(v) for v in (1, 1.25, 12.04, -0.01, 1234.56)] == ["1", "1.2", "12", "0", "1234.6"]


def test_an_axis_puts_values_on_pixels():
    assert [Axis(0, 10, 100, 200).at(v) for v in (0, 5, 10)] == [100, 150, 200]
    assert Axis(0, 10, 200, 100).at(2) == 180  # upward
    assert Axis(1, 100, 0, 10, log=True).at(10) == pytest.approx(5)


@pytest.mark.parametrize(
    ("axis", "labels"),
    [
        (Axis(0, 10, 0, 1), ["0", "5", "10"]),
        (Axis(69.4, 73.1, 0, 1), ["70", "71", "72", "73"]),
        (Axis(-0.31, 1.0, 0, 1), ["0.0", "0.5", "1.0"]),
        (Axis(0.941, 0.952, 0, 1), ["0.945", "0.950"]),
        (Axis(0, 23_456, 0, 1), ["0", "10,000", "20,000"]),
        (Axis(0.4, 3, 0, 1, log=True), ["0.5", "1", "2"]),
        (Axis(3, 40_000, 0, 1, log=True), ["10", "100", "1,000", "10,000"]),
    ],
)
def test_ticks_are_round(axis, labels):
    assert [label for _, label in axis.ticks()] == labels
    assert all(axis.low <= value <= axis.high for value, _ in axis.ticks())


def test_an_axis_goes_around_its_values():
    assert Axis.around([1, 2], 0, 1, margin=0.1) == Axis(0.9, 2.1, 0, 1)
    assert Axis.around([5, 5], 0, 1, margin=0.1) == Axis(4.5, 5.5, 0, 1)
    assert Axis.around([0], 0, 1, margin=0.1) == Axis(-0.1, 0.1, 0, 1)
    wide = Axis.around([1, 1000], 0, 1, margin=0.1)
    assert wide.log
    assert (wide.low, wide.high) == pytest.approx((0.501187, 1995.262))


@pytest.mark.parametrize(
    ("wanted", "places"),
    [
        ([50, 10], [50, 10]),
        ([50, 50, 50], [40, 50, 60]),
        ([0, 1], [0, 10]),
        ([100, 99, 98], [100, 90, 80]),
        ([20, 25, 33], [16, 26, 36]),
        ([-50, 500], [0, 100]),
    ],
)
def test_labels_in_a_column_make_room(wanted, places):
    assert spread(wanted, 10, 0, 100) == pytest.approx(places)


def test_labels_with_no_room_stand_evenly():
    assert sorted(spread([50] * 21, 10, 0, 100)) == pytest.approx([5 * n for n in range(21)])


@pytest.mark.parametrize("seed", range(20))
def test_labels_in_a_plane_keep_off_points_and_each_other(seed):
    draw = random.Random(seed)
    frame = Box(40, 20, 390, 290)
    # Half of the models are the same size, as students of one start are.
    points = [(draw.choice([100, draw.uniform(50, 380)]), draw.uniform(30, 280)) for _ in range(10)]
    widths = [draw.uniform(20, 150) for _ in points]
    boxes = label_boxes(points, widths, 15, frame)
    assert [round(box.right - box.left, 6) for box in boxes] == [round(w, 6) for w in widths]
    assert all(box.inside(frame) for box in boxes)
    assert not any(a.hits(b) for a, b in combinations(boxes, 2))
    dots = [Box(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    assert not any(box.hits(dot) for box in boxes for dot in dots)


def test_a_label_stands_right_of_its_point_if_it_can():
    frame = Box(0, 0, 400, 300)
    assert label_boxes([(100, 100)], [50], 10, frame) == [Box(109, 95, 159, 105)]
    assert label_boxes([(390, 100)], [50], 10, frame) == [Box(331, 95, 381, 105)]
    # No room at all: beside its point, come what may.
    assert label_boxes([(5, 5)], [50], 10, Box(0, 0, 20, 20)) == [Box(14, 0, 64, 10)]


def test_a_label_that_is_not_needed_stands_close_or_not_at_all():
    frame, row = Box(0, 0, 120, 300), [(60, 100), (60, 100), (60, 100), (60, 200)]
    boxes = label_boxes(row, [50] * 4, 10, frame, needed=1)
    assert boxes[0] == Box(69, 95, 119, 105)
    assert boxes[1] == Box(1, 95, 51, 105)
    assert boxes[3] == Box(69, 195, 119, 205)
    assert label_boxes([(5, 5)], [50], 10, Box(0, 0, 20, 20), needed=0) == [None]
    # All others stand in the way: a needed label goes far from its point, another is left out.
    crowd = [(60, 60 + 8 * n) for n in range(12)]
    assert None in label_boxes(crowd, [100] * 12, 10, frame, needed=6)
    assert None not in label_boxes(crowd, [100] * 12, 10, frame)


# --- charts


def test_bars_begin_at_0_and_the_teacher_is_100():
    svg = charts.bars("STS", [charts.Bar("kd", "hue0", 98.84), charts.Bar("half", "start", 50)])
    assert [bar["width"] for bar in shapes(svg, "rect", "bar")] == ["316.3", "160"]
    assert [bar["width"] for bar in shapes(svg, "rect", "track")] == ["320", "320"]
    assert words(svg) == ["kd", "98.8 %", "half", "50.0 %"]
    assert 'aria-label="STS, in % of the teacher: kd 98.8 %, half 50.0 %"' in svg


def test_a_student_may_pass_the_teacher():
    svg = charts.bars("STS", [charts.Bar("kd", "hue0", 125), charts.Bar("ckd", "hue1", -3)])
    assert [bar["width"] for bar in shapes(svg, "rect", "bar")] == ["320", "0"]
    assert [bar["width"] for bar in shapes(svg, "rect", "track")] == ["256", "256"]


def test_models_in_a_plane():
    marks = [
        Mark("teacher", "teacher", 200, 72, False),
        Mark("ckd", "hue1", 400, 68, False),
        Mark("kd", "hue0", 400, 70, True),
        Mark("kd onnx", "hue0", 250, 73, True),
    ]
    svg = plane(marks, x_title="texts per second", y_title="STS average")
    dots = {d["class"]: (d["cx"], d["cy"]) for d in shapes(svg, "circle", "dot")}
    # What is passed is grey and below all others; the teacher never is.
    assert list(dots) == ["dot passed", "dot hue0", "dot teacher"]
    assert dots["dot passed"] == ("354.7", "258.8")
    assert [way["d"] for way in shapes(svg, "path", "front")] == ["M146.6 47.2L354.7 174.2"]
    assert words(svg)[-4:] == ["teacher", "kd", "kd onnx", "ckd"]
    labels = [label["class"] for label in shapes(svg, "text", "label")]
    assert labels == ["label teacher", "label hue0", "label hue0", "label passed"]
    assert "kd 400, 70; kd onnx 250, 73; ckd 400, 68. Front: kd, kd onnx" in svg
    assert "<title>ckd 400, 68</title>" in svg


def test_a_plane_grows_with_its_names_and_speeds_of_all_sizes_have_room():
    def marks(count):
        return [Mark(f"m{n}", "hue0", 1.5**n, -n, True) for n in range(count)]

    heights = [
        ElementTree.fromstring(plane(marks(n), x_title="x", y_title="y")).attrib["viewBox"]
        for n in (2, 8, 14)
    ]
    assert heights == ["0 0 400 320", "0 0 400 320", "0 0 400 410"]
    assert [w for w in words(plane(marks(14), x_title="x", y_title="y")) if w == "100"]


def test_lines_by_step():
    rows = [
        charts.Line("kd", "hue0", [(0, 0), (100, 1)], best=100),
        charts.Line("ckd", "hue1", [(50, 1)], best=7),
    ]
    svg = charts.lines(rows, title="agreement")
    ways = [way["d"] for way in shapes(svg, "path", "line")]
    assert ways == ["M44 243.9L351.5 42.1", "M197.8 42.1h0"]
    rings = shapes(svg, "circle", "ring")  # no ring where no evaluation was
    assert [(ring["cx"], ring["cy"]) for ring in rings] == [("351.5", "42.1")]
    labels = shapes(svg, "text", "label")
    assert [label["y"] for label in labels] == ["38.6", "53.6"]
    assert len(shapes(svg, "path", "leader")) == 2


def test_a_loss_in_a_small_picture():
    row = charts.Line("kd", "hue0", [(50, 0.75), (100, 0.25)])
    svg = charts.small_line(row, title="kd loss")
    assert words(svg) == ["0.25", "0.75", "step 100"]
    assert shapes(svg, "path", "line")[0]["d"] == "M119 12.7L194 71.3"
    flat = charts.small_line(charts.Line("kd", "hue0", [(50, 0.5)]), title="kd loss")
    assert words(flat) == ["0.5", "step 50"]


def test_a_histogram_compares_shares():
    found = Similarities(edges=(-1, 0, 1), teacher=(30, 10), model=(0, 2))
    svg = charts.histogram(found, "kd", "hue0")
    assert shapes(svg, "path", "area")[0]["d"] == "M4 146V41H160V111H316V146Z"
    assert shapes(svg, "path", "line")[0]["d"] == "M4 146V146H160V6H316V146"
    assert "kd has a mean of 0.50, the teacher of -0.25" in svg
    empty = charts.histogram(Similarities(edges=(0, 1), teacher=(0,), model=(0,)), "kd", "hue0")
    assert shapes(empty, "path", "line")[0]["d"] == "M4 146V146H316V146"


def test_a_scatter_has_one_scale_for_both_sides():
    svg = charts.scatter([(0, 1), (0.5, 0.5)], "kd", "hue0", span=(0, 1))
    assert shapes(svg, "path", "dots")[0]["d"] == "M43.9 32.6h0M175 143h0"
    assert shapes(svg, "path", "diagonal")[0]["d"] == "M36 260L314 26"
    assert "Cosines of 2 pairs, kd against the teacher: 0.50 apart on average" in svg


def test_a_gauge_widens_for_what_lies_below_it():
    svg = charts.gauge({"teacher": ("teacher", 1.0), "kd": ("hue0", 0.4)})
    assert [dot["cx"] for dot in shapes(svg, "circle")] == ["192", "100"]
    low = charts.gauge({"teacher": ("teacher", -0.6), "kd": ("hue0", 0.2)})
    assert [dot["cx"] for dot in shapes(low, "circle")] == ["8", "100"]
    assert 'aria-label="cosine: teacher -0.60, kd 0.20"' in low


# --- the page


def test_every_section_is_there_and_linked(full):
    outline = Outline(full)
    assert outline.sections == SECTIONS
    assert [link["href"] for link in outline.all("a")] == [f"#{name}" for name in SECTIONS]
    assert (
        "kd, the best student, keeps 99.5 % of the teacher's STS average and 100.0 % of its nDCG@10"
    ) in outline.text
    assert (
        "<b>99.5<small>&nbsp;%</small></b><span>of the teacher&#39;s STS average</span>"
        "<i>72.50, teacher 72.90</i>"
    ) in full
    terms = re.findall("<dt>(.*?)</dt>", full[: full.index('<section id="quality">')])
    assert terms == ["STS", "nDCG@10", "fidelity", "top-10 overlap"]
    assert "Speeds were measured on AMD EPYC, 1 thread." in outline.text
    assert "24,310 texts" in outline.text


def test_what_the_page_is_about_stands_on_top_and_what_a_student_is_made_of_beside_its_name(site):
    made_of = {MODELS[1]: "layers 0, 3 of <teacher>", STUDENTS[0]: "recipe kd, start half"}
    page = site.fill().drawn(
        made_of=made_of,
        project="sen<tences",
        teacher="all-MiniLM",
        corpus="24 texts",
        prompts="none",
    )
    head = page[page.index("<h1>") : page.index('<p class="verdict">')]
    assert head.splitlines() == [
        "<h1>Which student to serve</h1>",
        '<p class="about">project sen&lt;tences · teacher all-MiniLM · corpus 24 texts</p>',
    ]
    assert "<title>sen&lt;tences: which student to serve</title>" in page
    rows = page[page.index("<tbody>") : page.index("</tbody>")].split("<tr>")[1:]
    found = [re.findall('<span class="of">(.*?)</span>', row) for row in rows]
    told = dict(zip(MODELS, found, strict=True))
    assert told.pop(MODELS[1]) == ["layers 0, 3 of &lt;teacher&gt;"]
    assert told.pop(STUDENTS[0]) == ["recipe kd, start half"]
    assert set(map(tuple, told.values())) == {()}


def test_the_points_of_a_short_curve_are_marked():
    for count, marked in ((1, 1), (2, 2), (12, 12), (13, 0)):
        row = charts.Line("kd", "hue0", [(50 * n, 1 / (n + 1)) for n in range(count)])
        for svg in (charts.lines([row], title="agreement"), charts.small_line(row, title="loss")):
            places = [(float(e["cx"]), float(e["cy"])) for e in shapes(svg, "circle", "point")]
            assert len(set(places)) == marked
            way = shapes(svg, "path", "line")[0]["d"]
            assert all(f"{px(x)} {px(y)}" in way for x, y in places)


def test_the_table_marks_the_best_student(full):
    rows = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', full)[:5]
    names = [re.sub("<svg.*?</svg>", "", head) for head, _ in rows]
    best = ' <span class="tag">best</span>'
    assert names == ["teacher", "half", f"kd{best}", "ckd", "kd-finetuned"]
    cells = [re.findall("<td>(.*?)</td>", row) for _, row in rows]
    assert cells[0][:3] == ["72.90", "72.40", "73.40"]
    assert cells[2][:3] == [f"<strong>{v}</strong>" for v in ("72.50", "72.00", "73.00")]
    assert cells[3][:3] == ["72.30", "71.80", "72.80"]


def test_students_inside_the_interval_are_tied_on_the_page(site):
    site.fill()
    for name in MODELS:
        metrics = {name: json.loads((site.root / f"{name}.json").read_text())}
        site.evaluated(name, with_ends(metrics, 0.9, "sts.")[name], details_of(name))
    page = site.drawn()
    assert re.findall('</svg>([a-z-]+) <span class="tag">(.*?)</span>', page) == [
        ("kd", "tied"), ("ckd", "tied"), ("kd-finetuned", "tied"),
    ]  # fmt: skip
    assert "<i>72.5 ± 0.9, teacher 72.9 ± 0.9</i>" in page
    # 0.9 of 72.9 is more than a percent: no digit behind the point is known.
    assert (
        "STS average, in % of the teacher: kd 99 %, ckd 99 %, kd-finetuned 99 %, half 100 %" in page
    )
    assert "Models are tied if the number of one lies in the interval of the other." in page


def test_a_students_widths_stand_below_it_on_the_page(site, full):
    kd = json.loads((site.root / "kd.json").read_text())
    site.evaluated("kd", kd | at_width(128, 71.5, 0.83, 0.93, 0.7), details_of("kd"))
    page = site.drawn(Teacher="all-MiniLM-L6-v2", Corpus="24,310 texts")
    (part,) = re.findall(r'<tr class="part"><th scope="row">first 128</th>.*?</tr>\n', page)
    assert re.findall("<td>(.*?)</td>", part) == [
        *("71.50", "71.00", "72.00", "0.830", "0.930", "0.700", "-", "-", "-", "-")
    ]
    before, after = page.split(part)
    assert re.findall('<th scope="row">(?:<svg.*?</svg>)?([a-z-]+)', before)[-1] == "kd"
    # A sentence below the table explains it; all else is the page without it.
    note = "<dt>first N</dt><dd>the model with nothing but the first N values of its vectors</dd>\n"
    assert after.count(note) == 1
    assert before + after.replace(note, "") == full


def test_a_set_whose_queries_are_documents_too_is_named(site, full):
    said = "A document with the query's own id is no result in arguana."
    assert said not in Outline(full).text
    kd = json.loads((site.root / "kd.json").read_text())
    kd |= {"retrieval.arguana.ndcg@10": 0.4, "retrieval.arguana.identical_ids_ignored": 1401}
    site.evaluated("kd", kd, details_of("kd"))
    assert said in Outline(site.drawn()).text


@pytest.mark.parametrize(("shift", "said"), [(0.2149, True), (0.01, False)])
def test_a_student_with_another_scale_of_cosines_is_told_beside_them(site, full, shift, said):
    kd = json.loads((site.root / "kd.json").read_text()) | {"fidelity.cosine_shift": shift}
    site.evaluated("kd", kd, details_of("kd"))
    note = "On average, its cosines are 0.21 higher than the teacher's: choose thresholds anew."
    assert note not in Outline(full).text
    assert Outline(site.drawn()).text.count(note) == said


def test_bars_are_shares_of_the_teacher(full):
    said = re.findall(r'aria-label="(.*?, in % of the teacher: .*?)"', full)
    assert len(said) == 6
    assert said[0] == (
        "STS average, in % of the teacher: kd 99.5 %, ckd 99.2 %, kd-finetuned 98.9 %, half 99.7 %"
    )
    assert said[3].startswith("nDCG@10 xquad_en_wiki10k, in % of the teacher: kd 100.0 %")


def test_quality_stands_against_speed_and_size(full):
    said = re.findall(r'aria-label="(% of the teacher&#39;s STS average against .*?)"', full)
    assert [label.split(": ", 1)[0] for label in said] == [
        "% of the teacher&#39;s STS average against times as fast as the teacher",
        "% of the teacher&#39;s STS average against MB",
    ]
    assert "kd 1.875, 99.45; ckd 1.88, 99.18; kd-finetuned 1.884, 98.9" in said[0]
    assert said[0].endswith("Front: teacher, kd, ckd, kd-finetuned")
    # All are of one size, so that the best one alone is on the front; no start is drawn.
    assert said[1].endswith("Front: teacher")
    assert "half" not in said[0]


def test_each_format_is_a_point_of_its_own(site):
    site.fill()
    exports = {
        "safetensors-fp16": in_format(72.5, 402, 34.8),
        "onnx-int8": in_format(72.0, 1_600, 17.6),
        "openvino-int8": in_format(20, 9, 9, reason="it loses too much"),
    }
    site.exported("kd", **exports)
    page = site.drawn()
    said = re.findall(r'aria-label="(% of the teacher&#39;s STS average against .*?)"', page)
    assert "kd onnx-int8 7.463, 98.77" in said[0]
    assert "kd 34.8, 99.45; kd onnx-int8 17.6, 98.77" in said[1]
    assert said[1].endswith("Front: teacher, kd, kd onnx-int8")
    assert "openvino" not in "".join(said)
    assert "Not published: kd openvino-int8 (it loses too much)." in Outline(page).text
    rows = re.findall(r'<tr class="part"><th scope="row">(.*?)</th>', page)
    assert rows == ["safetensors-fp16", "onnx-int8"]
    terms = re.findall("<dt>(.*?)</dt>", page[: page.index('<section id="quality">')])
    assert terms[-4:] == ["safetensors", "fp16", "onnx", "int8"]


def tags(page):
    return re.findall(r'>([a-z0-9-]+) <span class="tag">(.*?)</span>', page)


def test_the_chosen_form_is_marked_and_its_bound_is_drawn(site):
    site.fill()
    exports = {
        "safetensors-fp16": in_format(72.5, 402, 34.8),
        "onnx-int8": in_format(72.0, 1_600, 17.6),
    }
    site.exported("kd", **exports)
    page = site.drawn(choose=ChooseParams(at_most_mb=20))
    assert ("onnx-int8", "chosen") in tags(page)
    assert '<p class="verdict">kd onnx-int8 (17.6 MB), the best of at most 20 MB, keeps' in page
    assert "<i>17.6 MB, teacher 69.6</i>" in page  # the cards are about it, too
    planes = [svg for svg in re.findall(r"<svg.*?</svg>", page) if "average against" in svg]
    assert [len(shapes(svg, "circle", "chosen")) for svg in planes] == [1, 1]
    assert [len(shapes(svg, "path", "bound")) for svg in planes] == [0, 1]
    (bound,) = shapes(planes[1], "path", "bound")
    left, right = sorted(
        float(dot["cx"]) for dot in shapes(planes[1], "circle", "dot") if "hue0" in dot["class"]
    )
    assert left < float(bound["d"].split()[0][1:]) < right  # 17.6 < 20 < 34.8
    quality = site.drawn(choose=ChooseParams(at_least=0.99))
    planes = [svg for svg in re.findall(r"<svg.*?</svg>", quality) if "average against" in svg]
    assert [len(shapes(svg, "path", "bound")) for svg in planes] == [1, 1]
    assert ("safetensors-fp16", "chosen") in tags(quality)
    nearest = site.drawn(choose=ChooseParams(at_most_mb=1))
    assert ("onnx-int8", "nearest") in tags(nearest)
    assert "bound that" in nearest  # told, though it lies beside the picture
    assert 'class="bound"' not in nearest
    plain = site.drawn()
    assert 'class="chosen"' not in plain
    assert "bound that" not in plain


def indexed(dim, *recalls):
    sizes = (4 * dim, dim + 4, dim // 8)
    return {
        f"index.{kind}.{what}": value
        for kind, size, recall in zip(("float32", "int8", "binary"), sizes, recalls, strict=True)
        for what, value in (("bytes", size), ("recall@10", recall))
    }


def test_what_an_index_costs_and_finds_is_a_table(site, full):
    assert "Recall@10" not in full
    among = {"index.among": "400 documents of docs, asked with 400 queries"}
    whole = indexed(384, 1.0, 0.9912, 0.6567)
    first = {key.replace(".", ".128.", 1): v for key, v in indexed(128, 0.8, 0.79, 0.4).items()}
    for name, found in (("teacher", whole), ("half", whole), ("kd", whole | first)):
        metrics = json.loads((site.root / f"{name}.json").read_text()) | found | among
        site.evaluated(name, metrics, details_of(name))
    page = site.drawn()
    assert "index" in Outline(page).sections
    section = page[page.index('<section id="index">') : page.index('<section id="training">')]
    table = {
        re.sub("<svg.*?</svg>", "", name): re.findall("<td>(.*?)</td>", row)
        for name, row in re.findall(r'<tr[^>]*><th scope="row">(.*?)</th>(.*?)</tr>', section)
    }
    row = ["1,536", "1.00", "388", "0.99", "48", "0.66"]
    assert table == {
        "teacher": row,
        "kd": row,
        "first 128": ["512", "0.80", "132", "0.79", "16", "0.40"],
    }
    assert "the index finds, among 400 documents of docs, asked with 400 queries." in section
    # Asked for other things, they are not told as one.
    metrics |= {"index.among": "9 held-out texts"}
    site.evaluated("kd", metrics, details_of("kd"))
    assert "the index finds. A vector's bytes" in site.drawn()


def test_curves_of_one_score_share_a_picture(full):
    said = re.findall(r'aria-label="(\w+ by step: .*?)"', full)
    assert said == [
        "agreement by step: kd ends at 0.8625; ckd ends at 0.8625",
        "dev by step: kd-finetuned ends at 0.8625",
    ]
    losses = re.findall(r'aria-label="(\w+ loss of .*?)"', full)
    assert losses == [
        f"{part} loss of {name}: from 1 to 0.125"
        for name, parts in (("kd", "kd ckd"), ("ckd", "kd ckd"), ("kd-finetuned", "infonce"))
        for part in parts.split()
    ]
    assert full.count('class="ring"') == 3  # step 350 of each run


def test_what_a_run_noted_besides_its_losses_is_drawn_by_step(site):
    site.fill()
    rows = ["0,,0.58,0.0,,0.5", "50,0.3,0.8,0.0002,0.21,0.5", "100,0.1,0.9,0.0,0.34,0.6"]
    head = "step,loss_skew,agreement,learning_rate,acceptance_skew,phi_skew"
    site.trained("kd", "\n".join([head, *rows, ""]))
    page = site.drawn()
    assert re.findall(r'aria-label="((?:acceptance|phi) .*?)"', page) == [
        "acceptance skew of kd: from 0.21 to 0.34",
        "phi skew of kd: from 0.5 to 0.6",
    ]
    assert "<h3>kd <small>acceptance skew</small></h3>" in page


def test_what_is_long_is_folded(full):
    pairs = full[full.index('<section id="disagreements">') : full.index('<section id="searches">')]
    searches = full[full.index('<section id="searches">') :]
    folds = re.findall(r"<details.*?</summary>", pairs)
    assert [" open>" in fold for fold in folds] == [True, False, False]  # kd is the best
    assert all(f"{name} <small>5 pairs" in fold for name, fold in zip(STUDENTS, folds, strict=True))
    assert re.findall(r"<details[^>]*>", searches) == [
        *['<details class="query" open>'] * 2,
        *['<details class="query">'] * 4,
    ]


def test_each_picture_says_what_it_shows(full):
    pictures = [svg for svg in Outline(full).all("svg") if "aria-hidden" not in svg]
    assert (
        len(pictures) == 6 + 2 + 2 + 5 + 3 * 2 + 3 * 5
    )  # bars, planes, curves, losses, pairs, gauges
    assert all(svg["role"] == "img" and len(svg["aria-label"]) > 10 for svg in pictures)
    for svg in re.findall(r"<svg.*?</svg>", full, re.DOTALL):
        ElementTree.fromstring(svg)


def test_the_page_asks_nobody_for_anything_and_runs_nothing(full):
    outline = Outline(full)
    assert not outline.all("script")
    assert not [tag for tag, found in outline.tags if "src" in found]
    assert [link["href"] for link in outline.all("link")] == ["data:,"]
    assert not re.search(r"https?:|url\(|@import", full)
    assert {"http-equiv": "Content-Security-Policy", "content": POLICY} in outline.all("meta")
    assert POLICY.startswith("default-src 'none';")
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in outline.all(
        "meta"
    )
    assert outline.all("html") == [{"lang": "en"}]


def test_texts_from_files_cannot_become_markup(site):
    site.fill()
    hostile = metrics_of(70, 0.8, 0.9, 0.7, 300) | {"device": SCRIPT, f"sts.{SCRIPT}": 1.0}
    site.evaluated("kd", hostile, details_of("kd") | {"disagreements": []})
    page = site.drawn(**{SCRIPT: SCRIPT})
    assert "<script" not in page
    assert "<img" not in page
    metrics = metrics_of(70, 0.8, 0.9, 0.7, 300)
    named = {name: Model(name, metrics, Details(**DETAILS)) for name in ("teacher", "<i>")}
    assert "&lt;i&gt; keeps" in drawn(Subject(named, ["<i>"]), facts={}, made_of={})
    assert page.count("&lt;script&gt;document.title = &#39;taken&#39;&lt;/script&gt;") > 10


def test_the_same_files_give_the_same_page_and_a_small_one(site):
    models = [*MODELS, "skew"]
    site.fill(models, [*STUDENTS, "skew"])
    first = site.drawn(models, [*STUDENTS, "skew"])
    assert site.drawn(models, [*STUDENTS, "skew"]) == first
    assert len(first.encode()) < 400_000
    assert str(site.root) not in first


def test_long_texts_and_many_searches_are_cut(full):
    assert "x" * 159 + "…" in full
    assert "x" * 280 not in full
    assert full.count('<details class="query"') == MOST_SEARCHES == len(TEXTS)


def test_searches_stand_side_by_side_with_their_right_answers(site):
    site.fill()
    for name, relevant in (("teacher", True), ("kd", False), ("ckd", None)):
        result = {"text": f"found by {name}", "score": 0.714, "relevant": relevant}
        search = {"set": "docs", "query": "roots", "results": [result]}
        site.evaluated(name, metrics_of(70, 0.8, 0.9, 0.7, 300), DETAILS | {"searches": [search]})
    page = site.drawn(["teacher", "kd", "ckd"], ["kd", "ckd"])
    section = page[page.index('<section id="searches">') :]
    answers = re.findall(r"<h4><svg.*?</svg>(.*?)</h4><ol>\n(.*?)</ol>", section, re.DOTALL)
    assert [name for name, _ in answers] == ["teacher", "kd", "ckd"]
    assert answers[0][1] == (
        '<li class="hit"><bdi dir="auto">found by teacher</bdi>'
        '<span><b>✓</b> 0.71<b class="hidden">relevant</b></span></li>\n'
    )
    assert [items.count("hit") for _, items in answers] == [1, 0, 0]
    assert section.count("<details") == 1


def test_sections_with_nothing_to_show_are_left_out(site):
    site.evaluated("teacher", {"parameters": 7})
    site.evaluated("kd", {"parameters": 5})
    page = site.drawn(["teacher", "kd"], ["kd"])
    assert Outline(page).sections == ["models"]
    assert "2 models side by side." in page
    assert 'class="cards"' not in page


@pytest.mark.parametrize(
    ("change", "absent"),
    [
        ({"scatter": [], "similarities": None}, "similarity"),
        ({"disagreements": []}, "disagreements"),
        ({"searches": []}, "searches"),
    ],
)
def test_what_evaluate_left_out_is_left_out(site, change, absent):
    site.fill()
    for name in MODELS:
        metrics = json.loads((site.root / f"{name}.json").read_text())
        site.evaluated(name, metrics, details_of(name) | change)
    assert Outline(site.drawn(a="b")).sections == [name for name in SECTIONS if name != absent]


def test_a_student_that_no_run_made_has_no_curve(site):
    site.fill(students=["ckd"])
    page = site.drawn(a="b")
    assert Outline(page).sections == SECTIONS
    runs = page[page.index('aria-label="Training runs"') :].split("</table>")[0]
    assert re.findall(r"</svg>(.*?)</th><td>(.*?)</td><td>(.*?)</td>", runs) == [
        ("ckd", "7.9", "400")
    ]
    for file in site.root.glob("ckd.*"):
        if file.suffix == ".csv" or ".training" in file.name:
            file.unlink()
    assert "training" not in Outline(site.drawn(a="b")).sections


def test_speeds_of_another_device_are_not_drawn(site):
    site.fill()
    site.evaluated("ckd", metrics_of(70, 0.8, 0.9, 0.7, 9_999) | {"device": "NVIDIA H200"}, DETAILS)
    page = site.drawn()
    speed = page[page.index("Against speed") : page.index("Against size")]
    assert "Measured on another device, so not compared: ckd." in page
    assert ">kd<" in speed
    assert ">ckd<" not in speed


def test_a_finetuned_student_has_the_hue_of_its_first_stage():
    names = ["teacher", "half", "a", "b", "b-finetuned", "c", "d", "e", "f", "g"]
    models = {name: Model(name, {}, Details(**DETAILS)) for name in names}
    assert Subject(models, names[2:]).tones == {
        "teacher": "teacher", "half": "start", "a": "hue0", "b": "hue1", "b-finetuned": "hue1 second",
        "c": "hue2", "d": "hue3", "e": "hue4", "f": "hue5", "g": "hue0",
    }  # fmt: skip


# --- a browser

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
]
MEASURE = """<script>addEventListener("load", () => {
  const seen = frames[0], page = seen.document;
  const box = element => element.getBoundingClientRect();
  document.body.textContent = JSON.stringify({
    width: seen.innerWidth,
    content: page.documentElement.scrollWidth,
    title: page.title,
    requests: seen.performance.getEntriesByType("resource").map(entry => entry.name),
    sections: [...page.querySelectorAll("section")].filter(s => box(s).height > 60).map(s => s.id),
    wide: [...page.querySelectorAll("body *")]
      .filter(e => !e.closest(".scroll") && !e.closest("svg") && box(e).right > seen.innerWidth + 0.5)
      .map(e => e.outerHTML.slice(0, 80)),
  });
})</script>"""


@pytest.fixture(scope="module")
def browser():
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        wanted = f"none of {', '.join(names)} is here: apt-get install chromium"
        if os.environ.get("CI") == "true":
            pytest.fail(wanted)
        pytest.skip(wanted)
    return found


def opened(browser, page, profile):
    """The page as the browser sees it, and what it wrote to its console."""
    run = subprocess.run(
        [browser, *FLAGS, f"--user-data-dir={profile}", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout, [line for line in run.stderr.splitlines() if ":CONSOLE" in line]


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_a_browser(site, browser, tmp_path, width):
    page = site.fill().drawn(**{"Teacher" * 40: SCRIPT, "空": "🤷"})
    dom, console = opened(browser, site.page, tmp_path / "profile-1")
    assert console == []
    assert "<title>teachonce: which student to serve</title>" in dom

    # In a frame, since a browser's window is never narrower than 500; and without the policy, so that
    # nothing but the page itself keeps it from asking for something or running it.
    policy = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    assert policy in page
    inner = html.escape(page.replace(policy, ""))
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<!doctype html><meta charset="utf-8">{MEASURE}<body>'
        f'<iframe width="{width}" height="900" style="border: 0" srcdoc="{inner}"></iframe>'
    )
    dom, console = opened(browser, frame, tmp_path / "profile-2")
    found = json.loads(Outline(dom[dom.index("<body") :]).text)
    assert console == []
    assert found == {
        "width": width,
        "content": width,
        "title": "teachonce: which student to serve",
        "requests": [],
        "sections": SECTIONS,
        "wide": [],
    }
