"""Text to token ids: one `tokenizer.json`, two libraries that read it.

Byte-level BPE (GPT-2, Llama 3, and what `train_tokenizer` makes) is the same greedy merge in both, but tiktoken runs it
four to ten times faster than Hugging Face `tokenizers`.  A tokenizer.json becomes tiktoken ranks when nothing in it
goes beyond that algorithm: no normalizer, a GPT-2 or explicit split pattern, merges listed in the order of their ids.
Whether the two then agree is tested on documents of the corpus, not assumed; if they differ, the slow one encodes.
Special tokens that appear in a document are encoded as ordinary text, so data cannot forge an end of document.
"""

import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tiktoken
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pipeline.data.errors import DataError
from pipeline.data.manifest import Encoder
from pipeline.data.shards import atomic_write

EOD_TOKEN = "<|endoftext|>"
MIN_TRAINED_VOCAB = 257
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
"""GPT-2's pre-tokenization in tiktoken's possessive form: the same splits without backtracking."""


class UnsupportedTokenizerError(ValueError):
    """A tokenizer.json that tiktoken cannot reproduce; the message says why."""


class TextTokenizer:
    """Encodes and decodes text.

    Args:
        path: tokenizer.json.
        eod_token: Token that ends a document.
        encoder: Library that encodes.

    Raises:
        DataError: The file is missing, not a tokenizer, or has no such token.
        UnsupportedTokenizerError: `encoder` is tiktoken and the tokenizer does not allow it.
    """

    def __init__(self, path: Path, *, eod_token: str = EOD_TOKEN, encoder: Encoder = "tokenizers") -> None:
        if not path.is_file():
            raise DataError(f"{path}: no such tokenizer file")
        text = path.read_text(encoding="utf-8")
        try:
            self._tokenizer = Tokenizer.from_str(text)
        except Exception as error:
            raise DataError(f"{path}: not a Hugging Face tokenizer.json: {error}") from None
        self._tokenizer.encode_special_tokens = True
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        if eod_token not in vocab:
            special = ", ".join(token.content for token in self._tokenizer.get_added_tokens_decoder().values())
            raise DataError(f"{path}: no token '{eod_token}' to end documents; name it with --eod-token ({special})")
        self.vocab_size: int = max(vocab.values()) + 1
        self.eod_id: int = vocab[eod_token]
        self.encoder = encoder
        self._tiktoken = tiktoken_encoding(json.loads(text), name=path.stem) if encoder == "tiktoken" else None

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without EOD."""
        ids: list[int] = self.encode_array(text).tolist()
        return ids

    def encode_array(self, text: str) -> npt.NDArray[np.uint32]:
        """Token ids of `text`, without EOD, [tokens]."""
        if self._tiktoken is not None:
            ids = self._tiktoken.encode_to_numpy(text, disallowed_special=())
        else:
            ids = np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.uint32)
        return ids.astype(np.uint32, copy=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; EOD and other special tokens are left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


def load_tokenizer(path: Path, *, eod_token: str = EOD_TOKEN) -> TextTokenizer:
    """Tokenizer of a file or of a dataset folder (its tokenizer.json), for generation and evaluation."""
    return TextTokenizer(path / "tokenizer.json" if path.is_dir() else path, eod_token=eod_token)


def train_tokenizer(texts: Iterable[str], path: Path, *, vocab_size: int, eod_token: str = EOD_TOKEN) -> None:
    """Train a byte-level BPE with GPT-2's split pattern and write its tokenizer.json.

    Ids: 0 is EOD, 1 to 256 the bytes, then merges in order, so that tiktoken can use it.

    Args:
        texts: Training documents.
        path: File to write, atomically.
        vocab_size: Ids in all, EOD included; fewer when the text has not enough merges.
        eod_token: Token that ends a document.

    Raises:
        DataError: `vocab_size` leaves no room for the 256 bytes and EOD.
    """
    if vocab_size < MIN_TRAINED_VOCAB:
        raise DataError(f"--vocab-size {vocab_size}: 256 bytes and EOD need at least {MIN_TRAINED_VOCAB}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[eod_token], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    with atomic_write(path) as file:
        file.write(tokenizer.to_str(pretty=True).encode())


def choose_encoder(path: Path, sample: Sequence[str], *, eod_token: str = EOD_TOKEN) -> tuple[Encoder, str]:
    """The fastest library that gives Hugging Face's ids on `sample`, and the reason if it is not tiktoken."""
    reference = TextTokenizer(path, eod_token=eod_token)
    try:
        fast = TextTokenizer(path, eod_token=eod_token, encoder="tiktoken")
    except UnsupportedTokenizerError as error:
        return "tokenizers", str(error)
    for number, text in enumerate(sample):
        if not np.array_equal(fast.encode_array(text), reference.encode_array(text)):
            return "tokenizers", f"tiktoken gives other ids on sample document {number}"
    return "tiktoken", f"equal ids on {len(sample)} sample documents"


