"""The compiled module: stale and missing builds, what it links, its threads, and every instruction set it holds."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from operator_cases import needs_native

from dsfast import ops
from dsfast.errors import UserError
from dsfast.ops import native

TESTS = Path(__file__).parent
OPERATOR_TESTS = [str(TESTS / f"test_{operator}.py") for operator in ops.OPERATORS]
BLOCKED = "import sys; sys.modules['dsfast._native'] = None; "  # makes its import an ImportError


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter with `environment` added."""
    return subprocess.run(
        [sys.executable, *arguments], env={**os.environ, **environment}, cwd=TESTS.parent, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip


@pytest.fixture
def fresh_status(monkeypatch):
    """native.status without what it remembers."""
    monkeypatch.delenv("DSFAST_REQUIRE_NATIVE", raising=False)
    native.status.cache_clear()
    yield monkeypatch
    native.status.cache_clear()


@pytest.mark.parametrize("threads", [1, 2])
def test_too_little_memory_for_a_kernel_is_a_memory_error_and_does_no_harm(threads):
    needs_native()
    code = f"""
import resource, torch
from pathlib import Path
from dsfast import ops
from dsfast.ops import native
torch.set_num_threads({threads})
def swiglu_backward(N, D, I):
    x, gate_up, down, gu = (torch.ones(shape) for shape in ((N, D), (2 * I, D), (D, I), (N, 2 * I)))
    grads = [torch.empty_like(t) for t in (x, gate_up, down)]
    native.module().swiglu_mlp_backward(
        x.data_ptr(), D, x.data_ptr(), D, gate_up.data_ptr(), down.data_ptr(), gu.data_ptr(),
        *(g.data_ptr() for g in grads), N, D, I, torch.get_num_threads())
    return grads
def attend(N):  # in tasks, where the other is in ranges of tokens
    q = torch.ones(N, 2, 1)
    ends = torch.tensor([0, 3, N], dtype=torch.int32)
    with ops.use("native"):
        return ops.mla_attention(q, q[..., :0], q, q[:, 0, :0], q, ends, 1.0)
expected, attended = swiglu_backward(64, 16, 8), attend(64)  # the threads are there now
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 2**27, resource.RLIM_INFINITY))
for attempt in range(6):
    try:
        if attempt % 2:
            attend(2**19)  # 8 MB, and 300 MB for each head of the second document
        else:
            swiglu_backward(64, 16, 2**15)  # 40 MB, and 400 MB of working memory for each thread
    except MemoryError:
        print("too little")
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
for found, wanted in zip(swiglu_backward(64, 16, 8), expected):
    assert torch.equal(found, wanted)
assert torch.equal(attend(64), attended)
"""
    child = run_python("-c", code, OMP_NUM_THREADS=str(threads))
    assert (child.returncode, child.stdout, child.stderr) == (0, "too little\n" * 6, "")


def test_more_threads_than_there_is_room_for():
    """csrc/parallel.h: MAX_THREADS work, and what is summed over threads is right."""
    needs_native()
    code = """
import torch
from dsfast import ops
hidden, weight, labels = torch.randn(19200, 3), torch.randn(5, 3, requires_grad=True), torch.randint(5, (19200,))
losses, gradients = [], []
for threads in (1, 300):
    torch.set_num_threads(threads)
    with ops.use("native"):
        losses.append(ops.linear_cross_entropy(hidden, weight, labels))
    gradients += torch.autograd.grad(losses[-1], weight)
assert abs(losses[0] - losses[1]) < 1e-6
assert (gradients[0] - gradients[1]).abs().max() < 1e-5
"""
    child = run_python("-c", code)
    assert child.returncode == 0, child.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="protects a page of memory")
def test_nothing_behind_an_input_or_working_memory_is_touched():
    """Each lies at the very end of memory, in a process that a read or write behind it would end (csrc/scratch.cpp)."""
    needs_native()
    done = run_python("-X", "faulthandler", "-c", AT_THE_END_OF_MEMORY, DSFAST_GUARD_SCRATCH="1")
    assert (done.returncode, done.stdout) == (0, "all run\n"), done.stderr[-1500:]


