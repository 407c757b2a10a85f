"""The report: what is known of many models in one file, one table, one sentence. The page: test_page.py."""

import json
from io import StringIO

import pytest
from rich.console import Console

from stages import report
from stages.params import ChooseParams
from stages.reporting.choice import choice
from stages.reporting.forms import forms, front
from stages.reporting.measures import decimals_of, verdict
from stages.reporting.results import quality_of
from stages.reporting.table import table
from storage.errors import DamagedError, MissingError, TeachonceError

STUDENTS = ["kd", "ckd", "kd-finetuned"]


def metrics_of(sts, ndcg, likeness, overlap, speed, *, parameters=17_389_824, megabytes=69.6):
    return {
        "sts.STS12": sts - 0.5,
        "sts.STSB": sts + 0.5,
        "sts.average": sts,
        "retrieval.xquad_en_wiki10k.ndcg@10": ndcg,
        "retrieval.xquad_en_wiki10k.mrr@10": ndcg - 0.04,
        "retrieval.xquad_en_wiki10k.recall@100": 0.98,
        "fidelity.spearman": likeness,
        "fidelity.top10_overlap": overlap,
        "sentences_per_second": speed,
        "texts_per_reference": speed / 20,
        "device": "AMD EPYC, 1 thread",
        "parameters": parameters,
        "megabytes": megabytes,
    }


@pytest.fixture
def models():
    return {
        "teacher": metrics_of(
            72.87, 0.8712, 0.99999, 0.9987, 214.4, parameters=22_713_216, megabytes=90.9
        ),
        "half": metrics_of(69.61, 0.7012, 0.8312, 0.5521, 402.2),
        "kd": metrics_of(72.02, 0.8432, 0.9533, 0.7612, 405.1),
        "ckd": metrics_of(72.33, 0.8501, 0.9534, 0.7544, 398.8),
        "kd-finetuned": metrics_of(72.55, 0.8417, 0.9411, 0.7120, 401.7),
    }


def drawn(models, *, width=100, students=STUDENTS, styled=False, formats=None):
    sink = StringIO()
    console = Console(
        width=width, file=sink, force_terminal=styled, color_system="standard" if styled else None
    )
    report = {"models": models, "formats": formats or {}}
    console.print(table(report, students=students, width=width))
    lines = sink.getvalue().splitlines()
    return lines if styled else [line.rstrip() for line in lines]


def without(models, *prefixes):
    return {
        name: {key: value for key, value in found.items() if not key.startswith(prefixes)}
        for name, found in models.items()
    }


DETAILS = {"texts": 0, "similarities": None, "scatter": [], "disagreements": [], "searches": []}


class Folder:
    """What stages leave, below one folder."""

    def __init__(self, root):
        self.root = root
        self.out, self.page = root / "reports/metrics.json", root / "reports/index.html"

    def evaluated(self, name, metrics, details=DETAILS):
        (self.root / f"{name}.json").write_text(json.dumps(metrics))
        (self.root / f"{name}.details.json").write_text(json.dumps(details))

    def exported(self, name, **formats):
        quality = quality_of(json.loads((self.root / f"{name}.json").read_bytes()))
        content = {"model": name, "quality": quality, "formats": formats}
        (self.root / f"{name}.exports.json").write_text(json.dumps(content))

    def report(self, models, students=STUDENTS, made_of=None, choose=None, **facts):
        return report.run(
            models,
            students=students,
            metrics=lambda name: self.root / f"{name}.json",
            details=lambda name: self.root / f"{name}.details.json",
            curve=lambda name: self.root / f"{name}.csv",
            training=lambda name: self.root / f"{name}.training.json",
            exports=lambda name: self.root / f"{name}.exports.json",
            facts=facts,
            rank_by=None,
            choose=choose,
            made_of=made_of or {},
            out=self.out,
            page=self.page,
        )


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


