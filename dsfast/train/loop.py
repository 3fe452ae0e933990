"""The training loop: batches in, weights, metrics and checkpoints out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from operator import is_not
from pathlib import Path
from time import perf_counter

import torch
from tokenizers import Tokenizer
from torch import Tensor

from dsfast import ops
from dsfast.config import Config
from dsfast.data import Batch, Dataset, build_dataset, check_tokenizer, for_texts
from dsfast.errors import Interrupted, UserError
from dsfast.model import DeepseekV3, precision_of
from dsfast.model.gpu import gpu_errors_while
from dsfast.ops import native
from dsfast.train import checkpoint as ckpt
from dsfast.train.gradients import Gradients
from dsfast.train.interrupt import StopSignals
from dsfast.train.metrics import MetricsFile, experts_used
from dsfast.train.optimizer import build_optimizer, learning_rate_scale
from dsfast.train.progress import TrainingProgress
from dsfast.train.run_folder import METRICS, check_same_run, run_folder
from dsfast.train.runtime import gpu_errors_in_training, peak_memory_bytes, prepare
from dsfast.train.steps import DeviceSteps, Done, HostSteps, steps_of
from dsfast.triton_kernels.launch import dtype_name


class TrainingError(UserError):
    """Training cannot go on because too many steps in a row were not finite, or it ended and nothing was learnt."""


@dataclass(frozen=True)
class StepReport:
    """One step. `step` counts from 1; `lr` is train.learning_rate times the schedule; skipped: no update was made.

    seconds: on a GPU, which is not waited for after each, the mean of the steps between two log lines or checkpoints.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    skipped: bool
    tokens: int
    seconds: float


@dataclass(frozen=True)
class TrainResult:
    """What `Trainer.train` did in this call; `steps` is the run's total, `losses` one per step.

    seconds: wall time, checkpoints written included, preparation not. On a GPU, and None on a CPU: preparation_seconds before
    that, in which batches were loaded, kernels compiled or read from the cache and the step recorded; utilisation, the share of
    the steps' own seconds in which the GPU, by its clock, had steps to do (None too where they are launched kernel by kernel).
    experts_used: `metrics.experts_used` of each router in the last step.
    """

    steps: int
    final_loss: float
    seconds: float
    preparation_seconds: float | None
    utilisation: float | None
    tokens_per_second: float
    peak_memory_bytes: int
    skipped_steps: int
    checkpoint: Path | None
    experts_used: list[float]
    losses: list[float] = field(repr=False)


