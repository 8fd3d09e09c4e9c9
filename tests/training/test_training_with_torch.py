"""What PyTorch does to a training module: autocast, scaling, checkpoints, compilers, averages, several processes."""

import copy

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from ghostfused import FusedGhostModule, fuse
from ghostfused.models import seed
from ghostfused.numerics import relative_error


def network(backend: str = "reference", **kwargs) -> nn.Sequential:
    """Two fused Ghost modules between ordinary layers, trained by the training ops."""
    kwargs["backend"] = backend
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        FusedGhostModule(6, 9, act_primary="silu", act_cheap="silu", **kwargs),
        FusedGhostModule(9, 8, act_primary="none", act_cheap="silu", **kwargs),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    ).train()  # fmt: skip


def children(model: nn.Sequential) -> nn.Sequential:
    """A copy that runs its Ghost modules' layers one by one."""

    class Unfused(FusedGhostModule):
        def forward(self, x):
            return self._run_children(x, None, None, None)

    twin = copy.deepcopy(model)
    for module in twin.modules():
        if type(module) is FusedGhostModule:
            module.__class__ = Unfused
    return twin


def assert_same_gradients(model: nn.Module, twin: nn.Module, **tolerance) -> None:
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def assert_same_buffers(model: nn.Module, twin: nn.Module, **tolerance) -> None:
    for p, q in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(p, q, **tolerance)


CLOSE = {"rtol": 1e-4, "atol": 1e-6}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype):
    """No further from float64 than the unfused network under autocast, by twice; norms stay in float32."""
    model = network()
    twin, exact = children(model), children(model).double()
    x = torch.randn(4, 3, 8, 8)
    for m in (model, twin):
        with torch.autocast("cpu", dtype):
            out = m(x)
            assert out.dtype == dtype
        out.float().square().sum().backward()
    exact(x.double()).square().sum().backward()
    errors = [
        max(relative_error(p.grad, q.grad) for p, q in zip(m.parameters(), exact.parameters(), strict=True))
        for m in (model, twin)
    ]
    assert errors[0] <= 2 * errors[1]
    assert all(b.dtype != dtype for b in model.buffers())
    assert_same_buffers(model, twin, rtol=20 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


def test_grad_scaler():
    model = network()
    twin = copy.deepcopy(model)
    x = torch.randn(4, 3, 8, 8)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with torch.autocast("cpu", torch.float16):
        loss = model(x).square().mean()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    with torch.autocast("cpu", torch.float16):
        twin(x).square().mean().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0.05, atol=0.02 * float(q.grad.abs().max()) + 1e-4)
    before = model[1].primary_conv[0].weight.clone()
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(model[1].primary_conv[0].weight, before)
    # an overflow skips the step
    with torch.autocast("cpu", torch.float16):
        loss = model(x * float("inf")).square().mean()
    scaler.scale(loss).backward()
    before = model[1].primary_conv[0].weight.clone()
    scaler.step(optimizer)
    assert torch.equal(model[1].primary_conv[0].weight, before)


@pytest.mark.parametrize("ours", ["fused", "unfused"])
def test_channels_last(ours):
    """The same numbers, and outputs and gradients in channels_last too."""
    model = network()
    twin = copy.deepcopy(model) if ours == "fused" else children(model)
    x = torch.randn(4, 3, 8, 8)
    model.to(memory_format=torch.channels_last)
    last = x.to(memory_format=torch.channels_last).requires_grad_()
    maps = model[1](model[0](last))
    assert maps.is_contiguous(memory_format=torch.channels_last)
    model.zero_grad()
    for module in model.modules():
        if hasattr(module, "reset_running_stats"):
            module.reset_running_stats()
    model(last).square().sum().backward()
    assert last.grad.is_contiguous(memory_format=torch.channels_last)
    twin(x).square().sum().backward()
    assert_same_gradients(model, twin, **CLOSE)
    assert_same_buffers(model, twin, **CLOSE)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("parts", [slice(1, 2), slice(1, 3), slice(2, 3)], ids=str)
def test_activation_checkpointing(reentrant, parts):
    """As nn.BatchNorm2d's, the buffers see the batch twice: also the last layer's, where the forward that is repeated ends
    as soon as all is there that backward asks for."""
    model = network()
    x = torch.randn(4, 3, 8, 8)
    models = model, copy.deepcopy(model), children(model)
    for m, checkpointed in zip(models, (True, False, True), strict=True):
        maps = m[: parts.start](x)
        maps = checkpoint(m[parts], maps, use_reentrant=reentrant) if checkpointed else m[parts](maps)
        m[parts.stop :](maps).square().sum().backward()
    assert_same_gradients(model, models[1])
    assert_same_gradients(model, models[2], **CLOSE)
    assert_same_buffers(model, models[2], **CLOSE)
    assert int(model[1].primary_conv[1].num_batches_tracked) == 1 + (parts.start == 1)


def test_gradient_accumulation():
    model = network()
    twin = children(model)
    for _ in range(3):
        x = torch.randn(4, 3, 8, 8)
        for m in (model, twin):
            (m(x).square().sum() / 3).backward()
    assert_same_gradients(model, twin, **CLOSE)
    assert_same_buffers(model, twin, **CLOSE)


