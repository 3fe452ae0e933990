"""Groups, schedule, AdamW against torch.optim.AdamW, Muon against float64 and against torch.optim.Muon."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import tiny_config
from torch import Tensor, nn

from dsfast import ops
from dsfast.config import TrainConfig
from dsfast.model import DeepseekV3
from dsfast.train.muon import Muon
from dsfast.train.optimizer import build_optimizer, learning_rate_scale, role

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def filled_gradients(parameters, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator) * scale


def single_matrix_muon(w: Tensor, m: Tensor, g: Tensor, lr: float, decay: float) -> tuple[Tensor, Tensor]:
    """Muon for one matrix in float64, as the formula stands."""
    m = 0.95 * m + 0.05 * g
    x = 0.95 * m + 0.05 * g
    x = x / x.norm()
    a, b, c = COEFFICIENTS
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (1 - lr * decay) * w - lr * 0.2 * math.sqrt(max(w.shape)) * x, m


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("embed_tokens.weight", "embedding"),
        ("lm_head.weight", "embedding"),
        ("embed_tokens.projection", "matrix"),
        ("norm.weight", "vector"),
        ("layers.1.mlp.gate.weight", "vector"),
        ("layers.1.mlp.experts.gate_up_proj", "matrix"),
        ("layers.0.mlp.down_proj", "matrix"),
        ("layers.0.self_attn.q_a_layernorm.weight", "vector"),
        ("layers.0.self_attn.q_b_proj.weight", "matrix"),
        ("mtp.0.eh_proj.weight", "matrix"),
        ("mtp.0.enorm.weight", "vector"),
    ],
)
def test_role(name, expected):
    changes = {"model.tie_word_embeddings": False, "model.q_lora_rank": 8, "model.num_nextn_predict_layers": 1}
    model = DeepseekV3(tiny_config(**changes).model)
    assert role(name, dict(model.named_parameters())[name]) == expected


@pytest.mark.parametrize("decay", ["linear", "cosine", "constant"])
def test_a_run_of_nothing_but_warmup_ends_at_the_full_rate(decay):
    train = tiny_config(**{"train.steps": 4, "train.warmup_steps": 4, "train.decay": decay}).train
    assert [learning_rate_scale(step, train) for step in (3, 4)] == [0.8, 1.0]


def test_schedule_by_hand():
    linear = TrainConfig(steps=10, warmup_steps=4, decay="linear", final_lr_ratio=0.1)
    expected = [0.2, 0.4, 0.6, 0.8, 1.0, 0.85, 0.7, 0.55, 0.4, 0.25, 0.1, 0.1]
    assert [learning_rate_scale(step, linear) for step in range(12)] == pytest.approx(expected)
    cosine = TrainConfig(steps=4, warmup_steps=0, decay="cosine", final_lr_ratio=0.0)
    half = math.sqrt(0.5) / 2
    assert [learning_rate_scale(s, cosine) for s in range(5)] == pytest.approx([1, 0.5 + half, 0.5, 0.5 - half, 0])
    constant = TrainConfig(steps=4, warmup_steps=1, decay="constant")
    assert [learning_rate_scale(step, constant) for step in range(5)] == [0.5, 1, 1, 1, 1]
    assert learning_rate_scale(3, TrainConfig(steps=4, warmup_steps=9)) == pytest.approx(0.4)


def test_adamw_equals_torch_with_groups_and_clip():
    train = TrainConfig(optimizer="adamw", learning_rate=0.01, embedding_learning_rate=0.03, weight_decay=0.1)
    config = tiny_config().model
    torch.manual_seed(0)
    mine, theirs = DeepseekV3(config), DeepseekV3(config)
    theirs.load_state_dict(mine.state_dict())
    optimizer = build_optimizer(mine, train)
    groups = [
        {"params": [p], "lr": 0.03 if name == "embed_tokens.weight" else 0.01,
         "weight_decay": 0.1 if role(name, p) == "matrix" else 0.0}
        for name, p in theirs.named_parameters()
    ]  # fmt: skip
    peaks = [group["lr"] for group in groups]
    reference = torch.optim.AdamW(groups, betas=(train.beta1, train.beta2), eps=train.eps)
    for step, (lr_scale, size) in enumerate([(0.5, 1.0), (1.0, 1e-5), (0.25, 3.0)]):
        filled_gradients(mine.parameters(), step, size)
        filled_gradients(theirs.parameters(), step, size)
        before = [p.grad.clone() for p in mine.parameters()]
        norm = ops.grad_norm(before)
        optimizer.step(lr_scale, ops.clip_factor(norm, 1.0))
        for p, grad in zip(mine.parameters(), before, strict=True):
            assert torch.equal(p.grad, grad), "gradients must not be rewritten"
        torch_norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        assert norm == pytest.approx(torch_norm.item(), rel=1e-5)
        for group, lr in zip(reference.param_groups, peaks, strict=True):
            group["lr"] = lr * lr_scale
        reference.step()
    for (name, p), q in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


# One stack of equal shapes with a transposed member; a square; an expert tensor; a gate_up in two and three dimensions.
SHAPES = {
    "wide": ((12, 20), 1),
    "tall": ((20, 12), 1),
    "square": ((16, 16), 1),
    "experts": ((3, 12, 20), 1),
    "gate_up": ((24, 20), 2),
    "experts_gate_up": ((3, 40, 12), 2),
    "row": ((1, 7), 1),
}


def muon_parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(5)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, (shape, _) in SHAPES.items()}


def test_muon_equals_float64_matrix_by_matrix():
    parameters = muon_parameters()
    muon = Muon(parameters, [SHAPES[name][1] for name in parameters], lr=0.03, weight_decay=0.1)

    def matrices(name: str, tensor: Tensor) -> list[Tensor]:
        halves = [half for matrix in tensor.reshape(-1, *tensor.shape[-2:]) for half in matrix.chunk(SHAPES[name][1])]
        return [half.detach().double() for half in halves]

    weights = {name: matrices(name, p) for name, p in parameters.items()}
    momenta = {name: [torch.zeros_like(w) for w in ws] for name, ws in weights.items()}
    for step in range(4):
        filled_gradients(parameters.values(), step)
        muon.step(lr_scale=0.5, clip_scale=0.25)
        for name, p in parameters.items():
            for i, g in enumerate(matrices(name, p.grad)):
                arguments = (weights[name][i], momenta[name][i], 0.25 * g)
                weights[name][i], momenta[name][i] = single_matrix_muon(*arguments, lr=0.015, decay=0.1)
        for name, p in parameters.items():
            for got, want in zip(matrices(name, p), weights[name], strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("implementation", "dtype"), [("auto", torch.float32), ("reference", torch.bfloat16)])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (64, 128), (16, 16)])
def test_muon_agrees_with_torch_to_bfloat16(shape, implementation, dtype):
    torch.manual_seed(1)
    mine, theirs = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(shape))
    muon = Muon({"w": mine}, [1], lr=0.02, weight_decay=0.1, dtype=dtype)
    reference = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        mine.grad = torch.randn(shape)
        theirs.grad = mine.grad.clone()
        with ops.use(implementation):
            muon.step(1.0, 1.0)
        reference.step()
    # torch iterates in bfloat16, whose unit roundoff is 0.4%; five steps of it leave about 1%.
    assert (mine - theirs).norm() < 0.03 * theirs.norm()


def test_muon_takes_the_matrices_and_adamw_the_rest():
    model = DeepseekV3(tiny_config().model)
    state = build_optimizer(model, TrainConfig(optimizer="muon")).state_dict()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    momenta = {n.removeprefix("muon.momentum."): tuple(t.shape) for n, t in state.items() if n.startswith("muon.")}
    averages = {n.removeprefix("adamw.exp_avg."): tuple(t.shape) for n, t in state.items() if "exp_avg." in n}
    roles = {name: role(name, p) for name, p in model.named_parameters()}
    assert momenta == {name: shape for name, shape in shapes.items() if roles[name] == "matrix"}
    assert averages == {name: shape for name, shape in shapes.items() if roles[name] != "matrix"}
    assert set(roles.values()) == {"embedding", "vector", "matrix"}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_state_round_trip_continues_bitwise(kind):
    config = tiny_config(**{"train.optimizer": kind})
    torch.manual_seed(0)
    first = DeepseekV3(config.model)
    optimizer = build_optimizer(first, config.train)
    for step in range(2):
        filled_gradients(first.parameters(), step)
        optimizer.step(1.0)
    second = DeepseekV3(config.model)
    second.load_state_dict(first.state_dict())
    other = build_optimizer(second, config.train)
    other.load_state_dict({name: tensor.clone() for name, tensor in optimizer.state_dict().items()})
    for model, chosen in ((first, optimizer), (second, other)):
        filled_gradients(model.parameters(), 9)
        chosen.step(0.5, 0.5)
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_parameter_without_a_gradient_stays(kind):
    config = tiny_config(**{"train.optimizer": kind, "train.weight_decay": 0.0})
    model = DeepseekV3(config.model)
    optimizer = build_optimizer(model, config.train)
    filled_gradients(model.parameters(), 0)
    idle = {"norm.weight", "layers.0.self_attn.o_proj.weight", "embed_tokens.weight"}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        if name in idle:
            p.grad = None
    optimizer.step(1.0)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name in idle), name
