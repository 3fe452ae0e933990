"""Every Triton kernel compiled ahead of time for chips that are not here, and held to dsfast.triton_kernels.limits."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from dsfast.triton_kernels import mla_attention, pieces
from dsfast.triton_kernels.ahead import compile_launch
from dsfast.triton_kernels.limits import CHIPS

from dsfast.bench.compile import compile_example, examples, kernels_of, operators


def each(dtypes, wanted):
    """A test for every example launch at the sizes `wanted` says yes to, on every chip."""
    return pytest.mark.parametrize("example", examples(operators(), list(CHIPS), dtypes, wanted), ids="-".join)


def assert_within_limits(example):
    row = compile_example(example)
    assert not row["faults"], row
    assert (row["repeated"] or 1) <= 1, row


@each(["bfloat16"], lambda size: size == "DeepSeek-V3")
def test_deepseek_v3(example):
    assert_within_limits(example)


def those_of_other_sizes():
    """An example on sm_90 for each kernel that DeepSeek-V3's sizes do not launch."""
    found, seen = [], set()
    planned = examples(operators(), ["sm_90"], ["bfloat16"], lambda size: True)
    for example in sorted(planned, key=lambda example: example.size != "DeepSeek-V3"):
        name = example.operator, example.launch().kernel.__name__
        found += [example] if name not in seen and example.size != "DeepSeek-V3" else []
        seen.add(name)
    return found


@pytest.mark.parametrize("example", those_of_other_sizes(), ids="-".join)
def test_kernels_of_other_sizes(example):
    assert_within_limits(example)


@pytest.mark.slow
@each(["bfloat16"], lambda size: size != "DeepSeek-V3")
def test_other_sizes(example):
    assert_within_limits(example)


@pytest.mark.slow
@each(["float16", "float32"], lambda size: size in ("500K", "DeepSeek-V3"))
def test_other_dtypes(example):
    assert_within_limits(example)


def names_of_kernels(module):
    return {name for name in vars(module) if name.endswith("_kernel")}


def launched_by(module):
    return {
        launch.kernel.__name__
        for size in module.EXAMPLES
        for launch in module.example_launches(size, torch.bfloat16, large=True).values()
    }


@pytest.mark.parametrize("operator", operators())
def test_every_kernel_is_an_example(operator):
    """No kernel goes uncompiled: an example launches each @triton.jit function named ..._kernel, and it may launch others'."""
    module = kernels_of(operator)
    assert names_of_kernels(module) <= launched_by(module)


def test_every_shared_kernel_is_an_example():
    assert names_of_kernels(pieces) <= set().union(*(launched_by(kernels_of(operator)) for operator in operators()))


def entries_of_tables(module) -> dict[tuple[int, object], str]:
    """Row and key of each entry in the tables of tiles -> what the source calls it."""
    found = {}
    for name, table in vars(module).items():
        for kernel, row in table.items() if is_a_table(table) else ():
            found |= {(id(row), key): f"{name}[{kernel!r}][{key!r}]" for key in row}
    return found


def is_a_table(value) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(row, dict) for row in value.values())


@pytest.mark.parametrize("operator", operators())
def test_every_entry_of_a_table_is_compiled(operator, monkeypatch):
    """For a chip and a dtype that has it some example's launches read it."""
    module, read = kernels_of(operator), set()

    class Watched(dict):
        def __init__(self, row):
            super().__init__(row)
            self.row = id(row)

        def __getitem__(self, key):
            read.add((self.row, key))
            return super().__getitem__(key)

    expected = entries_of_tables(module)
    for name, table in list(vars(module).items()):
        if is_a_table(table):
            monkeypatch.setattr(module, name, {kernel: Watched(row) for kernel, row in table.items()})
    for size in module.EXAMPLES:
        for dtype in (torch.float32, torch.bfloat16):
            for chip in CHIPS.values():
                module.example_launches(size, dtype, chip.large)
    assert [name for entry, name in expected.items() if entry not in read] == []


def test_limits_find_what_breaks_them():
    launch = mla_attention.example_launches("DeepSeek-V3", torch.bfloat16, large=True)["forward_kernel"]
    kept = compile_launch(launch, "sm_90")
    assert kept.matrix > 0
    broken = type(kept)(
        "k", "sm_90", registers=255, spills=8, shared=232_449, matrix=0, copies=0, repeated=1.5, serialized=True
    )
    assert [fault.split(": ")[1].split()[0] for fault in broken.faults(launch)] == ["8", "232449", "no", "the", "each"]


def test_products_computed_twice_are_found():
    """The keys' kernel at DeepSeek-V3's widths has 8 warps for 64 rows: as a chain its products are laid out so that both warp
    groups compute the same scores, 104 instructions instead of 64."""
    launch = mla_attention.example_launches("DeepSeek-V3", torch.bfloat16, CHIPS["sm_90"].large)["backward_kv_kernel"]
    assert launch.options["num_warps"] == 8
    assert launch.rows == 64
    kept = compile_launch(launch, "sm_90")
    assert kept.repeated == 1
    launch.arguments["APART"] = False
    chained = compile_launch(launch, "sm_90")
    assert chained.repeated == 1.5
    assert chained.matrix > kept.matrix


def test_blocks_divide_tiles():
    """What mla_attention's loops rest on: blocks of keys fill a tile of queries, blocks of queries a tile of keys."""
    for table in (mla_attention._FLOAT32, mla_attention._LARGE, mla_attention._SM_100, mla_attention._SMALL):
        for kernel, by_width in table.items():
            for bt, bs, _, _ in by_width.values():
                assert (bs % bt if kernel == "backward_kv" else bt % bs) == 0