def test_averaged_copies():
    """An EMA of the weights, as timm and torch.optim.swa_utils keep it: a copy, then averages of all tensors."""
    model = network()
    ema = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
    )
    twin, twin_ema = children(model), children(ema.module)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (model, twin)]
    for _ in range(3):
        x = torch.randn(4, 3, 8, 8)
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            m(x).square().sum().backward()
            optimizer.step()
        ema.update_parameters(model)
    out, expected = (m.eval()(x) for m in (ema.module, children(ema.module)))
    torch.testing.assert_close(out, expected, **CLOSE)
    torch.testing.assert_close(model.eval()(x), twin.eval()(x), rtol=1e-3, atol=1e-4)
    assert not torch.equal(ema.module[1].primary_conv[0].weight, twin_ema[1].primary_conv[0].weight)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_training_step(backend):
    """One graph; the same losses, gradients and buffers as eager."""
    model = network()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for size in (8, 8, 6):
        x = torch.randn(4, 3, size, size)
        for m in (compiled, twin):
            m(x).square().sum().backward()
    assert_same_gradients(model, twin, **CLOSE)
    assert_same_buffers(model, twin, **CLOSE)


def test_compile_with_cumulative_average():
    model = network()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    twin = children(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x = torch.randn(4, 3, 8, 8)
        compiled(x), twin(x)
    assert_same_buffers(model, twin, **CLOSE)


def test_deterministic_algorithms():
    """PyTorch's own check lets the step through, and it gives the same bits twice."""
    model, x = network(), torch.randn(4, 3, 8, 8)
    torch.use_deterministic_algorithms(True)
    try:
        grads = []
        for m in (model, copy.deepcopy(model)):
            m(x).square().sum().backward()
            grads.append([p.grad for p in m.parameters()])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# ---- several processes


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    original, x, weight = torch.load(f"{folder}/input.pt", weights_only=False)
    results = {}
    for name in ("local", "sync", "sync compiled"):
        model = DistributedDataParallel(copy.deepcopy(original))
        if name != "local":
            # the constructor refuses SyncBatchNorm on the CPU, where PyTorch's own doesn't run; ours does
            model.module = nn.SyncBatchNorm.convert_sync_batchnorm(model.module)
        run = torch.compile(model, backend="aot_eager") if name == "sync compiled" else model
        # unequal shares: the joint statistics are no averages of averages
        own = slice(0, 3) if rank == 0 else slice(3, 8)
        # DDP averages the processes' gradients; the joint batch's loss is a sum
        (2 * (run(x[own]) * weight[own]).sum()).backward()
        results[name] = [p.grad for p in model.module.parameters()], list(model.module.buffers())
    torch.save(results, f"{folder}/output{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """(model, x, weight of the outputs in the loss, each process's results)"""
    folder = tmp_path_factory.mktemp("processes")
    torch.manual_seed(0)
    inputs = network().double(), torch.randn(8, 3, 6, 6).double() + 1, torch.randn(8, 5).double()
    torch.save(inputs, folder / "input.pt")
    mp.spawn(_process, (str(folder),), nprocs=2)
    return *inputs, [torch.load(folder / f"output{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", ["sync", "sync compiled"])
def test_two_processes_with_sync_batchnorm_are_one_with_the_joint_batch(two_processes, name):
    model, x, weight, results = two_processes
    joint = copy.deepcopy(model)
    (joint(x) * weight).sum().backward()
    for grads, buffers in (result[name] for result in results):
        for grad, p in zip(grads, joint.parameters(), strict=True):
            torch.testing.assert_close(grad, p.grad, rtol=1e-9, atol=1e-9)
        for buffer, expected in zip(buffers, joint.buffers(), strict=True):
            torch.testing.assert_close(buffer, expected, rtol=1e-9, atol=1e-9)


def test_data_parallel_without_sync(two_processes):
    """Each process has its own statistics, and gradients are those of both shares together."""
    model, x, weight, results = two_processes
    twin = children(model)
    for own in (slice(0, 3), slice(3, 8)):
        (twin(x[own]) * weight[own]).sum().backward()
    for grads, _ in (result["local"] for result in results):
        for grad, p in zip(grads, twin.parameters(), strict=True):
            torch.testing.assert_close(grad, p.grad, rtol=1e-9, atol=1e-9)


def test_sync_batchnorm_in_one_process_is_batchnorm():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(network())
    twin, x = copy.deepcopy(model), torch.randn(4, 3, 6, 6)
    for m in twin.modules():
        if isinstance(m, FusedGhostModule):
            m.primary_conv[1], m.cheap_op[1] = (
                nn.BatchNorm2d(n.num_features) for n in (m.primary_conv[1], m.cheap_op[1])
            )
    for m in (model, twin):
        m(x).square().sum().backward()
    assert_same_gradients(model, twin)


# ---- whole networks


@pytest.mark.parametrize("network", ["seed", "timm"])
def test_a_step_of_a_whole_network(network):
    if network == "timm":
        timm = pytest.importorskip("timm")
        model = timm.create_model("ghostnet_100", num_classes=5, drop_rate=0.0)
    else:
        torch.manual_seed(0)
        model = seed.GhostNet(num_classes=5)
    model.double().train()
    fused = fuse(model)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for m in (model, fused):
        m(x).square().sum().backward()
    assert_same_gradients(fused, model, rtol=1e-6, atol=1e-8)
    assert_same_buffers(fused, model, rtol=1e-8, atol=1e-10)
