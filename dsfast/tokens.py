"""What data, model and export agree on: the special tokens, and the label of a token that nothing is asked of."""

from __future__ import annotations

SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>")
BOS, EOS, PAD = SPECIAL_TOKENS
BOS_ID, EOS_ID = 0, 1  # in every tokenizer that dsfast trains
IGNORED = -100
