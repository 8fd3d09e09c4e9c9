"""Fused networks in compilers and exporters: one graph, and the same result wherever it runs."""

import contextlib
import copy
import io
import subprocess
import sys
import textwrap
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cuda_runtime import ON_CPU
from networks import KERNEL, assert_same, first, fused_inside, network
from spies import Ops
from torch import nn

import ghostfused
from ghostfused import fuse, unfuse
from ghostfused.capture import graphs
from ghostfused.capture.variant import key_of

ROOT = Path(ghostfused.__file__).parents[1]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def ops(graph: torch.fx.Graph) -> Counter[str]:
    """The ops of ours in a graph, and in the graphs inside it."""
    graphs = [m.graph for m in graph.owning_module.modules() if isinstance(m, torch.fx.GraphModule)]
    return Counter(str(n.target) for g in graphs for n in g.nodes if str(n.target).startswith("ghostfused."))


def eager_ops(fused: nn.Module, x: torch.Tensor) -> Counter[str]:
    """The ops of ours that a forward runs; none where that is the reference, which compilers see through."""
    with Ops() as called:  # with gradients: one by one
        fused(x)
    counted = Counter(f"{name}.default" for name in called.names if name.startswith("ghostfused."))
    assert KERNEL == "reference" or counted["ghostfused.forward_cpu.default"] > 2
    return counted


# ---- torch.compile


@pytest.mark.parametrize("name", ["ghostnet", "attention", "yolov8n-ghost"])
def test_networks_have_no_graph_break(name):
    model, x = network(name), torch.randn(1, 3, 64, 64)
    fused = fuse(model)
    compiled = torch.compile(fused, fullgraph=True, backend="eager")
    with torch.no_grad():
        fused(x)  # ultralytics' detector makes its anchors at the first call, which Dynamo can't trace
        assert_same(compiled(x), model, x)


def test_compiled_network_trains(training):
    model = network("small").train(training)
    fused = fuse(model)
    compiled = torch.compile(fused, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 3, 18, 14), (3, 3, 15, 20)):
        x = torch.randn(shape)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    compiled(x).square().mean().backward()
    model(x).square().mean().backward()
    for (key, ours), theirs in zip(fused.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}")


def test_inductor():
    model, x = network("small"), torch.randn(2, 3, 17, 14)
    compiled = torch.compile(fuse(model), fullgraph=True)
    with torch.no_grad():
        assert_same(compiled(x), model, x)
        model[1].ghost1.primary_conv[0].weight.mul_(2)
        compiled._orig_mod[1].ghost1.primary_conv[0].weight.mul_(2)
        assert_same(compiled(x), model, x)


# ---- torch.export and AOTInductor


def exported(fused: nn.Module, x: torch.Tensor, **options):
    batch, height, width = (torch.export.Dim(name, min=1, max=128) for name in ("batch", "height", "width"))
    return torch.export.export(fused, (x,), dynamic_shapes=({0: batch, 2: 2 * height, 3: 2 * width},), **options)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("backend", ["auto", KERNEL])
def test_exported_network_is_the_same_after_a_file(backend, strict, tmp_path):
    model = network("small")
    fused = fuse(model, backend=backend)
    program = exported(fused, torch.randn(2, 3, 16, 12), strict=strict)
    assert ops(program.graph) == ({} if backend == "auto" else eager_ops(fused, torch.randn(2, 3, 16, 12)))
    assert set(program.state_dict) == set(model.state_dict())
    torch.export.save(program, tmp_path / "net.pt2")
    loaded = torch.export.load(tmp_path / "net.pt2").module()
    for shape in ((2, 3, 16, 12), (3, 3, 22, 36)):
        x = torch.randn(shape)
        assert_same(loaded(x), model, x)


# ultralytics' layers share one activation module: torch.export then puts stand-ins in the place of modules
@pytest.mark.parametrize("name", ["attention", "ghostnet", "yolov8n-ghost"])
def test_export_of_networks(name):
    """Of standard operations alone, those of the unfused network; of our ops where the backend was asked for by name."""
    model, x = network(name), torch.randn(2, 3, 64, 64)
    first(model(x))  # makes the detector's anchors, as above
    unfused = [n.target for n in torch.export.export(model, (x,)).graph.nodes]
    for backend in ("auto", KERNEL):
        fused = fuse(model, backend=backend)
        expected_ops = eager_ops(fused, x)
        program = torch.export.export(fused, (x,))
        if backend == "auto":
            assert [n.target for n in program.graph.nodes] == unfused
        else:
            assert ops(program.graph) == expected_ops
        assert_same(program.module()(x), model, x)


def test_capture_leaves_other_exports_alone():
    """What it exports has an op for each kernel."""
    model, x = network("small"), torch.randn(2, 3, 16, 12)
    fused = fuse(model)
    if KERNEL == "cpu":
        assert str(ghostfused.capture(fused, x)).endswith(": 1 program")
    assert not ops(torch.export.export(fused, (x,)).graph)


