"""The loop: one step by hand, determinism, bad numbers, signals, what is printed, what is written, the command."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import subprocess
import sys
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from operator_cases import needs_native
from tiny import VOCABULARY, tiny_config, tiny_dataset, write_text_run
from tokenizers import Tokenizer, models

from dsfast import ops
from dsfast.command import run_command
from dsfast.config import load_config
from dsfast.data import PackedRows, train_tokenizer
from dsfast.data.tokenizer import tokenizer_hash
from dsfast.errors import UserError
from dsfast.model import DeepseekV3, precision_of
from dsfast.ops import native
from dsfast.suite import __main__ as suite
from dsfast.train import Interrupted, Trainer, TrainingError, TrainResult, build_optimizer, load_checkpoint
from dsfast.train.__main__ import main
from dsfast.train.interrupt import StopSignals
from dsfast.train.metrics import MetricsFile, experts_used, read_metrics
from dsfast.train.optimizer import learning_rate_scale
from dsfast.train.progress import TrainingProgress
from dsfast.train.runtime import peak_memory_bytes


def tiny_trainer(output_dir=None, **changes) -> Trainer:
    return Trainer(tiny_config(**changes), output_dir, tiny_dataset())


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def test_train_batch_is_the_step_written_out():
    """Two steps against forward, backward, clip, optimizer and router bias written down one after the other."""
    changes = {"train.grad_clip": 0.5, "model.num_nextn_predict_layers": 1, "train.mtp_loss_weight": 0.7}
    trainer, other = tiny_trainer(**changes), tiny_trainer(**changes)
    assert same(weights(trainer), weights(other))
    model, train = other.model, other.config.train
    optimizer = build_optimizer(model, train)
    for step in range(2):
        batch = other.dataset.rows.batch(step, 3)
        report = trainer.train_batch(batch)
        model.zero_grad()
        loss = model.loss(batch.input_ids, batch.labels, batch.positions, batch.cu_seqlens, mtp_loss_weight=0.7)
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.cat([g.double().flatten() for g in gradients]))
        torch._foreach_mul_(gradients, 0.5 / norm.item())  # not clip_grad_norm_, which divides by norm + 1e-6
        optimizer.step(learning_rate_scale(step, train))
        biases = [router.e_score_correction_bias.clone() for router in model.routers()]
        model.update_router_bias(train.bias_update_speed)
        assert any(not torch.equal(b, r.e_score_correction_bias) for b, r in zip(biases, model.routers(), strict=True))
        assert (report.step, report.loss, report.tokens) == (step + 1, loss.item(), 48)
        assert report.grad_norm == pytest.approx(norm.item(), rel=1e-5)
        assert norm > 0.5, "the clip must have something to do"
        assert report.lr == train.learning_rate * learning_rate_scale(step, train)
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(trainer.model.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)


def test_step_on_rows_of_ones_own_learns_them():
    trainer = Trainer(tiny_config(**{"train.steps": 60}))  # no data set is built for this
    tokens = torch.randint(3, VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(0))
    input_ids, labels = tokens[:, :-1], tokens[:, 1:]
    expected = trainer.model.loss(input_ids, labels).item()
    losses = [trainer.step(input_ids, labels) for _ in range(60)]
    assert losses[0] == pytest.approx(expected, rel=1e-6)  # operators there, one native call here
    assert losses[-1] < 0.5 * losses[0]
    assert trainer.steps_done == 60


def test_a_step_is_in_training_mode():
    trainer, batch = tiny_trainer(), tiny_dataset().rows.batch(0, 3)
    trainer.model.eval()
    trainer.step(batch.input_ids, batch.labels)
    assert trainer.model.training
    assert [router.load.sum().item() for router in trainer.model.routers()] == [48 * 2]


@pytest.mark.parametrize("whole_step", [True, False])
def test_a_step_makes_gradients_where_the_caller_wants_none(whole_step):
    batch, changes = tiny_dataset().rows.batch(0, 3), {"runtime.whole_step": whole_step}
    expected, trainer = tiny_trainer(**changes), tiny_trainer(**changes)
    expected.step(batch.input_ids, batch.labels)
    with torch.no_grad():
        trainer.step(batch.input_ids, batch.labels)
        assert not torch.is_grad_enabled()
    assert all(map(torch.equal, trainer.model.parameters(), expected.model.parameters()))


@pytest.mark.parametrize("whole_step", [True, False])
def test_training_in_inference_mode_is_as_without(whole_step, tmp_path):
    """Rows made in it, a trainer made in it, and one made before; whole runs, single steps and a run that goes on."""
    changes = {"runtime.whole_step": whole_step, "train.steps": 4}
    rows = tiny_dataset().rows.batch(0, 3)
    expected, before = tiny_trainer(**changes), tiny_trainer(tmp_path / "run", **changes)
    expected.step(rows.input_ids, rows.labels)
    expected.train(quiet=True)
    with torch.inference_mode():
        made_in_it = tiny_trainer(**changes)
        for trainer in (before, made_in_it):
            trainer.step(rows.input_ids.clone(), rows.labels.clone())
            trainer.train(quiet=True)
            assert torch.is_inference_mode_enabled()
            assert same(weights(trainer), weights(expected))
        further = tiny_trainer(tmp_path / "run", **changes | {"train.steps": 6})
        assert further.train(resume=tmp_path / "run", quiet=True).steps == 6
    made_in_it.step(rows.input_ids, rows.labels)
    model = DeepseekV3(tiny_config().model)
    with torch.inference_mode():
        assert Trainer(tiny_config(), model=model).step(rows.input_ids, rows.labels) > 0
        model = DeepseekV3(tiny_config().model)
    with pytest.raises(
        UserError, match=r"^model: embed_tokens\.weight was made under torch\.inference_mode; expected "
    ):
        Trainer(tiny_config(), model=model)


@pytest.mark.parametrize("whole_step", [True, False])
def test_a_model_whose_layers_are_all_dense_is_trained(whole_step, tmp_path):
    changes = {"model.first_k_dense_replace": 2, "runtime.whole_step": whole_step}
    trainer, batch = tiny_trainer(tmp_path / "run", **changes), tiny_dataset().rows.batch(0, 3)
    losses = [trainer.train_batch(batch).loss for _ in range(7)]
    assert losses[-1] < losses[0] - 0.1
    assert trainer.train(quiet=True).experts_used == []
    assert [line["expert_load"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [[]] * 3


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_same_seed_same_bits_other_seed_other_weights(kind):
    changes = {"train.optimizer": kind}
    runs = [tiny_trainer(**changes, seed=seed) for seed in (4, 4, 5)]
    losses = [trainer.train(quiet=True).losses for trainer in runs]
    assert losses[0] == losses[1]
    assert same(weights(runs[0]), weights(runs[1]))
    assert not same(weights(runs[0]), weights(runs[2]))


WHOLE_STEPS = """
import hashlib, sys
import torch
from dsfast import Trainer, load_config, ops
trainer = Trainer(load_config(sys.argv[1]).replace(**{"runtime.threads": int(sys.argv[2])}))
tokens = torch.randint(3, 8000, (8, 257), generator=torch.Generator().manual_seed(0))
losses = [trainer.step(tokens[:, :-1], tokens[:, 1:]) for _ in range(3)]
state = {**trainer.model.state_dict(), **trainer.optimizer.state_dict()}
bits = hashlib.sha256(b"".join(state[name].numpy().tobytes() for name in sorted(state))).hexdigest()
print(torch.get_num_threads(), ops.fallbacks(), losses, bits)
"""


def whole_steps(threads: int) -> str:
    """What a process of its own prints of three steps of the 500K model; runtime.threads alone says how many threads."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    config = Path(__file__).parents[1] / "configs" / "deepseek_v3_test_run_cpu.json"
    line = [sys.executable, "-c", WHOLE_STEPS, str(config), str(threads)]
    run = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_same_bits_with_two_threads_in_two_processes():
    needs_native()
    first, again, one = whole_steps(2), whole_steps(2), whole_steps(1)
    assert first.startswith("2 [] [")
    assert first == again
    assert first.split()[-1] != one.split()[-1], "two threads add up in another order than one: else nothing was shared"