def tiktoken_encoding(spec: dict[str, Any], *, name: str) -> tiktoken.Encoding:
    """Convert the contents of a tokenizer.json to tiktoken.

    Raises:
        UnsupportedTokenizerError: It uses something that tiktoken has not.
    """
    model = spec.get("model", {})
    _check_model(model)
    if spec.get("normalizer") is not None:
        raise UnsupportedTokenizerError("it has a normalizer")
    if not all(token["special"] for token in spec.get("added_tokens", [])):
        raise UnsupportedTokenizerError("it has added tokens that are not special")
    pattern = _split_pattern(spec.get("pre_tokenizer") or {})
    special = {token["content"]: token["id"] for token in spec.get("added_tokens", [])}
    ranks = _merge_ranks(model, special)
    try:
        return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    except ValueError as error:
        raise UnsupportedTokenizerError(f"tiktoken refuses its split pattern: {error}") from None


def _check_model(model: dict[str, Any]) -> None:
    if model.get("type", "BPE") != "BPE":
        raise UnsupportedTokenizerError(f"its model is {model['type']}, not BPE")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(option):
            raise UnsupportedTokenizerError(f"its model sets {option}")


def _split_pattern(pre_tokenizer: dict[str, Any]) -> str:
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    byte_level = parts[-1] if parts else {}
    if byte_level.get("type") != "ByteLevel" or byte_level.get("add_prefix_space"):
        raise UnsupportedTokenizerError("its pre-tokenizer is not ByteLevel without a prefix space")
    if len(parts) == 1 and byte_level.get("use_regex", True):
        return GPT2_PATTERN
    split = parts[0]
    regex = split.get("pattern", {}).get("Regex")
    isolated = split.get("behavior") == "Isolated" and not split.get("invert")
    if len(parts) == 2 and regex and isolated and not byte_level.get("use_regex", True):
        return str(regex)
    raise UnsupportedTokenizerError("its pre-tokenizer is not one isolated split followed by ByteLevel")


def _merge_ranks(model: dict[str, Any], special: dict[str, int]) -> dict[bytes, int]:
    vocab: dict[str, int] = model["vocab"]
    to_byte = _byte_of_character()
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    merged_ids = [vocab["".join(pair)] for pair in merges]
    if any(later <= earlier for earlier, later in pairwise(merged_ids)):
        raise UnsupportedTokenizerError("its merges are not in the order of their ids")
    ordinary = {token: rank for token, rank in vocab.items() if token not in special}
    if len(ordinary) != 256 + len(merges) or not all(character in ordinary for character in to_byte):
        raise UnsupportedTokenizerError("its vocabulary is not 256 bytes and one token per merge")
    return {bytes(to_byte[character] for character in token): rank for token, rank in ordinary.items()}


def _byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-in for every byte, inverted: bytes that print stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
