"""The GPU's decoder, run on CPU tensors: the same tokens as the others', and nothing that a CUDA graph forbids.

    TRITON_INTERPRET=1 python tests/test_device_decode.py    prints what it generates with every Triton kernel, as JSON

That is a process of its own, as in tests/triton_contract.py.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import subprocess
import sys
import weakref
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from guard import GraphGuard, NotCapturableError, kept_by_step, operators_called
from operator_cases import needs_native
from test_device_step import eager
from test_generate import without_cache
from tiny_models import MORE_VARIANTS, random_ids, random_model
from triton_contract import INTERPRETED, poisoned

from dsfast import ops
from dsfast.config import OPERATORS, default_config
from dsfast.errors import UserError
from dsfast.model import DeepseekV3, capture, generate_ids
from dsfast.model.capture import captured
from dsfast.model.decode import OperatorDecoder, Prompts
from dsfast.model.device_decode import BLOCK, LEAST_PLACES, STEPWISE, DecodeStep, DeviceDecoder, places_for
from dsfast.model.generate import _own_decoder
from dsfast.ops import triton

on_device = partial(DeviceDecoder, launch=eager)
by_device = partial(generate_ids, decoder_type=on_device)
by_operators = partial(generate_ids, decoder_type=OperatorDecoder)
FOR_TRAINING = {"mla_attention", "linear_cross_entropy", "adamw", "muon", "newton_schulz"}
LENGTHS = (5, 1, 17, 8)


def prompts_of(model: DeepseekV3, lengths=LENGTHS) -> list[list[int]]:
    return [random_ids(model, n, seed=n).tolist() for n in lengths]


def counted(launches: list[int]):
    """Launch the step as it is; `launches` gets an entry for each call."""

    def launch(step):
        def call():
            launches.append(1)
            step()

        return call

    return launch


class TestTheSameTokens:
    @pytest.mark.parametrize("implementation", ["auto", "reference"])
    @pytest.mark.parametrize("variant", MORE_VARIANTS)
    def test_as_by_operators_and_without_a_cache(self, variant, implementation):
        """More steps than a block, several lengths, alone and together."""
        model = random_model(**MORE_VARIANTS[variant])
        prompts, steps = prompts_of(model), BLOCK + 2
        with ops.use(implementation), torch.no_grad():
            found = by_device(model, prompts, steps)
            assert found == by_operators(model, prompts, steps)
            assert [by_device(model, [prompt], steps)[0] for prompt in prompts[:2]] == found[:2]
            assert found[1] == without_cache(model, prompts[1], steps)
            assert found[2] == without_cache(model, prompts[2], steps)

    @pytest.mark.parametrize("variant", ["factorised", "all at once"])
    @pytest.mark.parametrize("temperature", [1e-300, 0.3, 1.0, float("inf")])
    def test_as_by_operators_where_it_samples(self, variant, temperature):
        model = random_model(**MORE_VARIANTS[variant])
        prompts, steps = prompts_of(model), 2 * BLOCK + 3
        found = by_device(model, prompts, steps, temperature, seed=7)
        assert found == by_operators(model, prompts, steps, temperature, seed=7)
        assert found == by_device(model, prompts, steps, temperature, seed=7)
        assert temperature < 0.1 or found != by_device(model, prompts, steps, temperature, seed=8)

    @pytest.mark.parametrize("length", [1, 2, STEPWISE, STEPWISE + 1])
    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_short_prompts_of_one_length_are_taken_by_recorded_steps(self, temperature, length):
        """Again and again, after longer ones."""
        model, launches, steps = random_model(), [], BLOCK + 2
        decoder = partial(DeviceDecoder, launch=counted(launches))
        for seed in range(3):
            prompts = [random_ids(model, length, seed=10 * seed + s).tolist() for s in range(3)]
            for batch in ([prompts_of(model)[2]] * 3, prompts):
                launches.clear()
                found = generate_ids(model, batch, steps, temperature, seed=seed, decoder_type=decoder)
                assert found == by_operators(model, batch, steps, temperature, seed=seed)
            assert len(launches) == (length if length <= STEPWISE else 0) + steps - 1


def test_places_are_the_next_power_of_two_within_bounds():
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=3000))
    found = [places_for(model, capacity) for capacity in (1, 256, 257, 512, 513, 2049)]
    assert found == [LEAST_PLACES, LEAST_PLACES, 512, 512, 1024, 3000]


class TestWhereItEnds:
    def test_eos_at_every_step(self):
        """Ids as by operators, and no block is launched behind the one with the last <|eos|>."""
        model, steps = random_model(), 3 * BLOCK + 2
        prompts = prompts_of(model, (5,))
        [free] = by_operators(model, prompts, steps, temperature=1.0)
        for eos in sorted(set(free)):
            at, launches = free.index(eos), []
            decoder = partial(DeviceDecoder, launch=counted(launches))
            found = generate_ids(model, prompts, steps, 1.0, eos_id=eos, decoder_type=decoder)
            assert found == [free[:at]]
            assert len(launches) == len(prompts[0]) + min(-(-at // BLOCK) * BLOCK, steps - 1)

    def test_eos_ends_one_row_and_not_the_others(self):
        model = random_model()
        prompts = [random_ids(model, 6, seed=s).tolist() for s in range(4)]
        for temperature in (0.0, 1.0):
            free = by_operators(model, prompts, 40, temperature)
            for eos in free[0][::5]:
                found = by_device(model, prompts, 40, temperature, eos_id=eos)
                assert found == [row[: row.index(eos)] if eos in row else row for row in free]

    @pytest.mark.parametrize("steps", [1, 2, BLOCK, BLOCK + 1, BLOCK + 2])
    def test_no_step_is_launched_in_vain_for_prompts_of_one_length(self, steps):
        launches = []
        decoder = partial(DeviceDecoder, launch=counted(launches))
        found = generate_ids(random_model(), [[3, 4], [5, 6]], steps, decoder_type=decoder)
        assert [len(row) for row in found] == [steps, steps]
        assert len(launches) == 2 + steps - 1  # the prompts' tokens too

    def test_the_context_is_full(self):
        model = random_model(max_position_embeddings=20)
        prompts = prompts_of(model, (17, 20, 3))
        found = by_device(model, prompts, 9)
        assert [len(row) for row in found] == [4, 1, 9]
        assert found == by_operators(model, prompts, 9)

    def test_nothing_to_sample_from_is_an_error_when_the_token_is_asked_for(self):
        """After one of half of all words there is nothing to sample from: it is no error where that word ends the text."""
        model = random_model(tie_word_embeddings=False)
        model.embed_tokens.weight.data[1::2] = torch.nan
        ended = 0
        for seed in range(20):
            for eos in (None, 3, 5):
                outcomes = []
                for generate in (by_device, by_operators):
                    try:
                        outcomes.append(generate(model, [[2, 4]], 6, 1.0, seed, eos))
                    except UserError as error:
                        outcomes.append(str(error))
                assert outcomes[0] == outcomes[1]
                ended += eos is not None and not isinstance(outcomes[0], str)
        assert ended

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_logits_that_are_not_finite_are_an_error_also_later_in_a_block(self, temperature):
        model = random_model(tie_word_embeddings=False)
        first = by_device(model, [[2, 4]], 4, temperature)[0]
        model.embed_tokens.weight.data[first[0]] = torch.nan  # seen where it is read back
        assert by_device(model, [[2, 4]], 1, temperature) == [first[:1]]
        with pytest.raises(UserError, match="logits are not finite: there is no next token to choose"):
            by_device(model, [[2, 4]], 4, temperature)

    def test_ids_outside_the_vocabulary(self):
        with pytest.raises(UserError, match=r"prompt: expected token ids 0 .. 60, got 61"):
            by_device(random_model(), [[1, 61]], 1)


class OnAGpu(torch.nn.Parameter):
    """Says that it is on a GPU."""

    is_cuda = True
    device = torch.device("cuda")


def test_it_is_the_gpus_own_and_no_other_devices():
    model = random_model()
    with ops.use("reference"):
        assert _own_decoder(model) is OperatorDecoder
    model.embed_tokens.weight = OnAGpu(model.embed_tokens.weight)
    assert _own_decoder(model) is DeviceDecoder
    model.norm.register_forward_hook(lambda *_: None)
    with pytest.warns(ops.FallbackWarning, match="the CUDA graph is not made: module 'norm' is not dsfast's own"):
        assert _own_decoder(model) is OperatorDecoder


class TestWhatIsKept:
    @pytest.fixture
    def recorded(self):
        """(generate with it, how many steps were recorded)."""
        made = []

        def launch(step):
            made.append(step)
            return step

        return partial(generate_ids, decoder_type=partial(DeviceDecoder, launch=launch)), made

    def test_one_recording_for_answers_of_several_lengths(self, recorded):
        generate, made = recorded
        model = random_model()
        for prompt in prompts_of(model):
            assert generate(model, [prompt], 9) == by_operators(model, [prompt], 9)
        assert generate(model, [[7] * 200], 50, eos_id=3) == by_operators(model, [[7] * 200], 50, eos_id=3)
        assert len(made) == 1
        assert made[0].cache.capacity == LEAST_PLACES
        assert generate(model, [[7] * 200], 60) == by_operators(model, [[7] * 200], 60)
        assert [step.cache.capacity for step in made] == [256, 263], "no more than the context"

    def test_another_batch_temperature_or_implementation_has_its_own(self, recorded):
        generate, made = recorded
        model = random_model()
        for prompts, temperature in (([[1]], 0.0), ([[1], [2]], 0.0), ([[1], [2]], 1.0), ([[1], [2]], 2.0)):
            assert generate(model, prompts, 5, temperature) == by_operators(model, prompts, 5, temperature)
        assert len(made) == 4
        with ops.use("reference", "rope"):
            generate(model, prompts, 5, temperature)
        assert len(made) == (5 if ops.native.status()[0] else 4)

    def test_weights_that_change_in_place_are_seen_and_those_elsewhere_recorded_anew(self, recorded):
        generate, made = recorded
        model = random_model()
        before = generate(model, [[3]], 9)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        after = generate(model, [[3]], 9)
        assert (len(made), after) == (1, by_operators(model, [[3]], 9))
        assert after != before
        model.load_state_dict(random_model(seed=5).state_dict())
        model.train()(random_ids(model, 2, 8))  # which counts the tokens of experts in other memory
        assert generate(model.eval(), [[3]], 9) == by_operators(model, [[3]], 9)
        assert len(made) == 1
        model.layers[0].self_attn.o_proj.weight.data = model.layers[0].self_attn.o_proj.weight.data * 2
        assert generate(model, [[3]], 9) == by_operators(model, [[3]], 9)
        with ops.use("reference"):
            assert generate(model.double(), [[3]], 9) == by_operators(model, [[3]], 9)
        assert len(made) == 3

    @torch.inference_mode()
    def test_what_is_kept_is_free_before_its_place_is_taken(self):
        """Both at once may not fit. No collection of garbage is waited for."""
        model, there = random_model(), []

        def launch(step):
            there.append(weakref.ref(step.cache.latent))
            return lambda: step()

        gc.disable()
        try:
            for batch in (1, 2, 3):
                decoder = DeviceDecoder(model, batch, 9, 0.0, torch.Generator(), launch=launch)
                decoder.start(Prompts.pack([[3]] * batch))
                decoder.step()
                del decoder
            free = [cache() is None for cache in there]
        finally:
            gc.enable()
        assert free == [True, True, False]

    def test_a_copy_of_the_model_begins_without(self, recorded):
        generate, made = recorded
        model = random_model()
        expected = generate(model, [[3]], 9)
        twin = copy.deepcopy(model)
        assert twin.kept is not model.kept
        assert generate(twin, [[3]], 9) == expected
        assert made[0].model is model
        assert made[1].model is twin

    @torch.inference_mode()
    def test_the_memory_is_one_generations_at_a_time(self):
        model = random_model()
        first, second = (on_device(model, 1, 9, 0.0, torch.Generator()) for _ in range(2))
        with pytest.raises(RuntimeError, match="another generation has begun on this model"):
            first.start(Prompts.pack([[3]]))
        second.start(Prompts.pack([[3]]))
        second.step()
        on_device(model, 1, 9, 0.0, torch.Generator())
        for _ in range(7):
            second.step()  # was read before the third began
        with pytest.raises(RuntimeError, match="another generation has begun on this model"):
            second.step()


def memory(step: DecodeStep) -> list[torch.Tensor]:
    """All that a recording reads or writes again, but for the model."""
    return [*step.state(), step.cache.latent, step.cache.k_rope, step.uniforms]


class TestWhatAGraphForbids:
    """With the C++ kernels: what plain PyTorch does inside an operator is not what a GPU runs."""

    @pytest.mark.parametrize("temperature", [0.0, 0.7])
    @pytest.mark.parametrize("variant", ["factorised", "q_lora", "all at once"])
    @torch.inference_mode()
    def test_no_wait_no_shape_from_data_no_new_address(self, temperature, variant):
        needs_native()
        model = random_model(**MORE_VARIANTS[variant])
        step = DecodeStep(model, 3, 40, temperature)
        step.draw(5, torch.Generator())
        step.start(Prompts.pack(prompts_of(model, (3, 1, 7))))
        before, owned = [x.data_ptr() for x in memory(step)], {name for name in vars(step) if name != "model"}
        for _ in range(4):
            with GraphGuard() as guard:
                assert kept_by_step(step, model) == []
            assert {"dsfast::mla_decode", "dsfast::embedding"} <= set(guard.seen)
            assert [x.data_ptr() for x in memory(step)] == before
        tensors = {id(x) for name in owned for x in (getattr(step, name),) if isinstance(x, torch.Tensor)}
        assert tensors <= {id(x) for x in memory(step)}
        assert step.place.tolist() == [5]
        assert step.cache.lengths.tolist() == [7, 5, 11]
        assert len({tuple(row) for row in step.read(5)}) > 1

    @pytest.mark.parametrize("temperature", [0.0, 0.7])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @torch.inference_mode()
    def test_on_a_device_without_memory(self, temperature, dtype, monkeypatch):
        """Torch's meta device stands for a GPU: no value can be read, and a number left on the host is of another device."""
        monkeypatch.setitem(ops.dispatch._OF_DEVICE, "meta", "triton")
        monkeypatch.setattr(triton, "available", lambda operator: (True, ""))
        model = random_model(**MORE_VARIANTS["factorised"]).to("meta", dtype)
        step = DecodeStep(model, 3, 40, temperature)
        with GraphGuard() as guard:
            step()
        assert operators_called(guard.seen) == set(OPERATORS) - FOR_TRAINING

    @torch.inference_mode()
    def test_how_many_operators_a_step_of_the_500k_model_calls(self, monkeypatch):
        """Launches bound it: each is a few microseconds of a GPU that has little to do in between."""
        monkeypatch.setitem(ops.dispatch._OF_DEVICE, "meta", "triton")
        monkeypatch.setattr(triton, "available", lambda operator: (True, ""))
        step = DecodeStep(DeepseekV3(default_config("gpu").model).eval().to("meta"), 1, 256, 0.0)
        with GraphGuard() as guard:
            step()
        views = {
            "to", "unflatten", "split_with_sizes", "unsqueeze", "squeeze", "select", "view", "flatten", "detach",
            "view_as",
        }  # none casts  # fmt: skip
        assert len([name for name in guard.seen if name.split("::")[1].split(".")[0] not in views]) == 13 * 2 + 10

    @torch.inference_mode()
    def test_the_guard_would_notice(self):
        needs_native()
        step = DecodeStep(random_model(), 1, 8, 1.0)
        for forbidden in (lambda x: bool(x.isfinite().all()), lambda x: x[x > 0], lambda x: x.tolist()):
            choose = step._choose
            step._choose = lambda logits, f=forbidden, choose=choose: (f(logits), choose(logits))
            with pytest.raises(NotCapturableError), GraphGuard():
                step()
            step._choose = choose


