"""Every Triton kernel compiled ahead of time for chips that are not here, and held to dsfast.triton_kernels.limits."""

from __future__ import annotations

import re
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby

import pytest
import torch

pytest.importorskip("triton")

import triton
from dsfast.triton_kernels import ahead, mla_attention, mla_attention_kept, mla_decode, moe_route, pieces, rms_norm
from dsfast.triton_kernels import launch as launch_module
from dsfast.triton_kernels.ahead import compile_launch, compiled_kernel, unset
from dsfast.triton_kernels.limits import CHIPS
from dsfast.triton_kernels.version import numbers

from dsfast.bench.compile import DTYPES, compile_example, examples, kernels_of, operators


def each(dtypes, wanted, chips=tuple(CHIPS)):
    """A test for every example launch at the sizes `wanted` says yes to, on each of `chips`."""
    return pytest.mark.parametrize("example", examples(operators(), chips, dtypes, wanted), ids="-".join)


def assert_within_limits(example):
    row = compile_example(example)
    assert not row["faults"], row


DEFAULT = ("500K", "DeepSeek-V3")


@each(["bfloat16"], lambda size: size == "DeepSeek-V3")
def test_deepseek_v3(example, request):
    if numbers(triton.__version__) == (3, 7) and example[::4] == ("mla_decode", "sm_90") and "attend" in example.kernel:
        request.applymarker(pytest.mark.xfail(strict=True, reason="by triton 3.7 registers of 128 heads spill"))
    assert_within_limits(example)


@each(["bfloat16"], lambda size: size == "500K", ["sm_90"])
def test_the_products_own_size(example):
    """On one chip: all four take minutes, the others are among the slow tests."""
    assert_within_limits(example)


def those_of_other_sizes():
    """An example on sm_90 for each kernel that neither size launches."""
    found, seen = [], set()
    planned = examples(operators(), ["sm_90"], ["bfloat16"], lambda size: True)
    for example in sorted(planned, key=lambda example: example.size not in DEFAULT):
        name = example.operator, example.launch().kernel.__name__
        found += [example] if name not in seen and example.size not in DEFAULT else []
        seen.add(name)
    return found


@pytest.mark.parametrize("example", those_of_other_sizes(), ids="-".join)
def test_kernels_of_other_sizes(example):
    assert_within_limits(example)


@pytest.mark.slow
@each(["bfloat16"], lambda size: size != "DeepSeek-V3")
def test_other_sizes(example):
    assert_within_limits(example)


def is_a_table(value) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(row, dict) for row in value.values())


def entries_of_tables(module) -> dict[tuple[int, object], str]:
    """Row and key of each entry in the tables of tiles -> what the source calls it."""
    found = {}
    for name, table in vars(module).items():
        for kernel, row in table.items() if is_a_table(table) else ():
            found |= {(id(row), key): f"{name}[{kernel!r}][{key!r}]" for key in row}
    return found


def entries_read(module, size: str, dtype: torch.dtype) -> set[tuple]:
    """Row, key and chip (as launchers tell them apart) of each entry that the launches of an example read."""
    read = set()

    class Watched(dict):
        def __init__(self, row):
            super().__init__(row)
            self.row = id(row)

        def __getitem__(self, key):
            read.add((self.row, key, chip))
            return super().__getitem__(key)

    with pytest.MonkeyPatch.context() as patch:
        for name, table in list(vars(module).items()):
            if is_a_table(table):
                patch.setattr(module, name, {kernel: Watched(row) for kernel, row in table.items()})
        for chip in {chip.large for chip in CHIPS.values()}:
            module.example_launches(size, dtype, chip)
    return read


def sizes_that_read_every_entry(operator: str, dtype: str) -> list[str]:
    """DEFAULT's, and of the others each that reads an entry on a chip which none before it has read there."""
    module, chosen, seen = kernels_of(operator), [], set()
    for size in sorted(module.EXAMPLES, key=lambda size: size not in DEFAULT):
        read = entries_read(module, size, DTYPES[dtype])
        chosen += [size] if size in DEFAULT or read - seen else []
        seen |= read
    return chosen


def those_of_other_dtypes():
    """In bfloat16 every size is compiled; in the others as many as leave no entry of a table uncompiled on a chip that has it."""
    return [
        example
        for operator in operators()
        for dtype in ("float16", "float32")
        for example in examples(
            [operator], list(CHIPS), [dtype], sizes_that_read_every_entry(operator, dtype).__contains__
        )
    ]


