"""The bench: its formulas against counters, its peers against dsfast, what it writes and shows. No time is judged here."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import tiny_models
import torch
from operator_cases import needs_bfloat16, needs_native
from rich.console import Console
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dsfast import ops
from dsfast.bench import __main__ as bench
from dsfast.bench import cases, ceilings, growth, kernels, learning, memory, peers, results, step, timing
from dsfast.bench.generation import run_generate
from dsfast.bench.peers import PEERS, Peer, huggingface
from dsfast.bench.peers.eager import EagerDeepseekV3, rename
from dsfast.bench.report import Reporter, plain
from dsfast.bench.split import REST, split_by_operator
from dsfast.bench.workload import comparable, matrix_flops, random_batch
from dsfast.command import run_command
from dsfast.config import default_config, load_config
from dsfast.errors import UserError
from dsfast.model import generate_ids
from dsfast.model.decode import OperatorDecoder
from dsfast.ops import native
from dsfast.train import Trainer
from dsfast.train.gradients import Gradients

# Small, and no two letters of an operator alike.
SMALL = {
    "rms_norm": {"N": 12, "D": 5},
    "rope": {"N": 12, "T": 6, "H": 3, "Dr": 4},
    "embedding": {"N": 12, "V": 19, "R": 5, "D": 7},
    "mla_attention": {"N": 12, "T": 6, "H": 3, "Dn": 5, "Dr": 4, "Dv": 7},
    "mla_decode": {"B": 3, "C": 11, "H": 5, "R": 9, "Dn": 7, "Dr": 4, "Dv": 6},
    "moe_route": {"N": 12, "E": 8, "K": 3, "G": 4, "kept": 2},
    "moe_experts": {"N": 12, "D": 7, "E": 5, "K": 2, "I": 3},
    "swiglu_mlp": {"N": 12, "D": 7, "I": 5},
    "linear_cross_entropy": {"N": 12, "R": 5, "V": 19},
    "adamw": {"P": 50, "tensors": 4},
    "muon": {"layers": 2, "D": 8, "I": 5},
    "newton_schulz": {"M": 3, "R": 5, "C": 7},
}
PASSES = {
    "adamw": ["update"],
    "muon": ["update"],
    "mla_decode": ["forward"],
    "newton_schulz": ["forward"],
}  # those without gradient
CEILINGS = ceilings.Ceilings(1e11, 2e11, 1e10, 2048, 2048)
ARCHITECTURES = {
    "factorised": {"embedding_rank": 8},
    "dense embedding, untied": {"tie_word_embeddings": False},
    "factorised, untied": {"embedding_rank": 8, "tie_word_embeddings": False},
    "q_lora, first layer dense": {"q_lora_rank": 9, "first_k_dense_replace": 1},
    "groups, no shared expert": {"n_group": 3, "topk_group": 2, "n_shared_experts": 0},
    "unnormalised, scaled": {"norm_topk_prob": False, "num_experts_per_tok": 1, "routed_scaling_factor": 1.7},
    "softmax scores": {"scoring_func": "softmax"},
    "yarn": {"rope_scaling": tiny_models.YARN},
}


def quiet(text: str) -> None:
    pass


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    monkeypatch.setattr(ceilings, "SIZES", (64,))
    monkeypatch.setattr(ceilings, "COPY_BYTES", 4096)


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny.tiny_config().to_dict()), encoding="utf-8")
    return path


# timing


def test_variants_take_turns_pair_by_pair_after_the_warmup():
    calls = []
    found = timing.compare(
        lambda: calls.append("a"), {n: lambda n=n: calls.append(n) for n in "bc"}, repeats=2, warmup=1
    )
    assert "".join(calls) == "abc" + "abac" * 2
    assert list(found) == ["b", "c"]
    assert found["b"].first.count == found["b"].other.count == 2


def lasting(**durations: float) -> dict:
    """Calls that "take" as long as they return, under a timer that believes them."""
    return {name: lambda duration=duration: duration for name, duration in durations.items()}


@pytest.fixture
def believed(monkeypatch):
    monkeypatch.setattr(timing, "seconds", lambda call: call())


def test_a_slow_variant_gets_fewer_turns_and_costs_the_others_none(believed):
    others = lasting(quick=0.5, slow=6.0, slowest=100.0)
    found = timing.compare(lambda: 1.0, others, repeats=20, warmup=0)
    assert {name: pair.first.count for name, pair in found.items()} == {"quick": 20, "slow": 5, "slowest": 3}
    assert found["slow"].ratio_of_medians == found["slow"].median_of_ratios == 6.0
    assert 4 * 7.0 < timing.BUDGET <= 5 * 7.0  # the fifth pair of the slow one was the last to begin in time


def test_no_budget_adds_to_the_repeats_asked_for(believed):
    assert timing.repeat([lambda: 2.0, lambda: 3.0], repeats=2) == [(2.0, 3.0)] * 2
    assert len(timing.repeat([lambda: 2.0], repeats=9, budget=8.0)) == 4
    assert len(timing.repeat([lambda: 2.0], repeats=9, budget=0.0)) == timing.FEWEST


def test_a_ceiling_is_that_of_the_first_product_that_is_long_enough(monkeypatch):
    taken = []

    def seconds(call):
        size = call.args[0].shape[0]
        taken.append(size)
        return {8: 0.01, 16: ceilings.LONG_ENOUGH, 32: 60.0}[size]

    monkeypatch.setattr(ceilings, "SIZES", (8, 16, 32))
    monkeypatch.setattr(timing, "seconds", seconds)
    assert ceilings._matrix(torch.bfloat16) == (2 * 16**3 / ceilings.LONG_ENOUGH, 16)
    assert taken == [8] * 2 + [16] * (2 + ceilings.CALLS)


def test_ceilings_of_a_quick_machine_are_those_of_the_largest_product(monkeypatch):
    monkeypatch.setattr(ceilings, "SIZES", (8, 16))
    monkeypatch.setattr(timing, "seconds", lambda call: 0.01)
    found = ceilings.measure_ceilings()
    assert (found.float32, found.float32_size) == (found.bfloat16, found.bfloat16_size) == (2 * 16**3 / 0.01, 16)
    assert found.bandwidth == 2 * ceilings.COPY_BYTES / 0.01


def test_a_slow_ceiling_takes_few_calls(believed):
    calls = []
    assert ceilings._best(lambda: calls.append(1) or ceilings.BUDGET) == ceilings.BUDGET
    assert len(calls) == timing.FEWEST


def test_a_comparison_says_how_many_times_as_fast_the_first_is():
    pair = timing.summarise([(1.0, 3.0), (2.0, 4.0), (4.0, 20.0)])
    assert (pair.first.median, pair.other.median) == (2.0, 4.0)
    assert pair.ratio_of_medians == 2.0  # 4 / 2
    assert pair.median_of_ratios == 3.0  # of 3, 2 and 5


def test_quartiles_lie_between_the_samples():
    assert timing.spread([4.0, 1.0, 3.0, 2.0, 5.0]) == timing.Spread(3.0, 2.0, 4.0, 5)
    assert timing.spread([7.0]) == timing.Spread(7.0, 7.0, 7.0, 1)


# cases


def build(operator: str) -> cases.BenchCase:
    return cases.build_case(operator, "small", SMALL[operator])


def inputs(case: cases.BenchCase, dtype: torch.dtype = torch.float32) -> list:
    arguments = list(case.case.make_inputs(torch.Generator().manual_seed(0)))
    for position in case.case.differentiable:
        arguments[position] = arguments[position].to(dtype).requires_grad_()
    return arguments


def test_every_operator_has_every_size():
    assert set(cases.SIZES) == set(ops.OPERATORS)
    assert all(tuple(sizes) == cases.SIZE_NAMES for sizes in cases.SIZES.values())


@pytest.mark.parametrize(
    "operator",
    [
        "embedding",
        "mla_attention",
        "mla_decode",
        "moe_experts",
        "swiglu_mlp",
        "linear_cross_entropy",
        "muon",
        "newton_schulz",
    ],
)
def test_flops_are_those_torch_counts(operator: str):
    case = build(operator)
    arguments = inputs(case)
    # Attention without a mask in its products counts the pairs above the diagonal too: T of them, not (T + 1) / 2.
    full = 2 * 6 / (6 + 1) if operator == "mla_attention" else 1
    with ops.use("reference"), FlopCounterMode(display=False) as counter:
        output = case.ours(*arguments)
    assert counter.get_total_flops() == case.forward.flops * full
    if case.backward is None:
        return
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    assert counter.get_total_flops() == case.backward.flops * full


@pytest.mark.parametrize("operator", sorted(set(SMALL) - {"embedding", "adamw", "muon"}))
def test_forward_bytes_are_those_of_inputs_and_results(operator: str):
    case = build(operator)
    arguments = inputs(case)
    with ops.use("reference"):
        outputs = case.ours(*arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    # The boundaries of documents do not count.
    tensors = [x for x in arguments if isinstance(x, Tensor) and x.dtype is not torch.int32]
    assert case.forward.bytes == sum(x.nbytes for x in (*tensors, *outputs))


@pytest.mark.parametrize("operator", ["mla_attention", "moe_experts", "swiglu_mlp", "linear_cross_entropy"])
def test_backward_bytes_are_those_of_inputs_and_gradients(operator: str):
    case = build(operator)
    arguments = inputs(case)
    with ops.use("reference"):
        output = case.ours(*arguments)
    read = [x for x in arguments if isinstance(x, Tensor) and x.dtype is not torch.int32]
    written = [arguments[position] for position in case.case.differentiable]
    assert case.backward.bytes == sum(x.nbytes for x in (*read, output, *written))


def test_an_embedding_reads_the_rows_it_takes_not_the_table():
    N, V, R, D = SMALL["embedding"].values()
    case = build("embedding")
    assert case.forward.bytes == 8 * N + 4 * (N * R + R * D + N * D)
    assert case.backward.bytes == 8 * N + 4 * (N * D + N * R + R * D + V * R + R * D)  # dy, rows, P -> dE, dP


def test_muon_reads_and_writes_every_state_once():
    case = build("muon")
    count = sum(p.numel() for p in inputs(case)[0])
    assert count == 2 * (12 * 8 + 8 * 8 + 2 * 10 * 8 + 2 * 8 * 5)
    assert case.forward.bytes == count * 4 * (3 + 2)
    assert case.backward is None


def test_adamw_reads_and_writes_every_state_once():
    case = build("adamw")
    assert sum(p.numel() for p in inputs(case)[0]) == 50
    assert case.forward.bytes == 50 * 4 * (1 + 4 + 3)  # norm: g; update: p, g, m, v; out: p, m, v
    assert case.backward is None


@pytest.mark.parametrize("changes", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_a_steps_flops_are_those_torch_counts_in_the_eager_model(changes: dict):
    rows, length = 2, 12
    config = tiny_models.tiny_config(v_head_dim=13, **changes)  # as wide as the keys: nothing is padded
    c = config.model
    model = EagerDeepseekV3(tiny_models.random_model(v_head_dim=13, **changes))
    # The products above the diagonal, which torch's plain attention does and a causal one need not.
    extra = 6 * rows * length * (length - 1) / 2 * c.num_hidden_layers * c.num_attention_heads * 26
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.loss(*random_batch(config, rows, length)).backward()
    assert counter.get_total_flops() == matrix_flops(c, rows, length) + extra


# peers


@pytest.mark.parametrize("static", [False, True], ids=["by tokens", "every expert"])
@pytest.mark.parametrize("changes", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_the_eager_peer_has_dsfasts_loss_and_gradients(changes: dict, static: bool):
    config = tiny_models.tiny_config(**changes)
    rows = random_batch(config, 3, 21)
    model = tiny_models.random_model(**changes).train()
    peer = peers._module(model, static)
    loss, theirs = model.loss(*rows), peer.loss(*rows)
    loss.backward()
    theirs.backward()
    torch.testing.assert_close(theirs, loss, rtol=1e-6, atol=0)
    expected = rename({name: p.grad for name, p in model.named_parameters()})
    found = {name: p.grad for name, p in peer.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        size = expected[name].abs().max().item()
        assert size > 0 or ".experts." in name, name  # an expert that no token chose has none
        # Sums of 63 tokens and up to 61 words in another order: a few hundred roundings at most.
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=300 * 2**-24 * size, msg=name)


def test_the_peers_copy_is_its_own():
    model = tiny_models.random_model()
    peer = EagerDeepseekV3(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for tensor in (*peer.parameters(), *peer.buffers()):
            tensor.add_(1)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # torch's, on its own norm under autocast
@pytest.mark.parametrize("name", ["eager", "autocast", "transformers"])
def test_a_peers_step_gives_dsfasts_loss_and_updates_every_weight(name: str):
    if PEERS[name].missing():
        pytest.skip(PEERS[name].missing())
    config = comparable(tiny.tiny_config())
    trainer = Trainer(config)
    rows = random_batch(config, 2, 16)
    training = peers.PeerTraining(PEERS[name], trainer.model, config.train)
    before = [p.detach().clone() for p in training.parameters]
    expected, found = trainer.step(*rows), training.step(*rows)
    assert abs(found - expected) <= PEERS[name].tolerance * expected
    assert not any(torch.equal(p, old) for p, old in zip(training.parameters, before, strict=True))


def test_the_eager_step_follows_dsfasts_for_several_steps():
    """The same clip and the same AdamW on both sides: the losses stay together while they fall."""
    config = comparable(tiny.tiny_config(**{"train.weight_decay": 0.0, "train.bias_update_speed": 0.0}))
    trainer = Trainer(config)
    rows = random_batch(config, 2, 16)
    training = peers.PeerTraining(PEERS["eager"], trainer.model, config.train)
    pairs = [(trainer.step(*rows), training.step(*rows)) for _ in range(6)]
    assert pairs[-1][0] < pairs[0][0] - 0.1
    assert all(abs(a - b) <= 1e-3 * a for a, b in pairs), pairs


# kernels


@pytest.mark.parametrize("operator", SMALL)
def test_a_right_case_is_timed_in_every_implementation(operator: str):
    row = kernels.run_case(build(operator), CEILINGS, repeats=2)
    timed = {name for name, problem in row["checks"].items() if not problem}
    assert {"reference", "eager"} <= timed
    assert list(row["passes"]) == PASSES.get(operator, ["forward", "forward+backward"])
    case = build(operator)
    works = {"forward+backward": case.backward and case.forward + case.backward}
    for run, found in row["passes"].items():
        work = works.get(run, case.forward)
        assert (found["flops"], found["bytes"]) == (work.flops, work.bytes)
        assert set(found["implementations"]) == timed
        for name, figures in found["implementations"].items():
            median = figures["seconds"]["median"]
            assert figures["bytes_per_second"] == found["bytes"] / median
            dtype = torch.bfloat16 if name == kernels.ROUNDED else torch.float32
            assert figures["ceiling_share"] == CEILINGS.ideal_seconds(found["flops"], found["bytes"], dtype) / median
            assert ("speedup_median_of_pairs" in figures) == (name != "eager")


def test_a_speedup_is_how_many_times_as_fast_as_eager_it_is(monkeypatch):
    monkeypatch.setattr(timing, "seconds", lambda call: call())
    calls = {"native": lambda: 2.0, "eager": lambda: 5.0}
    ours = kernels._timed(calls, cases.Work(10, 20), CEILINGS, 3)["implementations"]["native"]
    assert (ours["speedup_of_medians"], ours["speedup_median_of_pairs"]) == (2.5, 2.5)


@pytest.mark.parametrize("spoil", [1.0, 1.05])
def test_products_of_bfloat16_are_an_implementation_of_their_own(spoil, monkeypatch):
    """Where the processor is fast at them; held to eager's error in bfloat16, not beyond."""
    needs_bfloat16()
    monkeypatch.setattr(kernels.native, "fast_bfloat16", lambda: True)
    case = build("swiglu_mlp")

    @functools.wraps(case.case.function)
    def function(*arguments):
        rounded = native._products.get() == torch.bfloat16 and arguments[0].dtype == torch.float32  # not eager
        return case.case.function(*arguments) * (spoil if rounded else 1.0)

    bench_case = dataclasses.replace(case, case=dataclasses.replace(case.case, function=function))
    row = kernels.run_case(bench_case, CEILINGS, 1)
    right = spoil == 1.0
    assert (row["checks"][kernels.ROUNDED] == "") == right
    assert all((kernels.ROUNDED in found["implementations"]) == right for found in row["passes"].values())
    assert kernels.ROUNDED not in kernels.run_case(build("rope"), CEILINGS, 1)["checks"]