def test_aot_inductor_package_runs_in_another_process(tmp_path):
    model = network("small")
    x = torch.randn(3, 3, 10, 14)
    config = torch._inductor.config.aot_inductor
    wanted = {"compile_wrapper_opt_level": "O0", "precompile_headers": False}  # compiled once, they save nothing
    quick = {f"aot_inductor.{name}": value for name, value in wanted.items() if hasattr(config, name)}
    package = torch._inductor.aoti_compile_and_package(
        exported(fuse(model, backend=KERNEL), torch.randn(2, 3, 16, 12)),
        package_path=str(tmp_path / "net.pt2"),
        inductor_configs=quick,
    )
    torch.save(x, tmp_path / "x.pt")
    program = f"""
        import torch, ghostfused
        torch.set_num_threads(1)
        net = torch._inductor.aoti_load_package({package!r})
        torch.save(net(torch.load({str(tmp_path / "x.pt")!r})), {str(tmp_path / "out.pt")!r})
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, cwd=ROOT, timeout=300)
    assert_same(torch.load(tmp_path / "out.pt"), model, x)


# ---- ONNX


def run_onnx(file: bytes, x: torch.Tensor) -> torch.Tensor:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def onnx_file(fused: nn.Module, x: torch.Tensor, dynamo: bool, tmp_path: Path) -> bytes:
    onnx = pytest.importorskip("onnx")
    path = tmp_path / "net.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations of the exporter by torch.jit, and its notes on Python values
        if dynamo:
            pytest.importorskip("onnxscript")
            torch.onnx.export(
                fused, (x,), path, dynamo=True, external_data=False, verbose=False,
                dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},),
            )  # fmt: skip
        else:
            axes = {"x": {0: "batch"}}
            torch.onnx.export(fused, (x,), path, dynamo=False, input_names=["x"], dynamic_axes=axes)
    graph = onnx.load(path).graph
    assert {node.domain for node in graph.node} <= {"", "ai.onnx"}, "standard operations only"
    return path.read_bytes()


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("name", ["small", "attention", "ghostnet"])
def test_onnx_runtime_computes_the_same(name, dynamo, tmp_path):
    if not dynamo and "dynamo" not in torch.onnx.export.__code__.co_varnames:
        pytest.skip("this torch has no export by torch.jit")
    model = network(name)
    fused = fuse(model)
    file = onnx_file(fused, torch.randn(2, 3, 64, 64), dynamo, tmp_path)
    x = torch.randn(3, 3, 64, 64)
    assert_same(run_onnx(file, x), model, x)
    if name == "small":
        with_ops = fuse(model, backend=KERNEL)
        assert ops(torch.export.export(with_ops, (x,)).graph) == eager_ops(with_ops, x), (
            "the kernels are back afterwards"
        )


def test_onnx_export_of_one_backend(tmp_path):
    """Also where a backend was asked for by name: no runtime of ONNX files has it."""
    model = network("small")
    fused = fuse(model, backend=KERNEL)
    file = onnx_file(fused, torch.randn(2, 3, 16, 12), True, tmp_path)
    x = torch.randn(2, 3, 16, 12)
    assert_same(run_onnx(file, x), model, x)


# ---- torch.fx, torch.jit


@pytest.mark.parametrize("name", ["ghostnet", "attention"])
def test_fx_tracing(name):
    model, x = network(name), torch.randn(1, 3, 64, 64)
    fused = fuse(model)
    traced = torch.fx.symbolic_trace(fused)
    calls = [getattr(n.target, "__name__", "") for n in traced.graph.nodes if n.op == "call_function"]
    assert calls.count("ghost_module") == fused_inside(fused)[0]
    if name == "ghostnet":
        assert {"depthwise", "squeeze_excite"} <= set(calls), "the bottlenecks' other layers are calls of ours as well"
    assert set(dict(traced.named_parameters())) <= set(dict(fused.named_parameters()))
    assert not [n for n in traced.graph.nodes if "_tensor_constant" in str(n.target)], "nothing is frozen"
    with torch.no_grad():
        assert_same(traced(x), model, x)
        assert_same(copy.deepcopy(traced)(x), model, x)
        for each in (model, fused):  # the traced one shares the parameters of the fused one
            for p in each.parameters():
                p.mul_(1.01)  # more, of 150 layers, and rounding would be amplified beyond comparison
        assert_same(traced(x), model, x)


def test_jit_tracing():
    model, x = network("small"), torch.randn(2, 3, 16, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.no_grad():
            traced = torch.jit.trace(fuse(model), x)
        buffer = io.BytesIO()
        torch.jit.save(traced, buffer)
        buffer.seek(0)
        assert_same(torch.jit.load(buffer)(x), model, x)


# ---- CUDA graphs


def test_graphed_is_deprecated_and_leaves_a_cpu_model_alone():
    fused, x = fuse(network("small")), torch.randn(2, 3, 16, 12)
    with (
        pytest.warns(DeprecationWarning, match="use ghostfused.capture"),
        pytest.warns(UserWarning, match="need a GPU"),
    ):
        assert ghostfused.graphed(fused, x) is fused
    for example in ([x], (), (x, 1), None):
        with pytest.raises(TypeError, match="example: expected a tensor or a tuple of tensors"):
            ghostfused.graphed(fused, example)


class Recorder(nn.Module):
    """Returns a dict, as some networks do; ``record`` keeps what a graph would read and write."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((2, 1), 3.0))
        self.calls = 0

    def forward(self, x, y):
        self.calls += 1
        return {"sum": x + y, "all": [x * self.weight]}