def test_what_is_known_of_the_named_models_is_gathered(folder, models):
    for name, found in (models | {"forgotten": {}}).items():
        folder.evaluated(name, found)
    outcome = folder.report(list(models))
    found = json.loads(folder.out.read_bytes())
    chosen = {"model": "kd-finetuned", "format": None, "fits": None}
    assert found == {"models": models, "formats": {}, "chosen": chosen} == outcome.facts
    assert list(outcome.facts["models"]) == list(models)
    assert outcome.summary == (
        "5 models: kd-finetuned, the best student, keeps 99.6 % of the teacher's STS average and "
        "96.6 % of its nDCG@10, is 1.9 times as fast and has 77 % of its size."
    )
    assert outcome.made == folder.page
    assert folder.page.read_text().startswith("<!doctype html>")


def test_a_model_that_was_not_evaluated_is_named(folder):
    with pytest.raises(MissingError) as caught:
        folder.report(["kd"])
    assert str(caught.value) == (
        f"{folder.root}/kd.json: not there\n  cure: run `teachonce evaluate kd`"
    )
    assert caught.value.exit_code == 3
    assert not folder.out.exists()


def test_a_model_whose_details_are_gone_is_named_and_nothing_is_written(folder, models):
    folder.evaluated("kd", models["kd"])
    (folder.root / "kd.details.json").unlink()
    with pytest.raises(MissingError) as caught:
        folder.report(["kd"])
    assert str(caught.value) == (
        f"{folder.root}/kd.details.json: not there\n  cure: run `teachonce evaluate kd`"
    )
    assert not folder.out.exists()
    assert not folder.page.exists()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "no JSON"),
        ("[1]", "not the flat metrics of a model"),
        ('{"sts": {"A": 1}}', "not the flat metrics of a model"),
    ],
)
def test_a_file_that_evaluate_did_not_write_is_refused(folder, content, problem):
    (folder.root / "kd.json").write_text(content)
    with pytest.raises(DamagedError) as caught:
        folder.report(["kd"])
    assert str(caught.value) == (
        f"{folder.root}/kd.json: {problem}\n  cure: run `teachonce evaluate kd`"
    )


SIMILARITIES = {"edges": [-1, 0, 1], "teacher": [1, 2], "model": [0, 3]}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"more": 1}, "more: Extra inputs are not permitted"),
        ({"texts": None}, "texts: Input should be a valid integer"),
        ({"scatter": [[0.1, float("nan")]]}, "scatter.0.1: Input should be a finite number"),
        ({"scatter": [[0.1]]}, "scatter.0.1: Field required"),
        (
            {"similarities": SIMILARITIES | {"model": [3]}},
            "similarities: Value error, n + 1 edges take n counts",
        ),
        (
            {"similarities": SIMILARITIES | {"edges": [0, 0, 1]}},
            "similarities: Value error, edges must rise",
        ),
        (
            {"searches": [{"set": "docs", "query": "q", "results": [{"text": "t", "score": 1}]}]},
            "searches.0.results.0.relevant: Field required",
        ),
    ],
)
def test_details_of_another_shape_are_refused(folder, models, change, problem):
    folder.evaluated("kd", models["kd"], DETAILS | change)
    with pytest.raises(DamagedError) as caught:
        folder.report(["kd"])
    assert str(caught.value) == (
        f"{folder.root}/kd.details.json: not the details of a model: {problem}\n"
        "  cure: run `teachonce evaluate kd`"
    )


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("step,loss_kd\n0,\n", "no column named agreement or dev"),
        ("", "no column named agreement or dev"),
        ("step,agreement\n0,x\n", "could not convert string to float: 'x'"),
        ("step,agreement\n0,nan\n", "agreement has NaN or Inf"),
        ("step,loss_kd,agreement\n7\n", "float() argument must be a string or a real number"),
    ],
)
def test_a_curve_that_no_training_wrote_is_refused(folder, models, content, problem):
    folder.evaluated("kd", models["kd"])
    (folder.root / "kd.csv").write_text(content)
    with pytest.raises(DamagedError) as caught:
        folder.report(["kd"])
    assert str(caught.value).startswith(
        f"{folder.root}/kd.csv: not the curve of a training run: {problem}"
    )
    assert caught.value.cure == "run `teachonce distill kd`"