AT_THE_END_OF_MEMORY = """
import ctypes, mmap, sys
sys.path.insert(0, "tests")
import torch
from operator_cases import contract, drawn, run_native
from test_native_step import WITHOUT_MTP, flat, in_one_call
from tiny_models import random_model
from torch.utils._pytree import tree_map_only
from dsfast import ops
from dsfast.model import generate_ids
from dsfast.ops import native

def at_the_end(x):
    size = x.numel() * x.element_size()
    end = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    area = mmap.mmap(-1, end + mmap.PAGESIZE)
    behind = ctypes.addressof(ctypes.c_char.from_buffer(area)) + end
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(behind), mmap.PAGESIZE, 0) == 0
    if not size:
        return x
    return torch.frombuffer(area, dtype=x.dtype, count=x.numel(), offset=end - size).view(x.shape).copy_(x)

for operator in ops.OPERATORS:
    rounded = hasattr(native.module(), "bfloat16") and operator in native.OF_PRODUCTS
    for products in [torch.float32, torch.bfloat16][: 1 + rounded]:
        for case in (contract(operator).tiny, *contract(operator).cases[::2]):
            with ops.products_in(products):
                run_native(case, tree_map_only(torch.Tensor, at_the_end, drawn(case)))

wide = {"first_k_dense_replace": 1, "intermediate_size": 901, "v_head_dim": 41}  # MLP and heads that need more than others
one_expert = {**WITHOUT_MTP["factorised, untied"], "num_experts_per_tok": 1}
for changes in (WITHOUT_MTP["all at once"], one_expert, wide):
    model = random_model(**changes).train()
    for products in [torch.float32, torch.bfloat16][: 1 + hasattr(native.module(), "bfloat16")]:
        with ops.products_in(products):
            assert in_one_call(model, flat(model, (17, 29, 1, 33)))["loss"].isfinite()
    with ops.use("native"):
        for temperature in (0.0, 1.0):
            generate_ids(model.eval(), [[n % 7] for n in range(97)], max_new_tokens=2, temperature=temperature)
print("all run")
"""


class TestStaleAndMissing:
    def test_hash_changes_with_any_source(self, tmp_path):
        hash_of = runpy.run_path(str(native.SOURCES / "source_hash.py"))["source_hash"]
        (tmp_path / "a.cpp").write_text("int a;")
        (tmp_path / "a.h").write_text("int b;")
        first = hash_of(tmp_path)
        assert hash_of(tmp_path) == first
        (tmp_path / "a.h").write_text("int b; ")
        changed = hash_of(tmp_path)
        (tmp_path / "a.h").rename(tmp_path / "c.h")
        renamed = hash_of(tmp_path)
        (tmp_path / "CMakeLists.txt").write_text("")
        assert len({first, changed, renamed, hash_of(tmp_path)}) == 4

    def test_a_build_of_other_sources_counts_as_missing(self, fresh_status):
        needs_native()
        native.status.cache_clear()
        fresh_status.setattr(native, "source_hash", lambda: "another")
        module, reason = native.status()
        assert module is None
        assert re.search("built from other sources.*make build", reason)
        assert {row["implementation"] for row in ops.report("cpu")} == {"reference"}

    def test_without_sources_the_build_is_taken_as_it_is(self, fresh_status):
        needs_native()
        native.status.cache_clear()
        fresh_status.setattr(native, "source_hash", lambda: None)
        assert native.status()[0] is not None

    def test_required_but_stale_is_an_error(self, fresh_status):
        needs_native()
        native.status.cache_clear()
        fresh_status.setattr(native, "source_hash", lambda: "another")
        fresh_status.setenv("DSFAST_REQUIRE_NATIVE", "1")
        with pytest.raises(UserError, match="DSFAST_REQUIRE_NATIVE=1 forbids"):
            native.status()

    def test_missing_falls_back_with_a_warning(self):
        done = run_python("-c", BLOCKED + USE_AN_OPERATOR, DSFAST_REQUIRE_NATIVE="0")
        assert done.returncode == 0, done.stderr
        assert re.search(
            "FallbackWarning: rms_norm runs in plain PyTorch: dsfast._native is not built.*make build", done.stderr
        )

    def test_required_but_missing_is_an_error(self):
        done = run_python("-c", BLOCKED + USE_AN_OPERATOR, DSFAST_REQUIRE_NATIVE="1")
        assert done.returncode != 0
        assert re.search(r"UserError: dsfast._native is not built .*DSFAST_REQUIRE_NATIVE=1 forbids", done.stderr)


