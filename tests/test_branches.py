"""What a step starts aside may run at any time until it is waited for: a whole step in Triton's interpreter, in both extremes.

    TRITON_INTERPRET=1 python tests/test_branches.py narrow float16    prints how many launches ran aside

It is a process of its own, as in tests/triton_contract.py.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from dsfast.triton_kernels import branches as module
from dsfast.triton_kernels.branches import Branches
from dsfast.triton_kernels.launch import aside, branches
from launches import training_step
from postponed import LastFirst, Postponed
from torch import Tensor
from triton_contract import INTERPRETED, poisoned

from dsfast import ops
from dsfast.config import default_config

RUNS = {
    "narrow": {},
    "with MTP": {"model.num_nextn_predict_layers": 1},
    "other kernels": {
        "model.first_k_dense_replace": 1, "model.num_hidden_layers": 2, "model.moe_intermediate_size": 80,
        "model.tie_word_embeddings": False,
    },
}  # fmt: skip
"""Changes of a small model that takes the kernels of the 500K's. The last: a dense layer, wide experts, and a head of its own."""
SMALL = {
    "model.vocab_size": 60, "model.num_hidden_layers": 1, "model.hidden_size": 32, "model.num_attention_heads": 2,
    "model.embedding_rank": 16, "model.kv_lora_rank": 16, "model.qk_nope_head_dim": 16,
    "model.v_head_dim": 16, "model.moe_intermediate_size": 16, "train.optimizer": "adamw", "runtime.threads": 1,
}  # fmt: skip


def state_after(run: str, dtype: torch.dtype, order: type[Postponed] | None) -> tuple[list[Tensor], int]:
    """What a step leaves behind, all memory full of NaN before; how many launches ran aside."""
    step = training_step(default_config("cpu").replace(**SMALL | RUNS[run]), 2, 16, dtype)
    now = order and order()
    with ops.use("triton"), poisoned(), now or nullcontext():
        step()
    return [x.clone() for x in (*step.state(), *step.gradients)], now.launches if now else 0


def compared(run: str, dtype: torch.dtype) -> int:
    """Raises AssertionError unless both orders give the bits of a step without branches; how many launches ran aside."""
    expected, _ = state_after(run, dtype, None)
    assert all(x.isfinite().all() for x in expected)
    for order in (Postponed, LastFirst):
        found, count = state_after(run, dtype, order)
        assert all(map(torch.equal, found, expected)), order
    return count


@pytest.mark.skipif(INTERPRETED, reason="this is what starts the interpreter's process")
@pytest.mark.parametrize(
    ("run", "dtype"),
    [
        ("narrow", "float16"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in product(RUNS, ("float16", "float32"))
            if case != ("narrow", "float16")
        ),
    ],
)
def test_a_step_gives_the_same_bits_whenever_its_branches_run(run, dtype):
    """The kernels of narrow layers take float16 and no float32."""
    command = [sys.executable, __file__, run, dtype]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=500)
    assert child.returncode == 0, child.stdout[-2000:] + child.stderr[-4000:]
    assert int(child.stdout.splitlines()[-1]) > 8


class Scripted(Branches):
    """Writes down what is started and what is waited for; `fill` stands for a launch."""

    def __init__(self) -> None:
        super().__init__((), None)
        self.log: list[str] = []

    def _beside(self, stages, urgent):
        names = [[launch.name for launch in launches] for launches, _ in stages]
        self.log += [f"start {name}" for stage in names for name in stage]
        return [",".join(stage) for stage in names]

    def _join(self, end):
        self.log.append(f"wait for {end}")


def fill(name: str, *tensors: Tensor) -> SimpleNamespace:
    return SimpleNamespace(name=name, tensors=lambda kept=list(tensors): kept)


