"""Generation on a GPU: the decode step as a function of device memory alone, recorded once and replayed for every token.

Nothing in a step waits for the host, no shape depends on data, and what one leaves to the next stands at an address that does
not change. The host launches a block of steps and then reads what all of them chose.
Shapes: B sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from itertools import chain

import torch
from torch import Generator, Tensor

from dsfast import ops
from dsfast.errors import UserError
from dsfast.model.cache import LatentCache
from dsfast.model.capture import captured
from dsfast.model.decode import NOT_FINITE, Prompts, next_logits, prompt_logits, sample
from dsfast.model.deepseek_v3 import DeepseekV3

BLOCK = 16
"""Steps between two looks of the host: a look waits for the device, and steps of a block behind the last <|eos|> are in vain."""
LEAST_PLACES = 256
"""The smallest cache, in tokens, or the whole context where that is shorter: answers of different lengths share one recording."""
STEPWISE = 12
"""Tokens of a prompt, at most, that are taken one by one by the recorded step: on an H200 a step takes 0.16 ms (0.27 for 256
sequences), a prompt of any length 3.5 ms, as its operators are launched one after the other."""
NOTHING = -1
"""What is said in place of a token where there is none to choose."""


class DecodeStep:
    """One token more for each of `batch` sequences of `model`, chosen as OperatorDecoder does.

    A call takes the tokens `chosen` [B] last and the uniform numbers at `place` of `uniforms` [BLOCK, B], and leaves its choice
    in `chosen` and at `place` of `tokens` [BLOCK, B]; `place` [1] moves on. There `weights` [BLOCK, B] is what it was chosen by:
    the largest logit, or what all tokens weigh together; not finite where logits are not.
    """

    name = "decode_step"

    def __init__(self, model: DeepseekV3, batch: int, capacity: int, temperature: float):
        weight = model.embed_tokens.weight
        self.model, self.temperature = model, temperature
        self.cache = LatentCache(model.config, len(model.layers), batch, capacity, weight.device, weight.dtype)
        self.chosen = torch.zeros(batch, dtype=torch.int64, device=weight.device)
        self.tokens = torch.zeros(BLOCK, batch, dtype=torch.int64, device=weight.device)
        self.uniforms = torch.zeros(BLOCK, batch, dtype=torch.float64, device=weight.device)
        self.largest = torch.zeros(batch, dtype=weight.dtype, device=weight.device)
        wide = torch.float64 if temperature > 0 else weight.dtype
        self.weights = torch.zeros(BLOCK, batch, dtype=wide, device=weight.device)
        self.place = torch.zeros(1, dtype=torch.int64, device=weight.device)
        self.user: object = None
        """Whoever began last: the memory is one generation's at a time."""

    def start(self, prompts: Prompts) -> None:
        """The first choice, after `prompts`; what earlier sequences left is forgotten."""
        self.begin()
        self._choose(prompt_logits(self.model, self.cache, prompts.to(self.place.device)))

    def begin(self) -> None:
        """What earlier sequences left is forgotten; the next choice is at place 0."""
        self.cache.lengths.zero_()
        self.place.zero_()

    def __call__(self) -> None:
        self._choose(next_logits(self.model, self.cache, self.chosen))

    def draw(self, count: int, generator: Generator) -> None:
        """Uniform numbers for the next `count` choices, which begin at place 0."""
        self.place.zero_()
        if self.temperature > 0:
            for uniform in self.uniforms[:count]:  # one by one, as OperatorDecoder draws them
                uniform.uniform_(generator=generator)

    def read(self, count: int) -> list[list[int]]:
        """What the last `count` choices were, NOTHING where there was none; waits for them."""
        return self.tokens[:count].masked_fill(~self.weights[:count].isfinite(), NOTHING).tolist()

    def state(self) -> list[Tensor]:
        """But for the cache: nothing is read there that was not written after `lengths` said so."""
        return [self.cache.lengths, self.chosen, self.largest, self.tokens, self.weights, self.place]

    def _choose(self, logits: Tensor) -> None:
        if self.temperature == 0:
            weight, _ = torch.max(logits, -1, out=(self.largest, self.chosen))
        else:
            uniform = self.uniforms.index_select(0, self.place).squeeze(0)
            chosen, weight = sample(logits, self.temperature, uniform)
            self.chosen.copy_(chosen)
        self.tokens.index_copy_(0, self.place, self.chosen[None])
        self.weights.index_copy_(0, self.place, weight[None])
        self.place.add_(1)


