"""Installed packages -> sentences and pairs: what a person would call prose is kept, the rest is not."""

import json
import platform
import sys
import types

import pytest

from stages import docs
from stages.docs import Pair
from stages.params import DocsParams
from stages.reading import packages
from stages.reading.packages import package_versions
from stages.reading.prose import paragraphs, reads_well, unwrapped
from storage.corpus import cut
from storage.errors import TeachonceError

NUMPYDOC = '''
def solve(a, b=None):
    r"""Solve a linear system of :class:`~pkg.Matrix` equations.

    The ``solver`` picks a method from the
    structure of the matrix, see `the guide <https://x.org>`_ [1]_. It never
    changes its **input**.

    .. versionadded:: 1.2
       This line is a part of the directive above it.

    Parameters
    ----------
    a : array_like
        This describes the first parameter of the function.
    b : This looks like a sentence but it is a type.

    Notes
    -----
    The method is due to Gauss, i.e. it is an old one. A second sentence
    stands here in the notes, e.g. to be found:

    - This is an item of a list, and it is left out.

    >>> solve(1)
    The output of a session is not a sentence of prose.

    Examples
    --------
    The following example is in a section that is skipped.
    """
'''

GOOGLE = '''
class Reader:
    """Reads the rows of a file, one after the other.

    Every row is given as a tuple of the values that
    stand in it::

        This is a literal block and not a sentence at all.

    Args:
        path: The path of the file which is to be read.

    Note that nothing is held in memory but the current row.
    ```python
    This is a line of code between two fences of ticks.

    And so is this line, which stands in the same fence.
    ```
    Returns:
        The number of rows that have been read so far.
    """

    try:
        def close(self):
            """Close the file and forget its name.

            https://x.org/a
            """
    finally:
        pass
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Make an importable package whose import would fail."""

    def make(name, **modules):
        folder = tmp_path / "site" / name
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("raise RuntimeError('imported')\n")
        for path, content in modules.items():
            file = folder / (path.replace("__", "/") + ".py")
            file.parent.mkdir(exist_ok=True)
            file.write_text(content)
        return name

    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return make


class Place:
    def __init__(self, root):
        self.out, self.facts = root / "data/raw", root / "reports/stages/docs.json"

    def run(self, *packages, max_texts=1000, heldout_pairs=2):
        params = DocsParams(packages=packages, max_texts=max_texts, heldout_pairs=heldout_pairs)
        return docs.run(params, out=self.out, facts=self.facts)

    def lines(self, name):
        return [json.loads(line) for line in (self.out / name).read_text().splitlines()]

    def texts(self):
        return [line["text"] for line in self.lines("texts.jsonl")]

    def files(self):
        return {
            str(path.relative_to(self.out)): path.read_bytes()
            for path in self.out.rglob("*")
            if path.is_file()
        }


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def function(name, summary, description):
    return f'def {name}():\n    """{summary}\n\n    {description}\n    """\n\n'


def documented(count, start=0):
    return "".join(
        function(
            f"f{n}",
            f"Return the value of the item number {n} of the list.",
            f"The item is looked up in the table of all values, which number {n} or more in this case.",
        )
        for n in range(start, start + count)
    )


# --- prose


def test_what_is_prose_in_numpydoc(place, package):
    place.run(package("pkg", numpydoc=NUMPYDOC))
    assert sorted(place.texts()) == [
        "It never changes its input.",
        "Solve a linear system of Matrix equations.",
        "The solver picks a method from the structure of the matrix, see the guide.",
    ]
    assert place.lines("pairs.jsonl") == [
        {
            "anchor": "Solve a linear system of Matrix equations.",
            "positive": "The solver picks a method from the structure of the matrix, see the guide. "
            "It never changes its input.",
        }
    ]


def test_what_is_prose_in_google_style(place, package):
    place.run(package("pkg", google=GOOGLE))
    assert sorted(place.texts()) == [
        "Close the file and forget its name.",
        "Reads the rows of a file, one after the other.",
    ]


@pytest.mark.parametrize(
    "line",
    [
        ">>> a = call()",
        "... continued(call)",
        ".. note:: This is the first line of a note that goes on.",
        "@param x The first of the parameters of this function.",
        "- The first item of a list that has only this one.",
        "* The first item of a list that has only this one.",
        "1. The first item of a list that has only this one.",
        "(a) The first item of a list that has only this one.",
        "| The first cell of a table | and the second cell of it. |",
        "+-----+-----+",
        "=====  =====",
        "# This is a heading of a page in Markdown style.",
        "<Tip> This is a box in the style of the transformers docs.",
        "https://example.org/a/b",
    ],
)
def test_a_paragraph_with_something_else_in_it_is_left_out(line):
    docstring = (
        f"The prose before it stays.\n\nIt goes over into\n{line}\nIt ends.\n\nThe next block."
    )
    assert paragraphs(docstring)[0] == ["The prose before it stays."]
    assert [p for p in paragraphs(docstring)[1:] if p != ["The next block."]] == []


def test_what_stands_behind_the_first_field_is_no_prose():
    docstring = "Read a file.\n\nIt is read once.\n:param path: The file to read.\n\nThe end."
    assert paragraphs(docstring) == [["Read a file."], ["It is read once."]]


def test_indented_lines_take_the_paragraph_along():
    docstring = "A sentence of prose.\n\nterm\n    Its definition.\n\nThe end."
    assert paragraphs(docstring) == [["A sentence of prose."], ["The end."]]


def test_sections_and_headings_are_no_prose():
    docstring = (
        "Before,\non two lines.\n\nMore About It\n~~~~~~~~~~~~~\n\nUnder it.\n\n"
        "Returns\n-------\nout : int\n\nLast."
    )
    assert paragraphs(docstring) == [["Before, on two lines."], ["Under it."]]


@pytest.mark.parametrize(
    ("marked", "plain"),
    [
        (":class:`X` and :py:func:`~a.b.Y` and :meth:`m <a.m>`", "X and Y and m"),
        ("``code`` and :math:`x^2`", "code and x^2"),
        ("`text <https://x.org>`_ and `name`_ and `x`", "text and name and x"),
        ("[`save`](https://x.org/a) and [text](https://x.org/b)", "save and text"),
        ("**bold** and *thin* but 2 * 3 * 4 and *args", "bold and thin but 2 * 3 * 4 and *args"),
        ("as in [1]_ and [ABC99]_, see it.", "as in and, see it."),
        ("snake_case stays_here, and [0, 1] too", "snake_case stays_here, and [0, 1] too"),
    ],
)
def test_markup_is_unwrapped(marked, plain):
    assert unwrapped(marked) == plain


@pytest.mark.parametrize(
    "sentences",
    [
        ["It ends here.", "The next one starts."],
        ["Is it so?", "It is!", "1 is a number."],
        [
            "Use lists, i.e. Python lists, e.g. of J. Smith.",
            "See Fig. 3 and No. 4.",
        ],
        ["Rows, columns, etc. are kept.", "A version 1.2.3 of pkg.Name is read."],
        ["No full stop at the end"],
        [],
    ],
)
def test_where_a_sentence_ends(sentences):
    assert paragraphs(" ".join(sentences)) == ([sentences] if sentences else [])


@pytest.mark.parametrize(
    ("sentence", "good"),
    [
        ("Return the number of rows in the table.", True),
        ("Compute pairwise distances between two arrays.", True),
        ("The method fit() must be called before transform() is.", True),
        ("Too short to be.", False),
        ("no capital at the beginning of this one.", False),
        ("There is no full stop at the end of this one", False),
        ("This one goes on in the following way:", False),
        ("The value x = 3 is set by the caller of it.", False),
        (r"The mean \mu of the distribution is returned.", False),
        ("Compute kernel matrix eigenvalue decomposition quickly.", False),
        ("The a_b_c, d_e_f, g.h.i and j_k(1) of l_m are read.", False),
        ("An open (bracket makes it a part of something.", False),
        ("The page https://x.org tells more about this.", False),
        ("See the guide for more details about all of this.", False),
        ("Create a new [pkg.Dataset] that has all of these rows.", False),
        ("Set the name of it The conversion is applied to all.", False),
        ("It is the native representation. allow_copy is a keyword of it.", False),
        ("Licensed under the terms of the licence of this file.", False),
        ("The word " + "very " * 80 + "often is in this one.", False),
    ],
)
def test_which_sentence_reads_well(sentence, good):
    assert reads_well(sentence) is good


# --- pairs

SUMMARY = "Return the number of rows in the table."
GOOD = "The rows are counted once, and the count is remembered for the next time."


def pair_of(*blocks):
    return docs.pair_of(paragraphs("\n\n".join(blocks)))


def test_a_pair_is_a_summary_and_the_first_good_paragraph_before_a_section():
    assert pair_of(SUMMARY, GOOD) == Pair(SUMMARY, GOOD)
    assert pair_of(SUMMARY, "Too short.", GOOD) == Pair(SUMMARY, GOOD)
    assert pair_of(SUMMARY, f"{GOOD} It is so: x = 3. Nothing after it.") == Pair(SUMMARY, GOOD)
    assert pair_of(SUMMARY, f"Notes\n-----\n{GOOD}") is None
    assert pair_of(f"{SUMMARY} It has two sentences.", GOOD) is None
    assert pair_of(SUMMARY) is None
    assert (
        pair_of(SUMMARY, f"It does what it says: {SUMMARY[:-1]}, and remembers the count.") is None
    )


def test_a_description_is_cut_at_a_sentence():
    sentences = [f"{GOOD[:-1]} of number {'I' * n}." for n in range(1, 30)]
    description = pair_of(SUMMARY, " ".join(sentences)).description
    assert len(description) <= 800 < len(description) + 100
    assert description.endswith(tuple(sentences))


def test_a_summary_or_description_that_two_pairs_share_is_out():
    kept = Pair("A", "a")
    pairs = [kept, kept, Pair("B", "b"), Pair("b", "c"), Pair("D", "d"), Pair("E", "D")]
    assert docs.unambiguous(pairs) == [kept]


# --- the stage


def test_it_leaves_texts_pairs_and_a_retrieval_test(place, package):
    outcome = place.run(package("one", a=documented(10)), heldout_pairs=3)
    queries, documents = (
        place.lines("retrieval/queries.jsonl"),
        place.lines("retrieval/corpus.jsonl"),
    )
    rows = (place.out / "retrieval/qrels/test.tsv").read_text().splitlines()
    text_of = {line["_id"]: line["text"] for line in documents}
    assert len(place.texts()) == 20
    assert [line["_id"] for line in queries] == ["q0", "q1", "q2"]
    assert set(documents[0]) == {"_id", "title", "text"}
    assert rows[0] == "query-id\tcorpus-id\tscore"
    for row, query in zip(rows[1:], queries, strict=True):
        query_id, document_id, score = row.split("\t")
        number = query["text"].split()[7]
        assert (query_id, score) == (query["_id"], "1")
        assert f"which number {number} or more" in text_of[document_id]
    assert len(documents) == 10
    pairs = place.lines("pairs.jsonl")
    assert len(pairs) == 7
    assert not {pair["anchor"] for pair in pairs} & {query["text"] for query in queries}
    assert {pair["positive"] for pair in pairs} < set(text_of.values())
    assert outcome.summary == (
        "20 sentences and 7 pairs from 1 packages; 3 queries held out, to be found among 10 descriptions"
    )
    assert json.loads(place.facts.read_text()) == outcome.facts
    assert outcome.facts["packages"] == {"one": {"docstrings": 10, "sentences": 20, "pairs": 10}}


def test_other_documents_are_capped_and_half_of_the_pairs_stay(place, package, monkeypatch):
    monkeypatch.setattr(docs, "MAX_OTHER_DOCUMENTS", 2)
    place.run(package("one", a=documented(10)), heldout_pairs=100)
    assert len(place.lines("retrieval/queries.jsonl")) == len(place.lines("pairs.jsonl")) == 5
    assert len(place.lines("retrieval/corpus.jsonl")) == 7


def test_equal_packages_give_equal_bytes_in_any_order(place, package):
    one, two = package("one", a=documented(9)), package("two", b=documented(9, start=5))
    place.run(one, two)
    before = place.files()
    place.run(two, one)
    assert place.files() == before


def test_a_cut_is_a_fair_and_stable_sample(place, package):
    one, two = package("one", a=documented(100)), package("two", b=documented(100, start=200))
    place.run(one)
    alone = place.texts()
    place.run(one, two, max_texts=200)
    both = place.texts()
    assert len(both) == 200
    ours = [text for text in both if text in set(alone)]
    assert 70 < len(ours) < 130
    assert ours == alone[: len(ours)]


def test_the_order_leaves_the_borders_of_shards_to_the_texts():
    shards = list(cut(docs.in_fair_order(f"text number {n}" for n in range(4000)), 64))
    assert 40 < len(shards) < 90


def test_nothing_is_imported_and_odd_files_are_skipped(place, package):
    name = package(
        "pkg",
        good=documented(1),
        broken='"""This does not parse, although it is a sentence."""\ndef (',
        nul='"""This has a zero in it, which is no Python."""\0',
        escape='"""This is above a string that makes Python warn."""\nx = "\\d"',
        tests__a='"""This stands in a folder of tests and is left out."""',
        test_b='"""This stands in a file of tests and is left out."""',
    )
    place.run(name)
    assert len(place.texts()) == 3
    assert "This is above a string that makes Python warn." in place.texts()
    assert name not in sys.modules


def test_no_packages_leave_empty_files(place):
    outcome = place.run()
    assert place.files() == {
        "texts.jsonl": b"",
        "pairs.jsonl": b"",
        "retrieval/corpus.jsonl": b"",
        "retrieval/queries.jsonl": b"",
        "retrieval/qrels/test.tsv": b"query-id\tcorpus-id\tscore\n",
    }
    assert outcome.facts["texts"] == outcome.facts["documents"] == 0


def test_the_standard_library_has_prose_and_the_version_of_python(place):
    params = DocsParams(packages=("argparse", "json"), max_texts=9, heldout_pairs=1)
    assert package_versions(params.packages) == dict.fromkeys(
        params.packages, platform.python_version()
    )
    place.run("argparse", "json")
    assert len(place.texts()) > 20


def test_versions_are_those_of_distributions(tmp_path, monkeypatch):
    for owner, version in (("first-part", "1.5"), ("second", "2")):
        info = tmp_path / f"{owner.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {owner}\nVersion: {version}\n"
        )
        (info / "top_level.txt").write_text(
            "shared_name\n" + ("own_name\n" if version == "2" else "")
        )
    monkeypatch.syspath_prepend(str(tmp_path))
    params = DocsParams(packages=("own_name", "shared_name"), max_texts=1, heldout_pairs=1)
    assert package_versions(params.packages) == {"own_name": "2", "shared_name": "1.5+2"}


@pytest.mark.parametrize("name", ["no_such_package", "os.path", "not a name", "without_spec"])
def test_a_package_that_is_not_installed_is_named(place, name, monkeypatch):
    monkeypatch.setitem(sys.modules, "without_spec", types.ModuleType("without_spec"))
    message = (
        f"docs.packages: no installed package is imported as {name!r}\n"
        "  cure: install it, or take it out of docs.packages in params.yaml"
    )
    with pytest.raises(TeachonceError) as caught:
        place.run(name)
    assert str(caught.value) == message
    params = DocsParams(packages=(name,), max_texts=1, heldout_pairs=1)
    with pytest.raises(TeachonceError) as caught:
        package_versions(params.packages)
    assert str(caught.value) == message


def test_documentation_without_its_readers_says_what_to_install(monkeypatch):
    monkeypatch.setattr(packages, "READERS", ("docstring_parser", "no_such_reader"))
    with pytest.raises(TeachonceError) as caught:
        package_versions(["numpy"])
    assert str(caught.value) == (
        "docs.packages: no_such_reader cannot be imported, and documentation is read with it\n"
        "  cure: pip install 'teachonce[demo]', or set docs.packages: [] to have no texts of packages"
    )
    assert package_versions([]) == {}


def test_a_package_without_python_source_is_named(place):
    with pytest.raises(TeachonceError) as caught:
        place.run("sys")
    assert str(caught.value) == (
        "docs.packages: sys has no Python source to read\n"
        "  cure: take it out of docs.packages in params.yaml"
    )
    assert not place.out.exists()


def test_every_setting_is_in_the_recipe():
    params = DocsParams(packages=("a", "b"), max_texts=3, heldout_pairs=4)
    assert docs.recipe(params) == {
        "version": docs.VERSION,
        "packages": ["a", "b"],
        "max_texts": 3,
        "heldout_pairs": 4,
    }