def test_result_metrics_and_folder(tmp_path, capsys):
    trainer = tiny_trainer(tmp_path / "new" / "run", **{"train.checkpoint_every": 4})
    result = trainer.train()
    folder = tmp_path / "new" / "run"
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "metrics.jsonl", "step-000004", "step-000008", "step-000010"
    ]  # fmt: skip
    assert load_config(folder / "config.json") == trainer.config
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert [line["loss"] for line in lines] == result.losses
    scales = [learning_rate_scale(step, trainer.config.train) for step in range(10)]
    assert [line["lr"] for line in lines] == [trainer.config.train.learning_rate * scale for scale in scales]
    for line in lines:
        assert line["grad_norm"] > 0
        assert line["tokens_per_second"] == pytest.approx(48 / line["seconds"])
        assert [len(shares) for shares in line["expert_load"]] == [4]
        assert sum(line["expert_load"][0]) == pytest.approx(1)
    last = trainer.model.routers()[0].load / (48 * 2)
    assert lines[-1]["expert_load"] == [pytest.approx(last.tolist())]
    assert last.tolist() != last.flip(0).tolist()
    assert result.experts_used == [pytest.approx(1 / float(last.square().sum()))]
    assert (result.steps, result.skipped_steps, result.final_loss) == (10, 0, result.losses[-1])
    assert result.checkpoint == folder / "step-000010"
    assert result.tokens_per_second == pytest.approx(480 / result.seconds)
    assert 2**24 < result.peak_memory_bytes < 2**36
    model, _, config = load_checkpoint(folder)
    assert same(model.state_dict(), weights(trainer))
    assert config == trainer.config
    printed = capsys.readouterr().out.splitlines()
    assert [line.partition("  loss ")[0] for line in printed] == ["step  5/10", "step 10/10"]
    assert f"loss {result.final_loss:.4f}" in printed[-1]
    for word in ("lr ", " tokens/s", " left"):
        assert word in printed[-1]