class DeviceDecoder:
    """OperatorDecoder for a GPU: the same tokens, its steps launched in blocks and a step captured as one CUDA graph.

    launch: makes of a DecodeStep what is called for each token. Step and recording are kept beside the model for the next
    decoder with the same batch and temperature, the same weights in the same memory, and a capacity that rounds to the same.
    Used within torch.inference_mode. A decoder is at an end where another of its model begins: then it raises RuntimeError.
    """

    def __init__(
        self, model: DeepseekV3, batch: int, capacity: int, temperature: float, generator: Generator,
        launch: Callable[[DecodeStep], Callable[[], None]] = captured,
    ):  # fmt: skip
        places = places_for(model, capacity)

        def make() -> tuple[DecodeStep, Callable[[], None]]:
            step = DecodeStep(model, batch, places, temperature)
            return step, launch(step)

        self._step, self._call = model.kept.get((batch, places, temperature, launch, _made_of(model)), make)
        # Not itself: in a circle, what is kept would not be free before another takes its place.
        self._user = self._step.user = object()
        self._capacity, self._generator = capacity, generator
        self._unread: list[list[int]] = []  # the last is next

    def start(self, prompts: Prompts) -> list[int]:
        """The first choice after `prompts`, which lie on the CPU."""
        self._check_user()
        self._left = self._capacity - int(prompts.lengths.min())  # steps until the longest answer is full
        lengths = set(prompts.lengths.tolist())
        if self._call is not self._step and len(lengths) == 1 and max(lengths) <= STEPWISE:
            self._take_by_steps(prompts.ids.view(len(prompts.lengths), -1))
        else:
            self._step.draw(1, self._generator)
            self._step.start(prompts)
        self._unread = self._step.read(1)
        return self._next()

    def step(self) -> list[int]:
        """The next choice, from the block that was read last or, where that is at its end, from a new one."""
        if not self._unread:
            self._check_user()
            count = max(1, min(BLOCK, self._left))
            self._left -= count
            self._step.draw(count, self._generator)
            for _ in range(count):
                self._call()
            self._unread = self._step.read(count)[::-1]
        return self._next()

    def _take_by_steps(self, ids: Tensor) -> None:
        """The first choice after prompts ids [B, T], whose tokens are taken as if they had been chosen: of what they lead to only
        the last counts."""
        step = self._step
        *others, last = ids.T.to(step.chosen.device).unbind()
        step.begin()
        for tokens in others:
            step.chosen.copy_(tokens)
            self._call()
        step.chosen.copy_(last)
        step.draw(1, self._generator)
        self._call()

    def _next(self) -> list[int]:
        chosen = self._unread.pop()
        if min(chosen) == NOTHING:
            raise UserError(NOT_FINITE)
        return chosen

    def _check_user(self) -> None:
        if self._step.user is not self._user:
            raise RuntimeError("another generation has begun on this model: on a GPU it has one at a time")


def places_for(model: DeepseekV3, capacity: int) -> int:
    """The places of a cache for `capacity` tokens: the next power of two, at least LEAST_PLACES and at most the context."""
    return min(max(LEAST_PLACES, 1 << (capacity - 1).bit_length()), model.config.max_position_embeddings)


def _made_of(model: DeepseekV3) -> Hashable:
    """What a recording holds on to: where the model's tensors lie and how, but for a router's load, which is training's; its
    layers in their order; and which kernels run."""
    buffers = (buffer for name, buffer in model.named_buffers() if not name.endswith(".load"))
    tensors = chain(model.parameters(), buffers)
    weight = model.embed_tokens.weight
    kernels = ops.report(weight.device.type, weight.dtype)
    memory = tuple((x.data_ptr(), x.dtype, x.stride()) for x in tensors)
    return memory, tuple(map(id, model.layers)), tuple(row["implementation"] for row in kernels)
