"""A whole model's loss and gradients in one native call, held against the Python model in float64."""

from __future__ import annotations

import copy
import time
import warnings
from contextlib import nullcontext

import pytest
import torch
from operator_cases import DRAWS, assert_bitwise_equal, assert_passed, needs_native
from tiny import tiny_config, tiny_dataset
from tiny_models import MORE_VARIANTS, random_ids, random_model
from torch import Tensor

from dsfast import ops
from dsfast.data import Batch
from dsfast.errors import UserError
from dsfast.model import DeepseekV3, NativeStep
from dsfast.model.moe import Router
from dsfast.model.native_step import MOST_UNEVEN, uneven
from dsfast.ops.checks import judge
from dsfast.train import Trainer
from dsfast.train.gradients import CHOICE, UNLIKE, Gradients, first_documents

WITHOUT_MTP = {name: changes | {"num_nextn_predict_layers": 0} for name, changes in MORE_VARIANTS.items()}
# Lengths of documents: one token, below and above a segment of 256 and a block of 48 queries, an empty one.
DOCUMENTS = {
    "rows of equal length": (37, 37, 37),
    "one token, none, a block and one more": (1, 0, 48, 49, 15),
    "longer than a segment, and after it short ones": (261, 3, 1, 130, 90, 40, 47),
    "one document": (19,),
}
ROUNDINGS = 4


@pytest.fixture(autouse=True)
def native():
    needs_native()
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def flat(model: DeepseekV3, lengths: tuple[int, ...], seed: int = 1) -> tuple[Tensor, ...]:
    """Documents of these lengths end to end; a seventh of the labels, and each document's last, are not predicted."""
    ids = random_ids(model, sum(lengths), seed=seed)
    labels = ids.roll(-1).clone()
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    labels[3::7] = -100
    labels[(cu_seqlens[1:] - 1).clamp(min=0).long()] = -100
    positions = torch.cat([torch.arange(n) for n in lengths])
    return ids, labels, positions, cu_seqlens


def by_autograd(model: DeepseekV3, ids, labels, positions, cu_seqlens, implementation="reference") -> dict[str, Tensor]:
    with ops.use(implementation):
        hidden = model.hidden(model.embed_tokens(ids), positions, cu_seqlens)
        loss = model.cross_entropy(hidden, labels, model.head_weights())
        gradients = torch.autograd.grad(loss, list(model.parameters()))
    return {"loss": loss.detach(), **dict(zip(dict(model.named_parameters()), gradients, strict=True))}


def in_one_call(model: DeepseekV3, arguments: tuple[Tensor, ...], step: NativeStep | None = None) -> dict[str, Tensor]:
    loss = (step or NativeStep(model))(*arguments)
    return {"loss": torch.tensor(loss), **{name: p.grad.clone() for name, p in model.named_parameters()}}


def rounded_otherwise(model: DeepseekV3, seed: int) -> DeepseekV3:
    """A copy whose weights are moved by at most one rounding to float32."""
    copied, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for p in copied.parameters():
        share = torch.rand(p.shape, generator=generator, dtype=torch.float64) * 2 - 1
        p.data = (p.data.double() * (1 + 2**-24 * share)).float()
    return copied


def assert_right(
    changes: dict, lengths: tuple[int, ...], threads: int = 1, of: int = DRAWS, embedded: float = 1
) -> None:
    """As for an operator: at most twice the error of eager PyTorch in float32, and a floor.

    Loss and gradients are judged together, each in units of its largest value: what rounding does to one small gradient
    is luck. So is what it does to one model: where a draw is ill-conditioned, one rounding more or less of a weight moves
    eager's own gradients threefold. Eager's error is therefore the largest of several models that differ by that much.
    """
    draws = []
    for seed in range(of):
        model = random_model(seed, **changes).train()
        model.embed_tokens.weight.data *= embedded
        exact = copy.deepcopy(model).double()
        arguments = flat(model, lengths, seed)
        torch.set_num_threads(1)
        expected = by_autograd(exact, *arguments)
        eager = [by_autograd(m, *arguments) for m in (model, *(rounded_otherwise(model, k) for k in range(ROUNDINGS)))]
        torch.set_num_threads(threads)
        found = in_one_call(model, arguments)
        sizes = {name: x.abs().max() for name, x in expected.items()}
        draws.append(
            [torch.cat([(v[n].double() / sizes[n]).flatten() for n in sizes]) for v in (expected, found, *eager)]
        )
    expected, found, *eager = (torch.stack(values) for values in zip(*draws, strict=True))
    exact = torch.stack([expected] * len(eager))
    assert_passed([judge(exact, torch.stack(eager), torch.stack([found] * len(eager)), torch.float32, "native")])