def test_the_result_tells_the_most_memory_that_the_device_held(monkeypatch):
    monkeypatch.setattr("dsfast.train.loop.peak_memory_bytes", lambda device: {"cpu": 12345}[device.type])
    assert tiny_trainer().train(quiet=True).peak_memory_bytes == 12345


def test_the_most_memory_is_the_processs_peak_or_what_torch_has_taken_of_a_gpu(monkeypatch):
    status = "VmPeak:\t    9000 kB\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n"
    monkeypatch.setattr(Path, "read_text", lambda path: {"/proc/self/status": status}[str(path)])
    assert peak_memory_bytes(torch.device("cpu")) == 2 * 2**20
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: {"cuda": 12345}[device.type])
    assert peak_memory_bytes(torch.device("cuda")) == 12345


def test_the_time_left_goes_by_the_steps_of_this_run():
    progress = TrainingProgress(5, 10, 1)
    assert progress.line(7, 1.0, 1e-3, 100.0, progress.started + 4.0).endswith("  0:06 left")


def test_without_a_folder_nothing_is_written_and_quiet_is_quiet(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert tiny_trainer().train(quiet=True).checkpoint is None
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


def test_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    tiny_trainer().train()
    printed = capsys.readouterr().out
    assert "━" in printed
    assert "step 10/10" in printed


def test_poisoned_step_is_skipped_and_counted(tmp_path):
    """At steps 3 and 4 one gradient is NaN, at step 6 infinite: weights, moments and biases stay as they are."""
    trainer = tiny_trainer(tmp_path / "run", **{"train.max_bad_steps": 3})
    target = dict(trainer.model.named_parameters())["layers.1.self_attn.o_proj.weight"]
    bad = {2: math.nan, 3: math.nan, 5: math.inf}
    target.register_hook(lambda grad: grad * bad.get(trainer.steps_done, 1.0))
    seen = []
    train_batch = trainer.train_batch

    def watched(batch):
        before, state = weights(trainer), {n: t.clone() for n, t in trainer.optimizer.state_dict().items()}
        report = train_batch(batch)
        unchanged = same(before, weights(trainer)) and same(state, trainer.optimizer.state_dict())
        seen.append((report.step, report.skipped, unchanged, trainer.bad_steps))
        return report

    trainer.train_batch = watched
    result = trainer.train(quiet=True)
    expected = {3: (True, True, 1), 4: (True, True, 2), 6: (True, True, 1)}
    assert seen == [(step, *expected.get(step, (False, False, 0))) for step in range(1, 11)]
    assert result.skipped_steps == 3
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["skipped"]] == [3, 4, 6]
    assert lines[2]["grad_norm"] is None
    assert not any(tensor.isnan().any() for tensor in weights(trainer).values())


def test_too_many_bad_steps_name_step_and_gradient():
    trainer = tiny_trainer(**{"train.max_bad_steps": 2})
    target = dict(trainer.model.named_parameters())["layers.1.mlp.experts.down_proj"]
    target.register_hook(lambda grad: grad * (math.inf if trainer.steps_done >= 4 else 1))
    with pytest.raises(TrainingError, match=r"step 6: 2 steps in a row .*gradient of 'layers.1.mlp.experts.down_proj'"):
        trainer.train(quiet=True)


