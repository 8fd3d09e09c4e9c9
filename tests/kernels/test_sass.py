"""tools.sass: the simulator against numpy on small kernels, the faults it must find, what it counts; and on its stand-in
device the kernels of every family, in sass_on_device.py."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from mutants import harness

from ghostfused.backends import AUTO
from tools.sass import build, costs, device, kernel, machine, race, tables
from tools.sass.memory import Arena, Fault

HERE = Path(__file__).parents[1] / "helpers"
pytestmark = pytest.mark.skipif(build.missing() is not None, reason=f"{build.missing()}")
LIMIT = 20_000
Run = Callable[..., machine.Counts]


@pytest.fixture(scope="module")
def cubin(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sass") / "kernels.cubin"
    nvcc = build.setup_functions()["find_cuda_home"]() / "bin/nvcc"
    flags = ["-cubin", "-arch=sm_90", "-lineinfo", "-std=c++20"]
    subprocess.run([nvcc, *flags, "-o", out, HERE / "sass_kernels.cu"], check=True)
    return out


def launch_of(cubin: Path, name: str, arguments: tuple, grid: int, block: int, shared: int) -> machine.Launch:
    code = kernel.load(cubin, name)
    raw = bytearray(max(offset + size for offset, size in code.parameters))
    for (offset, size), value in zip(code.parameters, arguments, strict=True):
        raw[offset : offset + size] = struct.pack("<q" if size == 8 else "<i", value)
    return machine.Launch(code, (grid, 1, 1), (block, 1, 1), shared, bytes(raw))


@pytest.fixture
def memory() -> Arena:
    return Arena(1 << 20)


@pytest.fixture
def run(cubin, memory) -> Run:
    def go(name: str, *arguments: int, grid: int = 1, block: int = 32, shared: int = 0) -> machine.Counts:
        launch = launch_of(cubin, name, arguments, grid, block, shared)
        return machine.execute(launch, range(grid), memory)

    return go


@pytest.fixture
def races(cubin, memory) -> Callable[..., list[str]]:
    def go(name: str, *arguments: int, block: int = 64, shared: int = 4096) -> list[str]:
        return race.check_races(launch_of(cubin, name, arguments, 1, block, shared), [0], memory)

    return go


def nothing(memory: Arena, *shape: int, dtype: type = np.float32) -> int:
    return memory.put(np.full(shape, 0xFF, np.uint8).repeat(np.dtype(dtype).itemsize))


# What instructions compute


def test_integers(run, memory):
    rng = np.random.default_rng(0)
    n = 100
    a = rng.integers(-(2**31), 2**31, n).astype(np.int32)
    b = rng.integers(1, 2**20, n).astype(np.int32) * rng.choice([-1, 1], n).astype(np.int32)
    out = nothing(memory, n, 6)
    run("integers", memory.put(a), memory.put(b), out, n, grid=4)
    got = memory.get(out, np.int32, (n, 6))
    x, y = a.astype(np.int64), b.astype(np.int64)
    quotient = np.trunc(x / y).astype(np.int64)
    assert (got[:, 0] == quotient).all()
    assert (got[:, 1] == x - quotient * y).all()
    assert (got[:, 2] == (x * y) >> 32).all()
    assert (got[:, 3] == ((x >> (y & 31)) ^ (x & 0xFFFFFFFF) >> 7).astype(np.int32)).all()
    ones = np.array([bin(int(v) & 0xFFFFFFFF).count("1") for v in a])
    zeros = np.array([32 - (int(v) & 0xFFFFFFFF).bit_length() for v in b])
    assert (got[:, 4] == np.minimum(np.maximum(x, -5), y) + ones + zeros).all()
    assert (
        got[:, 5] == np.array([int(abs(v) // 7) * (1 if v >= 0 else -1) for v in (x * y + n)]).astype(np.int32)
    ).all()


def test_floats(run, memory):
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal(29).astype(np.float32), rng.standard_normal(29).astype(np.float32)
    a[0], b[1], a[2] = 0, 1e-42, np.inf  # a zero, a divisor that needs the slow way, an infinity
    out = nothing(memory, 29, 4)
    run("floats", memory.put(a), memory.put(b), out, 29)
    got = memory.get(out, np.float32, (29, 4))
    with np.errstate(all="ignore"):
        integers = np.trunc(np.nan_to_num(a * np.float32(100))) + np.trunc(b * np.float32(50))
        want = np.stack([a / b, np.sqrt(np.abs(a)) + np.exp(b), np.maximum(a, 0) - np.minimum(b, 1), integers], 1)
    finite = np.ones_like(want, bool)
    finite[2, 3] = False  # trunc(inf) is inf
    np.testing.assert_allclose(got[finite], want[finite], rtol=4e-7, atol=1e-7)


def test_halves(run, memory):
    rng = np.random.default_rng(2)
    a, b = (rng.standard_normal((32, 2)).astype(np.float16) for _ in range(2))
    out, wide = nothing(memory, 32, 4, dtype=np.float16), nothing(memory, 32, 2, dtype=np.float16)
    run("halves", memory.put(a), memory.put(b), out, wide)
    x, y = a.astype(np.float64), b.astype(np.float64)
    got = memory.get(out, np.float16, (32, 4))
    assert (got[:, :2] == (x * y + x).astype(np.float16)).all()
    assert (got[:, 2:] == np.maximum((x + y).astype(np.float16), (x * y).astype(np.float16))).all()
    bfloats = (memory.get(wide, np.uint16, (32, 2)).astype(np.uint32) << 16).view(np.float32)
    want = np.stack([a[:, 0].astype(np.float32) + 1, b[:, 1].astype(np.float32) * 3], 1)
    assert np.abs(bfloats - want).max() <= np.abs(want).max() * 2**-8


def test_divergent_lanes_meet_again(run, memory):
    trips = np.arange(32, dtype=np.int32) * 7 % 13
    out = nothing(memory, 32)
    counts = run("divergence", memory.put(trips), out)
    want = sum(sum(3 if k & 1 else lane for k in range(t)) for lane, t in enumerate(trips))
    assert (memory.get(out, np.int32, (32,)) == want).all()
    shuffles = [pc for pc, n in counts.lanes.items() if n == 32 * counts.instructions[pc]]
    assert len(shuffles) >= 10  # all lanes are there after the loop


def test_lanes_wait_for_those_in_a_call(run, memory):
    """A function's code lies behind its caller's: that others are at a lower address doesn't mean that they may go on."""
    rng = np.random.default_rng(4)
    a, b = rng.standard_normal((8, 32)).astype(np.float32), rng.uniform(1, 2, (8, 32)).astype(np.float32)
    b[:, 5::7] = 1e-40
    a[:, 5::7] *= 1e-41
    out = nothing(memory, 32)
    counts = run("slow_division", memory.put(a), memory.put(b), out, 8)
    np.testing.assert_allclose(memory.get(out, np.float32, (32,)), (a / b).sum(0), rtol=1e-5)
    together = [n for pc, n in counts.instructions.items() if counts.lanes[pc] == 32 * n]
    assert max(together) == 8  # no part of the loop runs twice