class TestCapture:
    """Without a GPU: the stream and the recording are stood in for."""

    generate = staticmethod(partial(generate_ids, decoder_type=DeviceDecoder))

    @pytest.fixture(autouse=True)
    def no_gpu(self, monkeypatch):
        monkeypatch.setattr(capture, "_side_stream", nullcontext)

    def test_warm_up_and_recording_change_nothing(self, monkeypatch):
        replayed = []

        def record(step):
            step()
            return SimpleNamespace(replay=lambda: (replayed.append(None), step()))

        monkeypatch.setattr(capture, "record", record)
        model = random_model()
        for temperature in (0.0, 1.0):
            found = self.generate(model, prompts_of(model), 2 * BLOCK, temperature, seed=3)
            assert found == by_operators(model, prompts_of(model), 2 * BLOCK, temperature, seed=3)
        assert len(replayed) >= 2 * (2 * BLOCK - 1)
        assert not ops.fallbacks()

    @torch.inference_mode()
    def test_state_is_everything_that_a_step_changes_but_for_the_cache(self):
        step = DecodeStep(random_model(), 2, 9, 1.0)
        step.draw(3, torch.Generator())
        step.start(Prompts.pack([[3], [4, 5]]))
        everything = [*memory(step), *step.model.state_dict().values()]
        before = [x.clone() for x in everything]
        with capture.unchanged(step.state()):
            step()
        caches, written = (step.cache.latent, step.cache.k_rope), step.cache.lengths
        for now, old in zip(everything, before, strict=True):
            if any(now is cache for cache in caches):  # behind what the lengths say is there
                now[:, torch.arange(2), written] = old[:, torch.arange(2), written] = 0
            assert torch.equal(now.nan_to_num(), old.nan_to_num())

    def test_where_it_fails_steps_are_launched_one_by_one_and_it_is_said_once(self, monkeypatch):
        tried = []

        def record(step):
            tried.append(None)
            step()
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

        monkeypatch.setattr(capture, "record", record)
        model = random_model()
        with pytest.warns(ops.FallbackWarning, match="decode_step is launched operator by operator: capture as a CUDA"):
            assert self.generate(model, [[3]], 9) == by_operators(model, [[3]], 9)
        assert self.generate(model, [[4]], 9) == by_operators(model, [[4]], 9)
        assert len(tried) == 1
        (row,) = ops.fallbacks()
        assert (row["operator"], row["device"]) == ("decode_step", "cuda")
        assert row["reason"].endswith("operation not permitted when stream is capturing")

    @pytest.mark.parametrize(
        ("error", "message"),
        [
            (
                torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
                r"^out of GPU memory with 2 prompts at once and 10 tokens each: lower one \(CUDA out of memory. Tried to "
                r"allocate 2.00 GiB.\)$",
            ),
            (torch.AcceleratorError("device lost", 1), "^the GPU failed while generating: .*device lost"),
        ],
    )
    def test_what_a_gpu_cannot_do_is_one_line_and_the_next_call_begins_anew(self, error, message, monkeypatch):
        def failing():
            raise error

        model = random_model()
        with pytest.raises(UserError, match=message) as caught:
            generate_ids(model, [[3], [4, 5]], 9, decoder_type=partial(DeviceDecoder, launch=lambda step: failing))
        assert "\n" not in str(caught.value)
        assert by_device(model, [[3]], 9) == by_operators(model, [[3]], 9)

    def test_other_errors_are_not_the_gpus(self):
        def failing():
            raise RuntimeError("a mistake in the program")

        with pytest.raises(RuntimeError, match="a mistake in the program"):
            generate_ids(random_model(), [[3]], 9, decoder_type=partial(DeviceDecoder, launch=lambda step: failing))