def test_a_parameter_that_is_not_finite_is_named_before_its_gradients():
    trainer = tiny_trainer(**{"train.max_bad_steps": 1})
    with torch.no_grad():
        dict(trainer.model.named_parameters())["layers.1.self_attn.kv_b_proj.weight"][0, 0] = math.nan
    with pytest.raises(TrainingError, match=r"step 1: .*first tensor: parameter 'layers.1.self_attn.kv_b_proj"):
        trainer.train(quiet=True)


@pytest.mark.parametrize(("loss", "first"), [(math.inf, "the loss"), (1.0, "the norm of all gradients together")])
def test_what_is_not_finite_while_all_tensors_are_is_named(loss, first):
    trainer = tiny_trainer(**{"train.max_bad_steps": 1})
    trainer.train_batch(tiny_dataset().rows.batch(0, 3))
    with pytest.raises(TrainingError, match=rf"step 2: .*; loss {loss}, first tensor: {first}$"):
        trainer.count_step(loss, math.inf, 1.0, skipped=True, tokens=48, seconds=1.0)


class SignallingRows(PackedRows):
    """Rows that send this process a signal while the batch of step 3 is fetched."""

    def batch(self, step, batch_size):
        if step == 3:
            os.kill(os.getpid(), self.number)
        return super().batch(step, batch_size)


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signal_finishes_the_step_saves_and_restores_the_handlers(tmp_path, number, code):
    data = tiny_dataset()
    rows = SignallingRows(data.rows.stream, data.rows.sequence_length, data.rows.seed)
    object.__setattr__(rows, "number", number)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    trainer = Trainer(tiny_config(), tmp_path / "run", replace(data, rows=rows))
    with pytest.raises(Interrupted, match=r"stopped after step 4 of 10; saved as .*step-000004") as stop:
        trainer.train(quiet=True)
    assert stop.value.exit_code == code
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    model, _, _ = load_checkpoint(tmp_path / "run")
    assert same(model.state_dict(), weights(trainer))
    trainer = Trainer(tiny_config(), None, replace(data, rows=rows))
    with pytest.raises(Interrupted, match="nothing was saved"):
        trainer.train(quiet=True)


@pytest.mark.usefixtures("terminal")
def test_a_signal_before_the_first_step_saves_nothing(tmp_path):
    trainer = tiny_trainer(tmp_path / "run")
    steps = trainer.steps
    trainer.steps = lambda: os.kill(os.getpid(), signal.SIGTERM) or steps()
    with pytest.raises(Interrupted, match="stopped after step 0 of 10; nothing was saved"):
        trainer.train(quiet=True)
    assert not list((tmp_path / "run").glob("step-*"))


def test_a_signal_that_is_ignored_stays_ignored():
    """As a closed terminal is under nohup."""
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
        assert signals.received is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, former)


def test_a_model_of_ones_own_is_trained_on(tmp_path):
    model = DeepseekV3(tiny_config().model)
    before = copy.deepcopy(model.state_dict())
    trainer = Trainer(tiny_config(), tmp_path / "run", tiny_dataset(), model)
    assert trainer.model is model
    trainer.train(quiet=True)
    saved, _, _ = load_checkpoint(tmp_path / "run")
    assert same(saved.state_dict(), model.state_dict())
    assert not same(saved.state_dict(), before)
    with pytest.raises(AttributeError):
        trainer.model = DeepseekV3(tiny_config().model)