def test_a_wrong_eager_peer_is_not_timed():
    case = build("swiglu_mlp")

    def wrong(x, gate_up, down):
        return case.eager(x, gate_up, down) * 1.01

    row = kernels.run_case(dataclasses.replace(case, eager_result=wrong), CEILINGS, 1)
    assert row["checks"]["eager"].startswith("output: error")
    assert row["passes"] == {}
    assert not bench.sound({"cases": [row]})


def test_eager_is_not_timed_alone(monkeypatch):
    check = kernels.checks.check
    monkeypatch.setattr(kernels.checks, "check", lambda *a, **o: [{**row, "passed": False} for row in check(*a, **o)])
    row = kernels.run_case(build("rope"), CEILINGS, 1)
    assert row["passes"] == {}
    assert row["checks"]["reference"]
    assert not row["checks"]["eager"]


def test_wrong_gradients_are_named_and_not_timed():
    needs_native()
    case = build("swiglu_mlp")

    def wrong(x, gate_up, down):
        y = case.case.function(x, gate_up, down)
        return y if ops.dispatch.choose("swiglu_mlp", x) == "reference" else 1.01 * y - 0.01 * y.detach()

    def wrong_eager(x, gate_up, down):
        y = case.eager(x, gate_up, down)
        return 1.01 * y - 0.01 * y.detach()

    spoilt = dataclasses.replace(case, case=dataclasses.replace(case.case, function=wrong), eager_result=wrong_eager)
    found = kernels.run_case(spoilt, CEILINGS, 1)["checks"]
    assert found["reference"] == ""
    assert found["native"].startswith("grad x: error")
    assert found["eager"].startswith("grad x: error")


