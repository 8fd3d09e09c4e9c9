"""Many threads call one captured network at once, on inputs of several sizes."""

import ctypes
import gc
import itertools
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from capture_network import made
from spies import needs_cpu_kernels
from torch import nn

from bench import results
from bench.__main__ import main
from bench.callers import check, mixed, seconds
from ghostfused import capture
from ghostfused.models import paper

pytestmark = needs_cpu_kernels
CALLERS = 8
SHAPES = [(1, 3, 64, 64), (5, 3, 48, 48), (16, 3, 32, 40), (2, 3, 9, 80)]


@pytest.fixture(params=[1, 2], ids=lambda n: f"{n}_threads")
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=[False, True], ids=["reading", "frozen"])
def captured(request):
    torch.manual_seed(0)
    model, _ = made()
    return capture(model, [torch.randn(shape) for shape in SHAPES], freeze=request.param)


def test_each_gets_what_one_caller_gets(captured, threads):
    inputs = [torch.randn(shape) for shape in SHAPES for _ in range(CALLERS)]
    alone = [captured(x) for x in inputs]
    order = list(range(len(inputs)))

    def calls(first: int) -> list[tuple[int, torch.Tensor]]:
        # grad mode and the number of threads are a thread's own
        turn = itertools.islice(itertools.cycle(order), first * 5, first * 5 + 100)
        return [(i, captured(inputs[i])) for i in turn]

    with ThreadPoolExecutor(CALLERS) as pool:
        for got in pool.map(calls, range(CALLERS)):
            assert all(torch.equal(out, alone[i]) for i, out in got)


def test_networks_captured_at_once(monkeypatch):
    """By two threads: torch.export isn't made for that, so that they take turns."""
    model, x = nn.Sequential(paper.GhostModule(3, 4)).eval(), torch.randn(1, 3, 5, 6)
    expected, inside = capture(model, x)(x), []

    def export(*args, real=torch.export.export, **options):
        inside.append(args)
        time.sleep(0.1)
        exported = real(*args, **options)
        assert inside.pop() is args
        assert not inside
        return exported

    monkeypatch.setattr(torch.export, "export", export)
    with ThreadPoolExecutor(2) as pool:
        assert all(torch.equal(each(x), expected) for each in pool.map(lambda _: capture(model, x), range(2)))


class Mallinfo2(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


def held_bytes() -> int:
    """What malloc has handed out and not got back: pages that stay resident after a free neither add nor hide."""
    gc.collect()
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Mallinfo2
    info = mallinfo2()
    return info.uordblks + info.hblkhd


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33, whose malloc tells what it holds"
)
def test_memory_stays(captured, threads):
    """Over a thousand calls: keeping 2 kB of each would be seen."""
    inputs = [torch.randn(shape) for shape in SHAPES]

    def grown(call) -> int:
        before = held_bytes()
        seconds(CALLERS, mixed(call, inputs, 1000))
        return held_bytes() - before

    seconds(CALLERS, mixed(captured, inputs, 500))
    assert any(grown(captured) < 2e6 for _ in range(3))
    kept: list = []
    assert grown(lambda x: kept.append(torch.ones(10_000))) > 10e6


def test_what_differs_is_told():
    inputs = [torch.ones(1), torch.ones(2)]
    count = itertools.count()
    check(lambda x: x + 1, inputs, 4, 20)
    with pytest.raises(RuntimeError, match=r"4 callers: expected what one caller gets, got something else for \(2,\)"):
        check(lambda x: x + (next(count) if len(x) == 2 else 0), inputs, 4, 20)


def test_a_call_that_raises_is_raised():
    with pytest.raises(ZeroDivisionError):
        seconds(3, [lambda: None, lambda: 1 // 0, lambda: None] * 4)


def test_bench(tmp_path, threads):
    output = tmp_path / "rows.jsonl"
    (tmp_path / "net.py").write_text("from capture_network import made\ndef build(): return made()[0]")
    command = [
        "callers",
        "--network",
        f"{tmp_path}/net.py:build",
        "--sizes",
        "18",
        "--batch",
        "1,3",
        "--layout",
        "nchw",
    ]
    command += ["--callers", "3", "--calls", "12", "--rounds", "3", "--output", str(output)]
    assert main(command) == 0
    (row,) = [row for row in results.read(output)[1] if row["kind"] == "callers"]
    assert (row["threads"], row["callers"], row["batches"], row["sizes"]) == (threads, 3, [1, 3], [18])
    assert len(row["one_per_second"]) == len(row["many_per_second"]) == len(row["ratios"]) == 3
    for one, many, ratio in zip(row["one_per_second"], row["many_per_second"], row["ratios"], strict=True):
        assert ratio == pytest.approx(many / one, abs=1e-3)
    assert row["ratio"] == sorted(row["ratios"])[1]
    assert main([*command[:-2], "--fail-below", "1000"]) == 1