def test_a_model_is_trained_on_with_its_own_tokenizer(tmp_path, monkeypatch):
    """Another text's would give other words the same numbers."""
    monkeypatch.setenv("DSFAST_CACHE", str(tmp_path / "cache"))
    config = load_config(write_text_run(tmp_path, **{"train.steps": 20}))
    Trainer(config, tmp_path / "run").train(quiet=True)
    model, tokenizer, _ = load_checkpoint(tmp_path / "run")
    text = tmp_path / "text.txt"
    text.write_text("jig hag bad cafe " * 300 + "\n\n" + text.read_text(encoding="utf-8"), encoding="utf-8")
    on = Trainer(config, model=model, tokenizer=tokenizer)
    begin = on.dataset.rows.stream[:9].tolist()
    assert tokenizer.decode(begin).strip().startswith("jig hag")
    assert tokenizer_hash(on.dataset.tokenizer) == tokenizer_hash(tokenizer)
    other = Trainer(config, model=model)
    assert not tokenizer.decode(other.dataset.rows.stream[:9].tolist()).strip().startswith("jig hag")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tokenizer: None, None),
        (lambda tokenizer: "tokenizer.json", "expected a tokenizers.Tokenizer, got str$"),
        (
            lambda tokenizer: Tokenizer(models.BPE()),
            r"expected <\|bos\|>, <\|eos\|>, <\|pad\|> as its first tokens, .* got \(None, ",
        ),
        (lambda tokenizer: tokenizer.add_tokens(["one more"]) and tokenizer, "expected at most 300 tokens .* got 301$"),
    ],
)
def test_a_tokenizer_that_the_model_does_not_know_is_refused(change, message, tmp_path):
    texts = [" ".join(f"{a}{b}" for a in "abcdefghij" for b in "klmnopqrst") for _ in range(3)]
    config = tiny_config(**{"model.vocab_size": 300})
    tokenizer = change(train_tokenizer(texts, 300))
    with nullcontext() if message is None else pytest.raises(UserError, match=f"^tokenizer: {message}"):
        Trainer(config, tokenizer=tokenizer)


def test_a_model_that_no_memory_here_can_hold_is_one_line():
    """Not an allocation that succeeds, and a process that is killed when it uses it."""
    config = tiny_config(**{"model.n_routed_experts": 2**16, "model.moe_intermediate_size": 2**16})
    line = r"^model: [\d,]+ parameters and \d+ positions take at least [\d.,]+ GB to train; this machine has [\d.,]+$"
    with pytest.raises(UserError, match=line):
        Trainer(config)


def test_memory_is_to_hold_weights_gradients_a_moment_and_the_table_of_angles(monkeypatch):
    config = tiny_config()
    matrices = sum(p.numel() for p in DeepseekV3(config.model).parameters() if p.ndim > 1)
    needed = 4 * (3 * matrices + 32 * 4)
    memory = {"SC_PAGE_SIZE": 4, "SC_PHYS_PAGES": needed // 4}
    monkeypatch.setattr(os, "sysconf", memory.get)
    Trainer(config)
    memory["SC_PHYS_PAGES"] -= 1
    with pytest.raises(UserError, match=rf"^model: {matrices:,} parameters and 32 positions take at least"):
        Trainer(config)


def test_a_wrapped_module_is_trained_too():
    model = DeepseekV3(tiny_config().model)
    layer = model.layers[1].self_attn
    width = layer.o_proj.out_features
    layer.o_proj = torch.nn.Sequential(layer.o_proj, torch.nn.Linear(width, width))
    with pytest.warns(
        ops.FallbackWarning, match=r"module 'layers\.1\.self_attn\.o_proj' is not dsfast's own, or has hooks"
    ):
        trainer = Trainer(tiny_config(), None, tiny_dataset(), model)
    before = layer.o_proj[1].weight.clone()
    losses = [trainer.train_batch(tiny_dataset().rows.batch(0, 3)).loss for _ in range(8)]
    assert losses[-1] < losses[0]
    assert not torch.equal(layer.o_proj[1].weight, before)


def one_for_two(config) -> DeepseekV3:
    model = DeepseekV3(config.model)
    model.layers[1].self_attn.q_proj.weight = model.layers[0].self_attn.q_proj.weight
    return model


OTHERS = {
    r"but layers.0.self_attn.q_proj.weight and layers.1.self_attn.q_proj.weight are one$": one_for_two(tiny_config()),
    "expected a DeepseekV3, got Linear": torch.nn.Linear(1, 1),
    "got one with another kv_lora_rank$": DeepseekV3(tiny_config(**{"model.kv_lora_rank": 4}).model),
    "expected weights in float32, got .* in float16": DeepseekV3(tiny_config().model).half(),
    "but embed_tokens.weight does not require a gradient": DeepseekV3(tiny_config().model).requires_grad_(False),
}


@pytest.mark.parametrize("message", OTHERS)
def test_a_model_that_the_config_does_not_describe_is_refused(message):
    with pytest.raises(UserError, match=f"^model: .*{message}"):
        Trainer(tiny_config(), model=OTHERS[message])


def test_a_path_is_no_config():
    with pytest.raises(UserError, match="config: expected a Config, as load_config returns, got str"):
        Trainer("config.json")
    with pytest.raises(UserError, match=r"DeepseekV3: expected a ModelConfig, such as config\.model, got Config"):
        DeepseekV3(tiny_config())


def test_signal_while_a_checkpoint_is_written(tmp_path):
    trainer = tiny_trainer(tmp_path / "run", **{"train.checkpoint_every": 4})
    save = trainer.save

    def save_and_signal():
        os.kill(os.getpid(), signal.SIGTERM)
        return save()

    trainer.save = save_and_signal
    with pytest.raises(Interrupted, match=r"stopped after step 4 of 10; saved as .*step-000004"):
        trainer.train(quiet=True)
    assert [path.name for path in (tmp_path / "run").glob("step-*")] == ["step-000004"]


def test_output_folder_rules(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"full: expected a new or empty folder, found 'notes.txt'"):
        tiny_trainer(tmp_path / "full").train(quiet=True)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]
    for folder in (tmp_path / "full" / "notes.txt", tmp_path / "full" / "notes.txt" / "run"):
        with pytest.raises(UserError, match=r"cannot be used as output folder"):
            tiny_trainer(folder).train(quiet=True)
    (tmp_path / "empty").mkdir()
    tiny_trainer(tmp_path / "empty").train(quiet=True)