def test_a_wrong_implementation_is_named_and_not_timed(monkeypatch):
    right = kernels.checks.check

    def check(*arguments, **options):
        rows = right(*arguments, **options)
        return [{**row, "passed": row["implementation"] != "reference"} for row in rows]

    monkeypatch.setattr(kernels.checks, "check", check)
    row = kernels.run_case(build("rope"), CEILINGS, 1)
    assert "error" in row["checks"]["reference"]
    assert all("reference" not in found["implementations"] for found in row["passes"].values())
    assert not bench.sound({"cases": [row]})


def test_a_missing_native_module_is_reported_not_an_error(monkeypatch):
    monkeypatch.setattr(kernels.native, "status", lambda: (None, "no compiler"))
    row = kernels.run_case(build("rope"), CEILINGS, 1)
    assert row["checks"]["native"] == "not available: no compiler"
    assert set(row["passes"]["forward"]["implementations"]) == {"reference", "eager"}
    assert bench.sound({"cases": [row]})


def test_the_ideal_time_is_that_of_the_narrower_ceiling():
    assert CEILINGS.ideal_seconds(flops=10**11, bytes_moved=10**9) == 1.0
    assert CEILINGS.ideal_seconds(flops=10**9, bytes_moved=2 * 10**10) == 2.0


# step


@pytest.mark.parametrize("factor", [1.01, 0.99, float("nan")])
def test_a_peer_with_another_loss_is_wrong_and_not_timed(monkeypatch, factor):
    def build_wrong(model):
        module = EagerDeepseekV3(model)
        return module, lambda ids, labels: module.loss(ids, labels) * factor

    monkeypatch.setitem(PEERS, "eager", Peer("wrong", build_wrong))
    found = step.run_step(tiny.tiny_config(), 2, 8, 1, {"eager": ""}, False, quiet)
    assert found["peers"]["eager"]["status"] == "wrong"
    assert "its first loss is" in found["peers"]["eager"]["reason"]
    assert "comparison" not in found["peers"]["eager"]
    assert not bench.sound(found)


