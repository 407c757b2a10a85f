"""Long texts in windows: nothing is left out, and the vector is the mean that it should be."""

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from stages import embed
from stages.models.encoder import Encoder
from stages.models.windows import windows_of
from storage.errors import TeachonceError
from storage.manifest import fingerprint
from tests.conftest import embed_params, sentences

CPU = torch.device("cpu")
ROOM = 6
LONG = " ".join(sentences(4))


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


def count(tokenizer, text):
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_windows_hold_the_whole_text_and_no_more_than_there_is_room_for(tokenizer):
    texts = [LONG, "short", "", f"  {LONG}  "]
    windows = windows_of(texts, tokenizer, window_tokens=ROOM)
    for place, text in enumerate(texts):
        pieces = [
            piece
            for piece, owner in zip(windows.texts, windows.owners, strict=True)
            if owner == place
        ]
        assert "".join(pieces) == text
        assert all(count(tokenizer, piece) <= ROOM for piece in pieces)
        # Between words: each window has the tokens that the text has there.
        assert sum(count(tokenizer, piece) for piece in pieces) == count(tokenizer, text)
    assert windows.tokens.sum() == sum(count(tokenizer, text) for text in texts)
    assert windows.owners.tolist().count(1) == windows.owners.tolist().count(2) == 1
    assert windows.split_texts == 2


def test_a_word_longer_than_a_window_is_cut_inside(tokenizer):
    word = "x" * 40
    windows = windows_of([word], tokenizer, window_tokens=ROOM)
    assert "".join(windows.texts) == word
    assert len(windows.texts) > 1


def slow_mean(vectors, tokens):
    total = [0.0] * len(vectors[0])
    for vector, weight in zip(vectors, tokens, strict=True):
        total = [a + weight * float(b) for a, b in zip(total, vector, strict=True)]
    return [value / sum(tokens) for value in total]


@pytest.mark.parametrize("prompt", ["", "find: "])
def test_the_vector_of_a_long_text_is_the_mean_of_its_windows(tiny_model, tokenizer, prompt):
    """The tiny teacher ends in Normalize, so the mean is scaled to length 1 again."""
    limit = ROOM + 2 + count(tokenizer, prompt)
    options = {"device": CPU, "max_tokens": limit, "prompts": {"text": prompt}}
    cut, whole = Encoder(tiny_model, **options), Encoder(tiny_model, **options, in_windows=True)
    texts = ["short", LONG, sentences(1)[0][:20]]
    found = whole.encode_counted(texts)
    windows = windows_of([LONG], tokenizer, window_tokens=ROOM)
    mean = np.array(slow_mean(cut.encode(windows.texts), windows.tokens.tolist()))
    assert found.vectors[1] == pytest.approx(mean / np.linalg.norm(mean), abs=1e-5)
    assert np.allclose(np.linalg.norm(found.vectors, axis=1), 1, atol=1e-5)
    # What is left out when a text is cut is heard here.
    assert float(found.vectors[1] @ cut.encode([LONG])[0]) < 0.999
    assert found.truncated == windows_of(texts, tokenizer, window_tokens=ROOM).split_texts
    windows = windows_of(texts, tokenizer, window_tokens=ROOM).texts
    assert found.tokens == whole.reader.read(windows, whole.prompt).lengths.sum()


def test_texts_that_fit_have_the_vectors_that_they_have_without_windows(tiny_model):
    texts = [text[:12] for text in sentences(20)]
    options = {"device": CPU, "max_tokens": 32}
    cut = Encoder(tiny_model, **options).encode_counted(texts)
    found = Encoder(tiny_model, **options, in_windows=True).encode_counted(texts)
    assert np.array_equal(found.vectors, cut.vectors)
    assert (found.tokens, found.truncated) == (cut.tokens, 0)
    assert Encoder(tiny_model, **options, in_windows=True).encode([]).shape[0] == 0


def test_a_prompt_that_leaves_no_room_is_refused(tiny_model):
    """Else all vectors would be the prompt's."""
    prompt = "amber basin cedar"
    for in_windows in (True, False):
        options = {"device": CPU, "prompts": {"text": prompt}, "in_windows": in_windows}
        with pytest.raises(TeachonceError) as caught:
            Encoder(tiny_model, max_tokens=8, **options)
        assert str(caught.value) == (
            "embed.max_tokens: 8, but special tokens and the prompt take 5 of them: 3 are left for a text, "
            "and it takes at least 4\n  cure: set it to 9 or more, or write a shorter embed.prompts.text"
        )
        assert Encoder(tiny_model, max_tokens=9, **options).window_tokens == 4
    assert Encoder(tiny_model, device=CPU, max_tokens=4).window_tokens == 2


def test_windows_are_part_of_the_fingerprint_and_cutting_keeps_the_old_one():
    recipe = embed.recipe(embed_params(), {})
    assert "long_texts" not in recipe
    other = embed.recipe(embed_params(long_texts="windows"), {})
    assert fingerprint(other) != fingerprint(recipe)
