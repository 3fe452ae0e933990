"""Generation: the latent cache changes nothing, batches do not mix, limits hold; by operators and in one native call."""

from __future__ import annotations

import copy

import pytest
import torch
from operator_cases import needs_native
from tiny_models import MORE_VARIANTS, random_ids, random_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dsfast import ops
from dsfast.errors import UserError
from dsfast.model import generate, generate_ids
from dsfast.model.cache import LatentCache
from dsfast.model.decode import OperatorDecoder, Prompts
from dsfast.model.native_decode import LONG_PROMPT, NativeDecoder, apart
from dsfast.model.native_model import runs_natively
from dsfast.ops import native


@pytest.fixture(params=["native", "reference"])
def implementation(request):
    """The whole step in C++, or one operator after the other."""
    if request.param == "native" and native.status()[0] is None:
        pytest.skip(native.status()[1])
    with ops.use(request.param):
        yield request.param


@pytest.fixture(params=MORE_VARIANTS, ids=str)
def model(request):
    return random_model(**MORE_VARIANTS[request.param])


@pytest.fixture
def tokenizer() -> Tokenizer:
    """Specials and the 58 letters from A on: 61 tokens, as many as the tiny models know."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.add_special_tokens(["<|bos|>", "<|eos|>", "<|pad|>"])
    tokenizer.add_tokens([chr(ord("A") + i) for i in range(58)])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def without_cache(model, prompt: list[int], steps: int) -> list[int]:
    """Greedy continuation with a full forward pass per token."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_cached_generation_equals_full_forward_passes(model, implementation):
    prompts = [random_ids(model, n, seed=n).tolist() for n in (5, 1, 17, 8)]
    with torch.no_grad():
        expected = [without_cache(model, prompt, 12) for prompt in prompts]
    assert generate_ids(model, prompts, max_new_tokens=12) == expected
    assert [generate_ids(model, [prompt], max_new_tokens=12)[0] for prompt in prompts] == expected


def decoder_for(model, batch: int, capacity: int, temperature: float = 0.0, seed: int = 0):
    """The decoder that generate_ids would take now."""
    generator = torch.Generator().manual_seed(seed)
    return (NativeDecoder if runs_natively(model) else OperatorDecoder)(model, batch, capacity, temperature, generator)


def packed(rows: torch.Tensor, lengths: list[int]) -> Prompts:
    return Prompts.pack([row[:n].tolist() for row, n in zip(rows, lengths, strict=True)])


@torch.no_grad()
def forced_logits(model, rows: torch.Tensor, lengths: list[int], steps: int) -> torch.Tensor:
    """rows [B, T]: the logits [steps + 1, B, V] after the first `lengths` tokens of each and after each token that follows."""
    decoder = decoder_for(model, len(rows), rows.size(1), temperature=1.0)
    decoder.start(packed(rows, lengths))
    logits = [decoder.logits.clone()]
    for step in range(steps):
        decoder.chosen.copy_(rows[torch.arange(len(rows)), torch.tensor(lengths) + step])
        decoder.step()
        logits.append(decoder.logits.clone())
    return torch.stack(logits)