def test_the_cure_for_a_finetuned_student_is_to_finetune(folder, models):
    folder.evaluated("kd-finetuned", models["kd"])
    (folder.root / "kd-finetuned.training.json").write_text('{"minutes": 1.5, "steps": 9}')
    with pytest.raises(DamagedError) as caught:
        folder.report(["kd-finetuned"])
    assert str(caught.value) == (
        f"{folder.root}/kd-finetuned.training.json: not the end of a training run: best_step: "
        "Field required\n  cure: run `teachonce finetune kd`"
    )


def in_format(sts, speed, megabytes, *, reason=""):
    """What `export` measures of a model in a format."""
    found = metrics_of(sts, sts / 100, 0.9, 0.7, speed, parameters=7, megabytes=megabytes)
    return found | {"published": not reason, "reason": reason}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "not the exports of a model: Invalid JSON"),
        ('{"formats": {}}', "not the exports of a model: model: Field required"),
        ('{"model": "ckd", "formats": {}}', "the exports of ckd, not of kd"),
        (
            '{"model": "kd", "formats": {"onnx": {"reason": ""}}}',
            "not the exports of a model: formats.onnx.published: Field required",
        ),
        (
            '{"model": "kd", "formats": {"onnx": {"published": true, "reason": "", "sts": [1]}}}',
            "not the exports of a model: formats.onnx.sts",
        ),
    ],
)
def test_exports_that_no_export_wrote_are_refused(folder, models, content, problem):
    folder.evaluated("kd", models["kd"])
    (folder.root / "kd.exports.json").write_text(content)
    with pytest.raises(DamagedError) as caught:
        folder.report(["kd"])
    assert str(caught.value).startswith(f"{folder.root}/kd.exports.json: {problem}")
    assert caught.value.cure == (
        "run `teachonce export kd`, or `teachonce export` where export.model names it"
    )
    assert not folder.page.exists()


def test_a_model_in_another_format_has_a_row_of_its_own(folder, models):
    for name, found in models.items():
        folder.evaluated(name, found)
    exports = {
        "safetensors-fp16": in_format(72.55, 401.7, 34.8),
        "onnx-int8": in_format(72.1, 812.3, 17.6),
        "static-int8": in_format(50, 9, 1, reason="it loses 31 % of the STS average"),
    }
    folder.exported("kd-finetuned", **exports)
    same = models["ckd"] | {"published": True, "reason": "", "megabytes": 69.61}
    folder.exported("ckd", safetensors=same)
    facts = folder.report(list(models)).facts
    assert facts["formats"]["kd-finetuned"] == exports
    lines = drawn(models, width=120, formats=facts["formats"])
    rows = [line.split() for line in lines if line.startswith("  ")][2:]
    # Of what is as large as the model, the model's own row says all.
    assert [[row[0], row[1], *row[-4:]] for row in rows] == [
        ["safetensors-fp16", "72.55", "402", "1.9x", "0.0", "34.8"],
        ["onnx-int8", "72.10", "812", "3.8x", "0.0", "17.6"],
    ]
    said = " ".join(lines)
    assert "Not published: kd-finetuned static-int8 (it loses 31 % of the STS average)." in said
    # No format is a rival of the students.
    assert "kd-finetuned, the best student, keeps 99.6 % of the teacher's STS average" in said


def test_formats_of_a_student_as_it_was_before_are_left_out(folder, models, caplog):
    for name, found in models.items():
        folder.evaluated(name, found)
    better = {"onnx-int8": in_format(99, 4_000, 1)}
    folder.exported("kd", **better)
    # Measured once more it is the same student, at another speed.
    folder.evaluated("kd", models["kd"] | {"sentences_per_second": 1.0, "texts_per_reference": 1.0})
    choose = ChooseParams(at_most_mb=20)
    facts = folder.report(list(models), choose=choose).facts
    assert facts["formats"] == {"kd": better} and not caplog.text
    assert facts["chosen"] == {"model": "kd", "format": "onnx-int8", "fits": True}
    # Trained anew it is another.
    folder.evaluated("kd", models["kd"] | {"sts.average": 30.0})
    facts = folder.report(list(models), choose=choose).facts
    assert facts["formats"] == {} and facts["chosen"]["fits"] is False
    assert (
        "the formats of kd are left out: kd was evaluated anew since they were measured, with another "
        "result; run `teachonce export kd`, or `teachonce export` where export.model names it"
    ) in caplog.text
    # As are those of which nothing says whose they are.
    (folder.root / "kd.exports.json").write_text(json.dumps({"model": "kd", "formats": better}))
    assert folder.report(list(models)).facts["formats"] == {}