@pytest.mark.parametrize("use", [Trainer.train, Trainer.save])
def test_an_output_folder_that_cannot_be(use):
    with pytest.raises(UserError, match=r"^'a\\x00b': no file can have this name$"):
        use(tiny_trainer("a\0b"))


def test_too_little_data_leaves_no_folder(tmp_path):
    with pytest.raises(UserError, match="too few articles for one batch"):
        tiny_trainer(tmp_path / "run", **{"train.batch_size": 99}).train(quiet=True)
    assert not (tmp_path / "run").exists()


def test_runtime_is_applied():
    before = torch.get_num_threads()
    try:
        trainer = tiny_trainer(**{"runtime.threads": 2, "runtime.kernels": {"rms_norm": "reference"}})
        assert torch.get_num_threads() == 2
        with trainer.kernels():
            row = next(row for row in ops.report("cpu") if row["operator"] == "rms_norm")
        assert (row["implementation"], row["reason"]) == ("reference", "asked for")
    finally:
        torch.set_num_threads(before)


def test_freed_memory_is_kept_from_the_first_step_on(monkeypatch):
    kept = []
    needs_native()
    monkeypatch.setattr(native.module(), "keep_freed_memory", lambda: kept.append(True))
    tiny_trainer()
    assert kept


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_without_a_gpu():
    with pytest.raises(UserError, match=r"runtime.device is 'cuda', but torch finds no GPU"):
        tiny_trainer(**{"runtime.device": "cuda", "runtime.dtype": "bfloat16"})


def test_a_run_that_learnt_nothing_is_an_error_that_says_so(tmp_path, monkeypatch, capsys):
    """Too short for `max_bad_steps`; what there is is saved."""
    monkeypatch.setenv("DSFAST_CACHE", str(tmp_path / "cache"))

    def broken(*arguments):
        trainer = Trainer(*arguments)
        torch.nn.init.constant_(trainer.model.norm.weight, math.nan)
        return trainer

    monkeypatch.setattr("dsfast.train.__main__.Trainer", broken)
    config = write_text_run(tmp_path, **{"train.steps": 3})
    arguments = ["--config", str(config), "--output-dir", str(tmp_path / "run")]
    assert run_command(main, arguments) == 2
    output = capsys.readouterr()
    assert "3 steps skipped; checkpoint" in output.out
    assert output.err.startswith(
        "error: nothing was learnt: 3 of 3 steps were skipped, their loss or gradients not finite"
    )
    assert output.err.count("\n") == 1


def test_a_last_loss_that_is_not_finite_is_an_error(tmp_path, monkeypatch):
    losses = [6.0, 5.0, math.nan]
    result = TrainResult(3, math.nan, 1.0, None, None, 144.0, 2**30, 1, tmp_path / "run", [], losses)
    monkeypatch.setattr("dsfast.train.__main__.Trainer", lambda *given: SimpleNamespace(train=lambda resume: result))
    with pytest.raises(
        TrainingError, match=r"^nothing was learnt: 1 of 3 steps were skipped, .* the last loss is nan;"
    ):
        main(["--config", str(write_text_run(tmp_path)), "--output-dir", str(tmp_path / "run")])


@pytest.mark.parametrize(
    ("load", "used"),
    [((8, 8, 8, 8), 4.0), ((0, 32, 0, 0), 1.0), ((0, 16, 16, 0), 2.0), ((3, 1), 1.6), ((0, 0, 0), 0.0)],
)
def test_experts_are_used_as_evenly_as_so_many(load, used):
    assert experts_used(torch.tensor(load)) == used