def test_cached_logits_equal_full_forward_passes(model, implementation):
    lengths, steps = [4, 9, 1, 16, 17], 7  # one below and above a block of lanes
    ids = random_ids(model, 5, 24)
    assert runs_natively(model) == (implementation == "native")
    found = forced_logits(model, ids, lengths, steps)
    with torch.no_grad():
        full = model(ids)
    for step in range(steps + 1):
        expected = full[torch.arange(5), torch.tensor(lengths) - 1 + step]
        torch.testing.assert_close(found[step], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lengths", [[LONG_PROMPT + 1], [3, 100, LONG_PROMPT, 2, LONG_PROMPT + 1], [90, 80]], ids=str)
def test_long_prompts_beside_short_ones(model, lengths):
    """Those above LONG_PROMPT are read by operators, but for their last token."""
    needs_native()
    ids = random_ids(model, len(lengths), 103)
    found = forced_logits(model, ids, lengths, 3)
    with torch.no_grad():
        full = model(ids)
    for step in range(4):
        expected = full[torch.arange(len(lengths)), torch.tensor(lengths) - 1 + step]
        torch.testing.assert_close(found[step], expected, rtol=1e-4, atol=1e-4)


def test_native_tokens_are_those_of_the_operators(model):
    needs_native()
    prompts = [random_ids(model, n, seed=n).tolist() for n in (5, LONG_PROMPT, 1, 17, 8, LONG_PROMPT + 1, 100)]
    for temperature in (0.0, 0.3, 1.0, 3.0):
        with ops.use("reference"):
            expected = generate_ids(model, prompts, 15, temperature, seed=3)
        assert generate_ids(model, prompts, 15, temperature, seed=3) == expected


def test_how_far_the_call_is_from_the_model_at_every_place_of_the_context(monkeypatch):
    model = random_model()
    limit, prompts = model.config.max_position_embeddings, random_ids(model, 3, 2)
    assert apart(model, prompts, limit).shape == (3, limit - 1)
    assert apart(model, prompts, limit).max() < 1e-5
    assert apart(model, random_ids(model, 2, limit), 1).shape == (2, 1)
    last, of_run = limit - 1, NativeDecoder._run

    def wrong_at_the_last_place(self, call):
        tokens = of_run(self, call)
        if int(self._lengths[1]) == last:
            self.logits[1] *= 1.01
        return tokens

    monkeypatch.setattr(NativeDecoder, "_run", wrong_at_the_last_place)
    found = apart(model, prompts, limit).clone()
    assert found[1, -1] == pytest.approx(0.01, rel=1e-3)
    found[1, -1] = 0
    assert found.max() < 1e-5


def test_a_sequence_gives_the_same_bits_alone_in_any_batch_and_with_any_threads(model):
    """Sums are added in an order of their own whatever shares the block, and prefill is the same code as decoding."""
    needs_native()
    lengths, steps = [3 + i % 5 for i in range(37)], 3
    ids = random_ids(model, 37, 16)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = forced_logits(model, ids, lengths, steps)
        torch.set_num_threads(2)
        assert torch.equal(forced_logits(model, ids, lengths, steps), expected)
        for some in ([0], [1, 5], list(range(9)), list(range(20, 37))):
            alone = forced_logits(model, ids[some], [lengths[i] for i in some], steps)
            assert torch.equal(alone, expected[:, some])
        prefilled = forced_logits(model, ids, [n + steps for n in lengths], 0)
        assert torch.equal(prefilled[0], expected[-1])
    finally:
        torch.set_num_threads(before)


def test_a_sequence_gives_the_same_bits_beside_any_number_of_others():
    """Rows are taken 1 .. MR at a time, 48 tokens together, words 128 at a time: one below and above all of them."""
    needs_native()
    model = random_model(vocab_size=389, num_attention_heads=9, embedding_rank=8)
    ids = random_ids(model, 99, 4)
    expected = forced_logits(model, ids, [2] * 99, 2)
    for batch in (*range(1, 15), 23, 24, 25, 47, 48, 49, 95, 96, 97):
        assert torch.equal(forced_logits(model, ids[:batch], [2] * batch, 2), expected[:, :batch])


def test_weights_are_packed_alike_by_any_number_of_threads():
    needs_native()
    model, before = random_model(vocab_size=389, embedding_rank=8), torch.get_num_threads()
    ids = random_ids(model, 3, 6)
    expected = forced_logits(model, ids, [2] * 3, 2)
    try:
        for threads in (1, 3, 7):
            torch.set_num_threads(threads)
            assert torch.equal(forced_logits(model, ids, [2] * 3, 2), expected)
    finally:
        torch.set_num_threads(before)


def test_more_threads_than_sequences():
    needs_native()
    model, before = random_model(), torch.get_num_threads()
    expected = generate_ids(model, [[3], [4, 5]], max_new_tokens=4)
    try:
        torch.set_num_threads(7)
        assert generate_ids(model, [[3], [4, 5]], max_new_tokens=4) == expected
    finally:
        torch.set_num_threads(before)


def test_nothing_but_what_was_written_is_read_from_the_cache(model, implementation, monkeypatch):
    expected = generate_ids(model, [[3, 4, 5], [7]], max_new_tokens=9)
    right = torch.empty

    def poisoned(*size, **options):
        made = right(*size, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)
    assert generate_ids(model, [[3, 4, 5], [7]], max_new_tokens=9) == expected


def test_greedy_choice_of_equals():
    """As torch.argmax: the first of them."""
    needs_native()
    model = random_model(vocab_size=389, tie_word_embeddings=False)
    head = model.lm_head.weight.data
    for words, value in (([7], 50), ([100, 7, 388], 50), ([388], 50), (range(389), 0)):
        head.normal_()
        head[list(words)] = value * torch.ones(24)
        for batch in (1, 2, 9, 18):
            prompts = [[1 + i, 5] for i in range(batch)]
            with ops.use("reference"):
                expected = generate_ids(model, prompts, max_new_tokens=1)
            assert generate_ids(model, prompts, max_new_tokens=1) == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_from_logits_that_are_not_finite_there_is_nothing_to_choose(implementation, value, temperature):
    model = random_model()
    model.norm.weight.data[3] = value
    with pytest.raises(UserError, match="the model's logits are not finite: there is no next token to choose"):
        generate_ids(model, [[1, 2], [3]], max_new_tokens=4, temperature=temperature)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_native_step_itself_says_so(temperature):
    """Once a model has been compared its step is taken as it is."""
    needs_native()
    model = random_model()
    model.norm.weight.data[3] = torch.nan
    decoder = NativeDecoder(model, 2, 4, temperature, torch.Generator())
    with pytest.raises(UserError, match="the model's logits are not finite"):
        decoder.start(Prompts.pack([[1, 2], [3]]))


def test_one_word_that_is_not_finite_is_enough(implementation):
    """Whichever thread has it: NaN counts as the largest."""
    for word in (0, 200, 388):
        model = random_model(vocab_size=389, tie_word_embeddings=False)
        model.lm_head.weight.data[word] = torch.nan
        with pytest.raises(UserError, match="the model's logits are not finite"):
            generate_ids(model, [[1, 2], [3]], max_new_tokens=2)


def test_sampling_follows_the_probabilities(implementation):
    """20,000 draws of the token after one prompt, against its softmax: within five standard deviations, each word."""
    model, draws = random_model(), 20_000
    with torch.no_grad():
        expected = (model(torch.tensor([[9]]))[0, -1].double() / 1.5).softmax(-1)
    first = generate_ids(model, [[9]] * draws, max_new_tokens=1, temperature=1.5)
    counts = torch.bincount(torch.tensor(first)[:, 0], minlength=61)
    deviation = (expected * (1 - expected) * draws).sqrt()
    assert ((counts - expected * draws).abs() <= 5 * deviation + 1).all()


def test_weights_that_are_not_contiguous():
    needs_native()
    model = random_model()
    expected = generate_ids(model, [[3, 4]], max_new_tokens=5)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data = parameter.data.T.contiguous().T
    assert generate_ids(model, [[3, 4]], max_new_tokens=5) == expected


def test_one_operator_by_reference_is_enough_to_go_by_operators():
    needs_native()
    model = random_model()
    assert runs_natively(model)
    for operator in ("mla_decode", "rope", "moe_experts"):
        with ops.use("reference", operator):
            assert not runs_natively(model)
    with ops.use("reference", "linear_cross_entropy", "adamw", "muon", "newton_schulz"):
        assert runs_natively(model)
    assert not runs_natively(random_model().double())


OTHER_LAYERS = {
    "reversed": lambda layers: list(layers)[::-1],
    "one more": lambda layers: [*layers, copy.deepcopy(layers[0])],
    "thirty more": lambda layers: [*layers, *(copy.deepcopy(layers[0]) for _ in range(30))],
    "one of them twice": lambda layers: [*layers[:-1], layers[0]],
    "one less": lambda layers: layers[1:],
}


@pytest.mark.parametrize("change", OTHER_LAYERS.values(), ids=OTHER_LAYERS)
def test_layers_may_be_others_than_they_were_made_as(implementation, change):
    """The cache goes by their order in the model; one prompt is long enough to be read by operators."""
    model = random_model(num_hidden_layers=3)
    generate_ids(model, [[3]], max_new_tokens=2)
    model.layers = torch.nn.ModuleList(change(model.layers))
    prompts = [random_ids(model, n, seed=n).tolist() for n in (81, 4)]
    with torch.no_grad():
        expected = [without_cache(model, prompt, 5) for prompt in prompts]
    assert generate_ids(model, prompts, max_new_tokens=5) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_what_torch_makes_by_default_makes_no_difference(implementation, dtype):
    model = random_model()
    prompts = [random_ids(model, n, seed=n).tolist() for n in (81, 4)]
    expected = [generate_ids(model, prompts, 20, temperature) for temperature in (0.0, 1.0)]
    torch.set_default_dtype(dtype)
    torch.set_default_device("meta")
    try:
        found = [generate_ids(model, prompts, 20, temperature) for temperature in (0.0, 1.0)]
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert found == expected


def test_the_cache_holds_the_latent_and_the_rotary_key_alone():
    model = random_model()
    cache = LatentCache(
        model.config, len(model.layers), batch=2, capacity=7, device=torch.device("cpu"), dtype=torch.float32
    )
    floats = [t for t in vars(cache).values() if isinstance(t, torch.Tensor) and t.is_floating_point()]
    assert sum(t.numel() for t in floats) == 2 * 2 * 7 * (10 + 6)  # layers, sequences, tokens, R + Dr


def test_eos_ends_one_row_and_not_the_others(implementation):
    model = random_model(tie_word_embeddings=False)
    prompts = [random_ids(model, 6, seed=s).tolist() for s in range(4)]
    free = generate_ids(model, prompts, max_new_tokens=10)
    eos = next(token for token in free[0] if token not in [row[0] for row in free])
    stopped = generate_ids(model, prompts, max_new_tokens=10, eos_id=eos)
    assert stopped == [row[: row.index(eos)] if eos in row else row for row in free]
    assert len({len(row) for row in stopped}) > 1


def test_generation_ends_with_the_context(implementation):
    model = random_model(max_position_embeddings=20)
    prompts = [random_ids(model, n, seed=n).tolist() for n in (17, 20, 3)]
    assert [len(row) for row in generate_ids(model, prompts, max_new_tokens=9)] == [4, 1, 9]


def test_sampling_repeats_with_its_seed_and_varies_with_it(implementation):
    model = random_model()
    prompts = [random_ids(model, 4).tolist()] * 2
    first, again, other = (
        generate_ids(model, prompts, max_new_tokens=20, temperature=1.5, seed=seed) for seed in (5, 5, 6)
    )
    assert first == again
    assert first != other
    assert first[0] != first[1]
    for temperature in (1e-4, 1e-300, 5e-324):
        cold = generate_ids(model, prompts, max_new_tokens=20, temperature=temperature, seed=5)
        assert cold == generate_ids(model, prompts, max_new_tokens=20)


def test_generate_returns_the_continuation_of_bos_and_prompt(tokenizer):
    model = random_model()
    ids = [0, *tokenizer.encode("HELLO").ids]
    assert len(ids) == 6
    [expected] = generate_ids(model, [ids], max_new_tokens=6, eos_id=1)
    text = generate(model, tokenizer, "HELLO", max_new_tokens=6)
    assert text == tokenizer.decode(expected)
    assert text
    assert not text.startswith("HELLO")


def test_generation_leaves_the_model_as_it_was(implementation):
    model = random_model().train()
    model(random_ids(model, 2, 8))
    loads = [router.load.clone() for router in model.routers()]
    generate_ids(model, [[3, 4]], max_new_tokens=3)
    assert model.training
    assert all(torch.equal(router.load, load) for router, load in zip(model.routers(), loads, strict=True))
    assert generate_ids(model.eval(), [[3, 4]], max_new_tokens=1) is not None
    assert not model.training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": "A" * 20}, r"prompt: expected 1 .. 20 tokens, <\|bos\|> included .*, got 21"),
        ({"max_new_tokens": "5"}, "max_new_tokens: expected a whole number of at least 1, got '5'"),
        ({"max_new_tokens": True}, "max_new_tokens: expected a whole number of at least 1, got True"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected a whole number of at least 1, got 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens: expected a whole number of at least 1, got 2.5"),
        ({"temperature": -0.1}, "temperature: expected a number of at least 0, got -0.1"),
        ({"temperature": 10**400}, "temperature: expected a number of at least 0, got 10000"),
        ({"temperature": float("nan")}, "temperature: expected a number of at least 0, got nan"),
        ({"seed": -1}, "seed: expected a whole number 0 .. 9223372036854775807, got -1"),
        ({"seed": 2**63}, "seed: expected a whole number 0 .. 9223372036854775807, got 9223372036854775808"),
        ({"prompt": ["A"]}, r"prompt: expected a string, got list"),
        ({"prompt": "A\udcff"}, r"prompt: expected text that UTF-8 can hold, got '\\udcff' at character 1"),
    ],
)
def test_bad_arguments_are_refused(tokenizer, arguments, message):
    model = random_model(max_position_embeddings=20)
    with pytest.raises(UserError, match=message):
        generate(model, tokenizer, **{"prompt": "A", **arguments})


