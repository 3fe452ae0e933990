"""Token rows: documents joined into one stream, cut into rows of equal length, dealt out in batches.

B rows of a batch, T tokens of a row, S segments of a batch (a segment is a stretch of one document in one row).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from dsfast.errors import UserError
from dsfast.tokens import BOS_ID, EOS_ID, IGNORED


@dataclass(frozen=True)
class Batch:
    """B rows of T tokens with their targets and their document boundaries; without boundaries (None) every row is a document."""

    input_ids: Tensor  # [B, T] int64
    labels: Tensor  # [B, T] int64: the next token; -100 where the next token begins another document
    positions: Tensor | None  # [B, T] int64: inside the document, 0 at its start and at each row's start
    cu_seqlens: Tensor | None  # [S + 1] int32: starts of the segments in the flattened [B*T] tokens, then B*T


@dataclass(frozen=True, eq=False)  # arrays have no single truth value
class PackedRows:
    """The rows of `stream` and the order in which they are dealt.

    stream: [N] int32, documents one after another, each bos + text + eos. Row r is stream[r*T : (r+1)*T]; its
    labels reach one token further, so the stream's last token is only ever a label.
    """

    stream: np.ndarray
    sequence_length: int
    seed: int

    def __len__(self) -> int:
        """The number of rows."""
        return max(0, (len(self.stream) - 1) // self.sequence_length)

    def batch(self, step: int, batch_size: int) -> Batch:
        """The batch of `step` (counted from 0): a pure function of (seed, step, batch_size).

        Every epoch deals the rows in a new random order, none twice; rows that do not fill a last batch wait for
        another epoch. Raises UserError where there are fewer rows than `batch_size`.
        """
        per_epoch = len(self) // batch_size
        if per_epoch == 0:
            raise UserError(
                f"too few articles for one batch: they give {len(self)} rows of {self.sequence_length} tokens and "
                f"train.batch_size is {batch_size}; raise data.max_articles (or give more text), or lower batch_size"
            )
        epoch, index = divmod(step, per_epoch)
        rows = _row_order(len(self), self.seed, epoch)[index * batch_size : (index + 1) * batch_size]
        offsets = rows[:, None] * self.sequence_length + np.arange(self.sequence_length + 1)  # [B, T + 1]
        return _as_batch(torch.from_numpy(self.stream[offsets].astype(np.int64)))

    def most_segments(self, batch_size: int) -> int:
        """No batch of any step has more segments: as many as the `batch_size` rows with the most have together."""
        tokens = self.stream[: len(self) * self.sequence_length].reshape(len(self), self.sequence_length)
        segments = 1 + (tokens[:, 1:] == BOS_ID).sum(axis=1)  # a row's start begins one in any case
        return int(np.sort(segments)[-batch_size:].sum())


def pack(texts: list[str], tokenizer: Tokenizer, sequence_length: int, seed: int) -> PackedRows:
    """Tokenise `texts`, one document each, and lay them end to end."""
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    documents = [np.array([BOS_ID, *encoding.ids, EOS_ID], dtype=np.int32) for encoding in encoded]
    return PackedRows(np.concatenate(documents), sequence_length, seed)


@lru_cache(maxsize=2)
def _row_order(rows: int, seed: int, epoch: int) -> np.ndarray:
    order = np.random.default_rng([seed, epoch]).permutation(rows)
    order.setflags(write=False)
    return order


def _as_batch(tokens: Tensor) -> Batch:
    """`tokens` [B, T + 1]: the rows, each with the one token that follows it."""
    input_ids = tokens[:, :-1].contiguous()
    labels = tokens[:, 1:].masked_fill(input_ids == EOS_ID, IGNORED)
    is_start = input_ids == BOS_ID
    is_start[:, 0] = True
    columns = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    last_start = torch.where(is_start, columns, 0).cummax(dim=1).values
    starts = is_start.flatten().nonzero().flatten()
    cu_seqlens = torch.cat([starts, starts.new_tensor([input_ids.numel()])]).to(torch.int32)
    return Batch(input_ids, labels, columns - last_start, cu_seqlens)