@pytest.mark.slow
@pytest.mark.parametrize("example", those_of_other_dtypes(), ids="-".join)
def test_other_dtypes(example):
    assert_within_limits(example)


def names_of_kernels(module):
    return {name for name in vars(module) if name.endswith("_kernel")}


def launched_by(module):
    return {
        launch.kernel.__name__
        for size in module.EXAMPLES
        for launch in module.example_launches(size, torch.bfloat16, CHIPS["sm_90"].large).values()
    }


@pytest.mark.parametrize("operator", operators())
def test_every_kernel_is_an_example(operator):
    """No kernel goes uncompiled: an example launches each @triton.jit function named ..._kernel, and it may launch others'."""
    module = kernels_of(operator)
    assert names_of_kernels(module) <= launched_by(module)


def test_every_shared_kernel_is_an_example():
    assert names_of_kernels(pieces) <= set().union(*(launched_by(kernels_of(operator)) for operator in operators()))


@pytest.mark.parametrize("operator", operators())
def test_every_entry_of_a_table_is_compiled(operator):
    """Some chip and dtype of the examples that are compiled, above, reads it."""
    module, read = kernels_of(operator), set()
    for dtype, sizes in (("bfloat16", module.EXAMPLES), ("float32", sizes_that_read_every_entry(operator, "float32"))):
        read |= {entry[:2] for size in sizes for entry in entries_read(module, size, DTYPES[dtype])}
    assert [name for entry, name in entries_of_tables(module).items() if entry not in read] == []


def test_limits_find_what_breaks_them():
    launch = mla_attention.example_launches("DeepSeek-V3", torch.bfloat16, CHIPS["sm_90"].large)["forward_kernel"]
    kept = compile_launch(launch, "sm_90")
    assert kept.matrix > 0
    broken = type(kept)(
        "k", "sm_90", registers=255, spills=8, shared=232_449, matrix=0, copies=0, repeated=1.5, serialized=True,
        unset=("UMOV UR4, UR5",),
    )  # fmt: skip

    def faults(rows: int, stages: int) -> list[str]:
        sized = replace(launch, rows=rows, options=launch.options | {"num_stages": stages})
        return [fault.split(": ")[1].split()[0] for fault in broken.faults(sized)]

    assert faults(64, 2) == ["8", "232449", "no", "the", "products", "each", "ptxas"]
    assert faults(63, 1) == ["8", "232449", "products", "each", "ptxas"]


@pytest.mark.parametrize("chip", ["sm_90", "gfx942"])
def test_registers_in_memory_are_counted(chip):
    """Of a kernel that may have too few of them."""
    launch = rms_norm.example_launches("500K", torch.bfloat16, CHIPS[chip].large)["backward_kernel"]
    few = {"maxnreg": 24} if chip == "sm_90" else {"waves_per_eu": 8, "num_warps": 1}
    compiled = compile_launch(replace(launch, options=launch.options | few), chip)
    assert compiled.spills > 0
    assert any("bytes of registers spilled" in fault for fault in compiled.faults(launch))


def test_machine_code_is_made_by_a_ptxas_that_is_right_for_its_chip(monkeypatch):
    launch, inside = rms_norm.example_launches("500K", torch.bfloat16, 0)["forward_kernel"], []
    right_ptxas = ahead.right_ptxas

    @contextmanager
    def noted(arch):
        with right_ptxas(arch):
            inside.append(arch)
            yield
            inside.remove(arch)

    product = compiled_kernel(mla_attention.example_launches("500K", torch.bfloat16, 9)["forward_kernel"], "sm_90")
    get_ptxas = ahead.get_ptxas
    monkeypatch.setattr(ahead, "right_ptxas", noted)
    monkeypatch.setattr(ahead, "get_ptxas", lambda arch: get_ptxas(arch) if inside == [arch] else None)
    assert not ahead._serialized(product, 90)
    monkeypatch.setattr(triton, "compile", lambda source, target, options: list(inside))
    assert [compiled_kernel(launch, chip) for chip in ("sm_90", "sm_80", "gfx942")] == [[90], [80], []]
    assert not inside


