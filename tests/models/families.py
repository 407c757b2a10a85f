"""Each family of models in tiny: random weights, 4 layers of 32 values, one tokenizer of a few words."""

from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch
import transformers as tf

from stages.models.encoder import PaddedReader
from stages.models.packed import PackedReader
from tests.conftest import make_tiny_model, sentences

PAGE = Path(__file__).parents[2] / "docs" / "teachers.md"
HEADING = "## Which families were tried"
WINDOW = 8

BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 80,
    "pad_token_id": 0,
}
SPECIAL = {"cls_token_id": 2, "bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3}
DECODER = BERT | {"num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 2, "eos_token_id": 3}
SLIDING = DECODER | {"sliding_window": WINDOW}
LOCAL = SPECIAL | {"local_attention": 2 * WINDOW, "global_attn_every_n_layers": 2}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 4, "num_heads": 4, "pad_token_id": 0}
DISTIL = {"dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 80}
DISENTANGLED = {
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "position_buckets": 16,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
}


@dataclass(frozen=True)
class Family:
    """How a model of a family is made, and how it is read.

    Args:
        model: Name of its class.
        config: Name of the class of its configuration.
        settings: Its configuration.
        pooling: How the vectors of tokens become that of a text.
        reader: How `Encoder` reads it.
        is_decoder: Whether it pads on the left, and its tokenizer is one of pieces of bytes.
    """

    model: str
    config: str
    settings: dict = field(default_factory=dict)
    pooling: str = "mean"
    reader: type = PackedReader
    is_decoder: bool = False

    def with_settings(self, **changes):
        return replace(self, settings=self.settings | changes)


def decoder(model, config, settings=DECODER, reader=PackedReader):
    return Family(model, config, settings, "lasttoken", reader, is_decoder=True)


FAMILIES = {
    "BERT": Family("BertModel", "BertConfig", BERT),
    "RoBERTa": Family("RobertaModel", "RobertaConfig", BERT),
    "XLM-RoBERTa": Family("XLMRobertaModel", "XLMRobertaConfig", BERT, "cls"),
    "DistilBERT": Family("DistilBertModel", "DistilBertConfig", DISTIL),
    "ELECTRA": Family("ElectraModel", "ElectraConfig", BERT | {"embedding_size": 32}, "cls"),
    "NomicBERT": Family("NomicBertModel", "NomicBertConfig", BERT),
    "ModernBERT": Family("ModernBertModel", "ModernBertConfig", BERT | LOCAL),
    # Their attention adds a bias by the distance of tokens in the whole row.
    "MPNet": Family("MPNetModel", "MPNetConfig", BERT | {"pad_token_id": 1}, reader=PaddedReader),
    "DeBERTa": Family(
        "DebertaModel",
        "DebertaConfig",
        BERT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
        reader=PaddedReader,
    ),
    "DeBERTa-v3": Family(
        "DebertaV2Model", "DebertaV2Config", BERT | DISENTANGLED, reader=PaddedReader
    ),
    "T5 encoder": Family("T5EncoderModel", "T5Config", T5, reader=PaddedReader),
    "Qwen2": decoder("Qwen2Model", "Qwen2Config"),
    "Qwen3": decoder("Qwen3Model", "Qwen3Config"),
    "Llama": decoder("LlamaModel", "LlamaConfig"),
    "Mistral": decoder("MistralModel", "MistralConfig", SLIDING),
    # Its attention bounds the scores of pairs of tokens, which the one of packed texts does not.
    "Gemma 2": decoder("Gemma2Model", "Gemma2Config", SLIDING, PaddedReader),
    "Gemma 3": Family(
        "Gemma3TextModel",
        "Gemma3TextConfig",
        SLIDING
        | {
            "use_bidirectional_attention": True,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
            "num_hidden_layers": 6,
        },
    ),
}


def make_tokenizer(folder):
    """A tokenizer of a few words; `folder` gets the model that it comes with."""
    return tf.AutoTokenizer.from_pretrained(make_tiny_model(folder))


@cache
def byte_tokenizer():
    """One of pieces of bytes that ends a text with a token of its own, as decoders that embed have it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    ends = ["<pad>", "<unk>", "<s>", "<end>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=ends, initial_alphabet=letters)
    core.train_from_iterator(sentences(200), trainer)
    core.post_processor = processors.TemplateProcessing(
        single="$A <end>", special_tokens=[("<end>", 3)]
    )
    names = {"pad_token": "<pad>", "eos_token": "<end>", "padding_side": "left"}
    return tf.PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=64, **names)


def make_family(folder, tokenizer, family):
    """Write a model of a family, a `Family` or its name, into a folder of sentence-transformers."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

    family = FAMILIES[family] if isinstance(family, str) else family
    tokenizer = byte_tokenizer() if family.is_decoder else tokenizer
    torch.manual_seed(0)
    config = getattr(tf, family.config)(vocab_size=len(tokenizer), **family.settings)
    config.initializer_range = 0.2  # far enough from zero that attention matters
    body = folder / "body"
    getattr(tf, family.model)(config).save_pretrained(body)
    tokenizer.save_pretrained(body)
    modules = [Transformer(str(body), max_seq_length=64), Pooling(32, family.pooling), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder), create_model_card=False)
    return folder


def table():
    """The table of families on the page: family -> column -> cell."""
    lines = PAGE.read_text().split(HEADING)[1].split("\n## ")[0].splitlines()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if line[:1] == "|"
    ]
    columns, _, *cells = rows
    return {row[0]: dict(zip(columns, row, strict=True)) for row in cells}