USE_AN_OPERATOR = "import torch; from dsfast import ops; ops.rms_norm(torch.ones(2, 3), torch.ones(3), 1e-6)"


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files and /proc")
class TestLinking:
    def test_links_no_torch_and_no_python(self):
        needs_native()
        # The names of needed libraries stand in the file's string table.
        names = set(re.findall(rb"lib[\w+.-]+\.so[.\d]*", Path(native.module().__file__).read_bytes()))
        assert any(name.startswith(b"libgomp") for name in names)
        assert not [name for name in names if re.match(rb"lib(torch|c10|python)", name)]

    def test_one_openmp_runtime_in_the_process(self):
        needs_native()
        with ops.use("native"):
            ops.rms_norm(torch.ones(64, 3), torch.ones(3), 1e-6)
        loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if ".so" in line}
        assert len({name for name in loaded if re.search(r"lib(gomp|omp|iomp5)[-.]", name)}) == 1

    def test_obeys_torch_set_num_threads(self):
        """Threads counted in a fresh process, where no other code has started any."""
        needs_native()
        done = run_python("-c", COUNT_THREADS, OMP_NUM_THREADS="1")
        assert done.stdout.split() == ["0", "1", "2"], done.stderr


COUNT_THREADS = """
import os, torch
from dsfast import ops
x = torch.ones(512, 64)
before = len(os.listdir("/proc/self/task"))
for threads in (1, 2, 3):
    torch.set_num_threads(threads)
    with ops.use("native"):
        ops.rms_norm(x, torch.ones(64), 1e-6)
    print(len(os.listdir("/proc/self/task")) - before)
"""


def test_attention_softmax_has_the_accuracy_of_exp():
    """csrc/simd.h: exp is at most 2 ulp off. Two keys, one with score 0 and value 0, one with score x <= -18 and value 1: the
    output is exp(x) itself, since 1 + exp(x) rounds to 1.
    """
    needs_native()
    x = torch.cat((torch.linspace(-87.3, -18, 40001), torch.tensor([-87.3, -87.0, -18.0])))
    found = exp_through_attention(x)
    exact = x.double().exp()
    ulp = 2.0 ** (torch.floor(torch.log2(exact)) - 23)
    assert ((found.double() - exact).abs() / ulp).max() <= 2
    below = exp_through_attention(torch.tensor([-87.4, -100.0, -1e4, -1e30]))
    assert below.max() <= 1.2e-38
    assert exp_through_attention(torch.tensor([torch.nan])).isnan().all()


def exp_through_attention(x: torch.Tensor) -> torch.Tensor:
    h = len(x)
    query = torch.stack((torch.zeros(h), x))[..., None]  # [N = 2, H, 1]; the second token asks
    key = torch.tensor([0.0, 1.0])[:, None, None].expand(2, h, 1)
    none = torch.zeros(2, h, 0)
    boundaries = torch.tensor([0, 2], dtype=torch.int32)
    with ops.use("native"):
        return ops.mla_attention(query, none, key, torch.zeros(2, 0), key, boundaries, 1.0)[1, :, 0]


class TestInstructionSets:
    def test_best_supported_is_chosen(self):
        needs_native()
        module = native.module()
        assert set(module.supported) <= set(module.compiled)
        assert module.supported[0] == "baseline"
        assert module.isa == os.environ.get("DSFAST_ISA", module.supported[-1])

    def test_unknown_name_lists_the_known(self):
        needs_native()
        done = run_python("-c", USE_AN_OPERATOR, DSFAST_ISA="avx1024", DSFAST_REQUIRE_NATIVE="1")
        assert done.returncode != 0
        assert "environment variable DSFAST_ISA is 'avx1024'; this processor runs: baseline" in done.stderr

    @pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
    def test_every_operator(self, isa):
        """All cases of all operators, generation and the accuracy of exp, in a process that runs the instruction set named."""
        needs_native()
        if isa not in native.module().supported:
            pytest.skip(f"this processor does not run {isa}")
        if isa == native.module().isa:
            pytest.skip("it is the one this process runs, and tests everywhere else")
        chosen = (
            "test_native_against_float64 or test_views or accuracy_of_exp or saturated or best_supported"
            " or test_native_tokens or test_a_sequence or test_cached_logits or test_greedy_choice or TestProducts"
            " or test_one_token_alone or test_nothing_behind"
        )
        others = (str(TESTS / "test_generate.py"), str(TESTS / "test_bfloat16.py"), __file__)
        command = ("-m", "pytest", "-x", "-k", chosen, *OPERATOR_TESTS, *others)
        done = run_python(*command, DSFAST_ISA=isa, DSFAST_REQUIRE_NATIVE="1")
        assert done.returncode == 0, done.stdout[-3000:]
        assert re.search(r"^\d{3,} passed", done.stdout.splitlines()[-1]), done.stdout[-300:]