@pytest.mark.parametrize(
    ("loss", "rough", "status"),
    [(10.0009, 0.0, ""), (10.0011, 0.0, "wrong"), (9.9989, 0.0, "wrong"), (10.09, 0.01, ""), (10.11, 0.01, "wrong")],
)
def test_a_peers_loss_may_be_off_by_a_part_of_dsfasts(loss, rough, status):
    training = SimpleNamespace(step=lambda *rows: loss)
    assert step._first_step(PEERS["eager"], training, "", (), 10.0, rough)["status"] == status


def test_the_work_of_a_step_is_held_against_each_ceiling():
    work = step._work(10**9, 0.5, CEILINGS)["work"]
    assert work["flops_per_second"] == 2e9
    assert work["share_of"] == {"float32": 2e9 / CEILINGS.float32, "bfloat16": 2e9 / CEILINGS.bfloat16}
    assert CEILINGS.float32 != CEILINGS.bfloat16


def test_a_peer_that_fails_does_not_stop_the_others(monkeypatch):
    def broken(*arguments):
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setitem(PEERS, "compile", Peer("broken", lambda model: (EagerDeepseekV3(model), broken)))
    monkeypatch.setitem(PEERS, "autocast", Peer("not even built", broken))
    chosen = {"compile": "", "autocast": "", "eager": ""}
    found = step.run_step(tiny.tiny_config(), 2, 8, 1, chosen, False, quiet)
    for name in ("compile", "autocast"):
        assert found["peers"][name]["status"] == "failed"
        assert found["peers"][name]["reason"] == "RuntimeError: no kernel"
    assert found["peers"]["eager"]["status"] == "timed"
    assert not bench.sound(found)