def test_a_graph_copies_inputs_and_outputs(monkeypatch):
    """The bookkeeping around the graph, with a stand-in that computes again from the recorded places into the recorded
    output, as a replay does. Recording itself needs a GPU: see the next test."""
    model = Recorder().eval()
    recorded = []

    class Graph:
        def replay(self):
            graphed = recorded[-1]
            with torch.no_grad():
                new = model(*graphed.inputs)
                graphed.output["sum"].copy_(new["sum"])
                graphed.output["all"][0].copy_(new["all"][0])

    def stream_of(device):
        return SimpleNamespace(wait_stream=lambda other: None, device=device)

    def on(*objects, stream=None):
        used.append(stream or objects[0])
        return contextlib.nullcontext()

    used: list = []  # the device, the warm-up's stream, the recording's
    for name, value in {
        "CUDAGraph": Graph, "Stream": stream_of, "current_stream": stream_of, "stream": on, "graph": on, "device": on,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    for copy_output in (True, False):
        graph = graphs.RecordedGraph(model, (x, y), copy_output)
        device, warmup, recording = used[-3:]
        assert device == x.device == warmup.device
        assert recording is warmup, "the default stream of a recording is one for all devices, the first one's"
        recorded[:] = [graph]
        run = ghostfused.Captured({key_of((x, y)): graph}, torch.device("cpu"), False, False)
        for mine, place in zip((x, y), graph.inputs, strict=True):
            assert place.data_ptr() != mine.data_ptr(), "the example stays the caller's"
        outs, inputs = [], [(torch.randn(2, 3), torch.randn(3, 2).t()) for _ in range(2)]
        for a, b in inputs:
            outs.append(run(a, b))
            torch.testing.assert_close(outs[-1], {"sum": a + b, "all": [a * 3]})
            assert not outs[-1]["sum"].requires_grad
        assert (outs[0]["sum"] is outs[1]["sum"]) == (not copy_output)
        if copy_output:
            assert torch.equal(outs[0]["sum"], inputs[0][0] + inputs[0][1]), "the second call left it alone"
        expected = r"inputs: expected \(2, 3\) torch.float32 and \(2, 3\) torch.float32, got "
        with pytest.raises(ValueError, match=expected + r"\(2, 3\) torch.float32$"):
            run(x)
        with pytest.raises(ValueError, match=expected + r".* and \(1, 3\)"):
            run(x, y[:1])
        with pytest.raises(ValueError, match=expected + r"\(2, 3\) torch.float64"):
            run(x.double(), y)
        assert str(run).endswith(": one CUDA graph")


@pytest.mark.cuda
@pytest.mark.skipif(ON_CPU or not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("name", ["small", "ghostnet_050", "ghostnetv2_100"])
@pytest.mark.parametrize("autocast", [False, True])
def test_capture_on_a_gpu(name, autocast):
    model = network(name).cuda()
    fused = fuse(model)
    with torch.autocast("cuda", torch.float16, enabled=autocast):
        run = ghostfused.capture(fused, torch.zeros(2, 3, 64, 64, device="cuda"))
    for _ in range(2):
        x = torch.randn(2, 3, 64, 64, device="cuda")
        with torch.no_grad(), torch.autocast("cuda", torch.float16, enabled=autocast):
            torch.testing.assert_close(run(x), fused(x), rtol=1e-3, atol=1e-3)
        with torch.no_grad():
            for p in fused.parameters():
                p.mul_(1.01)  # what is written into the weights takes effect
    before = run(x)
    copied = before.clone()
    run(torch.randn_like(x))
    assert torch.equal(before, copied)


def test_unfused_network_exports_as_before():
    """Where ghostfused can't be imported: the unfused network is the original, without ops of ours."""
    model, x = network("small"), torch.randn(2, 3, 16, 12)
    program = torch.export.export(unfuse(fuse(model)), (x,))
    assert not ops(program.graph)
    np.testing.assert_array_equal(first(program.module()(x)).detach(), first(model(x)).detach())