LARGE = {"qk_nope_head_dim": 3701, "num_hidden_layers": 1}  # csrc/linear.h: queries of more than 2^18 weights
LARGE_AFTER_A = {"q_lora_rank": 6723, "num_hidden_layers": 1}  # as many, and the rows of their gradient are padded


@pytest.mark.parametrize(
    "changes", [*WITHOUT_MTP.values(), LARGE], ids=[*WITHOUT_MTP, "a weight not packed beforehand"]
)
def test_every_architecture_against_float64(changes):
    assert_right(changes, (17, 29, 1, 33))


def test_low_rank_queries_not_packed_beforehand():
    assert_right(LARGE_AFTER_A, (17, 29, 1, 33), of=1)


def test_a_stream_far_larger_than_scores():
    """What attention keeps of its scores lies beside the stream (csrc/train_state.h), and would bear being a little off."""
    assert_right({"tie_word_embeddings": False}, (17, 29, 1, 33), embedded=1e4)


@pytest.mark.parametrize("lengths", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("threads", [1, 3])
def test_documents_of_any_length_on_any_number_of_threads(lengths, threads):
    assert_right({"embedding_rank": 8}, lengths, threads)


def test_an_embedding_far_wider_than_latent_and_queries():
    """More tokens than are embedded at a time (csrc/embedding.cpp); one expert each, and no slots, which else lie behind."""
    one_expert = {"n_routed_experts": 2, "num_experts_per_tok": 1, "norm_topk_prob": False}
    assert_right({"hidden_size": 64, "embedding_rank": 60, **one_expert}, DOCUMENTS["rows of equal length"])


@pytest.mark.parametrize("threads", [1, 2])
def test_same_bits_twice_and_after_a_model_full_of_nan(threads):
    torch.set_num_threads(threads)
    model, broken = random_model().train(), random_model(num_experts_per_tok=1).train()
    arguments = flat(model, (40, 30, 50))
    step = NativeStep(model)
    first = in_one_call(model, arguments, step)
    with torch.no_grad():
        broken.embed_tokens.weight.fill_(float("nan"))
    assert in_one_call(broken, arguments)["loss"].isnan()
    assert_bitwise_equal(first, in_one_call(model, arguments, step))


@pytest.mark.parametrize("dense", [0, 1])
def test_expert_loads_are_those_of_the_routers(dense):
    model = random_model(first_k_dense_replace=dense, num_hidden_layers=3, n_routed_experts=20).train()
    arguments = flat(model, (40, 30, 50))
    by_autograd(model, *arguments)
    expected = [router.load.clone() for router in model.routers()]
    torch.set_num_threads(2)
    in_one_call(model, arguments)
    assert [router.load.tolist() for router in model.routers()] == [load.tolist() for load in expected]
    assert sum(expected[0]) == 120 * model.config.num_experts_per_tok


def test_without_a_label_there_is_nothing_to_learn():
    model = random_model().train()
    ids, labels, *rest = flat(model, (9, 8))
    found = in_one_call(model, (ids, torch.full_like(labels, -100), *rest))
    assert not any(values.any() for values in found.values())


def test_replaced_weights_are_seen():
    """Parameters and buffers whose memory was exchanged, as `module.to` does."""
    model = random_model().train()
    step, arguments = NativeStep(model), flat(model, (9, 8))
    in_one_call(model, arguments, step)
    for router in model.routers():
        router.e_score_correction_bias = -router.e_score_correction_bias
    assert_bitwise_equal(in_one_call(model, arguments, step), in_one_call(model, arguments))
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.5
    assert_bitwise_equal(in_one_call(model, arguments, step), in_one_call(model, arguments))


def test_time_is_told_by_part():
    model = random_model().train()
    step = NativeStep(model)
    torch.set_num_threads(1)
    begun = time.perf_counter()
    step(*flat(model, (40, 30)))
    elapsed = time.perf_counter() - begun
    seconds = step.thread_seconds()
    assert sum(map(sum, seconds.values())) <= elapsed
    assert all(forward > 0 for forward, _ in seconds.values())
    assert all(backward > 0 for part, (_, backward) in seconds.items() if part != "linear_cross_entropy")


class TestWhatItTakes:
    @staticmethod
    def taken(model: DeepseekV3, lengths: tuple[int, ...] = (8, 8), **changes) -> bool:
        names = ("ids", "labels", "positions", "cu_seqlens")
        arguments = dict(zip(names, flat(model, lengths), strict=True)) | changes
        return NativeStep(model).takes(**arguments)

    def test_a_plain_model(self):
        assert self.taken(random_model())

    def test_not_what_an_operator_is_asked_to_do_otherwise(self):
        with ops.use("reference", "rope"):
            assert not self.taken(random_model())

    def test_also_where_an_optimizer_is_asked_to_do_otherwise(self):
        """That is no part of the call."""
        with ops.use("reference", "adamw", "muon", "newton_schulz"):
            assert self.taken(random_model())

    def test_not_multi_token_prediction(self):
        assert not self.taken(random_model(num_nextn_predict_layers=1))

    def test_not_a_frozen_parameter(self):
        model = random_model()
        model.norm.weight.requires_grad_(False)
        assert not self.taken(model)

    def test_not_where_a_hook_waits(self):
        model = random_model()
        handle = model.norm.weight.register_hook(lambda grad: grad)
        assert not self.taken(model)
        handle.remove()
        assert self.taken(model)
        handle = model.layers[0].mlp.register_forward_hook(lambda *_: None)
        with pytest.warns(ops.FallbackWarning, match=r"module 'layers\.0\.mlp' is not dsfast's own, or has hooks"):
            assert not self.taken(model)
        handle.remove()
        assert self.taken(model)
        handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
        with pytest.warns(ops.FallbackWarning, match="the model is not dsfast's own, or has hooks"):
            assert not self.taken(model)
        handle.remove()
        assert self.taken(model)

    def test_not_one_document_on_two_threads(self):
        torch.set_num_threads(2)
        assert self.taken(random_model())
        assert not self.taken(random_model(), (16,))

    @pytest.mark.parametrize("boundaries", [[1, 16], [0, 15], [0, 9, 8, 16], [0, 17], []])
    def test_not_boundaries_that_do_not_rise_from_0_to_the_last_token(self, boundaries):
        """Read as they are they would lead out of the arrays; the model says what is wrong with them."""
        model, boundaries = random_model(), torch.tensor(boundaries, dtype=torch.int32)
        torch.set_num_threads(1)
        assert not self.taken(model, cu_seqlens=boundaries)
        gradients, ids = Gradients(model.train(), torch.float32, tiny_config().train, True), random_ids(model, 1, 16)
        with pytest.raises(UserError, match="cu_seqlens: expected where documents begin"):
            gradients(ids, ids, torch.arange(16)[None], boundaries)

    def test_not_another_dtype(self):
        model = random_model()
        assert not self.taken(model, positions=torch.arange(16, dtype=torch.int32))
        assert not self.taken(model, cu_seqlens=torch.tensor([0, 16]))

    @pytest.mark.parametrize(
        ("boundaries", "threads", "expected"),
        [([0, 8, 16], 2, 1.0), ([0, 16], 2, 2.0), ([0, 16], 1, 1.0), ([0, 12, 16], 2, 1.5), ([0, 0], 2, 0.0)],
    )
    def test_uneven(self, boundaries, threads, expected):
        assert uneven(boundaries, threads) == expected
        assert MOST_UNEVEN == 1.5


class TestGradients:
    """The choice between the native call and autograd."""

    def test_a_model_changed_in_python_is_noticed(self, monkeypatch):
        trainer = Trainer(tiny_config(), dataset=tiny_dataset())
        kind = type(trainer.model.layers[1].mlp)
        forward = kind.forward
        monkeypatch.setattr(kind, "forward", lambda self, *x: 1.01 * forward(self, *x))
        batch = tiny_dataset().rows.batch(0, 3)
        arguments = (batch.input_ids, batch.labels, batch.positions, batch.cu_seqlens)
        with pytest.warns(
            ops.FallbackWarning, match=r"train_step runs operator by operator: .* differs by .*csrc/train_step"
        ):
            trainer.gradients(*arguments)
        assert not trainer.gradients.in_one_call
        assert trainer.gradients.furthest_apart(*arguments) is None, "given up for good"
        expected = torch.autograd.grad(trainer.model.loss(*arguments), list(trainer.model.parameters()))
        for parameter, gradient in zip(trainer.model.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
        assert any(fallback["operator"] == "train_step" for fallback in ops.fallbacks())

    def test_a_router_changed_in_python_is_noticed_after_some_batches(self, monkeypatch):
        """One that differs in a token may be rounding."""
        trainer = Trainer(tiny_config(), dataset=tiny_dataset())
        of_router = Router.forward
        monkeypatch.setattr(Router, "forward", lambda self, x: of_router(self, -x))
        for number in range(UNLIKE):
            expected = nullcontext() if number < UNLIKE - 1 else pytest.warns(ops.FallbackWarning, match=CHOICE)
            with expected:
                trainer.train_batch(tiny_dataset().rows.batch(number, 3))
            assert not trainer.gradients.in_one_call

    def test_after_batches_that_chose_otherwise_the_call_is_taken_where_they_choose_alike(self, monkeypatch):
        trainer, of_router = Trainer(tiny_config(), dataset=tiny_dataset()), Router.forward
        for number in range(UNLIKE + 1):
            otherwise = number % UNLIKE < UNLIKE - 1
            monkeypatch.setattr(Router, "forward", lambda self, x, sign=1 - 2 * otherwise: of_router(self, sign * x))
            trainer.train_batch(tiny_dataset().rows.batch(number, 3))
            assert trainer.gradients.in_one_call == (number >= UNLIKE - 1)

    def test_each_batch_in_a_row_that_chose_otherwise_is_followed_by_half_as_many_tokens(self, monkeypatch):
        """One without a label between them begins a new row."""
        trainer, of_router, looked_at = Trainer(tiny_config(), dataset=tiny_dataset()), Router.forward, []
        of_documents = "dsfast.train.gradients.first_documents"
        monkeypatch.setattr(of_documents, lambda flat, tokens: (looked_at.append(tokens), flat)[1])
        batch = tiny_dataset().rows.batch(0, 3)
        for number in range(UNLIKE + 2):
            labels = torch.full_like(batch.labels, -100) if number == 4 else batch.labels
            monkeypatch.setattr(
                Router, "forward", lambda self, x, sign=1 - 2 * (number != 4): of_router(self, sign * x)
            )
            trainer.gradients(batch.input_ids, labels, batch.positions, batch.cu_seqlens)
        assert looked_at == [1024, 512, 256, 128, 64, 1024, 512, 256, 128, 64, 32, 16]
        assert not ops.fallbacks()

    def test_a_gradient_that_is_no_number_is_furthest_apart(self, monkeypatch):
        trainer, batch = Trainer(tiny_config(), dataset=tiny_dataset()), tiny_dataset().rows.batch(0, 3)
        name, parameter = list(trainer.model.named_parameters())[-1]
        of_step = NativeStep.__call__
        monkeypatch.setattr(
            NativeStep, "__call__", lambda self, *flat: (of_step(self, *flat), parameter.grad.fill_(torch.nan))[0]
        )
        what, difference = trainer.gradients.furthest_apart(
            batch.input_ids, batch.labels, batch.positions, batch.cu_seqlens
        )
        assert what == f"the gradient of {name}"
        assert difference != difference

    def test_how_far_a_whole_batch_is_apart(self, monkeypatch):
        trainer, batch = Trainer(tiny_config(), dataset=tiny_dataset()), tiny_dataset().rows.batch(0, 3)
        arguments = (batch.input_ids, batch.labels, batch.positions, batch.cu_seqlens)
        what, difference = trainer.gradients.furthest_apart(*arguments)
        assert difference < 1e-5
        assert what == "the loss" or what.removeprefix("the gradient of ") in dict(trainer.model.named_parameters())
        of_step = NativeStep.__call__

        def without_a_word(self, *flat):
            loss = of_step(self, *flat)
            self.model.embed_tokens.weight.grad[int(flat[0][0])] = 0
            return loss

        monkeypatch.setattr(NativeStep, "__call__", without_a_word)
        what, difference = trainer.gradients.furthest_apart(*arguments)
        assert (what, difference > 1e-2) == ("the gradient of embed_tokens.weight", True)

    @pytest.mark.parametrize("whole_step", [True, False])
    def test_the_config_decides(self, whole_step):
        config = tiny_config(**{"runtime.whole_step": whole_step})
        trainer = Trainer(config, dataset=tiny_dataset())
        trainer.train_batch(tiny_dataset().rows.batch(0, 3))
        assert trainer.gradients.in_one_call == whole_step
        assert bool(trainer.gradients.seconds()) == whole_step

    def test_training_goes_the_same_way(self):
        losses = []
        for whole_step in (True, False):
            trainer = Trainer(tiny_config(**{"runtime.whole_step": whole_step}), dataset=tiny_dataset())
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                losses.append([trainer.train_batch(tiny_dataset().rows.batch(i, 3)).loss for i in range(8)])
        torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=2e-4, atol=0)

    def test_what_would_be_read_beyond_its_end_is_refused_after_the_first_batch_too(self):
        trainer = Trainer(tiny_config(), dataset=tiny_dataset())
        limit = trainer.config.model.max_position_embeddings
        ids = random_ids(trainer.model, 2, limit)
        shape = rf"the shape of input_ids \[2, {limit}\], of int64"
        refused = {
            rf"positions: expected {shape}, got \[1, 5\] of torch.int64": (torch.arange(5)[None], None),
            rf"positions: expected {shape}, got \[2, {limit}\] of torch.int32": (torch.zeros_like(ids).int(), None),
            rf"positions: expected 0 .. {limit - 1}, got {limit}": (torch.full_like(ids, limit), None),
            rf"positions in the documents of cu_seqlens: expected 0 .. {limit - 1}, got {2 * limit - 1}": (
                None, torch.tensor([0, 2 * limit]).int(),
            ),
        }  # fmt: skip
        for _ in range(2):
            for message, (positions, cu_seqlens) in refused.items():
                with pytest.raises(UserError, match=f"^{message}$"):
                    trainer.train_batch(Batch(ids, ids, positions, cu_seqlens))
            trainer.train_batch(Batch(ids, ids, None, None))
            assert trainer.gradients.in_one_call

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
    def test_what_torch_makes_by_default_makes_no_difference(self, dtype):
        losses = []
        for default in (torch.float32, dtype):
            trainer = Trainer(tiny_config(), dataset=tiny_dataset())
            torch.set_default_dtype(default)
            try:
                losses.append([trainer.train_batch(tiny_dataset().rows.batch(i, 3)).loss for i in range(3)])
            finally:
                torch.set_default_dtype(torch.float32)
        assert losses[0] == losses[1]
        assert trainer.gradients.in_one_call

    def test_nothing_is_taken_for_agreement_where_nothing_was_compared(self):
        model = random_model().train()
        ids, config = random_ids(model, 4, 16), tiny_config().train
        gradients = Gradients(model, torch.float32, config, True)
        gradients(ids, torch.full_like(ids, -100), None, None)
        assert not gradients.in_one_call
        gradients(ids, ids, None, None)
        assert gradients.in_one_call

    def test_first_documents(self):
        model = random_model()
        arguments = flat(model, (7, 9, 5))
        assert [len(x) for x in first_documents(arguments, 20)] == [16, 16, 16, 3]
        assert [len(x) for x in first_documents(arguments, 3)] == [7, 7, 7, 2]
        assert [len(x) for x in first_documents(arguments, 100)] == [21, 21, 21, 4]

    def test_elsewhere_than_in_float32_on_the_cpu_autograd_does_it(self):
        model = random_model()
        assert not Gradients(model, torch.bfloat16, tiny_config().train, True)._native