@pytest.mark.parametrize(("used", "warned"), [([2.0, 1.21], False), ([2.0, 1.19], True), ([], False)])
def test_a_router_that_uses_few_experts_is_told_of(used, warned, tmp_path, monkeypatch, capsys):
    result = TrainResult(1, 5.0, 1.0, None, None, 144.0, 2**30, 0, tmp_path / "run", used, [5.0])
    monkeypatch.setattr("dsfast.train.__main__.Trainer", lambda *given: SimpleNamespace(train=lambda resume: result))
    config = write_text_run(tmp_path, **{"model.n_routed_experts": 2, "train.bias_update_speed": 0.002})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert run_command(main, ["--config", str(config), "--output-dir", str(tmp_path / "run")]) == 0
    assert ("experts used 2.0, 1.2 of 2; checkpoint" in capsys.readouterr().out) == bool(used)
    expected = (
        "the last step's tokens met 2 experts as unevenly as if there were 1.2 (1 / the sum of squared shares); a "
        "train.bias_update_speed above 0.002 evens that out sooner"
    )
    assert [str(warning.message) for warning in said] == [expected] * warned


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DSFAST_CACHE", str(tmp_path / "cache"))
    config = write_text_run(tmp_path)
    arguments = ["--config", str(config), "--output-dir", str(tmp_path / "run"), "--seed", "7", "--steps", "4"]
    assert main(arguments) == 0
    assert "trained to step 4 in" in capsys.readouterr().out.splitlines()[-1]
    saved = load_config(tmp_path / "run" / "config.json")
    assert (saved.seed, saved.train.steps) == (7, 4)
    with pytest.raises(UserError, match=r"found 'config.json' in it"):
        main(arguments)
    with pytest.raises(UserError, match=r"train.steps: expected more than the 4 done already, got 4"):
        main([*arguments, "--resume"])
    (tmp_path / "run" / "step-000005").mkdir()
    with (
        pytest.warns(UserWarning, match=r"step-000005 has no manifest\.json and is passed over") as warned,
        pytest.raises(UserError, match="run: holds step-000005, later than step 4 to resume from"),
    ):
        main([*arguments[2:4], "--resume", "--steps", "5"])  # at whose end it could not be saved
    assert len(warned) == 1
    with pytest.raises(UserError, match="expected --config FILE"):
        main(["--output-dir", str(tmp_path / "other")])
    with pytest.raises(UserError, match="output-dir"):
        main(["--config", str(config)])
    with pytest.raises(UserError, match=r"absent.json: cannot be read"):
        main(["--config", str(tmp_path / "absent.json"), "--output-dir", str(tmp_path / "other")])
    with pytest.raises(UserError, match=rf"^{config} with --steps: train.steps must be above 0, got 0"):
        main([*arguments[:4], "--steps", "0"])
    assert not (tmp_path / "other").exists()


DEEP = b'{"step": 2, "x": ' + b"[" * 10**5 + b"]" * 10**5 + b"}"


@pytest.mark.parametrize(
    "line",
    [b"5", b"{}", b'{"step": "3"}', b"{", b"\xff\xfe", b"[]", b'{"step": true}', pytest.param(DEEP, id="deep")],
)
def test_a_line_of_the_metrics_that_is_no_steps_is_one_line_of_an_error(line, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    with pytest.raises(UserError, match=r'metrics.jsonl: line 2: expected one JSON object per step, .* as "step"$'):
        read_metrics(path)


def test_a_last_line_of_the_metrics_that_was_cut_short_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step"')
    assert read_metrics(path) == [{"step": 1}]


def test_there_is_nowhere_to_save_without_a_folder():
    with pytest.raises(UserError, match="output_dir: expected a folder to save checkpoints in, got None"):
        Trainer(tiny_config(), None, tiny_dataset()).save()


def test_saving_makes_the_folder(tmp_path):
    trainer = tiny_trainer(tmp_path / "runs" / "first")
    assert trainer.save() == tmp_path / "runs" / "first" / "step-000000"
    assert load_checkpoint(tmp_path / "runs" / "first")[2] == trainer.config


def test_metrics_can_be_read_while_they_are_written(tmp_path):
    with MetricsFile(tmp_path / "metrics.jsonl", 0) as file:
        file.write({"step": 1})
        assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}]