def test_a_missing_peer_is_reported_and_by_name_an_error(monkeypatch, capsys):
    missing = dataclasses.replace(PEERS["transformers"], missing=lambda: huggingface.INSTALL)
    monkeypatch.setitem(PEERS, "transformers", missing)
    chosen = step.choose_peers(None, tiny.tiny_config().model)
    assert list(chosen) == list(PEERS)
    assert "pip install" in chosen["transformers"]
    found = step.run_step(tiny.tiny_config(), 2, 8, 1, {"transformers": chosen["transformers"]}, False, quiet)
    assert found["peers"]["transformers"]["status"] == "missing"
    assert bench.sound(found)
    assert run_command(bench.main, ["step", "--peers", "eager,transformers"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    assert line.startswith(f"error: peer 'transformers': {huggingface.INSTALL}; available here: eager, ")


def test_a_model_that_transformers_cannot_have_is_missing_there_and_nothing_broken(capsys, tmp_path):
    config = tiny.tiny_config(**{"model.scoring_func": "softmax"})
    chosen = step.choose_peers(None, config.model)
    if not huggingface.missing():
        assert chosen["transformers"].startswith(
            "transformers' DeepseekV3ForCausalLM makes the routers' scores by sigmoid"
        )
    found = step.run_step(config, 2, 8, 1, {"transformers": chosen["transformers"]}, False, quiet)
    assert found["peers"]["transformers"] | {"what": ""} == {
        "what": "", "status": "missing", "reason": chosen["transformers"],
    }  # fmt: skip
    model = tiny_models.random_model(scoring_func="softmax")
    found = run_generate(model, [1], 2, 1, quiet)
    assert (found["status"], found["reason"]) == ("missing", chosen["transformers"])
    assert bench.sound(found)


@pytest.mark.parametrize(
    "changes", [{"v_head_dim": 64}, {"n_routed_experts": 4, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 1}]
)
def test_the_eager_peer_has_values_wider_than_keys_and_groups_of_one_expert(changes):
    config = tiny.tiny_config(**{f"model.{name}": value for name, value in changes.items()})
    found = step.run_step(config, 2, 8, 1, {"eager": ""}, False, quiet)
    assert found["peers"]["eager"]["status"] == "timed"


def test_the_comparison_starts_with_no_weight_at_zero():
    config = comparable(tiny.tiny_config(**{"model.zero_init_output": True}))
    assert config.train.optimizer == "adamw"
    assert all(p.any() for p in Trainer(config).model.parameters())


@pytest.mark.parametrize("whole_step", [True, False])
def test_the_split_names_dsfasts_operators_forward_and_backward(whole_step):
    config = comparable(tiny.tiny_config(**{"runtime.whole_step": whole_step}))
    trainer, batch = Trainer(config), random_batch(config, 2, 8)
    split = split_by_operator(lambda: trainer.step(*batch), 2, trainer.gradients.seconds)
    rows = {row["operator"]: row for row in split}
    assert REST in rows
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1, abs=0.01)
    if kernels.native.status()[0]:
        assert {f"dsfast::{name}" for name in set(ops.OPERATORS) - {"mla_decode", "muon", "newton_schulz"}} <= set(rows)
        assert ("dsfast::linear" in rows) == whole_step
        for name in ("rms_norm", "rope", "mla_attention", "moe_experts", "swiglu_mlp"):
            assert rows[f"dsfast::{name}"]["forward_seconds"] > 0
            assert rows[f"dsfast::{name}"]["backward_seconds"] > 0
        assert rows["dsfast::adamw"]["backward_seconds"] == 0


def test_memory_is_that_of_a_process_for_each_variant():
    memory.check_measurable()
    found = memory.peak_memory(comparable(tiny.tiny_config()), 2, 8, [], quiet)
    assert found["memory_failed"] == {}
    assert list(found["memory"]) == [memory.IDLE, "dsfast"]
    assert 10e6 < found["memory"][memory.IDLE] < found["memory"]["dsfast"] < 2e9


def test_a_variant_whose_process_fails_is_named_and_the_others_are_kept(capsys, monkeypatch):
    memory.check_measurable()
    monkeypatch.setattr(memory, "_TRAIN", "import os; os.write(2, b'a word\\nno room'); os._exit(9)")
    found = step.run_step(tiny.tiny_config(), 2, 8, 1, {"eager": ""}, True, quiet)
    assert list(found["memory"]) == [memory.IDLE]
    failed = "its process ended with status 9: no room"
    assert found["memory_failed"] == {"dsfast": failed, "eager": failed}
    assert found["peers"]["eager"]["status"] == "timed"
    assert not bench.sound(found)
    Reporter()._memory(found["memory"], found["memory_failed"])
    assert f"✗ the memory of eager was not measured: {failed}" in " ".join(capsys.readouterr().out.split())


# generate

# transformers' grouped products want rows of whole 16 bytes.
EVEN = {"hidden_size": 24, "moe_intermediate_size": 12, "intermediate_size": 20}


def test_generation_is_timed_against_transformers():
    pytest.importorskip("transformers")
    found = run_generate(tiny_models.random_model(**EVEN), [1, 3], 4, 1, quiet)
    assert (found["status"], found["reason"]) == ("timed", "")
    assert [row["tokens"] for row in found["batches"]] == [4, 12]
    for row in found["batches"]:
        assert row["tokens_per_second"] == row["tokens"] / row["seconds"]["median"]
        assert row["peer_tokens_per_second"] == row["tokens"] / row["comparison"]["other"]["median"]


def test_generation_without_transformers_is_timed_alone(monkeypatch):
    monkeypatch.setattr(huggingface, "missing", lambda: huggingface.INSTALL)
    found = run_generate(tiny_models.random_model(), [2], 3, 1, quiet)
    assert found["status"] == "missing"
    assert "pip install" in found["reason"]
    assert found["batches"][0]["tokens"] == 6
    assert "comparison" not in found["batches"][0]


def test_other_ways_of_generating_are_timed_beside_and_other_tokens_noticed(monkeypatch):
    monkeypatch.setattr(huggingface, "missing", lambda: huggingface.INSTALL)
    others = {"by operators": partial(generate_ids, decoder_type=OperatorDecoder), "wrong": lambda *_: [[1, 1, 1]]}
    found = run_generate(tiny_models.random_model(), [1], 3, 1, quiet, others=others)
    assert found["batches"][0]["different"] == ["wrong"]
    assert found["batches"][0]["others"].keys() == others.keys()
    assert found["batches"][0]["others"]["by operators"]["first"]["count"] == 1


def test_another_model_in_transformers_is_wrong_and_not_timed(monkeypatch):
    pytest.importorskip("transformers")
    other = huggingface.from_dsfast(tiny_models.random_model(seed=1, **EVEN))
    monkeypatch.setattr(huggingface, "from_dsfast", lambda model: other)
    found = run_generate(tiny_models.random_model(**EVEN), [1], 3, 1, quiet)
    assert found["status"] == "wrong"
    assert "logits differ" in found["reason"]
    assert "comparison" not in found["batches"][0]


def test_a_peer_that_answers_and_cannot_generate_costs_dsfast_nothing(monkeypatch):
    pytest.importorskip("transformers")
    make = huggingface.from_dsfast

    def made(model):
        peer = make(model)
        monkeypatch.setattr(type(peer), "generate", None, raising=False)
        return peer

    monkeypatch.setattr(huggingface, "from_dsfast", made)
    found = run_generate(tiny_models.random_model(**EVEN), [1], 3, 1, quiet)
    assert found["status"] == "failed"
    assert "not callable" in found["reason"]
    assert found["batches"][0]["tokens_per_second"] > 0


def test_a_model_that_transformers_cannot_run_is_reported(monkeypatch):
    def fails(model):
        raise RuntimeError("strides should be multiple of 16 bytes")

    monkeypatch.setattr(huggingface, "missing", lambda: "")
    monkeypatch.setattr(huggingface, "from_dsfast", fails)
    found = run_generate(tiny_models.random_model(), [1], 3, 1, quiet)
    assert (found["status"], found["reason"]) == ("failed", "RuntimeError: strides should be multiple of 16 bytes")
    assert found["batches"][0]["tokens"] == 3
    assert not bench.sound(found)


# growth


def row(median: float, flops: int, parameters: int = 1000, quartile: float = 0.0) -> dict:
    """Of 100 tokens; the quartiles lie `quartile` seconds from the median."""
    taken = {"median": median, "lower": median - quartile, "upper": median + quartile, "count": 3}
    return {"seconds": taken, "flops": flops, "parameters": parameters, "tokens": 100}


def test_the_series_of_the_500k_model_end_at_its_batch_or_keep_its_tokens():
    config = default_config()
    series = growth.plan(config, None)
    assert list(series) == ["batch", "length", "experts"]
    assert [row.name for row in series["batch"]] == ["4 x 256", "8 x 256", "16 x 256", "32 x 256"]
    assert [row.name for row in series["length"]] == ["32 x 256", "16 x 512", "8 x 1024", "4 x 2048", "2 x 4096"]
    assert {row.config.model.max_position_embeddings for row in series["length"]} == {4096}
    assert [row.name for row in series["experts"]] == ["2", "4", "8", "16", "32", "64"]
    assert [row.config.model.n_routed_experts for row in series["experts"]] == [2, 4, 8, 16, 32, 64]
    assert {(row.batch, row.length) for row in series["experts"]} == {(32, 256)}
    assert {row.config.train.optimizer for rows in series.values() for row in rows} == {"adamw"}


def test_the_series_of_any_model_have_whole_rows_one_expert_a_token_and_room_for_the_longest():
    long = 5000  # a context that needs no raising
    changes = {"model.n_group": 2, "model.topk_group": 2, "model.max_position_embeddings": long}
    series = growth.plan(tiny.tiny_config(**changes), ["length", "batch", "experts", "batch"])
    assert list(series) == ["length", "batch", "experts"]
    assert [(row.batch, row.length) for row in series["batch"]] == [(1, 16), (2, 16), (4, 16), (8, 16)]
    assert {row.batch * row.length for row in series["length"]} == {4096}
    assert {row.config.model.max_position_embeddings for row in series["length"]} == {long}
    assert {row.config.model.num_experts_per_tok for row in series["experts"]} == {1}
    assert {row.config.model.n_group for row in series["experts"]} == {1}


def test_growth_is_the_time_over_the_first_rows_made_larger_by_the_flops():
    first, twice, faster = growth.judge([row(1.0, 10), row(1.5, 20), row(6.0, 40)], bandwidth=1.0)
    assert (first["growth"], first["time_ratio"], first["flops_ratio"], first["grows_faster"]) == (1, 1, 1, False)
    assert (twice["growth"], twice["time_ratio"], twice["flops_ratio"], twice["grows_faster"]) == (0.75, 1.5, 2, False)
    assert (faster["growth"], faster["time_ratio"], faster["flops_ratio"], faster["grows_faster"]) == (1.5, 6, 4, True)
    assert faster["seconds_per_token"] == 0.06


def test_growth_allows_for_the_bytes_of_further_parameters():
    bandwidth = 100.0 * growth.BYTES_PER_PARAMETER  # 100 parameters a second
    _, more = growth.judge([row(1.0, 10), row(3.0, 10, parameters=1200)], bandwidth)
    assert (more["growth"], more["grows_faster"]) == (1.0, False)
    _, slow = growth.judge([row(1.0, 10), row(3.6, 10, parameters=1200)], bandwidth)
    assert (slow["growth"], slow["grows_faster"]) == (1.2, True)
    _, noisy = growth.judge([row(1.0, 10, quartile=0.2), row(3.6, 10, 1200, quartile=0.5)], bandwidth)
    assert (noisy["growth"], noisy["grows_faster"]) == (1.2, False)  # from 3.1; the first lets expect 3.2 at most


def test_every_row_takes_an_untimed_step_first(monkeypatch):
    taken, step_of = [], growth.Trainer.step
    monkeypatch.setattr(
        growth.Trainer, "step", lambda self, *rows: (taken.append(len(rows[0])), step_of(self, *rows))[1]
    )
    monkeypatch.setattr(
        growth, "repeat", lambda steps, repeats: taken.append("timed") or [(1.0,) * len(steps)] * repeats
    )
    growth._timed(growth.plan(tiny.tiny_config(), ["batch"])["batch"][:2], repeats=1)
    assert taken == [1, 2, "timed"]


def test_a_row_is_marked_above_the_tolerance_and_where_the_quartiles_are_apart():
    def marked(median: float, quartile: float) -> bool:
        return growth.judge([row(1.0, 10, quartile=quartile), row(median, 20, quartile=quartile)], 1.0)[1][
            "grows_faster"
        ]

    assert not marked(2 * growth.TOLERANCE, 0.0)
    assert marked(2 * growth.TOLERANCE + 0.01, 0.0)
    assert marked(2.4, 0.1)  # from 2.3; the first lets expect 2.2 at most
    assert not marked(2.4, 0.2)  # from 2.2; 2.4


def test_the_parameters_a_row_has_beyond_the_first_are_those_of_its_experts():
    config = tiny.tiny_config(**{"model.moe_intermediate_size": 4})
    first, second = growth._timed(growth.plan(config, ["experts"])["experts"][:2], repeats=1)
    sparse_layers, width = 1, config.model.hidden_size
    assert second["parameters"] - first["parameters"] == sparse_layers * 2 * (3 * width * 4 + width)
    assert second["flops"] > first["flops"]  # the router's


@pytest.fixture
def small_growth(monkeypatch):
    monkeypatch.setattr(growth, "LENGTHS", (8, 32))
    monkeypatch.setattr(growth, "EXPERTS", (2, 4))


def test_growth_writes_and_shows_every_figure(config_file: Path, tmp_path: Path, capsys, monkeypatch, small_growth):
    monkeypatch.setattr(timing, "seconds", lambda call: 0.5)
    out = tmp_path / "out.json"
    assert run_command(bench.main, ["growth", "--config", str(config_file), "--repeats", "2", "--json", str(out)]) == 0
    written = json.loads(out.read_text(encoding="utf-8"))
    assert written["settings"]["series"] == ["batch", "length", "experts"]
    assert {"config", "config_hash", "repeats"} <= set(written["settings"])
    found = written["results"]
    assert {"tolerance", "bandwidth", "bytes_per_parameter", "series"} == set(found)
    assert [len(rows) for rows in found["series"].values()] == [4, 2, 2]
    for rows in found["series"].values():
        for figures in rows:
            assert figures["seconds"] == {"median": 0.5, "lower": 0.5, "upper": 0.5, "count": 2}
            assert figures["seconds_per_token"] == 0.5 / (figures["batch"] * figures["length"])
            assert not figures["grows_faster"]
    shown = capsys.readouterr().out
    assert all(
        word in shown for word in ("step by batch", "step by length", "step by experts", "1 x 16", "ns/token", "█")
    )
    assert "✗: above 1.15" in shown
    assert "grows faster" not in shown


def test_what_grows_faster_is_marked_named_and_1(config_file: Path, capsys, monkeypatch, small_growth):
    durations = iter([0.1, 0.1, 4.0, 0.1])
    monkeypatch.setattr(growth, "measure_bandwidth", lambda: 1e10)
    monkeypatch.setattr(timing, "seconds", lambda call: next(durations))
    arguments = ["growth", "--config", str(config_file), "--series", "batch", "--repeats", "1"]
    assert run_command(bench.main, arguments) == 1
    shown = capsys.readouterr().out
    assert shown.count("✗") == 2  # in its row, and in what the mark means
    assert "grows faster than its work: batch 4 x 16: 10.00" in shown
    assert "step by length" not in shown


# the command


def test_the_description_of_the_results_names_the_limits_in_the_code():
    text = (Path(__file__).parents[1] / "benchmarks" / "README.md").read_text(encoding="utf-8")
    limits = (
        f"{timing.BUDGET:.0f} seconds", f"{ceilings.LONG_ENOUGH} s", f"{growth.BYTES_PER_PARAMETER} bytes",
        f"exceeds {growth.TOLERANCE}",
    )  # fmt: skip
    assert [limit for limit in limits if limit not in " ".join(text.split())] == []


def test_step_writes_and_shows_every_figure(config_file: Path, tmp_path: Path, capsys):
    out = tmp_path / "out.json"
    arguments = ["step", "--config", str(config_file), "--batch", "2", "--length", "8", "--repeats", "2"]
    arguments += ["--peers", "eager,autocast", "--json", str(out)]
    assert run_command(bench.main, arguments) == 0
    written = json.loads(out.read_text(encoding="utf-8"))
    assert written["schema_version"] == results.SCHEMA_VERSION
    assert written["command"] == ["python", "-m", "dsfast.bench", *arguments]
    assert {"processor", "cores", "threads", "memory_gb"} <= set(written["machine"])
    assert {"versions", "commit", "native", "operators", "fallbacks", "created"} <= set(written)
    assert written["settings"] | {"config": 0, "config_hash": 0} == {
        "bench": "step", "repeats": 2, "batch": 2, "length": 8, "config": 0, "config_hash": 0, "dtype": "float32",
    }  # fmt: skip
    assert written["results"]["dsfast"]["products"] == "float32"
    assert list(written["results"]["peers"]) == ["eager", "autocast"]
    comparison = written["results"]["peers"]["eager"]["comparison"]
    assert comparison["first"]["count"] == comparison["other"]["count"] == 2
    shown = capsys.readouterr().out
    assert "\x1b" not in shown  # not a terminal: no colour
    assert "█" in shown
    assert all(word in shown for word in ("eager", "autocast", "dsfast::linear_cross_entropy", REST))
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


@pytest.mark.filterwarnings("ignore:runtime.dtype 'bfloat16' is slower here")
def test_step_in_bfloat16_meets_the_peers_loss_but_for_rounding(config_file: Path, tmp_path: Path):
    needs_bfloat16()
    out = tmp_path / "out.json"
    arguments = ["step", "--config", str(config_file), "--batch", "2", "--length", "8", "--repeats", "1"]
    assert run_command(bench.main, [*arguments, "--peers", "eager", "--dtype", "bfloat16", "--json", str(out)]) == 0
    written = json.loads(out.read_text(encoding="utf-8"))
    assert written["settings"]["dtype"] == written["results"]["dsfast"]["products"] == "bfloat16"
    eager = written["results"]["peers"]["eager"]
    assert eager["status"] == "timed"
    assert eager["first_loss"] != written["results"]["first_loss"]


def test_kernels_writes_and_shows_every_figure(tmp_path: Path, capsys, monkeypatch):
    for operator in ("rope", "swiglu_mlp"):
        monkeypatch.setitem(cases.SIZES[operator], "500k", SMALL[operator])
    out = tmp_path / "out.json"
    assert run_command(bench.main, ["kernels", "rope", "swiglu_mlp", "--repeats", "1", "--json", str(out)]) == 0
    written = json.loads(out.read_text(encoding="utf-8"))
    assert [(case["operator"], case["size"]) for case in written["results"]["cases"]] == [
        ("rope", "500k"),
        ("swiglu_mlp", "500k"),
    ]
    assert set(written["results"]["ceilings"]) == {"float32", "bfloat16", "bandwidth", "float32_size", "bfloat16_size"}
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("rope 500k", "forward+backward", "reference", "eager", "█"))


