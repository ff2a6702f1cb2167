"""tiktoken and Hugging Face tokenizers agree on real text, or tiktoken is not used."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex as TokenizersRegex
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from pipeline.data.errors import DataError
from pipeline.data.readers import read_documents
from pipeline.data.sources import list_inputs
from pipeline.data.tokenizer import (
    TextTokenizer,
    UnsupportedTokenizerError,
    choose_encoder,
    load_tokenizer,
    tiktoken_encoding,
    train_tokenizer,
)

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
ODD_TEXTS = [
    "",
    " ",
    "\n\n  \n",
    "a  b   c\t\t",
    "it's they'll I'D",
    "äöü 漢字 \U0001f600\u200d",
    "x" * 5000,
    "\r\n \r\n",
    "<|endoftext|>",
]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Forty modules of the standard library."""
    return [text for file in list_inputs(["stdlib"])[:40] for text in read_documents(file)]


@pytest.fixture(scope="module")
def trained(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer of 1000 ids."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(texts, path, vocab_size=1000)
    return path


def test_tiktoken_equals_hugging_face(trained: Path, texts: list[str]) -> None:
    reference = Tokenizer.from_file(str(trained))
    reference.encode_special_tokens = True
    fast = TextTokenizer(trained, encoder="tiktoken")
    assert fast.vocab_size == 1000
    assert fast.eod_id == 0
    for text in [*texts, *ODD_TEXTS]:
        assert fast.encode(text) == reference.encode(text, add_special_tokens=False).ids
    assert choose_encoder(trained, texts)[0] == "tiktoken"


def test_decode_inverts_encode_and_leaves_out_eod(trained: Path, texts: list[str]) -> None:
    tokenizer = load_tokenizer(trained.parent)
    assert tokenizer.encoder == "tokenizers"
    for text in [*texts[:5], *ODD_TEXTS]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([*tokenizer.encode("a b"), tokenizer.eod_id]) == "a b"
    assert tokenizer.eod_id not in tokenizer.encode("x<|endoftext|>y"), "documents cannot forge an end"


def test_training_is_reproducible(trained: Path, texts: list[str], tmp_path: Path) -> None:
    train_tokenizer(texts, tmp_path / "again.json", vocab_size=1000)
    assert (tmp_path / "again.json").read_bytes() == trained.read_bytes()


def test_explicit_split_pattern_as_in_llama3(texts: list[str], tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(TokenizersRegex(LLAMA3_PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=800, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(tmp_path / "t.json"))
    fast = TextTokenizer(tmp_path / "t.json", eod_token="</s>", encoder="tiktoken")
    for text in [*texts, *ODD_TEXTS]:
        assert fast.encode(text) == tokenizer.encode(text, add_special_tokens=False).ids
    assert choose_encoder(tmp_path / "t.json", texts, eod_token="</s>")[0] == "tiktoken"


def variant(trained: Path, **changes: Any) -> dict[str, Any]:
    spec = json.loads(trained.read_text())
    model = changes.pop("model", {})
    return {**spec, **changes, "model": {**spec["model"], **model}}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"normalizer": {"type": "NFC"}}, "it has a normalizer"),
        ({"model": {"type": "WordPiece"}}, "its model is WordPiece, not BPE"),
        ({"model": {"byte_fallback": True}}, "its model sets byte_fallback"),
        ({"model": {"dropout": 0.1}}, "its model sets dropout"),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "its pre-tokenizer is not ByteLevel"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "without a prefix space"),
        ({"pre_tokenizer": {"type": "ByteLevel", "use_regex": False}}, "not one isolated split"),
        ({"model": {"merges": []}}, "its vocabulary is not 256 bytes and one token per merge"),
        ({"added_tokens": [{"id": 0, "content": "<|endoftext|>", "special": False}]}, "not special"),
    ],
)
def test_what_tiktoken_cannot_do_is_refused(trained: Path, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedTokenizerError, match=reason):
        tiktoken_encoding(variant(trained, **changes), name="t")


def test_merges_out_of_order_are_refused(trained: Path) -> None:
    merges = json.loads(trained.read_text())["model"]["merges"]
    with pytest.raises(UnsupportedTokenizerError, match="not in the order of their ids"):
        tiktoken_encoding(variant(trained, model={"merges": merges[::-1]}), name="t")


def test_fallback_encodes_with_hugging_face(trained: Path, texts: list[str], tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(trained))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save(str(tmp_path / "lower.json"))
    encoder, reason = choose_encoder(tmp_path / "lower.json", texts)
    assert (encoder, reason) == ("tokenizers", "it has a normalizer")
    ids = TextTokenizer(tmp_path / "lower.json", encoder=encoder).encode_array("Hello World")
    assert np.array_equal(ids, tokenizer.encode("hello world").ids)


def test_errors(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such tokenizer file"):
        load_tokenizer(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match=r"bad\.json: not a Hugging Face tokenizer\.json"):
        load_tokenizer(tmp_path / "bad.json")
    with pytest.raises(
        DataError, match=r"no token '</s>' to end documents; name it with --eod-token \(<\|endoftext\|>\)"
    ):
        load_tokenizer(trained, eod_token="</s>")
    with pytest.raises(DataError, match="--vocab-size 256: 256 bytes and EOD need at least 257"):
        train_tokenizer([], tmp_path / "t.json", vocab_size=256)