def test_metrics_that_find_no_room_are_one_line_of_an_error(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    file._file = open("/dev/full", "w", buffering=1)  # noqa: SIM115 (it cannot be closed)
    for attempt in (lambda: file.write({"step": 1}), lambda: file.__exit__(None, None, None)):
        with pytest.raises(UserError, match=r"metrics.jsonl: cannot be written: No space left on device"):
            attempt()


def test_parameters_that_are_replaced_are_noticed_and_those_changed_in_place_are_trained():
    trainer, batch = tiny_trainer(), tiny_dataset().rows.batch(0, 3)
    trainer.train_batch(batch)
    trainer.model.load_state_dict(DeepseekV3(trainer.config.model).state_dict())
    before = [p.clone() for p in trainer.model.parameters()]
    trainer.train_batch(batch)
    assert not any(torch.equal(p, old) for p, old in zip(trainer.model.parameters(), before, strict=True))
    trainer.model.load_state_dict(DeepseekV3(trainer.config.model).state_dict(), assign=True)
    for attempt in (lambda: trainer.train_batch(batch), lambda: trainer.train(quiet=True)):
        with pytest.raises(UserError, match=r"^model: its parameters are not those that its Trainer was made with"):
            attempt()


def test_a_parameter_that_is_frozen_later_is_refused():
    trainer, batch = tiny_trainer(), tiny_dataset().rows.batch(0, 3)
    trainer.model.layers[0].self_attn.o_proj.weight.requires_grad_(False)
    with pytest.raises(UserError, match=r"layers.0.self_attn.o_proj.weight does not require a gradient$"):
        trainer.train_batch(batch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_weights_of_another_default_dtype_are_refused(dtype):
    torch.set_default_dtype(dtype)
    try:
        with pytest.raises(UserError, match=r"^torch's default dtype is (bfloat16|float64); expected float32"):
            tiny_trainer()
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_tokenizers_padding_cutting_and_reading_change_no_text(tmp_path):
    config = load_config(write_text_run(tmp_path))
    text = Path(config.data.source)
    text.write_text(text.read_text().replace(" ", " <|eos|> ", 20), encoding="utf-8")
    expected = Trainer(config).dataset
    given = Tokenizer.from_str(expected.tokenizer.to_str())
    given.enable_padding(length=64, pad_id=2, pad_token="<|pad|>")
    given.enable_truncation(5)
    found = Trainer(config, tokenizer=given).dataset
    assert (found.rows.stream == expected.rows.stream).all()
    assert given.truncation is not None, "the caller's own is left as it was"


def test_a_step_without_a_token_is_one_line_of_an_error():
    nothing = torch.zeros(0, 8, dtype=torch.int64)
    with pytest.raises(UserError, match=r"input_ids: expected at least one token, got \[0, 8\]"):
        Trainer(tiny_config()).step(nothing, nothing)


def test_a_folder_whose_name_safetensors_could_not_read_is_refused(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    with pytest.raises(UserError, match="expected a name in UTF-8"):
        Trainer(tiny_config(), folder, tiny_dataset()).train(quiet=True)
    assert not folder.exists()
    config = write_text_run(tmp_path)
    for command in (main, suite.main):
        with pytest.raises(UserError, match="expected a name in UTF-8"):
            command(["--config", str(config), "--output-dir", str(folder)])
        assert not folder.exists()


def test_a_kernel_that_does_not_run_here_is_refused_with_its_key():
    with pytest.raises(UserError, match=r"^runtime: rope: implementation 'triton' does not run on cpu"):
        tiny_trainer(**{"runtime.kernels": {"rope": "triton"}})


def test_bfloat16_without_a_kernel_that_computes_in_it_is_refused():
    changes = {"runtime.dtype": "bfloat16", "runtime.kernels": {"default": "reference", "rope": "native"}}
    with pytest.raises(UserError, match=r"runtime.dtype is 'bfloat16', which on a CPU .* leaves none of them"):
        Trainer(tiny_config(**changes))
    auto = tiny_config(**{**changes, "runtime.dtype": "auto"})
    assert precision_of(auto.runtime).products == torch.float32


def test_a_loss_under_inference_mode_between_two_steps_is_allowed():
    trainer = Trainer(tiny_config(), None, tiny_dataset())
    ids = torch.arange(3, 19)[None]
    trainer.step(ids, ids)
    with torch.inference_mode():
        trainer.model.loss(ids, ids)
    assert math.isfinite(trainer.step(ids, ids))
