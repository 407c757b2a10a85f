"""A smaller vocabulary: texts of kept tokens are read exactly as before, and no text is less known."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers as tf
from sentence_transformers import SentenceTransformer
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from stages import export, start
from stages.models import vocabulary
from stages.models.lineage import read_lineage
from stages.models.loading import load_model
from stages.models.renumbering import Pieces
from stages.models.token_counts import token_counts
from stages.models.vocabulary import cut_vocabulary
from stages.params import StartParams, VocabularyShare
from storage.errors import TeachonceError
from tests.conftest import exporting, sentences
from tests.models.families import FAMILIES, make_family, make_tokenizer
from tests.stages.test_distill import World, recipe

CPU = torch.device("cpu")
AT = "starts.small.vocabulary"
ENDS = ["<s>", "<pad>", "</s>", "<unk>"]
BYTES = [f"<0x{value:02X}>" for value in range(256)]


def words(count, seed=0):
    """Words of few letters, so that many merges and pieces overlap; short ones are frequent."""
    draw = np.random.default_rng(seed)
    letters = list("aabbcdeé")
    return ["".join(draw.choice(letters, size=size)) for size in draw.geometric(0.25, count)]


def texts(count, seed=0):
    """Of such words, of the lexicon, and of rare characters."""
    draw = np.random.default_rng([1, seed])
    mixed = [*words(400, seed), *" ".join(sentences(20, seed=seed)).split(), "東京", "ñandú", "🚀ß"]
    return [" ".join(draw.choice(mixed, size=draw.integers(1, 8))) for _ in range(count)]


def wordpiece():
    core = Tokenizer(models.WordPiece(unk_token="<unk>"))
    core.normalizer = normalizers.BertNormalizer(strip_accents=False)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=500, special_tokens=ENDS, continuing_subword_prefix="##", show_progress=False
    )
    core.train_from_iterator(training(), trainer)
    return core


def training():
    """Texts without the letter ß, which no tokenizer knows."""
    return [text.replace("ß", "") for text in texts(600, seed=9)]


def byte_level():
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=ENDS, initial_alphabet=letters, show_progress=False
    )
    core.train_from_iterator(training(), trainer)
    return core


def whole_words():
    """As Llama 3: a word that is a token is taken as it is, also if merges would not make it."""
    content = json.loads(byte_level().to_str())
    content["model"]["ignore_merges"] = True
    for word in ("Ġlantern", "zipper", "Ġabcd"):
        content["model"]["vocab"].setdefault(word, len(content["model"]["vocab"]))
    return Tokenizer.from_str(json.dumps(content))


def byte_fallback():
    """As Gemma: a text is one word, and characters that have no token are bytes."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=[*ENDS, *BYTES], limit_alphabet=24, show_progress=False
    )
    core.train_from_iterator(training(), trainer)
    content = json.loads(core.to_str())
    content["pre_tokenizer"] = None
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] in ENDS]
    return Tokenizer.from_str(json.dumps(content))


def unigram(*, has_bytes=False):
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=600, special_tokens=ENDS, unk_token="<unk>", show_progress=False
    )
    core.train_from_iterator(training(), trainer)
    content = json.loads(core.to_str())
    if has_bytes:
        content["model"]["byte_fallback"] = True
        content["model"]["vocab"] += [[piece, 0.0] for piece in BYTES]
    return Tokenizer.from_str(json.dumps(content))


CORES = {
    "WordPiece": wordpiece,
    "byte-level BPE": byte_level,
    "BPE that takes words whole": whole_words,
    "BPE with bytes": byte_fallback,
    "Unigram": unigram,
    "Unigram with bytes": lambda: unigram(has_bytes=True),
}