def test_nothing_is_a_share_of_a_teacher_below_zero(models):
    """A student of -40 keeps no 200 % of a teacher of -20."""
    for name, average in {"teacher": -20.0, "kd": -40.0, "ckd": 10.0, "kd-finetuned": 5.0}.items():
        models[name] |= {"sts.average": average}
    for choose in (None, ChooseParams(at_least=0.9)):
        chosen = choice(models, STUDENTS, choose=choose)
        assert chosen.form == "ckd" and chosen.fits is None
        assert "% of the teacher's nDCG@10" in chosen.sentence
        assert "% of the teacher's STS average" not in chosen.sentence
        told = "The teacher's STS average is not above 0, so no student is chosen by what it keeps of it."
        assert chosen.sentence.startswith(told) is (choose is not None)


def test_a_model_is_served_in_its_published_formats(models):
    formats = {
        "kd": {
            "safetensors-fp16": models["kd"] | {"megabytes": 34.8, "published": True},
            "onnx-int8": in_format(71, 800, 17.6),
            "onnx": in_format(70, 9, 9, reason="it loses too much"),
        }
    }
    served = forms({name: models[name] for name in ("teacher", "kd")}, formats)
    assert served == {
        "teacher": models["teacher"],
        "kd": formats["kd"]["safetensors-fp16"],
        "kd onnx-int8": formats["kd"]["onnx-int8"],
    }


@pytest.mark.parametrize(
    ("places", "names"),
    [
        ({"a": (1, 1)}, "a"),
        ({"a": (1, 2), "b": (2, 1), "c": (1, 1)}, "ab"),
        ({"a": (1, 2), "b": (1, 2), "c": (0, 2)}, "ab"),  # equals do not pass each other
        ({"a": (1, 2), "b": (1, 3), "c": (-9, 4)}, "bc"),
    ],
)
def test_the_front_has_those_that_no_other_passes(places, names):
    assert front(places) == set(names)


def test_the_table_at_100_columns(models):
    assert drawn(models) == [
        "                                       nDCG@10",
        "                  STS                xquad_en_             top-10  texts  speed-  million",
        "model         average  STS12   STSB    wiki10k  fidelity  overlap  per s      up  weights    MB",
        "─" * 95,
        "teacher         72.87  72.37  73.37      0.871     1.000    0.999    214    1.0x     22.7  90.9",
        "half            69.61  69.11  70.11      0.701     0.831    0.552    402    1.9x     17.4  69.6",
        "kd              72.02  71.52  72.52      0.843     0.953    0.761    405    1.9x     17.4  69.6",
        "ckd             72.33  71.83  72.83      0.850     0.953    0.754    399    1.9x     17.4  69.6",
        "kd-finetuned    72.55  72.05  73.05      0.842     0.941    0.712    402    1.9x     17.4  69.6",
        "",
        "kd-finetuned, the best student, keeps 99.6 % of the teacher's STS average and 96.6 % of its",
        "nDCG@10, is 1.9 times as fast and has 77 % of its size.",
        "Best: highest STS average.",
        "Speeds were measured on AMD EPYC, 1 thread. Speed-up: each model was timed in turns with a",
        "fixed workload.",
    ]


def test_the_table_at_80_columns_names_what_has_no_room(models):
    assert drawn(models, width=80) == [
        "                         nDCG@10",
        "                  STS  xquad_en_             top-10  texts  speed-",
        "model         average    wiki10k  fidelity  overlap  per s      up    MB",
        "─" * 72,
        "teacher         72.87      0.871     1.000    0.999    214    1.0x  90.9",
        "half            69.61      0.701     0.831    0.552    402    1.9x  69.6",
        "kd              72.02      0.843     0.953    0.761    405    1.9x  69.6",
        "ckd             72.33      0.850     0.953    0.754    399    1.9x  69.6",
        "kd-finetuned    72.55      0.842     0.941    0.712    402    1.9x  69.6",
        "",
        "kd-finetuned, the best student, keeps 99.6 % of the teacher's STS",
        "average and 96.6 % of its nDCG@10, is 1.9 times as fast and has 77 % of",
        "its size.",
        "Best: highest STS average.",
        "Speeds were measured on AMD EPYC, 1 thread. Speed-up: each model was",
        "timed in turns with a fixed workload.",
        "No room for: STS12, STSB, million weights.",
    ]