SASS = """
        /*0000*/                   UMOV UR14, 0x840 ;                        /* 0x0000084000057882 */
        /*0010*/                   ULDC.64 UR6, c[0x0][0x208] ;              /* 0x0000820000067ab9 */
        /*0020*/                   UMOV UR10, UR14 ;                         /* 0x0000000e000a7c82 */
        /*0030*/                   UMOV UR11, 0x80000020 ;                   /* 0x80000020000b7882 */
        /*0040*/                   HGMMA.64x32x16.F32.BF16 R24, R96, gdesc[UR8].tnspB, RZ, !UPT ;
        /*0050*/              @!P0 LDG.E.128 R52, desc[UR6][R148.64] ;       /* 0x0000000694348981 */
        /*0060*/                   UIADD3 UR14, UP0, UR{base}, 0x40, URZ ;   /* 0x00000040050e7890 */
        /*0070*/                   UIADD3.X UR15, URZ, -0x7fffffe0, URZ, UP0, !UPT ;
        /*0080*/                   HGMMA.64x32x16.F32.BF16 R24, R100, gdesc[UR12].tnspB, R24 ;
        /*0090*/                   UIMAD.WIDE.U32 UR16, UR6, 0x8, URZ ;
        /*00a0*/                   ULDC.128 UR20, c[0x0][0x210] ;
        /*00b0*/                   UIADD3 UR16, UR17, UR23, URZ ;
        /*00c0*/                   ULOP3.LUT UP0, UR30, UR16, 0x1, URZ, 0xc0, !UPT ;
        /*00d0*/                   ULOP3.LUT UR31, UR30, 0x1, URZ, 0xc0, !UPT ;
        /*00e0*/                   UISETP.NE.AND UP1, UPT, UR31, UR30, UPT ;
"""


@pytest.mark.parametrize(("base", "found"), [("14", ()), ("5", ("UIADD3 UR14, UP0, UR5, 0x40, URZ",))])
def test_registers_that_nothing_has_set_are_found(base, found):
    """As ptxas 12.8 made it of a product of mla_project's; of its own operands in shared memory a descriptor has all four."""
    assert unset(SASS.format(base=base)) == found
    right = SASS.format(base=base).replace("R100, gdesc[UR12]", "R100, gdesc[UR24]")
    assert unset(right) == (*found, "HGMMA.64x32x16.F32.BF16 R24, R100, gdesc[UR24].tnspB, R24")
    tested = "UISETP.NE.AND UP1, UPT, UR31, UR{}, UPT"
    assert unset(SASS.format(base=base).replace(tested.format(30), tested.format(32))) == (*found, tested.format(32))
    shared = SASS.format(base=base).replace("R24, R100, gdesc[UR12].tnspB", "R24, gdesc[UR12].tnspA.tnspB")
    assert unset(shared) == (*found, "HGMMA.64x32x16.F32.BF16 R24, gdesc[UR12].tnspA.tnspB, R24")