def test_of_several_prompts_the_bad_one_is_named():
    model = random_model(max_position_embeddings=20)
    with pytest.raises(UserError, match=r"^prompts\[1\]: expected 1 .. 20 tokens, .*, got 0$"):
        generate_ids(model, [[1], []], max_new_tokens=1)


def test_the_largest_seed_and_the_highest_temperature(implementation):
    """An infinite temperature draws every token alike."""
    model = random_model()
    [ids] = generate_ids(model, [[1]], max_new_tokens=200, temperature=float("inf"), seed=2**63 - 1)
    assert len(ids) == 200
    assert len(set(ids)) > 45  # of 61; 59 are expected, and 45 is beyond seven standard deviations


def test_a_tokenizer_without_the_special_tokens_is_refused():
    with pytest.raises(UserError, match=r"tokenizer: special token '<\|bos\|>' is missing"):
        generate(random_model(), Tokenizer(models.BPE()), "A")


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1, 61]], r"^prompt: expected token ids 0 .. 60, got 61$"),
        ([[1], [-1]], r"^prompts\[1\]: expected token ids 0 .. 60, got -1$"),
        ([[2**70]], "^prompt: expected token ids 0 .. 60, got 1180591620717411303424$"),
        ([[1.5]], "^prompt: expected token ids 0 .. 60, got 1.5$"),
        ([[True]], "^prompt: expected token ids 0 .. 60, got True$"),
        ([["a"]], "^prompt: expected token ids 0 .. 60, got 'a'$"),
        ([5], "^prompt: expected a list of token ids, got int$"),
        (torch.tensor([[1, 2]]), "^prompts: expected a list of lists of token ids, got Tensor$"),
        (None, "^prompts: expected a list of lists of token ids, got NoneType$"),
    ],
)
def test_what_is_no_token_id_is_refused(implementation, prompts, message):
    with pytest.raises(UserError, match=message):
        generate_ids(random_model(), prompts, max_new_tokens=1)
