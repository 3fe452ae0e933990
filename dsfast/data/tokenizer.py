"""Byte-level BPE tokenizer of an exact size, trained on the text at hand and cached.

A text is tokenised as if a space stood before it, so that a word has the same token at the start of a document as
inside it; decoding gives that space back. Digits are never split beforehand, so frequent years are one token.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dsfast.errors import UserError
from dsfast.files import cache_folder, write_text
from dsfast.tokens import SPECIAL_TOKENS

_SMALLEST = len(SPECIAL_TOKENS) + 256


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of exactly `vocab_size` tokens, a pure function of its arguments.

    The specials have ids 0, 1, 2; their names inside a text are plain text. Raises UserError if `texts` are too
    small to give that many tokens, or if `vocab_size` leaves no room for the 256 bytes.
    """
    if vocab_size < _SMALLEST:
        raise UserError(f"model.vocab_size: expected at least {_SMALLEST} (bytes and special tokens), got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise UserError(
            f"model.vocab_size: expected a text rich enough for {vocab_size} tokens, "
            f"but it gives only {tokenizer.get_vocab_size()}; add text or lower vocab_size"
        )
    return reading_no_special_tokens(tokenizer)


def load_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """`train_tokenizer(texts, vocab_size)`, read from the cache folder where it was trained before.

    The folder is `cache_folder()`. A damaged entry is trained anew; a folder that cannot be written to gives a warning.
    """
    path = cache_folder() / f"tokenizer-{_key(texts, vocab_size)}.json"
    tokenizer = _read_cache(path)
    if tokenizer is None:
        tokenizer = train_tokenizer(texts, vocab_size)
        _write_cache(path, tokenizer)
    return tokenizer


def check_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise UserError unless `tokenizer` is one that `train_tokenizer` could have made: with the specials where dsfast looks for
    them, and no token that a model of `vocab_size` does not know."""
    if not isinstance(tokenizer, Tokenizer):
        raise UserError(f"tokenizer: expected a tokenizers.Tokenizer, got {type(tokenizer).__name__}")
    found = tuple(tokenizer.id_to_token(number) for number in range(len(SPECIAL_TOKENS)))
    if found != SPECIAL_TOKENS:
        raise UserError(
            f"tokenizer: expected {', '.join(SPECIAL_TOKENS)} as its first tokens, as dsfast trains them, got {found}"
        )
    if tokenizer.get_vocab_size() > vocab_size:
        raise UserError(
            f"tokenizer: expected at most {vocab_size} tokens (model.vocab_size), got {tokenizer.get_vocab_size()}"
        )


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """SHA-256 of the tokenizer's JSON form."""
    return _sha256(tokenizer.to_str())


def reading_no_special_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """`tokenizer` itself, set so that a text which mentions "<|eos|>" does not end there. Its JSON form does not hold that."""
    tokenizer.encode_special_tokens = True
    return tokenizer


def for_texts(tokenizer: Tokenizer) -> Tokenizer:
    """A copy that reads texts as they stand: nothing cut off, nothing padded, and as `reading_no_special_tokens`."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.no_padding()
    copy.no_truncation()
    return reading_no_special_tokens(copy)


def _key(texts: list[str], vocab_size: int) -> str:
    """Everything the result depends on: the texts, the size, the recipe and the library's version."""
    recipe = Path(__file__).read_text(encoding="utf-8")
    return _sha256(json.dumps([texts, vocab_size, SPECIAL_TOKENS, recipe, tokenizers.__version__]))[:32]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _read_cache(path: Path) -> Tokenizer | None:
    """The cached tokenizer, or None where there is no whole one. The file's first line is the checksum of the rest."""
    try:
        checksum, _, body = path.read_text(encoding="utf-8").partition("\n")
    except (OSError, UnicodeDecodeError):
        return None
    return reading_no_special_tokens(Tokenizer.from_str(body)) if checksum == _sha256(body) else None


def _write_cache(path: Path, tokenizer: Tokenizer) -> None:
    body = tokenizer.to_str()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, f"{_sha256(body)}\n{body}")
    except OSError as error:
        warnings.warn(f"the tokenizer is not cached: {path.parent}: {error.strerror}; set DSFAST_CACHE", stacklevel=3)