@pytest.mark.parametrize("kind", CORES)
def test_texts_of_kept_tokens_are_cut_as_before_and_no_text_is_less_known(kind):
    """Whichever tokens are kept: the counts are drawn at random."""
    core = CORES[kind]()
    content = json.loads(core.to_str())
    pieces = Pieces(content, address=AT)
    needed = pieces.needed()
    unknown = core.token_to_id("<unk>")
    looked_at = texts(400, seed=3)
    before = dict(zip(looked_at, core.encode_batch(looked_at), strict=True))
    used = np.zeros(1 + max(pieces.names), np.int64)
    for encoding in before.values():
        used += np.bincount(encoding.ids, minlength=len(used))
    room = len({*np.flatnonzero(used).tolist()} - needed)
    assert room > 80
    same = 0
    for seed in range(8):
        draw = np.random.default_rng(seed)
        most = len(needed) + int(draw.integers(room // 8, room))
        counts = np.where(used > 0, draw.integers(1, 1000, len(used)), 0)
        kept = pieces.choose(counts, needed, most=most, share=np.inf)
        assert len(kept) == most
        cut = Tokenizer.from_str(json.dumps(pieces.cut(kept)))
        assert cut.get_vocab() == {pieces.names[number]: i for i, number in enumerate(kept)}
        for text, after in zip(looked_at, cut.encode_batch(looked_at), strict=True):
            own = before[text]
            assert after.ids.count(cut.token_to_id("<unk>")) <= own.ids.count(unknown)
            if set(own.ids) <= set(kept):
                assert after.tokens == own.tokens
                assert [kept[number] for number in after.ids] == own.ids
                same += 1
    assert same > 200
    assert any(unknown in own.ids for own in before.values()) == (kind in {"WordPiece", "Unigram"})


def model_of(folder, core, family="BERT"):
    """A model of a family with a tokenizer."""
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        special_tokens=[(name, core.token_to_id(name)) for name in ("<s>", "</s>")],
    )
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=64, **names)
    family = FAMILIES[family] if isinstance(family, str) else family
    padding = core.token_to_id("<pad>")
    make_family(folder, tokenizer, family.with_settings(pad_token_id=padding))
    return folder


def vectors(model, some):
    return model.encode(some, prompt="")


def make_start(folder, corpus, out, **settings):
    params = StartParams.model_validate({"from": "teacher", "layers": None, **settings})
    return start.run(
        params,
        name="small",
        folder=folder,
        trust_remote_code=False,
        corpus=lambda: corpus,
        out=out,
    )


@pytest.mark.parametrize("kind", CORES)
def test_a_start_with_fewer_tokens_gives_the_same_vectors(kind, place, tmp_path):
    corpus = place.corpus(list(dict.fromkeys(texts(400, seed=3))))
    folder = model_of(tmp_path / "m", CORES[kind](), "RoBERTa")
    whole = load_model(folder, device=CPU)
    counts = token_counts(whole.tokenizer, corpus)
    outcome = make_start(folder, corpus, tmp_path / "small", vocabulary={"keep": 0.97})
    small = SentenceTransformer(str(tmp_path / "small"), device="cpu")
    kept, there = len(small.tokenizer), len(whole.tokenizer)
    assert small[0].auto_model.get_input_embeddings().num_embeddings == kept < there - 20
    assert (outcome.facts["tokens"], outcome.facts["tokens_before"]) == (kept, there)
    assert f"{kept:,} of {there:,} tokens (" in outcome.summary
    assert 0.97 <= outcome.facts["corpus_tokens_kept"] < 1
    names = whole.tokenizer.convert_ids_to_tokens(range(there))
    share = sum(counts[names.index(name)] for name in small.tokenizer.get_vocab()) / counts.sum()
    assert outcome.facts["corpus_tokens_kept"] == pytest.approx(share)

    known = set(small.tokenizer.get_vocab())
    shared = [text for text in texts(400, seed=3) if {*whole.tokenizer.tokenize(text)} <= known]
    assert len(shared[:40]) == 40
    shared = shared[:40]
    assert np.allclose(vectors(small, shared), vectors(whole, shared), rtol=0, atol=1e-5)
    other = [text for text in texts(400, seed=3) if text not in shared][:3]
    assert not np.allclose(vectors(small, other), vectors(whole, other), atol=1e-3)