def test_what_was_not_timed_is_shown_with_the_reason():
    reporter = Reporter(Console(file=(shown := io.StringIO()), width=100))
    case = {"operator": "rope", "size": "500k", "sizes": {}, "passes": {}, "checks": {"native": "output: error 1"}}
    reporter._case(case, 20)
    results = {"status": "missing", "reason": huggingface.INSTALL, "batches": []}
    reporter._generate({"settings": {"new_tokens": 3, "repeats": 1}, "results": results})
    assert "not timed: native: output: error 1" in shown.getvalue()
    assert f"missing: transformers: {huggingface.INSTALL}" in shown.getvalue()


def test_what_was_timed_less_often_than_asked_is_named():
    reporter = Reporter(Console(file=(shown := io.StringIO()), width=120))
    reporter._fewer(20, {"dsfast against eager": 20, "dsfast against autocast": 4})
    reporter._fewer(3, {"dsfast alone": 3})
    assert shown.getvalue() == (
        "timed less often than the 20 times asked for, 30 s were over: dsfast against autocast: 4\n"
    )


def shown_rows(settings: dict, results: dict) -> list[str]:
    """The lines that a document with these is shown in, with single spaces."""
    machine = {"machine": {"processor": "one", "threads": 1}, "versions": {"torch": "2"}, "native": {"reason": "built"}}
    text = plain({**machine, "fallbacks": [], "settings": settings, "results": results})
    return [" ".join(line.split()) for line in text.splitlines()]


