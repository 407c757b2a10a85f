"""Queries and documents as the families of teachers that have roles read them, by their own prompts."""

import numpy as np
import pytest
import torch

from stages.models.config import own_prompts, prompts_by_role
from stages.models.encoder import Encoder
from stages.params import PromptsParams
from tests.conftest import sentences
from tests.models.families import make_family, make_tokenizer

INSTRUCTION = "Instruct: find the passage\nQuery: "
TEACHERS = {
    "E5": ("BERT", {"query": "query: ", "passage": "passage: "}),
    "E5, prompt not pooled": ("BERT", {"query": "query: ", "document": "passage: "}),
    "BGE": ("BERT", {"query": "Represent this: "}),
    "Qwen3": ("Qwen3", {"query": INSTRUCTION, "document": ""}),
    "EmbeddingGemma": ("Gemma 3", {"query": "task: query: ", "document": "title: none. text: "}),
    "nomic": ("NomicBERT", {"query": "search query: ", "document": "search document: "}),
}


def make_teacher(folder, name):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense

    family, prompts = TEACHERS[name]
    made = make_family(folder / "made", make_tokenizer(folder / "tiny"), family)
    model = SentenceTransformer(str(made), device="cpu")
    if name == "EmbeddingGemma":
        torch.manual_seed(0)
        transformer, pooling, normalize = model
        heads = [Dense(32, 64, activation_function=None), Dense(64, 32, activation_function=None)]
        model = SentenceTransformer(modules=[transformer, pooling, *heads, normalize], device="cpu")
    if name == "E5, prompt not pooled":
        model.set_pooling_include_prompt(False)
    model.prompts = dict(prompts)
    model.save(str(folder / "teacher"), create_model_card=False)
    return folder / "teacher"


@pytest.mark.parametrize("name", sorted(TEACHERS))
def test_queries_and_documents_are_those_of_sentence_transformers(tmp_path, name):
    from sentence_transformers import SentenceTransformer

    folder = make_teacher(tmp_path, name)
    settings = PromptsParams(text="", query=None, document=None)
    prompts = prompts_by_role(settings, own_prompts(folder, "embed.teacher"))
    encoder = Encoder(
        folder,
        device=torch.device("cpu"),
        max_tokens=48,
        prompts={role: prompt.text for role, prompt in prompts.items()},
    )
    model = SentenceTransformer(str(folder), device="cpu")
    model.max_seq_length = 48
    texts = sentences(20)
    queries, documents = model.encode_query(texts), model.encode_document(texts)
    if name == "E5":
        # Its `encode_document` leaves the prompt out, since it finds an empty one named `document`.
        documents = model.encode(texts, prompt="passage: ")
    assert np.abs(encoder(texts, "query").vectors - queries).max() < 1e-6
    assert np.abs(encoder(texts, "document").vectors - documents).max() < 1e-6
    assert np.abs(queries - documents).max() > 1e-3