def test_the_score_of_what_is_unknown_stays():
    """It is the lowest of all less ten: -40 here, and -24 without the last piece."""
    scores = {"<unk>": 0.0, "x": -13.9, "a": -1.0, "xa": -1.0, "aé": -14.0, "z": -1.0, "y": -1.0}
    scores |= dict.fromkeys(BYTES, 0.0) | {"yz": -20.0, "zz": -30.0}
    core = Tokenizer(models.Unigram([*scores.items()], unk_id=0, byte_fallback=True))
    assert core.encode("xaé").tokens == ["x", "aé"]
    pieces = Pieces(json.loads(core.to_str()), address=AT)
    kept = pieces.choose(np.ones(len(scores)), pieces.needed(), most=len(scores) - 1, share=np.inf)
    cut = Tokenizer.from_str(json.dumps(pieces.cut(kept)))
    assert {*core.get_vocab()} - {*cut.get_vocab()} == {"yz"}
    assert cut.encode("xaé").tokens == ["x", "aé"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tiny")


@pytest.mark.parametrize("family", FAMILIES)
def test_any_family_is_cut_with_its_layers(family, tokenizer, place, tmp_path):
    corpus = place.corpus(sentences(80))
    folder = make_family(tmp_path / "m", tokenizer, family)
    make_start(folder, corpus, tmp_path / "half", layers=[0, 1])
    half = load_model(tmp_path / "half", device=CPU)
    few = {"keep": 0.8}
    outcome = make_start(folder, corpus, tmp_path / "small", layers=[0, 1], vocabulary=few)
    small = load_model(tmp_path / "small", device=CPU)
    body = small[0].auto_model
    tokens = outcome.facts["tokens"]
    assert len(small.tokenizer) == tokens < len(half.tokenizer)
    # The class of Qwen2's tokenizer adds a token of its own, which the model does not know.
    unread = len(half.tokenizer) - half[0].auto_model.get_input_embeddings().num_embeddings
    assert unread == (family == "Qwen2")
    assert body.config.get_text_config().vocab_size == tokens - unread
    assert body.get_input_embeddings().weight.shape == (tokens - unread, 32)
    known = set(small.tokenizer.get_vocab()) - {"<|endoftext|>"}
    shared = ["", *sentences(80), "e.g.", *half.tokenizer.get_vocab()]
    shared = [text for text in shared if {*half.tokenizer.tokenize(text)} <= known]
    assert len(shared) > 30
    assert np.allclose(vectors(small, shared), vectors(half, shared), rtol=0, atol=1e-5)


def with_ends_last():
    """Special tokens behind all others, and put around a text as RoBERTa's are."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=letters, show_progress=False)
    core.train_from_iterator(training(), trainer)
    core.add_special_tokens(ENDS)
    return core


def test_ids_of_special_tokens_move_along(place, tmp_path):
    corpus = place.corpus(list(dict.fromkeys(texts(200))))
    core = with_ends_last()
    ids = {"pad_token_id": 501, "bos_token_id": 500, "eos_token_id": [502, 500]}
    assert [core.token_to_id(end) for end in ENDS] == [500, 501, 502, 503]
    folder = model_of(tmp_path / "m", core, FAMILIES["BERT"].with_settings(**ids))
    for processor in ("RobertaProcessing", "BertProcessing", "Sequence"):
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text())
        around = {"sep": ["</s>", 502], "cls": ["<s>", 500], "type": processor}
        if processor == "Sequence":
            template = {"Sequence": {"id": "A", "type_id": 0}}
            first = {"SpecialToken": {"id": "<s>", "type_id": 0}}
            around = {
                "type": "Sequence",
                "processors": [
                    {
                        "type": "ByteLevel",
                        "add_prefix_space": False,
                        "trim_offsets": True,
                        "use_regex": True,
                    },
                    {
                        "type": "TemplateProcessing",
                        "single": [first, template],
                        "pair": [first, template, {"Sequence": {"id": "B", "type_id": 0}}],
                        "special_tokens": {"<s>": {"id": "<s>", "ids": [500], "tokens": ["<s>"]}},
                    },
                ],
            }
        elif processor == "RobertaProcessing":
            around |= {"trim_offsets": True, "add_prefix_space": False}
        path.write_text(json.dumps(content | {"post_processor": around}))
        make_start(folder, corpus, tmp_path / processor, vocabulary={"keep": 0.95})
        small = load_model(tmp_path / processor, device=CPU)
        config, count = small[0].auto_model.config, len(small.tokenizer)
        assert count < 450
        assert (config.pad_token_id, config.bos_token_id) == (count - 3, count - 4)
        assert config.eos_token_id == [count - 2, count - 4]
        assert small.tokenizer.pad_token_id == count - 3
        assert small[0].auto_model.get_input_embeddings().padding_idx == count - 3
        tokens = small.tokenizer("a")["input_ids"]
        assert small.tokenizer.convert_ids_to_tokens(tokens)[0] == "<s>"


def test_positions_that_are_counted_from_padding_stay(place, tmp_path):
    """RoBERTa's first token has the position after padding's id; so all ids before that one stay."""
    content = json.loads(byte_level().to_str())
    shifted = {f"unused{number}": number for number in range(3)}
    model = content["model"]
    model["vocab"] = shifted | {piece: number + 3 for piece, number in model["vocab"].items()}
    for token in content["added_tokens"]:
        token["id"] += 3
    core = Tokenizer.from_str(json.dumps(content))
    assert core.token_to_id("<pad>") == 4
    corpus = place.corpus(list(dict.fromkeys(texts(200))))
    make_start(
        model_of(tmp_path / "r", core, "RoBERTa"),
        corpus,
        tmp_path / "kept",
        vocabulary={"keep": 0.9},
    )
    assert load_model(tmp_path / "kept", device=CPU).tokenizer.pad_token_id == 4
    make_start(
        model_of(tmp_path / "b", core, "BERT"), corpus, tmp_path / "moved", vocabulary={"keep": 0.9}
    )
    assert load_model(tmp_path / "moved", device=CPU).tokenizer.pad_token_id == 1


def fails(call):
    with pytest.raises(TeachonceError) as error:
        call()
    [problem, cure] = str(error.value).splitlines()
    return problem, cure.removeprefix("  cure: ")


WHOLE = "take `vocabulary` out: the start then has all tokens of its model"


def test_numbers_that_do_not_fit_are_refused(tiny_model, place):
    corpus = place.corpus(sentences(80))
    model = load_model(tiny_model, device=CPU)
    counts = token_counts(model.tokenizer, corpus)
    there, least = len(model.tokenizer), 5 + 26 + 26 + 10

    def cut(wanted):
        return lambda: cut_vocabulary(model, counts, wanted=wanted, sample=[], address=AT)

    for wanted in (there, there + 5):
        assert fails(cut(wanted)) == (
            f"{AT}: {wanted}, but the tokenizer has {there} tokens, so there is nothing to cut",
            f"set it to less than {there}, or {WHOLE}",
        )
    assert fails(cut(least - 1)) == (
        f"{AT}: {least - 1}, but {least} tokens are needed to spell any text",
        f"set it to {least} or more",
    )
    assert fails(cut(VocabularyShare(keep=1.0))) == (
        f"{AT}: the corpus uses all {there} tokens, or they are needed to spell any text; there is "
        "nothing to cut",
        f"set keep to less than 1, or {WHOLE}",
    )
    assert len(model.tokenizer) == there
    assert cut(least)().kept == least == len(model.tokenizer)


def word_level():
    core = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    return json.loads(core.to_str())


def changed(core, **model):
    content = json.loads(core.to_str())
    return content | {"model": content["model"] | model}


def without(core, piece):
    content = json.loads(core.to_str())
    del content["model"]["vocab"][piece]
    return content


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            word_level,
            "the tokens of a tokenizer of the kind WordPiece, BPE, Unigram can be cut, not",
        ),
        (lambda: changed(byte_level(), end_of_word_suffix="</w>"), "(end_of_word_suffix)"),
        (
            lambda: without(wordpiece(), "##d"),
            "cannot be spelled: there is no token ##d",
        ),
        (
            lambda: json.loads(
                Tokenizer(
                    models.Unigram([("<unk>", 0.0), ("ab", -1.0), ("a", -1.0)], unk_id=0)
                ).to_str()
            ),
            "the token ab cannot be spelled: there is no token b",
        ),
    ],
)
def test_tokenizers_that_cannot_be_cut_are_refused(make, said):
    problem, cure = fails(lambda: Pieces(make(), address=AT))
    assert said in problem
    assert cure == WHOLE


def test_models_that_cannot_be_cut_are_refused(tiny_model, place, tmp_path):
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    corpus = place.corpus(sentences(20))
    core = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    static = SentenceTransformer(modules=[StaticEmbedding(core, embedding_dim=8)], device="cpu")
    static.save(str(tmp_path / "static"))
    problem, _ = fails(
        lambda: make_start(tmp_path / "static", corpus, tmp_path / "s", vocabulary=1000)
    )
    assert problem.endswith("with one transformer can be cut, not those of StaticEmbedding")
    model = load_model(tiny_model, device=CPU)
    model[0].processor = tf.CanineTokenizer()
    problem, _ = fails(lambda: vocabulary.keep_tokens(model, 1000, corpus=corpus, address=AT))
    assert problem.endswith("with a tokenizer.json can be cut, and CanineTokenizer has none")


def test_what_was_saved_otherwise_is_refused(tiny_model, place, tmp_path):
    corpus = place.corpus(sentences(80))
    model = load_model(tiny_model, device=CPU)
    share = VocabularyShare(keep=0.8)
    cut = vocabulary.keep_tokens(model, share, corpus=corpus, address=AT)

    def saved(change):
        folder = tmp_path / "saved"
        shutil.rmtree(folder, ignore_errors=True)
        model.save(str(folder), create_model_card=False)
        other = load_model(folder, device=CPU)
        with torch.no_grad():
            change(other)
        other.save(str(folder), create_model_card=False)
        return lambda: cut.check_saved(folder, model, trust_remote_code=False)

    def another_row(other):
        other[0].auto_model.get_input_embeddings().weight[other.tokenizer.vocab["."], 0] += 0.1

    def other_tokens(other):
        content = json.loads(other.tokenizer.backend_tokenizer.to_str())
        vocab = content["model"]["vocab"]
        vocab["."], vocab[","] = vocab[","], vocab["."]
        other.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(content))

    def unknown(other):
        core = other.tokenizer.backend_tokenizer
        core.normalizer = normalizers.Sequence([core.normalizer, normalizers.Replace("a", "東")])

    saved(lambda other: None)()
    but = f"{AT}: without the other tokens the model does not read texts as it did: saved and loaded again"
    assert fails(saved(another_row))[0].startswith(f"{but}, its vectors of tokens are off by")
    assert fails(saved(other_tokens))[0].startswith(f"{but}, its vectors of tokens are off by")
    assert fails(saved(unknown))[0].startswith(f"{but}, it knows less of the text")
    assert fails(saved(lambda other: other.tokenizer.add_tokens("new")))[0].startswith(
        f"{but}, its tokenizer has {cut.kept + 1} tokens"
    )


def test_a_student_with_fewer_tokens_is_trained_and_exported(tiny_model, place):
    folder, student = place.root / "start", place.root / "student"
    world = World(place, tiny_model, folder)
    make_start(tiny_model, world.corpus, folder, layers=[0, 3], vocabulary={"keep": 0.8})
    world.train(recipe(epochs=1))
    export.run(
        folder=student,
        lineage=read_lineage(student),
        metrics={},
        facts={},
        **exporting(place.root / "export"),
    )
    ours = load_model(student, device=CPU)
    theirs = SentenceTransformer(str(place.root / "export"), device="cpu")
    tokens = len(ours.tokenizer)
    assert tokens == len(theirs.tokenizer) == len(load_model(folder, device=CPU).tokenizer) < 113
    assert theirs[0].auto_model.get_input_embeddings().num_embeddings == tokens
    some = [*world.texts[:40], "", "zipper, 東京"]
    assert np.allclose(vectors(theirs, some), vectors(ours, some), rtol=0, atol=1e-5)