class Trainer:
    """Trains `DeepseekV3(config.model)`, whose initial weights follow from config.seed alone, or a `model` of one's own.

    model: a DeepseekV3 of config.model in float32, trained on from its weights; it moves to the config's device.
    tokenizer: what makes the text's tokens, as a model that is trained on knows them; None trains one on the text.
    output_dir: where train() writes config.json, metrics.jsonl and checkpoints; None writes nothing.
    dataset: in place of the config's; that one is built when it is first needed, so `step` alone needs no data.
    Sets torch's thread count for the process; its steps run with the kernels that config.runtime names.
    Raises UserError for a device or a kernel that is not there, for another model than the config's or a tokenizer with other
    tokens, and for a model that this machine's memory cannot hold.
    """

    @torch.inference_mode(False)  # else its weights could never be trained
    def __init__(
        self,
        config: Config,
        output_dir: str | Path | None = None,
        dataset: Dataset | None = None,
        model: DeepseekV3 | None = None,
        tokenizer: Tokenizer | None = None,
    ):
        if not isinstance(config, Config):
            raise UserError(f"config: expected a Config, as load_config returns, got {type(config).__name__}")
        if model is not None:
            _check_model(model, config)
        elif torch.get_default_dtype() != torch.float32:
            raise UserError(
                f"torch's default dtype is {dtype_name(torch.get_default_dtype())}; expected float32, in which weights are made"
            )
        self.config = config
        self.output_dir = None if output_dir is None else Path(output_dir)
        self._tokenizer = tokenizer
        if tokenizer is not None:
            check_tokenizer(tokenizer, config.model.vocab_size)
            self._tokenizer = for_texts(tokenizer)
        if dataset is not None:
            self.dataset = dataset
        self.steps_done = 0
        self.bad_steps = 0
        """Steps without an update since the last one with."""
        self.last_saved: Path | None = None
        """The newest checkpoint written, or resumed from."""
        # A GPU that is broken shows when it is first asked for anything.
        with gpu_errors_while("setting up the model and its optimizer", "it takes a smaller model, or a GPU with room"):
            self.device = prepare(config)
            self.precision = precision_of(config.runtime)
            torch.manual_seed(config.seed)
            self._model = (DeepseekV3(config.model) if model is None else model).to(self.device)
            self._parameters = list(self.model.parameters())
            self.optimizer = build_optimizer(self.model, config.train, self.precision.tensors)
        self.gradients = Gradients(self.model, self.precision.tensors, config.train, config.runtime.whole_step)

    @property
    def model(self) -> DeepseekV3:
        """The model that is trained. Another one takes another Trainer: the optimizer has this one's weights."""
        return self._model

    @cached_property
    def dataset(self) -> Dataset:
        return build_dataset(self.config.data, self.config.model.vocab_size, self.config.seed, self._tokenizer)

    @torch.inference_mode(False)
    def train(self, resume: str | Path | None = None, quiet: bool = False) -> TrainResult:
        """Train up to config.train.steps; `resume` names a checkpoint, or a run folder whose newest one is continued.

        Raises UserError for a bad folder or checkpoint and for a GPU that fails or has too little memory, TrainingError after
        train.max_bad_steps steps in a row that are not finite, and Interrupted, the step finished and saved, on Ctrl-C,
        SIGTERM or SIGHUP. On a GPU these are noticed where steps are read, at a log line or checkpoint; the steps up to the next
        one may have been launched by then and are done as well.
        """
        rows, train = self.dataset.rows, self.config.train
        resumed = None if resume is None else ckpt.find_checkpoint(resume)
        if resumed is not None:
            with gpu_errors_in_training(self):
                self._resume(resumed)
        if self.steps_done >= train.steps:
            where = f"{resumed}: " if resumed else ""
            raise UserError(
                f"{where}train.steps: expected more than the {self.steps_done} done already, got {train.steps}"
            )
        rows.batch(self.steps_done, train.batch_size)  # too little data is noticed before anything is written
        folder = nullcontext()
        if self.output_dir is not None:
            folder = run_folder(self.output_dir, self.config, self.steps_done, resumed)
        with folder, StopSignals() as signals, gpu_errors_in_training(self):
            self._check_parameters()
            steps = self.steps()
            steps.prepare()
            started = perf_counter()
            reports, saved = self._run(steps, signals, quiet)
        if signals.received is not None:
            where = f"saved as {saved}" if saved else "nothing was saved"
            raise Interrupted(signals.received, f"stopped after step {self.steps_done} of {train.steps}; {where}")
        return self._result(reports, perf_counter() - started, steps, saved)

    def step(self, input_ids: Tensor, labels: Tensor) -> float:
        """One whole training step on rows of one's own, each a document; returns its loss.

        input_ids, labels [B, T] int64, labels as in DeepseekV3.loss. Counts as a step of the schedule. UserError without a token.
        """
        for name, given in (("input_ids", input_ids), ("labels", labels)):
            if not isinstance(given, Tensor):
                raise UserError(f"{name}: expected a tensor [B, T] of int64, got {type(given).__name__}")
        if not input_ids.numel():
            raise UserError(f"input_ids: expected at least one token, got {list(input_ids.shape)}")
        return self.train_batch(Batch(input_ids, labels, None, None)).loss

    def train_batch(self, batch: Batch) -> StepReport:
        """Forward, backward, the check for non-finite numbers, update with clipped gradients, router bias."""
        with self.kernels():
            return self._train_batch(batch)

    def _train_batch(self, batch: Batch) -> StepReport:
        started, train = perf_counter(), self.config.train
        if not self.model.training:
            self.model.train()
        self._check_parameters()
        value = self.gradients(*self._inputs(batch))
        norm = ops.grad_norm([p.grad for p in self._parameters if p.grad is not None])
        scale = learning_rate_scale(self.steps_done, train)
        finite = math.isfinite(value) and math.isfinite(norm)
        if finite:
            self.optimizer.step(scale, ops.clip_factor(norm, train.grad_clip))
            self.model.update_router_bias(train.bias_update_speed)
        tokens, seconds = batch.input_ids.numel(), perf_counter() - started
        return self.count_step(value, norm, scale, not finite, tokens, seconds)

    def count_step(
        self, loss: float, grad_norm: float, lr_scale: float, skipped: bool, tokens: int, seconds: float
    ) -> StepReport:
        """Count a step that was done; its report. Raises TrainingError for one skipped too many."""
        self.steps_done += 1
        if skipped:
            self._count_bad_step(loss)
        else:
            self.bad_steps = 0
        lr = self.config.train.learning_rate * lr_scale
        return StepReport(self.steps_done, loss, grad_norm, lr, skipped, tokens, seconds)

    def steps(self) -> HostSteps | DeviceSteps:
        """What carries out the steps of a run from here on: the device's own way."""
        return steps_of(self)

    @contextmanager
    def kernels(self) -> Iterator[None]:
        """The operators as config.runtime selects them, and what their products multiply; with derivatives, also where the
        caller has switched them off by torch.no_grad or torch.inference_mode."""
        runtime = self.config.runtime
        operators = ops.configured(runtime.kernels, runtime.device)
        with operators, native.products_in(self.precision.products), torch.inference_mode(False), torch.enable_grad():
            yield

    def save(self) -> Path:
        """Write a checkpoint of the present step into output_dir; returns its folder. UserError where there is none."""
        if self.output_dir is None:
            raise UserError("output_dir: expected a folder to save checkpoints in, got None")
        state = ckpt.TrainingState(step=self.steps_done, bad_steps=self.bad_steps, random=ckpt.random_states())
        data = self.dataset
        self.last_saved = ckpt.save_checkpoint(
            self.output_dir, self.model, self.optimizer, data.tokenizer, self.config, state, data.manifest
        )
        return self.last_saved

    def _run(
        self, steps: HostSteps | DeviceSteps, signals: StopSignals, quiet: bool
    ) -> tuple[list[StepReport], Path | None]:
        """The steps that are left, or those before a signal; with the last checkpoint written."""
        train, folder, reports, saved = self.config.train, self.output_dir, [], None
        metrics = nullcontext() if folder is None else MetricsFile(folder / METRICS, self.steps_done)
        with metrics as metrics, TrainingProgress(self.steps_done, train.steps, train.log_every, quiet) as progress:
            progress.prepared(steps.preparation_seconds)

            def record(done: Iterator[Done]) -> None:
                for report, loads in done:
                    reports.append(report)
                    progress.update(report.step, report.loss, report.lr, report.tokens / report.seconds)
                    if metrics is not None:
                        metrics.write(_metrics(report, loads))

            while self.steps_done < train.steps and signals.received is None:
                record(steps.run())
                due = train.checkpoint_every and self.steps_done % train.checkpoint_every == 0
                saved = self.save() if due and folder is not None else None
            record(steps.finish())  # a checkpoint is to hold the weights of the step it names
            if folder is not None and reports and saved is None:
                saved = self.save()
        return reports, saved

    def _result(
        self, reports: list[StepReport], seconds: float, steps: HostSteps | DeviceSteps, saved: Path | None
    ) -> TrainResult:
        busy, took = steps.busy_seconds, sum(report.seconds for report in reports)
        return TrainResult(
            steps=self.steps_done,
            final_loss=reports[-1].loss,
            seconds=seconds,
            preparation_seconds=steps.preparation_seconds,
            utilisation=None if busy is None else busy / took,
            tokens_per_second=sum(report.tokens for report in reports) / seconds,
            peak_memory_bytes=peak_memory_bytes(self.device),
            skipped_steps=sum(report.skipped for report in reports),
            checkpoint=saved,
            experts_used=[experts_used(router.load) for router in self.model.routers()],
            losses=[report.loss for report in reports],
        )

    def _inputs(self, batch: Batch) -> tuple[Tensor | None, ...]:
        arguments = (batch.input_ids, batch.labels, batch.positions, batch.cu_seqlens)
        own = (x.clone() if x is not None and x.is_inference() else x for x in arguments)  # autograd keeps no others
        return tuple(None if x is None else x.to(self.device, non_blocking=True) for x in own)

    def _check_parameters(self) -> None:
        """Raise UserError unless the model's parameters are those that the optimizer was made for, all of them trained."""
        found = list(self.model.parameters())
        if len(found) != len(self._parameters) or any(map(is_not, found, self._parameters)):
            raise UserError(
                "model: its parameters are not those that its Trainer was made with; expected them changed in place, or another "
                "Trainer for others"
            )
        if not all(parameter.requires_grad for parameter in found):
            _check_model(self.model, self.config)

    def _count_bad_step(self, loss: float) -> None:
        self.bad_steps += 1
        limit = self.config.train.max_bad_steps
        if self.bad_steps >= limit:
            raise TrainingError(
                f"step {self.steps_done}: {self.bad_steps} steps in a row were not finite "
                f"(train.max_bad_steps {limit}); loss {loss}, first tensor: {self._first_not_finite(loss)}"
            )

    def _first_not_finite(self, loss: float) -> str:
        named = list(self.model.named_parameters())
        for name, parameter in named:
            if not parameter.isfinite().all():
                return f"parameter {name!r}"
        for name, parameter in named:
            if parameter.grad is not None and not parameter.grad.isfinite().all():
                return f"gradient of {name!r}"
        return "the loss" if not math.isfinite(loss) else "the norm of all gradients together"

    def _resume(self, path: Path) -> None:
        check_same_run(path, self.config, self.dataset.manifest)
        self.last_saved = path
        state = ckpt.load_training_state(path, self.model, self.optimizer)
        self.steps_done, self.bad_steps = state.step, state.bad_steps