def test_against_shows_now_and_before_each_in_its_column():
    def side(mean_loss: float, exact: float, taught: float, heldout: float | None) -> dict:
        return {"mean_loss": mean_loss, "exact": exact, "recall": {"taught": taught, "heldout": heldout}}

    def seed(number: int, now: int, before: int, apart: dict | None) -> dict:
        peaks = {"now": now * 10**6, "before": before * 10**6}
        run = {"losses": [1.0] * 8, "fallbacks": []}
        return {"seed": number, "apart": apart, **{name: run | {"peak_memory_bytes": n} for name, n in peaks.items()}}

    times = {"first": {"median": 0.0123}, "other": {"median": 0.2468}, "median_of_ratios": 20.065, "left_out": 0}
    rows = shown_rows(
        {"bench": "against", "revision": "HEAD~1", "commit": "0123456789abcdef", "configs": {"now": 1, "before": 1}},
        {
            "timed": {"a step": {**times, "interval": [19.5, 21.25], "verdict": "faster"}},
            "learnt": {"now": side(1.25, 3.5, 0.91, 0.42), "before": side(1.5, 2, 0.87, None)},
            "seeds": [seed(5, 310, 420, {"first_step": 3, "largest": 0.0123, "at_step": 7}), seed(6, 330, 410, None)],
            "problems": [],
        },
    )
    assert "a step 12.3 247 20.065 x 19.500 .. 21.250 faster" in rows
    first = rows.index("loss of the last steps 1.2500 1.5000")
    assert rows[first + 1 : first + 5] == [
        "recall, taught phrasings 91.0% 87.0%",
        "recall, heldout phrasings 42.0% -",
        "prompts answered 3.5 2",
        "peak memory, MB 330 420",
    ]
    assert "Losses of seed 5, 8 steps: apart from step 3 on, by at most 1.23%, at step 7." in rows
    assert "Losses of seed 6, 8 steps: the same bits at every step." in rows


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["kernels", "rop"], "unknown operator 'rop'; known: adamw, embedding"),
        (["kernels", "--size", "7m"], "argument --size: invalid choice: '7m'"),
        (["step", "--peers", "eager,jax"], "unknown peer 'jax'; known: autocast, compile, eager, transformers"),
        (["step", "--repeats", "0"], "argument --repeats: expected a whole number from 1 to 999999, got '0'"),
        (["step", "--batch", "1000000"], "argument --batch: expected a whole number from 1 to 999999, got '1000000'"),
        (["step", "--length", "257"], "--length: expected at most model.max_position_embeddings 256, got 257"),
        (["step", "--config", "/no/such.json"], "/no/such.json: cannot be read"),
        (["step", "--json", "/no/such/folder/out.json"], "--json /no/such/folder/out.json: cannot be written"),
        (["kernels", "--json", "/"], "--json /: expected a file, this is a folder"),
        (["kernels", "--json", "/proc/out.json"], "--json /proc/out.json: cannot be written"),
        (["growth", "--series", "batch,width"], "unknown series 'width'; known: batch, experts, length"),
        (["growth", "--series", ""], "unknown series ''; known: batch, experts, length"),
        (["growth", "--config", "/no/such.json"], "/no/such.json: cannot be read"),
        (["generate", "--new-tokens", "250"], "--new-tokens: expected at most 248"),
        (["generate", "--batch", "1,0"], "argument --batch: expected a whole number from 1 to 999999, got '0'"),
        (["generate", "--checkpoint", "/no/such"], "/no/such: no such folder"),
        (["train"], "invalid choice: 'train'"),
        ([], "the following arguments are required"),
    ],
)
def test_bad_input_is_one_line_and_2_before_anything_is_timed(arguments, complaint, capsys, monkeypatch):
    def timed(*arguments, **options):
        pytest.fail("timed something")

    monkeypatch.setattr(timing, "seconds", timed)
    assert run_command(bench.main, arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    assert complaint in line


def test_what_the_peers_cannot_do_is_refused():
    with pytest.raises(UserError, match="the peers and the count of FLOPs have no MTP"):
        comparable(tiny.tiny_config(**{"model.num_nextn_predict_layers": 1}))


def test_step_is_for_the_cpu():
    with pytest.raises(UserError, match="got 'cuda'; a GPU is timed by `bench gpu`"):
        step.run_step(tiny.tiny_config(**{"runtime.device": "cuda"}), 2, 8, 1, {}, False, quiet)


# learning


def test_learning_holds_every_seed_to_plain_pytorch(tmp_path: Path, capsys):
    config, out = tiny.write_text_run(tmp_path), tmp_path / "out.json"
    arguments = ["learning", "--seeds", "2", "--config", str(config), "--json", str(out)]
    assert run_command(bench.main, arguments) == 0
    found = json.loads(out.read_text(encoding="utf-8"))["results"]
    assert found["status"] == "right"
    assert [row["seed"] for row in found["seeds"]] == [0, 1]
    for row in found["seeds"]:
        settings = {"seed": row["seed"], "runtime.kernels": {"default": "reference"}}
        alone = Trainer(load_config(config).replace(**settings)).train(quiet=True)
        assert row["reference"]["loss"] == alone.final_loss
        assert row["reference"]["recall"] == {"taught": None, "heldout": None}
        assert row["difference"] == row["dsfast"]["mean_loss"] / row["reference"]["mean_loss"] - 1
    ours, reference = (sum(row[name]["mean_loss"] for row in found["seeds"]) for name in ("dsfast", "reference"))
    assert found["difference"] == pytest.approx(ours / reference - 1, abs=1e-12)
    assert found["seeds"][0]["reference"]["loss"] != found["seeds"][1]["reference"]["loss"]
    assert "plain PyTorch in float32" in capsys.readouterr().out


def test_learning_shows_dsfast_and_plain_pytorch_each_in_its_column():
    def run(loss: float, mean_loss: float, taught: float, heldout: float, seconds: float) -> dict:
        recall = {"taught": {"fraction": taught}, "heldout": {"fraction": heldout}}
        return {"loss": loss, "mean_loss": mean_loss, "recall": recall, "seconds": seconds, "products": "float32"}

    row = {"seed": 7, "dsfast": run(2.5, 2.625, 0.91, 0.42, 12.3), "reference": run(2.25, 2.375, 0.87, 0.38, 45.6)}
    rows = shown_rows(
        {"bench": "learning", "config": {"train": {"steps": 8}}},
        {"tolerance": 0.005, "seeds": [row | {"difference": 0.1111}], "difference": 0.1111, "problems": []},
    )
    assert "7 2.5000 2.2500 2.6250 2.3750 +11.11% 91.0% 87.0% 42.0% 38.0% 12.3 45.6" in rows


@pytest.mark.parametrize("loss", [1.03, 0.97, float("nan")])
def test_learning_that_ends_elsewhere_with_one_seed_is_an_error(loss, tmp_path: Path, capsys, monkeypatch):
    right = learning._run

    def worse(config):
        run = right(config)
        return run if config.runtime.kernels or not config.seed else run | {"mean_loss": run["mean_loss"] * loss}

    monkeypatch.setattr(learning, "_run", worse)
    config = tiny.write_text_run(tmp_path)
    assert run_command(bench.main, ["learning", "--seeds", "2", "--config", str(config)]) == 1
    shown = capsys.readouterr().out
    assert "✗ seed 1: the mean loss of the last 10 steps differs by" in shown
    assert "✗ seed 0" not in shown


def learnt(seed: int, loss: float, heldout: float | None) -> dict:
    recall = {"taught": {"fraction": 0.9}, "heldout": None if heldout is None else {"fraction": heldout}}
    return {"seed": seed, "loss": loss, "mean_loss": loss, "seconds": 1.0, "products": "float32", "recall": recall}


@pytest.mark.parametrize(
    ("ours", "said"),
    [
        ([(1.01, 0.4), (0.99, 0.4)], []),  # what roundings do to one seed's loss is not a difference over the seeds
        ([(1.009, 0.4), (1.003, 0.4)], ["the mean loss of the last 10 steps differs by +0.60% over the seeds"]),
        ([(0.991, 0.4), (0.997, 0.4)], ["the mean loss of the last 10 steps differs by -0.60% over the seeds"]),
        ([(1.0, 0.30), (1.0, 0.39)], ["recall in heldout phrasings is 34.5%, in plain PyTorch 40.0%"]),
        ([(1.0, 0.30), (1.0, 0.41)], []),
        ([(1.0, 0.6), (1.0, 0.6)], []),
        ([(1.0, None), (1.0, 0.1)], []),
    ],
)
def test_what_is_learnt_is_held_to_plain_pytorch_over_all_seeds(ours, said, monkeypatch):
    def run(config):
        return learnt(config.seed, *((1.0, 0.4) if config.runtime.kernels else ours[config.seed]))

    monkeypatch.setattr(learning, "_run", run)
    found = learning.run_learning(tiny.tiny_config(), range(2), quiet)
    assert found["problems"] == said
    assert found["status"] == ("wrong" if said else "right")


def test_questions_that_do_not_fit_are_noticed_before_the_training(tmp_path: Path, capsys, monkeypatch):
    def too_long(*arguments):
        raise UserError("a question is too long")

    monkeypatch.setattr(learning, "check_taught", too_long)
    monkeypatch.setattr(learning.Trainer, "train", lambda self, quiet: pytest.fail("it trains"))
    assert run_command(bench.main, ["learning", "--config", str(tiny.write_text_run(tmp_path))]) == 2
    assert "a question is too long" in capsys.readouterr().err


def test_the_mean_loss_is_that_of_the_last_steps(tmp_path: Path, monkeypatch):
    losses = [*[9.0] * 5, *[2.0] * (learning.LAST - 1), 1.0]
    result = SimpleNamespace(final_loss=1.0, losses=losses, seconds=0.5)
    monkeypatch.setattr(learning.Trainer, "train", lambda self, quiet: result)
    monkeypatch.setattr(learning, "measure_taught", lambda *arguments: {})
    monkeypatch.setattr(learning, "as_json", lambda recall: recall)
    run = learning._run(load_config(tiny.write_text_run(tmp_path)))
    assert run["mean_loss"] == pytest.approx(2 - 1 / learning.LAST)


def test_a_run_whose_losses_become_no_numbers_is_wrong_and_says_so(tmp_path: Path, capsys, monkeypatch):
    config = tiny.write_text_run(tmp_path, **{"train.max_bad_steps": 2})
    monkeypatch.setattr(Gradients, "__call__", lambda self, *batch: float("nan"))
    arguments = ["learning", "--seeds", "1", "--config", str(config), "--json", str(tmp_path / "found.json")]
    assert run_command(bench.main, arguments) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "✗ seed 0: dsfast: step 2: 2 steps in a row were not finite" in said
    found = json.loads((tmp_path / "found.json").read_text())["results"]
    assert found["status"] == "wrong"
    assert found["seeds"][0]["dsfast"]["loss"] is None