def test_of_columns_that_matter_equally_the_last_goes_first(models):
    lines = drawn(models, width=90)
    assert lines[2].split()[:3] == ["model", "average", "STS12"]
    assert lines[-1] == "No room for: STSB."


@pytest.mark.parametrize("width", [10, 20, 40, 60, 80, 100, 200])
def test_no_line_is_wider_than_the_terminal(models, width):
    assert max(map(len, drawn(models, width=width))) <= width


def test_rows_stand_in_the_order_of_params_whatever_the_file_says(models):
    alphabetical = {name: models[name] for name in sorted(models)}
    rows = [line.split()[0] for line in drawn(alphabetical)[4:9]]
    assert rows == ["teacher", "half", "kd", "ckd", "kd-finetuned"]


def test_the_best_students_are_bold_and_no_one_else(models):
    def bold(models, students=STUDENTS):
        rows = drawn(models, styled=True, students=students)[4 : 4 + len(models)]
        return {
            row.split()[0]: [part.split("\x1b")[0].strip() for part in row.split("\x1b[1m")[1:]]
            for row in rows
        }

    assert bold(models) == {
        "teacher": [],
        "half": [],
        "kd": ["0.953", "0.761"],
        "ckd": ["0.850", "0.953"],  # 0.9533 and 0.9534 read the same
        "kd-finetuned": ["72.55", "72.05", "73.05"],
    }
    alone = {name: models[name] for name in ("teacher", "kd")}
    assert bold(alone, ["kd"])["kd"] == []


def test_columns_that_no_model_has_are_left_out(models):
    lines = drawn(without(models, "sts.", "fidelity.", "megabytes"))
    assert lines[2].split() == ["model", "wiki10k", "per", "s", "up", "weights"]
    only = {name: {"parameters": 7} for name in models}
    assert drawn(only)[1].split() == ["model", "weights"]


def test_one_sts_set_needs_no_average_and_many_sets_nothing_else(models):
    assert "average" not in "".join(drawn(without(models, "sts.STSB"))[:3])
    many = {
        name: found
        | {f"sts.{i}": 1 for i in range(3)}
        | {f"retrieval.{i}.ndcg@10": 0 for i in "abcd"}
        for name, found in models.items()
    }
    assert drawn(many)[1].split()[:4] == ["model", "average", "average", "fidelity"]
    assert drawn(many)[3].split()[:3] == ["teacher", "72.87", "0.174"]


def test_texts_that_were_truncated_are_told_below_the_table(models):
    for name, found in models.items():
        found |= {"sts.STSB.truncated": 0.0, "sts.STS12.truncated": 0.021}
        found["retrieval.xquad_en_wiki10k.truncated"] = 0.99 if name == "ckd" else 0.125
    lines = drawn(models, width=120)
    assert lines[1].split()[:4] == ["STS", "xquad_en_", "top-10", "texts"]
    assert (
        "Texts longer than a model reads were truncated: 2.1 % of STS12 and 12 to 99 % of xquad_en_wiki10k."
    ) in " ".join(lines)


def test_speeds_are_compared_within_one_device(models):
    models["ckd"] |= {"device": "NVIDIA H200", "sentences_per_second": 18312.4}
    del models["kd"]["sentences_per_second"], models["kd"]["texts_per_reference"]
    lines = drawn(models)
    assert [line.split()[-4:-2] for line in lines[4:9]] == [
        ["214", "1.0x"], ["402", "1.9x"], ["-", "-"], ["18,312", "-"], ["402", "1.9x"],
    ]  # fmt: skip
    assert lines[-2:] == [
        "Speeds were measured on AMD EPYC, 1 thread and NVIDIA H200. Speed-up: each model was timed in",
        "turns with a fixed workload. Models on different devices are not compared.",
    ]
    assert verdict(models, ["ckd"]) == (
        "ckd keeps 99.3 % of the teacher's STS average and 97.6 % of its nDCG@10 and has 77 % of "
        "its size."
    )