def tiny_case() -> tuple[DeepseekV3, list[list[int]]]:
    """For the interpreter, which takes seconds for a few steps."""
    model = random_model(**MORE_VARIANTS["factorised"], max_position_embeddings=16)
    return model, prompts_of(model, (3, 1))


def interpreted() -> dict:
    """What is generated with every Triton kernel, the steps under the guard after one without kernels, as before a recording;
    and which kernels did not run."""
    seen = set()

    def guarded(step):
        with capture.unchanged(step.state()), poisoned():
            triton.compile_together(step)

        def call():
            with GraphGuard() as guard:
                step()
            seen.update(guard.seen)

        return call

    decoder, (model, prompts) = partial(DeviceDecoder, launch=guarded), tiny_case()
    with ops.use("triton"):
        ids = {str(t): generate_ids(model, prompts, 6, t, seed=3, decoder_type=decoder) for t in (0.0, 1.0)}
    used = set(OPERATORS) - FOR_TRAINING
    return {"ids": ids, "missing": sorted(used - operators_called(seen))}


@pytest.mark.skipif(INTERPRETED, reason="this is what starts the interpreter's process")
@pytest.mark.skipif(bool(triton.missing()), reason="needs triton")
def test_tokens_with_the_triton_kernels_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert child.returncode == 0, child.stdout[-2000:] + child.stderr[-4000:]
    found = json.loads(child.stdout.splitlines()[-1])
    model, prompts = tiny_case()
    assert found["missing"] == []
    assert found["ids"] == {str(t): by_operators(model, prompts, 6, t, seed=3) for t in (0.0, 1.0)}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestOnAGpu:
    @pytest.fixture(params=["factorised", "q_lora", "all at once"])
    def model(self, request):
        return random_model(**MORE_VARIANTS[request.param]).cuda()

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    @pytest.mark.parametrize("batch", [1, 4, 256])
    def test_replayed_launched_one_by_one_and_by_operators_the_same_tokens(self, model, batch, temperature):
        prompts = prompts_of(model, [1 + 5 * i % 23 for i in range(batch)])
        found = generate_ids(model, prompts, 40, temperature, seed=3)
        assert not [row for row in ops.fallbacks() if row["operator"] == "decode_step"]
        assert found == by_device(model, prompts, 40, temperature, seed=3)
        assert found == by_operators(model, prompts, 40, temperature, seed=3)

    def test_one_recording_serves_many_prompts_and_sees_new_weights(self, model):
        recordings = []
        decoder = partial(DeviceDecoder, launch=lambda step: (recordings.append(step), captured(step))[1])
        for seed in range(3):
            for prompt in prompts_of(model):
                found = generate_ids(model, [prompt], 20, decoder_type=decoder)
                assert found == by_operators(model, [prompt], 20)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1 + 0.05 * seed)
        assert len({id(step) for step in recordings}) == len(recordings) == 1

    def test_the_first_token_is_the_cpus(self, model):
        prompts = prompts_of(model)
        expected = generate_ids(copy.deepcopy(model).cpu(), prompts, 1)
        assert generate_ids(model, prompts, 1) == expected


if __name__ == "__main__":
    assert INTERPRETED, "set TRITON_INTERPRET=1"
    print(json.dumps(interpreted()))
