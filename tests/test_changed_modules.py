"""Modules that have hooks or were replaced, as by what looks at activations, LoRA, or a patch: nothing passes them by."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from operator_cases import needs_native
from tiny_models import next_tokens, random_ids, random_model
from torch import nn

from dsfast import ops
from dsfast.errors import UserError
from dsfast.model import captured, generate_ids, loss_in
from dsfast.model.changed import note_changed
from dsfast.model.decode import OperatorDecoder
from dsfast.model.layers import RMSNorm, StreamNorm, is_plain
from dsfast.model.moe import DeepseekMoE
from dsfast.model.native_model import runs_natively
from dsfast.train import steps

CHANGED = r"module '[\w.]+' is not dsfast's own, or has hooks"
MODELS = {
    "tied": {"num_nextn_predict_layers": 1, "first_k_dense_replace": 1},
    "untied, latent of the queries": {"tie_word_embeddings": False, "q_lora_rank": 9, "embedding_rank": 8},
}
pytestmark = pytest.mark.filterwarnings(f"ignore:.*{CHANGED}")


def seen_by(model, call) -> set[str]:
    """The modules whose forward hooks `call` has run."""
    seen = set()
    handles = [
        module.register_forward_hook(lambda *_, name=name: seen.add(name)) for name, module in model.named_modules()
    ]
    call()
    for handle in handles:
        handle.remove()
    return seen


def with_a_forward(model, mtp: bool) -> set[str]:
    """The modules, but for the model, that are called as modules; those of multi-token prediction if `mtp`."""
    called = {name for name, module in model.named_modules() if name and not isinstance(module, nn.ModuleList)}
    return {name for name in called if mtp or not name.startswith("mtp")}


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
class TestHooks:
    def test_a_forward_pass_runs_them_all(self, changes):
        model = random_model(**changes)
        assert seen_by(model, lambda: model(random_ids(model, 2, 7))) == with_a_forward(model, mtp=False) | {""}

    def test_each_step_of_generation_runs_them_all(self, changes):
        model = random_model(**changes)
        seen = []
        generate_ids(model, [[3, 4, 5]], max_new_tokens=2, decoder_type=in_turn(model, seen))
        assert seen == [with_a_forward(model, mtp=False)] * 2

    def test_training_runs_them_all(self, changes):
        model = random_model(**changes).train()
        ids = random_ids(model, 2, 7)
        if model.lm_head is not None:
            model.lm_head.register_forward_hook(lambda *_: None)
            with pytest.raises(UserError, match=r"^lm_head: the loss takes its weight alone; expected torch.nn.Linear"):
                model.loss(ids, next_tokens(ids))
        else:
            assert seen_by(model, lambda: model.loss(ids, next_tokens(ids))) == with_a_forward(model, mtp=True)


def in_turn(model, seen: list[set[str]]):
    """An OperatorDecoder that notes whose hooks each of its calls has run."""

    class Noting(OperatorDecoder):
        def start(self, prompts):
            return self._noting(lambda: super(Noting, self).start(prompts))

        def step(self):
            return self._noting(lambda: super(Noting, self).step())

        def _noting(self, call):
            chosen = []
            seen.append(seen_by(model, lambda: chosen.append(call())))
            return chosen[0]

    return Noting


def hook(model):
    model.layers[0].mlp.register_forward_hook(lambda module, given, output: 0 * output)


def hook_of_a_norm(model):
    model.layers[1].input_layernorm.register_forward_hook(
        lambda module, given, output: ((-output[0][0],) * 2, output[1])
    )


def wrapped(model):
    attention = model.layers[1].self_attn
    attention.o_proj = nn.Sequential(attention.o_proj, nn.Tanh())


def forward(model):
    mlp = model.layers[0].mlp
    mlp.forward = lambda *x: 0 * type(mlp).forward(mlp, *x)


def bias(model):
    attention = model.layers[1].self_attn
    attention.o_proj = nn.Linear(attention.o_proj.in_features, attention.o_proj.out_features)


def eps(model):
    model.layers[0].post_attention_layernorm.eps = 10.0


def choice(model):
    gate = model.layers[1].mlp.gate
    *others, scaling, scoring_func = gate.choice
    gate.choice = (*others, 3 * scaling, scoring_func)


def scale(model):
    model.layers[0].self_attn.scale *= 9


@pytest.mark.parametrize("change", [hook, hook_of_a_norm, wrapped, forward, bias, eps, choice, scale])
def test_generation_does_not_pass_them_by(change):
    needs_native()
    model, fresh = random_model(), random_model()
    change(model)
    with pytest.warns(ops.FallbackWarning, match=CHANGED):
        found = generate_ids(model, [[3, 4, 5]], max_new_tokens=6)
    with ops.use("reference"):
        assert found == generate_ids(model, [[3, 4, 5]], max_new_tokens=6)
    assert found != generate_ids(fresh, [[3, 4, 5]], max_new_tokens=6)


def test_generation_does_not_pass_by_a_method_that_is_another(monkeypatch):
    """As after a change to dsfast/model: C++ repeats what was said there before. It shows where products are not zero."""
    needs_native()
    model, prompt = random_model(), [[3, 4, 5]]
    unchanged = generate_ids(model, prompt, max_new_tokens=6)
    weights = {name: p.clone() for name, p in model.named_parameters() if name.endswith(("o_proj.weight", "down_proj"))}
    of_moe = DeepseekMoE.forward
    monkeypatch.setattr(DeepseekMoE, "forward", lambda self, *x: -of_moe(self, *x))
    with torch.no_grad():
        for name in weights:
            model.get_parameter(name).zero_()
        generate_ids(model, prompt, max_new_tokens=6)
        for name, weight in weights.items():
            model.get_parameter(name).copy_(weight)
        model.embed_tokens.weight.mul_(1)  # training changes all
    with pytest.warns(
        ops.FallbackWarning, match=r"generation runs operator by operator: logits differ by .*decode_step"
    ):
        found = generate_ids(model, prompt, max_new_tokens=6)
    with ops.use("reference"):
        assert found == generate_ids(model, prompt, max_new_tokens=6)
    assert found != unchanged
    monkeypatch.setattr(DeepseekMoE, "forward", of_moe)
    assert generate_ids(model, prompt, max_new_tokens=6) == unchanged


def test_generation_does_not_pass_a_head_by():
    model = random_model(tie_word_embeddings=False)
    model.lm_head = nn.Sequential(model.lm_head, nn.Softmin(dim=-1))
    logits = random_model(tie_word_embeddings=False)(torch.tensor([[3]]))
    assert generate_ids(model, [[3]], max_new_tokens=1) == [[int(logits.argmin())]]


class Adapted(nn.Module):
    """W x + B A x, as LoRA trains."""

    def __init__(self, base: nn.Linear, rank: int = 2):
        super().__init__()
        self.base = base
        self.a, self.b = nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)

    @property
    def weight(self):
        """W alone, as adapters of other libraries say."""
        return self.base.weight

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))

    def merged(self):
        return self.base.weight.data + self.b.weight.data @ self.a.weight.data


def test_an_adapter_gives_the_tokens_of_the_merged_weights():
    """Decoding multiplies queries by what `kv_b_proj` multiplies latents by, and never calls it on a latent."""
    model, merged = random_model(), random_model()
    for layer, plain in zip(model.layers, merged.layers, strict=True):
        adapter = layer.self_attn.kv_b_proj = Adapted(layer.self_attn.kv_b_proj)
        plain.self_attn.kv_b_proj.weight.data = adapter.merged()
    found = generate_ids(model, [[3, 4, 5], [6]], max_new_tokens=12)
    assert found == generate_ids(merged, [[3, 4, 5], [6]], max_new_tokens=12)
    assert found != generate_ids(random_model(), [[3, 4, 5], [6]], max_new_tokens=12)


@pytest.mark.parametrize("bias", [False, True])
def test_keys_and_values_that_are_not_linear_cannot_be_decoded(bias):
    model = random_model()
    attention = model.layers[0].self_attn
    added = nn.Linear(attention.kv_b_proj.out_features, attention.kv_b_proj.out_features) if bias else nn.Tanh()
    attention.kv_b_proj = nn.Sequential(attention.kv_b_proj, added)
    with pytest.raises(UserError, match=r"^kv_b_proj: .* must be linear, without a bias$"):
        generate_ids(model, [[3, 4, 5]], max_new_tokens=3)


HOOKS = [name for name in dir(nn.Module) if re.fullmatch(r"register_\w*(forward|backward)\w*_hook", name)]


@pytest.mark.parametrize("register", HOOKS)
def test_what_takes_a_weight_does_not_stand_for_a_module_with_hooks(register):
    for module in (nn.Linear(2, 3, bias=False), RMSNorm(2, 1e-6), StreamNorm(2, 1e-6)):
        assert is_plain(module)
        handle = getattr(module, register)(lambda *_: None)
        assert not is_plain(module)
        handle.remove()
        assert is_plain(module)


@pytest.mark.parametrize(
    ("at_once", "passed_by"),
    [
        (
            "projects_at_once",
            ["self_attn", *(f"self_attn.{x}" for x in ("q_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj"))],
        ),
        ("projects_at_once", ["input_layernorm"]),
        ("outputs_at_once", ["self_attn.o_proj", "post_attention_layernorm"]),
    ],
)
def test_a_launch_for_several_modules_is_not_asked_for_where_one_has_hooks(at_once, passed_by, monkeypatch):
    asked = []
    monkeypatch.setattr(ops, at_once, lambda *_: bool(asked.append(at_once)))
    model = random_model(num_hidden_layers=1)
    model(torch.tensor([[1, 2]]))
    assert asked == [at_once]
    for name in passed_by:
        asked.clear()
        handle = model.layers[0].get_submodule(name).register_forward_hook(lambda *_: None)
        model(torch.tensor([[1, 2]]))
        assert not asked, name
        handle.remove()


def test_what_takes_a_weight_stands_for_nothing_else():
    assert not is_plain(nn.Linear(2, 3))
    assert not is_plain(nn.RMSNorm(2))
    patched = nn.Linear(2, 3, bias=False)
    patched.forward = lambda x: x
    assert not is_plain(patched)


def test_a_gpu_records_no_step_of_them(monkeypatch):
    monkeypatch.setattr(steps, "DeviceSteps", lambda trainer, launch: launch)
    model = random_model()
    trainer = SimpleNamespace(device=torch.device("cuda"), model=model)
    assert steps.steps_of(trainer).func is captured
    hook(model)
    launch = steps.steps_of(trainer)
    assert launch("a step") == "a step"


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_gpu_goes_step_by_step_where_a_parameter_has_hooks(register, monkeypatch):
    """A recorded step has copies of the weights in 16 bits, and what a hook does in Python is not replayed."""
    monkeypatch.setattr(steps, "DeviceSteps", lambda trainer, launch: launch)
    trainer = SimpleNamespace(device=torch.device("cuda"), model=random_model())
    handle = getattr(trainer.model.norm.weight, register)(lambda *_: None)
    with pytest.warns(ops.FallbackWarning, match=r"is not made: parameter 'norm\.weight' has hooks"):
        assert isinstance(steps.steps_of(trainer), steps.HostSteps)
    handle.remove()
    assert steps.steps_of(trainer).func is captured


def test_steps_that_cast_weights_ask_a_parameters_hooks():
    model, seen = random_model(), []
    model.norm.weight.register_hook(lambda gradient: 0 * gradient)
    model.norm.weight.register_post_accumulate_grad_hook(seen.append)
    ids = torch.tensor([[5, 6, 7]])
    with ops.use("reference"):
        loss_in(torch.bfloat16, model, 0.0, ids, ids).backward()
    assert not model.norm.weight.grad.any()
    assert model.layers[0].input_layernorm.weight.grad.any()
    assert seen == [model.norm.weight]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_does_not_replay_what_was_recorded_before_a_hook():
    sizes = {"kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
    model = random_model(**sizes).to("cuda", torch.bfloat16)
    fresh = generate_ids(model, [[3, 4, 5]], max_new_tokens=6)
    hook(model)
    found = generate_ids(model, [[3, 4, 5]], max_new_tokens=6)
    assert found != fresh
    assert found == generate_ids(model, [[3, 4, 5]], max_new_tokens=6, decoder_type=OperatorDecoder)


def test_the_module_is_named_and_a_plain_model_is_not_warned_of():
    model = random_model()
    assert not note_changed(model)
    handle = model.layers[1].mlp.gate.register_forward_pre_hook(lambda *_: None)
    with pytest.warns(ops.FallbackWarning, match=re.escape("module 'layers.1.mlp.gate' is not dsfast's own")):
        assert note_changed(model)
    handle.remove()
    assert not note_changed(model)


@pytest.mark.parametrize("name", ["embed_tokens.weight", "layers.0.self_attn.q_proj.weight", "rope.cos"])
def test_tensors_of_other_shapes_are_left_to_the_operators(name):
    needs_native()
    model = random_model()
    assert runs_natively(model)
    module, _, last = name.rpartition(".")
    owner = model.get_submodule(module)
    cut = getattr(owner, last).detach()[:-1].clone()
    setattr(owner, last, nn.Parameter(cut) if last == "weight" else cut)
    with pytest.warns(ops.FallbackWarning, match="other shapes than the config's"):
        assert not runs_natively(model)


def test_a_smaller_vocabulary_generates():
    needs_native()
    model = random_model()
    model.embed_tokens.weight = nn.Parameter(model.embed_tokens.weight.detach()[:-3].clone())
    with pytest.warns(ops.FallbackWarning, match="other shapes"):
        found = generate_ids(model, [[3, 4, 5]], 4)
    assert found == generate_ids(model, [[3, 4, 5]], 4, decoder_type=OperatorDecoder)


def test_a_router_bias_of_another_dtype_is_left_to_the_operators():
    model = random_model()
    for router in model.routers():
        router.e_score_correction_bias = router.e_score_correction_bias.bfloat16()
    assert not runs_natively(model)


@torch.no_grad()
@pytest.mark.parametrize("name", ["q_proj", "kv_a_proj_with_mqa"])
def test_what_a_hook_keeps_is_not_turned(name):
    model, seen = random_model(), []
    hooked = model.layers[0].self_attn.get_submodule(name)
    hooked.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    model(torch.tensor([[3, 4, 5, 6]]))
    ((x, y),) = seen
    torch.testing.assert_close(y, x @ hooked.weight.T)