@pytest.mark.parametrize(
    ("removed", "sentence"),
    [
        (
            ("sts.",),
            "ckd, the best student, keeps 97.6 % of the teacher's nDCG@10, is 1.9 times as fast and "
            "has 77 % of its size.",
        ),
        (
            ("sts.", "retrieval.", "megabytes"),
            "ckd, the best student, agrees with the teacher on the order of pairs (Spearman 0.953) and is "
            "1.9 times as fast.",
        ),
        (("sts.", "retrieval.", "fidelity."), ""),
    ],
)
def test_the_best_student_is_judged_by_what_was_measured(models, removed, sentence):
    assert verdict(without(models, *removed), STUDENTS) == sentence


def with_ends(models, half, *prefixes):
    """Metrics with an interval of +- `half` around those of these prefixes."""
    return {
        name: found
        | {
            f"{key}{end}": value + sign * half
            for key, value in found.items()
            for end, sign in ((".low", -1), (".high", 1))
            if key.startswith(prefixes)
        }
        for name, found in models.items()
    }


def test_a_setting_ranks_students_and_the_rule_is_told(models):
    said = verdict(models, STUDENTS, "fidelity.top10_overlap")
    assert said.startswith("kd, the best student, keeps")
    sink = StringIO()
    drawing = table({"models": models}, students=STUDENTS, rank_by="fidelity.top10_overlap")
    Console(width=100, file=sink).print(drawing)
    assert "Best: highest fidelity.top10_overlap." in sink.getvalue()
    with pytest.raises(TeachonceError) as caught:
        verdict(models, STUDENTS, "sts.STS99")
    assert str(caught.value) == (
        "report.rank_by: no student has the metric sts.STS99\n"
        "  cure: run `teachonce evaluate` for the students, or set it to null"
    )


def test_what_lies_inside_an_interval_is_tied_and_not_better(models):
    wide = with_ends(models, 0.4, "sts.")
    assert verdict(wide, STUDENTS).startswith(
        "kd-finetuned, tied with ckd for the best student, keeps 99.6 % of the teacher's STS average "
        "(tied: inside the confidence interval) and 96.6 % of its nDCG@10"
    )
    narrow = with_ends(models, 0.02, "sts.")
    assert verdict(narrow, STUDENTS).startswith("kd-finetuned, the best student, keeps 99.6 % of")


def test_figures_have_as_many_digits_as_are_known_and_their_interval(models):
    lines = drawn(with_ends(models, 0.4, "sts."), width=140)
    assert lines[4].split()[:4] == ["teacher", "72.9±0.4", "72.4±0.4", "73.4±0.4"]
    text = " ".join(lines)
    assert (
        "±: half of a 95 % confidence interval, by bootstrap over queries, pairs or texts" in text
    )
    assert [decimals_of((0, 2 * half), 3) for half in (0.0004, 0.02, 0.013, 0.2, 1.3, 0)] == [
        *(3, 2, 2, 1, 0, 3)
    ]
    bold = drawn(with_ends(models, 0.4, "sts."), width=140, styled=True)
    assert ["\x1b[1m72.3±0.4" in line for line in bold[6:9]] == [False, True, False]
    assert ["\x1b[1m72.5±0.4" in line or "\x1b[1m72.6±0.4" in line for line in bold[6:9]] == [
        *(False, False, True)
    ]


# --- a student within a bound


RANGE = {
    "teacher": metrics_of(80, 0.8, 1.0, 1.0, 100, megabytes=90.9),
    "half": metrics_of(60, 0.6, 0.5, 0.5, 190, megabytes=69.6),
    "kd": metrics_of(79, 0.79, 0.9, 0.7, 190, megabytes=69.6),
    "ckd": metrics_of(78, 0.78, 0.9, 0.7, 192, megabytes=69.6),
    "tiny": metrics_of(77, 0.77, 0.8, 0.6, 290, megabytes=24.1),
    "static": metrics_of(72, 0.72, 0.7, 0.5, 5_100, megabytes=31.2),
}
TINY = {
    "safetensors-fp16": RANGE["tiny"] | {"megabytes": 12.1, "published": True, "reason": ""},
    "onnx-int8": in_format(76.8, 620, 8.4),
    "onnx": in_format(10, 9_999, 1, reason="it loses too much"),
}