def test_tensor_cores(run, memory):
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((16, 16)).astype(np.float16), rng.standard_normal((8, 16)).astype(np.float16)
    out = nothing(memory, 16, 8)
    counts = run("product", memory.put(a), memory.put(b), out)
    want = a.astype(np.float64) @ b.astype(np.float64).T
    np.testing.assert_allclose(memory.get(out, np.float32, (16, 8)), want, rtol=1e-6, atol=1e-6)
    assert counts.block_tensor == [2]


@pytest.mark.parametrize(("size", "taken"), [(4, 0), (4, 4), (8, 0), (8, 6), (8, 8), (16, 0), (16, 10), (16, 16)])
def test_copies_that_end_in_zeros(run, memory, size, taken):
    """cp.async with a source that is shorter, or not there at all."""
    values = np.arange(1, 32 * size + 1).astype(np.uint8)
    out = nothing(memory, 32 * size // 4)
    run(f"partial_copy_{size}", memory.put(values), out, taken, shared=32 * size)
    want = values.reshape(32, size).copy()
    want[0::2] = 0
    want[1::2, taken:] = 0
    assert (memory.get(out, np.uint8, (32, size)) == want).all()


def test_atomics(run, memory):
    counter, total = memory.put(np.zeros(1, np.uint32)), memory.put(np.zeros(1, np.float32))
    run("count", counter, total, grid=3, block=64)
    assert memory.get(counter, np.uint32, (1,)) == 192
    assert memory.get(total, np.float32, (1,)) == 48


def test_warps_wait_for_each_other(run, memory):
    """More than one gang of warps, more blocks than one, and a barrier of two warps only."""
    values = np.arange(256, dtype=np.float32)
    out = nothing(memory, 256)
    run("reverse", memory.put(values), out, 1, grid=3, block=256, shared=1024)
    assert (memory.get(out, np.float32, (256,)) == values[::-1]).all()
    out = nothing(memory, 32)
    run("hand_over", memory.put(values), out, 1, block=64, shared=128)
    assert (memory.get(out, np.float32, (32,)) == values[32:64]).all()


def test_instructions_are_those_of_the_listing(run, memory, cubin):
    """A straight kernel: each warp issues each instruction up to its exit once."""
    counts = run("halves", *(memory.put(np.ones(256, np.float16)) for _ in range(4)))
    code = kernel.load(cubin, "halves").instructions
    length = next(pc for pc, i in code.items() if i.name == "EXIT") // 16 + 1
    assert counts.block_instructions == [length]
    assert sum(counts.instructions.values()) == length


@pytest.mark.parametrize(("stride", "clocks"), [(1, 1), (2, 2), (32, 32), (33, 1), (0, 1)])
def test_bank_conflicts(run, memory, stride, clocks):
    counts = run("banks", stride, nothing(memory, 32), shared=33 * 32 * 4)
    assert counts.block_shared == [2 * clocks]  # a store and a load


def test_sectors(run, memory, cubin):
    code = kernel.load(cubin, "product").instructions
    counts = run("product", *(memory.put(np.ones(256, np.float16)) for _ in range(2)), nothing(memory, 16, 8))
    loads = [n for pc, n in counts.sectors.items() if code[pc].name == "LDG"]
    stores = [n for pc, n in counts.sectors.items() if code[pc].name == "STG"]
    assert loads == [8] * 6  # eight rows of 32 bytes, of which half is taken
    assert sum(stores) in (16, 32)  # 8-byte or 4-byte stores


def test_parts_are_functions_of_the_source(cubin):
    lines = {i.source[0] for i in kernel.load(cubin, "copies").instructions.values() if i.source}
    text = (HERE / "sass_kernels.cu").read_text().splitlines()
    assert any("cp.async.ca" in text[line - 1] for path, line in lines if path.endswith("sass_kernels.cu"))


def test_times_are_by_the_busiest_block(cubin, memory):
    launch = launch_of(cubin, "beyond", (nothing(memory, 300), 0), grid=300, block=32, shared=0)
    counts = machine.execute(launch, range(2), memory)
    counts.block_instructions = [100, 60]
    cost = costs.cost_of(launch, counts, memory)
    assert cost.issue_us == pytest.approx(100 * 3 / 4 / 1.83e9 * 1e6)  # 300 blocks: three a multiprocessor
    assert cost.issue_mean_us == pytest.approx(80 * 3 / 4 / 1.83e9 * 1e6)


# Faults


def test_out_of_bounds(run, memory):
    out = nothing(memory, 8)
    with pytest.raises(Fault, match="global store out of bounds"):
        run("beyond", out, 8, block=1)
    with pytest.raises(Fault, match="shared access out of bounds"):
        run("beyond_shared", out, 32, block=1, shared=128)


def test_a_barrier_that_others_never_reach(run, memory):
    with pytest.raises(Fault, match="barrier"):
        run("lonely_barrier", nothing(memory, 32), block=32)


def test_an_endless_loop(cubin, memory):
    launch = launch_of(cubin, "endless", (memory.put(np.zeros(1, np.int32)),), 1, 32, 0)
    with pytest.raises(Fault, match="endless"):
        machine.Gang(launch, [0], memory).run(machine.compiled(launch.kernel), limit=LIMIT)


def test_an_unknown_instruction_stops_the_run(run, memory, cubin):
    from tools.sass.instructions import action_of

    i = kernel.Instruction(0x10, "", "FANCY", ("X",), ["R0"], (), "FANCY.X R0")
    launch = launch_of(cubin, "beyond", (0, 0), 1, 32, 0)
    gang = machine.Gang(launch, [0], memory)
    with pytest.raises(NotImplementedError, match=r"0x10: FANCY.X R0: not simulated"):
        action_of(i)(gang, gang.alive)


# Races


@pytest.mark.parametrize(("name", "kind"), [("reverse", "read after write"), ("copies", "read after write")])
def test_races(races, memory, name, kind):
    """The same kernel with and without its barrier or wait."""
    source, out = memory.put(np.ones(128, np.float32)), nothing(memory, 64)
    assert races(name, source, out, 1) == []
    found = races(name, source, out, 0)
    assert found
    assert all(kind in text for text in found)


def test_a_barrier_of_some_warps_orders_them(races, memory):
    source, out = memory.put(np.ones(64, np.float32)), nothing(memory, 32)
    assert races("hand_over", source, out, 1) == []
    assert races("hand_over", source, out, 0) != []


def test_the_docs_have_the_tables():
    text = tables.PAGE.read_text()
    assert tables.written(text) == text
    stale = re.sub(r"^(\| forward, float16, nhwc .*)$", r"\1 old |\n| more |", text, flags=re.MULTILINE)
    assert stale != text
    assert tables.written(stale) == text
    with pytest.raises(ValueError, match="expected one table"):
        tables.written("no table")


def test_all_counts_are_of_right_results():
    for path in tables.files():
        rows, sums = tables.read(path)
        assert sums["ok"]
        assert all(r["ok"] and r["images_checked"] >= 1 for r in rows)
        assert sums["issue_us"] == pytest.approx(sum(r["count"] * r["issue_us"] for r in rows))


def test_auto_tries_the_backend_that_counts_less():
    lines = tables.auto_table().splitlines()[2:]
    assert {"float16 nhwc", "float16 nchw", "float32 nhwc", "float32 nchw"} <= {
        line.split(" | ")[0].strip("| ") for line in lines
    }
    assert {line.split(" | ")[-1].strip("| ") for line in lines} == {AUTO["cuda"][0]}


# The kernels of the extension


KERNELS = [
    "float16_dw3_nchw", *(f"{dtype}_{kernel}" for dtype in ("float16", "float32") for kernel in ("any_nchw", "any_nhwc")),
    "tf32_any_nchw", "tf32_any_nhwc",
    "float16_nhwc_dw3_none", "float16_nhwc_dw3_relu", "float16_nhwc_dw3_any", "float32_nhwc_dw3", "float32_nhwc_dw3_any",
    "float16_nhwc_dw1_any", "float16_nchw_window_dw3", *(f"{dtype}_nchw_{map}_dw3" for dtype in ("tf32", "float32") for map in ("w4", "w14", "w7")),
    "float16_depthwise_w5_s2_nhwc", "float32_depthwise_w3_s1_nchw", "float16_squeeze_nhwc", "float32_squeeze_nchw",
    "float16_training_strips_nhwc", "float32_training_any_nchw",
]  # fmt: skip
"""Those that run below. A launch of another fails."""


@pytest.fixture(scope="module")
def extension(tmp_path_factory, host_objects) -> Iterator[None]:
    """One with ``KERNELS`` alone; ``tools.sass`` builds one with all by itself."""
    folder = tmp_path_factory.mktemp("extension") / "package"
    target = ["-gencode=arch=compute_90,code=sm_90", "-lineinfo"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(build.setup_functions()["find_cuda_home"]() / "bin"), prepend=os.pathsep)
        library = harness.build(folder, host_objects, KERNELS, None, target)
        patch.setenv("GHOSTFUSED_SASS_EXTENSION", str(library))
        yield


def test_every_family_on_the_stand_in_device(extension):
    """Runs sass_on_device.py in a process that has the device."""
    command = [sys.executable, "-m", "pytest", str(HERE / "sass_on_device.py"), "-p", "no:cacheprovider"]
    done = subprocess.run(
        command, env=device.environment(), capture_output=True, text=True, check=False, cwd=build.ROOT
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_the_command(extension):
    """One module by the command: a line for it, and one of sums."""
    import json

    command = [sys.executable, "-m", "tools.sass", "--configs", "tests/data/ghost_configs.jsonl", "--json"]
    command += ["--source", "timm/ghostnet_100@224", "--only", "672->160", "--batch", "4"]
    done = subprocess.run(command, cwd=build.ROOT, capture_output=True, text=True, check=False, env=os.environ.copy())
    assert done.returncode == 0, done.stderr[-2000:]
    module, sums = map(json.loads, done.stdout.splitlines())
    assert module["ok"]
    assert module["images_checked"] == 1
    assert sum(module["parts"].values()) == pytest.approx(1, abs=0.01)
    assert sums["issue_us"] == pytest.approx(module["issue_us"] * module["count"])
    assert sums["evidence"] == "counted, not measured"