@pytest.mark.parametrize("kernel", ["backward_kernel", "backward_kernel, 3 uses"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_widest_norm_fits_chips_with_less_shared_memory(kernel, dtype):
    """The 99 KB of sm_86, sm_89 and sm_120, which take sm_80's tiles."""
    compiled = compile_launch(rms_norm.example_launches("widest", dtype, large=0)[kernel], "sm_80")
    assert compiled.shared <= 101_376


@pytest.mark.skipif(pieces.BY_3_7, reason="by triton 3.6 and 3.7 no kernel has 8 warps for 64 rows")
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


EVENTS = {
    r"cp\.async\.c[ag]\b": "C", r"cp\.async\.wait_group": "D", r"wgmma\.mma_async": "M", r"wgmma\.wait_group": "W", r"ex2\.": "E",
}  # fmt: skip


def order(launch) -> str:
    """What a kernel does on sm_90 in the order of its assembly, equal neighbours once: C and D ask for copies into shared memory
    and wait for them, M and W for products, E takes exponentials."""
    ptx = compiled_kernel(launch, "sm_90").asm["ptx"]
    found = (
        next(event for name, event in EVENTS.items() if re.match(name, text))
        for text in re.findall("|".join(EVENTS), ptx)
    )
    return "".join(event for event, _ in groupby(found))


def test_scores_of_the_next_queries_are_under_way_beside_the_exponentials_of_these():
    launches = mla_attention_kept.example_launches("DeepSeek-V3", torch.bfloat16, CHIPS["sm_90"].large)
    assert "ME" in order(launches["scores_kernel"]).replace("C", "")


@pytest.mark.parametrize("size", mla_attention_kept.EXAMPLES)
def test_kept_gradients_are_stored_16_bytes_at_a_time(size):
    """By triton 3.6 a mask that it knows nothing of makes it 2 bytes at a time."""
    for launch in mla_attention_kept.example_launches(size, torch.bfloat16, CHIPS["sm_90"].large).values():
        assert not re.search(r"\bst\.global\S*\.b16\b", compiled_kernel(launch, "sm_90").asm["ptx"])


@pytest.mark.parametrize("size", ["DeepSeek-V3", "few experts"])
def test_choices_are_counted_without_a_mask(size):
    """Triton reshapes what a histogram takes, and its mask, each as suits itself: a mask may then be another place's. That shows
    in no interpreter, and on a GPU only where some places hold no choice."""
    launches = moe_route.example_launches(size, torch.float32, CHIPS["sm_90"].large)
    for name in {"forward_kernel", "forward_kernel, from tokens"} & launches.keys():
        histograms = re.findall(r"tt\.histogram (.*) :", compiled_kernel(launches[name], "sm_90").asm["ttir"])
        assert len(histograms) == 1
        assert "," not in histograms[0]


def test_the_next_places_of_a_cache_are_on_their_way_beside_both_products():
    launches = mla_decode.example_launches("DeepSeek-V3", torch.bfloat16, CHIPS["sm_90"].large)
    launch = launches["attend_kernel, contiguous"]
    assert launch.arguments["AHEAD"]
    assert "DCM" in order(launch)
    launch.arguments["AHEAD"] = None
    assert "DCM" not in order(launch)


@pytest.mark.parametrize("value", ["1", "true", "True", "on", "y", "0", "false", "", "2", "no"])
def test_what_asks_for_the_interpreter_is_what_triton_takes_for_it(value, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert launch_module.interpreted() is triton.knobs.runtime.interpret


@pytest.mark.parametrize(
    ("capability", "hip", "chip"),
    [
        ((8, 0), None, "sm_80"), ((9, 0), None, "sm_90"), ((10, 3), None, "sm_100"), ((12, 0), None, "sm_80"),
        ((9, 4), "7.0", "gfx942"),
    ],
    ids=str,
)  # fmt: skip
def test_which_tiles_a_gpu_has(capability, hip, chip, monkeypatch):
    """An sm_120 has less shared memory than an sm_80, and a gfx942 says that it is 9.4."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert launch_module.large_tiles(torch.device("cuda")) == CHIPS[chip].large


@pytest.mark.parametrize("operator", [name for name in operators() if hasattr(kernels_of(name), "opaque")])
def test_grids_of_kernels_with_opaque_starts_have_no_third_dimension(operator):
    """Else pieces.opaque would change them."""
    module, large = kernels_of(operator), CHIPS["sm_90"].large
    launches = [x for size in module.EXAMPLES for x in module.example_launches(size, torch.bfloat16, large).values()]
    assert max(len(launch.grid) for launch in launches) < 3


def test_blocks_divide_tiles():
    """What mla_attention's loops rest on: blocks of keys fill a tile of queries, blocks of queries a tile of keys."""
    for table in (mla_attention._FLOAT32, mla_attention._LARGE, mla_attention._SM_100, mla_attention._SMALL):
        for kernel, by_width in table.items():
            for tiles in by_width.values():
                assert (tiles.bs % tiles.bt if kernel == "backward_kv" else tiles.bt % tiles.bs) == 0


@pytest.mark.parametrize("table", ["_LARGE", "_SM_100", "_SMALL"])
@pytest.mark.parametrize("least", [48, 64, 80])
def test_gradients_of_narrow_heads_have_as_many_warps(table, least):
    """One kernel makes both. `measure` is a multiple of 16 and at least 48."""
    rows = [getattr(mla_attention, table)[kernel] for kernel in ("backward_q", "backward_kv")]
    queries, keys = (row[min(m for m in row if m >= least)] for row in rows)
    assert queries.warps == keys.warps
    assert mla_attention._NARROW == 80