def chosen(models=RANGE, **bound):
    choose = ChooseParams(**bound) if bound else None
    students = [name for name in models if name not in ("teacher", "half")]
    return choice(models, students, choose=choose, formats={"tiny": TINY})


def test_without_a_bound_the_best_student_is_named():
    found = chosen()
    assert (found.form, found.fits) == ("kd", None)
    assert found.sentence == verdict(RANGE, ["kd", "ckd", "tiny", "static"])


@pytest.mark.parametrize(
    ("bound", "form", "sentence"),
    [
        (
            {"at_most_mb": 20},
            "tiny",  # as float16: the folder of the trained model has 24.1 MB
            "tiny (12.1 MB), the best of at most 20 MB, keeps 96.2 % of the teacher's STS average and "
            "96.2 % of its nDCG@10, is 2.9 times as fast and has 13 % of its size.",
        ),
        (
            {"at_most_mb": 8.4},
            "tiny onnx-int8",
            "tiny onnx-int8 (8.4 MB), the best of at most 8.4 MB, keeps 96.0 % of the teacher's STS "
            "average and 96.0 % of its nDCG@10, is 6.2 times as fast and has 9.2 % of its size.",
        ),
        (
            {"at_least": 0.97},
            "kd",  # of two that are as small, the better one
            "kd (69.6 MB), the smallest with at least 97 % of the teacher's STS average, keeps 98.8 % of "
            "the teacher's STS average and 98.8 % of its nDCG@10, is 1.9 times as fast and has 77 %",
        ),
        (
            {"at_least": 0.96},
            "tiny onnx-int8",
            "tiny onnx-int8 (8.4 MB), the smallest with at least 96 % of the teacher's STS average, keeps",
        ),
        (
            {"at_least_times_as_fast": 5},
            "tiny onnx-int8",
            "tiny onnx-int8 (8.4 MB), the best that is at least 5 times as fast as the teacher, keeps",
        ),
        (
            {"at_least_times_as_fast": 50},
            "static",
            "static (31.2 MB), the best that is at least 50",
        ),
    ],
)
def test_a_bound_names_the_student_within_it(bound, form, sentence):
    found = chosen(**bound)
    assert (found.form, found.fits) == (form, True)
    assert found.sentence.startswith(sentence)


@pytest.mark.parametrize(
    ("bound", "form", "sentence"),
    [
        (
            {"at_most_mb": 5},
            "tiny onnx-int8",
            "No student has at most 5 MB. The nearest is tiny onnx-int8 (8.4 MB): it keeps 96.0 % of the "
            "teacher's STS average and 96.0 % of its nDCG@10, is 6.2 times as fast and has 9.2 % of its",
        ),
        (
            {"at_least": 0.995},
            "kd",
            "No student keeps at least 99.5 % of the teacher's STS average. The nearest is kd",
        ),
        (
            {"at_least_times_as_fast": 99},
            "static",
            "No student is at least 99 times as fast as the teacher. The nearest is static (31.2 MB): it",
        ),
    ],
)
def test_where_nothing_fits_the_nearest_is_named(bound, form, sentence):
    found = chosen(**bound)
    assert (found.form, found.fits) == (form, False)
    assert found.sentence.startswith(sentence)


@pytest.mark.parametrize(
    ("bound", "absent", "said"),
    [
        ({"at_most_mb": 20}, "megabytes", "No student's size is known, so none is chosen by it."),
        (
            {"at_least_times_as_fast": 2},
            "texts_per_reference",
            "No student's speed was compared with the teacher's, so none is chosen by it.",
        ),
        (
            {"at_least": 0.9},
            "sts.",
            "The teacher's fidelity is not known, so no student is chosen by what it keeps of it.",
        ),
    ],
)
def test_what_was_not_measured_chooses_nobody(bound, absent, said):
    models = {name: found for name, found in RANGE.items() if name != "tiny"}
    models = without(models, *([absent] if absent != "sts." else ["sts.", "retrieval."]))
    if absent == "sts.":
        models["teacher"] = without({"it": models["teacher"]}, "fidelity.")["it"]
    found = chosen(models, **bound)
    assert found.fits is None
    assert found.sentence.startswith(f"{said} kd, the best student, ")


