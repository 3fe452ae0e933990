"""Generation with the whole model in one C++ call per token (csrc/decode_step.cpp), on the CPU in float32."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Generator, Tensor

from dsfast import ops
from dsfast.errors import UserError
from dsfast.model.cache import LatentCache
from dsfast.model.changed import OWN_MODULES
from dsfast.model.decode import NOT_FINITE, Prompts
from dsfast.model.deepseek_v3 import DeepseekV3
from dsfast.model.native_model import AGREEMENT, NativeModel
from dsfast.ops import native

LONG_PROMPT = 64
"""Tokens from which on a prompt is read faster by operators, which take many tokens at a time, than by the step."""
_METHODS = ("forward", "hidden", "logits")


class NativeDecoder:
    """OperatorDecoder with the whole step in C++: the same tokens but for rounding.

    A sequence gives the same bits alone and in any batch if its prompt has at most LONG_PROMPT tokens. `logits` are there
    only where it samples. The model's weights must stay as they are while it is used.
    """

    def __init__(self, model: DeepseekV3, batch: int, capacity: int, temperature: float, generator: Generator):
        self._model, self._description = model, NativeModel(model)
        self._cache = LatentCache(model.config, len(model.layers), batch, capacity, torch.device("cpu"), torch.float32)
        self._hidden, self._last_place = _floats(batch, self._description.head_width), capacity - 1
        self._temperature, self._generator = temperature, generator
        sampled = batch if temperature > 0 else 0
        self.logits = _floats(sampled, model.config.vocab_size)
        self.chosen = torch.empty(batch, dtype=torch.int64, device="cpu")
        self._uniforms = torch.empty(sampled, dtype=torch.float64, device="cpu")
        self._rows, self._lengths = torch.arange(batch, device="cpu"), torch.empty_like(self.chosen)
        self._longest = 0
        self._panels = self._packed()
        self._step = self._call(self.chosen, self._rows, self._lengths)

    def _packed(self) -> Tensor:
        """The weights once more, as a step reads them."""
        pack, model = native.module().decode_panels, self._description.address
        panels = _floats(pack(model, 0, 1))
        pack(model, panels.data_ptr(), torch.get_num_threads())
        return panels

    def _call(self, ids: Tensor, rows: Tensor, positions: Tensor) -> Callable[[], int]:
        """The C++ step for these tokens, whose tensors must stay."""
        samples = self._temperature > 0
        return partial(
            native.module().decode_step, self._description.address, self._panels.data_ptr(),
            self._cache.latent.data_ptr(), self._cache.k_rope.data_ptr(), len(self.chosen), self._cache.capacity,
            ids.data_ptr(), rows.data_ptr(), positions.data_ptr(), len(ids), self._hidden.data_ptr(),
            self.logits.data_ptr() if samples else 0, self._uniforms.data_ptr() if samples else 0, self._temperature,
            self.chosen.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip

    def start(self, prompts: Prompts) -> list[int]:
        self._lengths.copy_(prompts.lengths)
        self._longest = int(prompts.lengths.max())
        if self._longest > LONG_PROMPT:
            prompts = self._fill_long(prompts)
        return self._run(self._call(prompts.ids, prompts.rows, prompts.positions))

    def _fill_long(self, prompts: Prompts) -> Prompts:
        """Long prompts but for their last token, by operators; what remains."""
        long = prompts.lengths > LONG_PROMPT
        filled = long[prompts.rows] & (prompts.positions < prompts.lengths[prompts.rows] - 1)
        ids, rows, positions = (x[filled] for x in (prompts.ids, prompts.rows, prompts.positions))
        ends = (prompts.lengths[long] - 1).cumsum(0)
        self._cache.place(rows, positions)
        embedded = self._model.embed_tokens(ids)
        self._model.hidden(embedded, positions, torch.cat([ends.new_zeros(1), ends]).int(), self._cache)
        remaining = (x[~filled] for x in (prompts.ids, prompts.rows, prompts.positions))
        return Prompts(*remaining, prompts.lengths)

    def step(self) -> list[int]:
        if self._longest > self._last_place:
            self._lengths.clamp_(max=self._last_place)
        chosen = self._run(self._step)
        self._lengths += 1
        self._longest += 1
        return chosen

    def _run(self, call: Callable[[], int]) -> list[int]:
        if self._temperature > 0:
            self._uniforms.uniform_(generator=self._generator)
        if call():
            raise UserError(NOT_FINITE)
        return self.chosen.tolist()


def stands_for(model: DeepseekV3) -> bool:
    """Whether the C++ step gives the logits of dsfast/model for `model`, in evaluation mode: it repeats what is said there.

    Looked at before a model's first use, and once more where it was trained since (at first many products are zero) or a method
    of dsfast/model has become another. A warning says that it does not.
    """
    weight = model.embed_tokens.weight
    version = 0 if weight.is_inference() else weight._version
    methods = (getattr(kind, name, None) for kind in OWN_MODULES for name in _METHODS)
    return model.kept.get((version, *methods), lambda: _agrees(model))


def _agrees(model: DeepseekV3) -> bool:
    longest = model.config.max_position_embeddings
    prompts, tokens = min(6, longest), min(3, longest)
    ids = torch.arange(4 * prompts, device="cpu").mul(7919).remainder(model.config.vocab_size)
    try:
        difference = float(apart(model, ids.view(4, prompts), tokens).amax(1).median())
    except UserError:  # logits that are not finite: nothing to compare
        return True
    if difference <= AGREEMENT:
        return True
    reason = f"logits differ by {difference:.1e} between dsfast/model and csrc/decode_step.cpp"
    ops.note_fallback("generation", "cpu", "runs operator by operator", reason)
    return False


def apart(model: DeepseekV3, prompts: Tensor, tokens: int) -> Tensor:
    """How far, relatively, logits of the C++ step are from the model's [B, tokens], at each place from the end of prompts [B, P]
    on, as tokens are sampled, to the end of the context at most. A sequence of which rounding sends a token to another expert is
    far off from there on.

    Raises UserError where logits are not finite. The model is in evaluation mode.
    """
    batch, length = prompts.shape
    capacity = min(length + tokens - 1, model.config.max_position_embeddings)
    generator = torch.Generator("cpu").manual_seed(0)
    with native.products_in(torch.float32), torch.inference_mode():
        decoder = NativeDecoder(model, batch, capacity, 1.0, generator)
        chosen, found = [decoder.start(Prompts.pack(prompts.tolist()))], [decoder.logits.clone()]
        for _ in range(capacity - length):
            chosen.append(decoder.step())
            found.append(decoder.logits.clone())
        ids = torch.cat([prompts, torch.tensor(chosen, device="cpu").T], 1)[:, :capacity]
        expected = model(ids)[:, length - 1 :]
        return (torch.stack(found, 1) - expected).norm(dim=-1) / expected.norm(dim=-1)


def _floats(*shape: int) -> Tensor:
    """What C++ writes to, whatever torch makes by default."""
    return torch.empty(*shape, dtype=torch.float32, device="cpu")