def _check_model(model: DeepseekV3, config: Config) -> None:
    """Raise UserError unless `model` can stand for one that the config describes."""
    if not isinstance(model, DeepseekV3):
        raise UserError(f"model: expected a DeepseekV3, got {type(model).__name__}")
    if model.config != config.model:
        differ = [name for name, value in vars(model.config).items() if value != getattr(config.model, name)]
        raise UserError(f"model: expected one of the config's model section, got one with another {', '.join(differ)}")
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if (first := names.setdefault(id(parameter), name)) != name:
            raise UserError(f"model: expected a parameter for each name, but {first} and {name} are one")
        if parameter.dtype != torch.float32:
            raise UserError(f"model: expected weights in float32, got {name} in {dtype_name(parameter.dtype)}")
        if parameter.is_inference():
            raise UserError(f"model: {name} was made under torch.inference_mode; expected weights that can be trained")
        if not parameter.requires_grad:
            raise UserError(f"model: all its parameters are trained, but {name} does not require a gradient")


def _metrics(report: StepReport, loads: list[Tensor]) -> dict:
    """A line of metrics.jsonl. `expert_load`: for each router the share of the choices that fell on each expert."""
    loads = [load.double() for load in loads]
    return {
        "step": report.step,
        "loss": report.loss,
        "lr": report.lr,
        "grad_norm": report.grad_norm,
        "skipped": report.skipped,
        "tokens_per_second": report.tokens / report.seconds,
        "seconds": report.seconds,
        "expert_load": [(load / load.sum()).tolist() for load in loads],
    }