def test_students_within_a_bound_may_be_tied():
    wide = with_ends(RANGE, 1.5, "sts.")
    assert chosen(wide, at_most_mb=69.6).sentence.startswith(
        "kd (69.6 MB), tied with ckd for the best of at most 69.6 MB, keeps 99 %"
    )


def test_the_choice_is_told_everywhere(folder):
    for name, found in RANGE.items():
        folder.evaluated(name, found)
    folder.exported("tiny", **TINY)
    students = ["kd", "ckd", "tiny", "static"]
    choose = ChooseParams(at_most_mb=10)
    outcome = folder.report(list(RANGE), students, choose=choose)
    sentence = chosen(at_most_mb=10).sentence
    assert outcome.summary == f"6 models: {sentence}"
    assert outcome.facts["chosen"] == {"model": "tiny", "format": "onnx-int8", "fits": True}
    sink = StringIO()
    Console(width=999, file=sink).print(
        table(outcome.facts, students=students, width=999, choose=choose)
    )
    assert sentence in " ".join(sink.getvalue().split())


def test_there_is_no_verdict_without_both_sides(models):
    assert verdict(models, []) == ""
    assert verdict({"kd": models["kd"]}, STUDENTS) == ""


def test_averages_over_other_sets_are_not_compared(models):
    del models["teacher"]["sts.STSB"]
    models["teacher"] |= {"megabytes": 14_222.4, "texts_per_reference": 3.1 / 20}
    assert verdict(models, ["kd"]) == (
        "kd keeps 96.8 % of the teacher's nDCG@10, is 131 times as fast and has 0.49 % of its size."
    )


# --- fewer values than there are


def at_width(width, sts, ndcg, likeness, overlap):
    """What `evaluate` adds of a student that has a width."""
    found = metrics_of(sts, ndcg, likeness, overlap, 1.0)
    kinds = ("sts.", "retrieval.", "fidelity.")
    return {f"widths.{width}.{key}": value for key, value in found.items() if key.startswith(kinds)}


def test_a_students_widths_stand_below_it_the_widest_first(models):
    models["kd"] |= at_width(64, 70.25, 0.8011, 0.9021, 0.6511)
    models["kd"] |= at_width(128, 71.5, 0.8301, 0.9311, 0.7001)
    models["kd-finetuned"] |= at_width(128, 73.5, 0.9, 0.99, 0.98)
    lines = drawn(models)
    assert lines[2].split()[:4] == ["model", "average", "STS12", "STSB"]
    assert [line for line in lines if line.startswith("  first")] == [
        "  first 128     71.50  71.00  72.00      0.830     0.931    0.700      -       -        -     -",
        "  first 64      70.25  69.75  70.75      0.801     0.902    0.651      -       -        -     -",
        "  first 128     73.50  73.00  74.00      0.900     0.990    0.980      -       -        -     -",
    ]
    names = [line[:14].rstrip() for line in lines[4:12]]
    whole = ["teacher", "half", "kd", "ckd", "kd-finetuned"]
    assert names == [*whole[:3], "  first 128", "  first 64", *whole[3:], "  first 128"]


def test_widths_are_no_rivals_and_change_nothing_else(models):
    plain = drawn(models, styled=True)
    models["ckd"] |= at_width(128, 99, 0.99, 0.99, 0.99)
    lines = drawn(models, styled=True)
    assert [line for line in lines if "first" not in line] == plain
    (row,) = [line for line in lines if "first" in line]
    assert "\x1b[1m" not in row
    assert verdict(models, STUDENTS).startswith("kd-finetuned, the best student, keeps 99.6 %")


def test_a_wide_label_takes_its_room(models):
    short = {
        "teacher": models["teacher"],
        "kd": models["kd"] | at_width(128, 71.5, 0.8301, 0.93, 0.70),
    }
    lines = drawn(short, students=["kd"], width=79)
    assert max(map(len, lines)) <= 79
    assert lines[-1] == "No room for: STS12, STSB, million weights."