class TestWaiting:
    def test_of_the_first_operator_that_takes_a_result(self):
        x, y = torch.zeros(4), torch.zeros(4)
        with Scripted() as now:
            aside(([fill("x", x)], [x]))
            aside(([fill("y", y)], [y]))
            _ = y + 1, x.view(2, 2).t(), torch.empty_like(x)
            assert now.log == ["start x", "start y", "wait for y"]
            torch.stack([torch.ones(2), x.view(2, 2)[1]])
            assert now.log[3:] == ["wait for x"]
            _ = x + y
            x.add_(1)
        assert now.log[4:] == [], "once each"

    def test_of_one_that_changes_it_or_is_given_it_by_name(self):
        x, y = torch.zeros(4), torch.zeros(4)
        with Scripted() as now:
            aside(([fill("x", x)], [x]), ([fill("y", y)], [y]))
            x.add_(1)
            assert now.log[2:] == ["wait for x"]
            torch.add(torch.ones(4), 1, out=y)
            assert now.log[3:] == ["wait for y"]

    @torch.inference_mode()
    def test_of_one_that_may_copy_though_it_looks_like_a_view(self):
        x = torch.zeros(2, 2)
        with Scripted() as now:
            aside(([fill("x", x)], [x]))
            assert now.log == ["start x"]
            x.t().reshape(4)
            assert now.log[1:] == ["wait for x"]

    def test_at_the_end_for_all(self):
        x, y = torch.zeros(4), torch.zeros(4)
        with Scripted() as now:
            aside(([fill("x", x), fill("more", x)], []))
            aside(([fill("y", y)], [y]))
            _ = x + 1  # not among what others take
            assert now.log == ["start x", "start more", "start y"]
        assert now.log[3:] == ["wait for x,more", "wait for y"]

    def test_of_one_stage_of_a_branch(self):
        x, y = torch.zeros(4), torch.zeros(4)
        with Scripted() as now:
            aside(([fill("x", x)], [x]), ([fill("y", y)], [y]))
            _ = x + 1
            assert now.log == ["start x", "start y", "wait for x"]
        assert now.log[3:] == ["wait for y"]

    def test_of_all_that_fill_parts_of_a_tensor(self):
        x = torch.zeros(4)
        with Scripted() as now:
            aside(([fill("first half", x)], [x]))
            aside(([fill("second half", x)], [x]))
            _ = x[:2] + 1
            assert now.log[2:] == ["wait for first half", "wait for second half"]
            _ = x + 1
        assert now.log[4:] == [], "once each"

    def test_where_much_is_kept(self, monkeypatch):
        monkeypatch.setattr(module, "HELD", 100)
        x, y = torch.zeros(20), torch.zeros(10)
        with Scripted() as now:
            aside(([fill("x", x)], [x]))
            aside(([fill("y", y)], [y]))
            assert now.log[2:] == ["wait for x"], "the oldest"
            assert now.held() == 40
            aside(([fill("y again", y[1:])], []))
            assert now.held() == 40, "all that its memory is part of, once"
            aside(([fill("z", torch.zeros(24))], []))
            assert now.log[4:] == ["start z", "wait for y", "wait for y again"]

    def test_not_behind_an_error(self):
        x, now = torch.zeros(4), Scripted()

        def failing():
            with now:
                aside(([fill("x", x)], [x]))
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            failing()
        assert now.log == ["start x"]
        assert branches.get() is None

    def test_in_a_backward_pass(self):
        """Autograd adds up the gradients of a tensor that is used twice."""

        class Twice(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x * 2

            @staticmethod
            def backward(ctx, dy):
                dx = dy.new_zeros(dy.shape)
                aside(([fill("dx", dx)], [dx]))
                return dx

        x = torch.ones(3, requires_grad=True)
        y = Twice.apply(x) + Twice.apply(x)
        with Scripted() as now:
            torch.autograd.grad(y, x, torch.ones(3))
        assert now.log == ["start dx", "start dx", "wait for dx"]


class Stream:
    """Of a GPU that is not there. `done`: what precedes all that it is given from now on."""

    def __init__(self) -> None:
        self.done: set[str] = set()

    def record_event(self) -> frozenset[str]:
        return frozenset(self.done)

    def wait_event(self, event: frozenset[str]) -> None:
        self.done |= event

    def wait_stream(self, other: Stream) -> None:
        self.done |= other.done


class TestStreams:
    """Where launches are started, and behind which others."""

    @pytest.fixture(autouse=True)
    def no_gpu(self, monkeypatch):
        self.chain, self.urgent, self.first, self.second = (Stream() for _ in range(4))
        self.current, self.started = [self.chain], {}
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.current[-1])
        monkeypatch.setattr(torch.cuda, "stream", self.within)

    @contextmanager
    def within(self, stream: Stream):
        self.current.append(stream)
        yield
        self.current.pop()

    def fill(self, name: str, *tensors: Tensor) -> SimpleNamespace:
        def run() -> None:
            self.started[name] = self.current[-1], "".join(sorted(self.current[-1].done))
            self.current[-1].done.add(name)

        return SimpleNamespace(run=run, tensors=lambda: tensors)

    def branches(self) -> Branches:
        self.fill("a").run()
        return Branches([self.first, self.second], self.urgent)

    def test_each_stage_behind_the_one_before_and_the_urgent_one_apart(self):
        x, y, z = (torch.zeros(4) for _ in range(3))
        with self.branches():
            aside(([self.fill("b", x), self.fill("c", x)], [x]), ([self.fill("d", y)], [y]), urgent=True)
            aside(([self.fill("e", z)], [z]))
            _ = x + 1
            assert self.chain.done == set("abc")
            aside(([self.fill("f", x)], [x]))
        assert self.started == {
            "a": (self.chain, ""), "b": (self.urgent, "a"), "c": (self.urgent, "ab"), "d": (self.first, "abc"),
            "e": (self.second, "a"), "f": (self.first, "abcd"),
        }  # fmt: skip
        assert self.chain.done == set("abcdef")

    def test_none_is_apart_after_an_error(self):
        x, now = torch.zeros(4), self.branches()

        def failing():
            with now:
                aside(([self.fill("b", x)], []), ([self.fill("c", x)], []))
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            failing()
        assert self.chain.done == set("abc")


def test_memory_is_kept_until_it_is_waited_for():
    result, parts = torch.zeros(4), torch.zeros(4)
    kept = weakref.ref(parts)
    with Scripted() as now:
        aside(([fill("sum", parts, result)], [result]))
        del parts
        gc.collect()
        assert kept() is not None
        _ = result + 1
        assert kept() is None
        assert now.log[-1] == "wait for sum"


def test_without_branches_it_runs_at_once():
    ran = []
    launches = [SimpleNamespace(run=partial(ran.append, name)) for name in "ab"]
    aside((launches[:1], []), (launches[1:], []))
    assert ran == ["a", "b"]


if __name__ == "__main__":
    assert INTERPRETED, "set TRITON_INTERPRET=1"
    print(compared(sys.argv[1], getattr(torch, sys.argv[2])))
