"""One trial of each kind: what is drawn by its number, what is done with it, and the comparison with the unfused."""

from __future__ import annotations

import contextlib
import copy
import math
import random
import warnings
from collections.abc import Callable
from typing import Any

import fuzz_raw_ops
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ghostfused import FusedGhostBottleneck, FusedGhostModule, NotCaptured, capture, fuse, fuse_with_report, unfuse
from ghostfused.cli.verify import calibrate
from ghostfused.numerics import TOLERANCES, relative_error, rounded_anew

from . import modules, networks

Forward = Callable[[Any, Tensor], list]
"""What is done with a model and an input: results by parts, of which each has an error of its own."""


class _OtherSums(TorchFunctionMode):
    """Computes 1×1 convolutions by PyTorch's matrix products, with a gate over their input's channels in the weights, and norms
    with stored statistics by its products and sums of tensors: what these, and their derivatives, sum is in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.gated: dict[int, tuple[Tensor, int, Tensor, Tensor]] = {}
        """Products of maps and a gate, by their ids, and what they are of. They are held, so that no id comes again."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.batch_norm:
            return _norm(*args, **(kwargs or {}))
        if func is torch.conv2d and not kwargs and _is_matrix_product(args):
            return self._product(*args[:3])
        out = func(*args, **(kwargs or {}))
        if func in _MULTIPLY and not kwargs and isinstance(args[1], Tensor) and _shape_of_a_gate(*args):
            self.gated[id(out)] = out, out._version, *args
        return out

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out, version, maps, gate = self.gated.get(id(x), (None, 0, x, x))
        if out is None or out._version != version:
            return F.linear(x.permute(0, 2, 3, 1), weight[:, :, 0, 0], bias).permute(0, 3, 1, 2)
        y = torch.matmul(weight[:, :, 0, 0] * gate[:, None, :, 0, 0], maps.flatten(2)).unflatten(2, maps.shape[2:])
        y = y if bias is None else y + bias[:, None, None]
        return y.contiguous(memory_format=torch.channels_last)  # as above: a norm's own sums are less exact there


_MULTIPLY = (torch.mul, Tensor.mul, Tensor.__mul__)


def _shape_of_a_gate(x: Tensor, gate: Tensor) -> bool:
    return x.dim() == gate.dim() == 4 and gate.shape == (*x.shape[:2], 1, 1) != x.shape


def _is_matrix_product(args: tuple) -> bool:
    _, weight, _, stride, padding, _, groups = (*args, *[None] * 7)[:7]
    return weight.shape[2:] == (1, 1) and groups == 1 and {*stride} == {1} and {*padding} == {0}


def _norm(
    x: Tensor,
    mean: Any,
    var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: Any = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training:
        return F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
    scale = (var + eps).rsqrt() if weight is None else (var + eps).rsqrt() * weight
    out = (x - mean[:, None, None]) * scale[:, None, None]
    return out if bias is None else out + bias[:, None, None]


def _vector(result: Any) -> Tensor:
    tensors = [t.detach().double().flatten() for t in tree_leaves(result) if isinstance(t, Tensor)]
    return torch.cat([torch.empty(0, dtype=torch.float64), *tensors])


def _shapes(result: Any) -> list:
    return [(t.shape, t.dtype) if isinstance(t, Tensor) else t for t in tree_leaves(result)]


_FAR = 4
"""Times the limit: no luck in rounding."""


def compare(what: str, model: nn.Module, fused: Any, x: Tensor, forward: Forward) -> None:
    """``fused`` gives what ``model`` gives, no further from float64 than that by the table of tolerances.

    One run's error may be small or large by luck. So of several runs, on inputs that differ by less than rounding,
    ``model``'s largest counts, its parameters nudged as well, and half of them with sums in another order; and
    ``fused``'s smallest, unless the first is far off: what is wrong is wrong in each of them.
    """
    theirs = _result_or_error(forward, model, x)
    if isinstance(theirs, Exception):  # one image of one position has no variance, say
        ours = _result_or_error(forward, fused, x)
        assert type(ours) is type(theirs), f"{what}: {ours!r} in place of {theirs!r}"
        return
    ours = forward(fused, x)
    assert _shapes(theirs) == _shapes(ours), f"{what}: {_shapes(ours)} in place of {_shapes(theirs)}"
    right = forward(copy.deepcopy(model).double(), x.double())
    tolerance = TOLERANCES[x.dtype]
    judges = [_Judge(part, x.dtype) for part in right]

    def errors_of(result: list) -> list[float]:
        return [judge.error(part) for judge, part in zip(judges, result, strict=True)]

    limits, errors, near = [tolerance.floor] * len(right), [math.inf] * len(right), x
    for attempt in range(12):
        own = [judge.own_error(part) for judge, part in zip(judges, theirs, strict=True)]
        limits = [max(limit, tolerance.factor * e) for limit, e in zip(limits, own, strict=True)]
        first = errors_of(ours)  # anew, since what PyTorch's own infinities excuse grows
        again = errors_of(forward(fused, near)) if attempt else first
        errors = [min(three) for three in zip(errors, first, again, strict=True)]
        far = any(error > _FAR * limit for error, limit in zip(first, limits, strict=True))
        if not far and all(error <= limit for error, limit in zip(errors, limits, strict=True)):
            return
        (near,) = rounded_anew(x, 1, seed=attempt)
        with _OtherSums() if attempt % 2 else contextlib.nullcontext():
            theirs = forward(_nudged(model, attempt), near)
    near_right = all(error <= limit for error, limit in zip(errors, limits, strict=True))
    if not (near_right and _across_a_kink(forward, model, x, ours, limits)):
        raise AssertionError(f"{what}: errors {errors}, limits {limits}")


def _across_a_kink(forward: Forward, model: nn.Module, x: Tensor, ours: list, limits: list[float]) -> bool:
    """Whether float64 itself gives ``ours`` for numbers that differ by less than rounding: where a ReLU's input is next to nought,
    a gradient through it is one or the other."""
    for attempt in range(100, 200):
        (near,) = rounded_anew(x, 1, seed=attempt)
        right = forward(_nudged(model, attempt).double(), near.double())
        judges = [_Judge(part, x.dtype) for part in right]
        if all(judge.error(part) <= _FAR * limit for judge, part, limit in zip(judges, ours, limits, strict=True)):
            return True
    return False


def _result_or_error(forward: Forward, model: Any, x: Tensor) -> Any:
    try:
        return forward(model, x)
    except Exception as error:
        return error


@torch.no_grad()
def _nudged(model: nn.Module, seed: int) -> nn.Module:
    model = copy.deepcopy(model)
    for number, t in enumerate((*model.parameters(), *model.buffers())):
        if t.is_floating_point():
            t.copy_(*rounded_anew(t, 1, seed=1000 * seed + number))
    return model


class _Judge:
    """Of one part of a result, all its tensors as one: the error relative to the largest number that is finite.

    A number that the dtype has no room for, and one of PyTorch's own that overflowed on its way, may be the infinity or
    NaN that it is there; nothing else that isn't finite passes.
    """

    def __init__(self, right: Any, dtype: torch.dtype):
        right, most = _vector(right), torch.finfo(dtype).max
        self.right = right.clamp(-most, most)
        self.kinds = [_kind(right.to(dtype))]

    def own_error(self, theirs: Any) -> float:
        """The error of PyTorch's result, where it is finite; where it isn't, another may be as it is."""
        out = _vector(theirs)
        self.kinds.append(_kind(out))
        return self._error(out, (_kind(out) == 0) & (self.kinds[0] == 0))

    def error(self, ours: Any) -> float:
        out = _vector(ours)
        kind = _kind(out)
        excused = (kind != 0) & torch.stack([kind == each for each in self.kinds]).any(0)
        # PyTorch's own may lie just below what there is room for; then another's may
        finite_too = (kind == 0) & torch.stack([each == 0 for each in self.kinds]).any(0)
        if not bool((excused | finite_too).all()):
            return math.inf
        return self._error(out, ~excused)

    def _error(self, out: Tensor, where: Tensor) -> float:
        return relative_error(out[where], self.right[where]) if bool(where.any()) else 0.0


def _kind(x: Tensor) -> Tensor:
    """0: finite, 1 and -1: infinite, 2: NaN."""
    return x.isposinf().int() - x.isneginf().int() + 2 * x.isnan().int()


@torch.no_grad()
def infer(model: Any, x: Tensor) -> list:
    return [model(x.clone())]


def step(model: nn.Module, x: Tensor) -> list:
    """Result, gradients, and running statistics of one pass in the mode that ``model`` is in, which stays as it is.

    Without oneDNN, of whose derivatives one may end the process, also where none of our kernels has run.
    """
    model, x = copy.deepcopy(model), x.clone().requires_grad_()
    with torch.backends.mkldnn.flags(enabled=False):
        out = model(x)
        loss = sum((t * torch.linspace(-1, 2, t.numel()).to(t).view_as(t)).sum() for t in tree_leaves(out))
        loss.backward()
    return [out, [x.grad, *(p.grad for p in model.parameters())], [b for b in model.buffers() if b.is_floating_point()]]


# ---- changes, each made to the unfused and the fused alike


def _pick(rng: random.Random, model: nn.Module, kind: Any) -> str:
    """The name of a layer that both have: ``fuse`` keeps names."""
    return rng.choice([name for name, m in model.named_modules() if isinstance(m, kind)] or [""])


def _change(rng: random.Random, pair: tuple[nn.Module, nn.Module]) -> str:
    model = pair[0]
    what = rng.choice(
        ("weights", "data", "eps", "state_dict", "hook", "norm gone", "conv", "train a norm", "frozen", "parameter")
    )
    conv, norm = _pick(rng, model, nn.Conv2d), _pick(rng, model, nn.BatchNorm2d)
    seed = rng.randrange(2**20)
    for each in pair:
        torch.manual_seed(seed)
        layer = each.get_submodule(conv)
        parent = each.get_submodule(norm.rpartition(".")[0])
        with torch.no_grad():
            if what == "weights":
                for p in each.parameters():
                    p.mul_(1.25)
            elif what == "data":
                layer.weight.data = layer.weight.data.flip(0) * 0.75
            elif what == "eps" and norm:
                each.get_submodule(norm).eps = 0.3
            elif what == "state_dict":
                each.load_state_dict(
                    {k: v * 0.75 if v.is_floating_point() else v for k, v in each.state_dict().items()}
                )
            elif what == "hook":
                layer.register_forward_hook(lambda module, given, out: out * 0.5)
            elif what == "norm gone" and norm:
                parent._modules[norm.rpartition(".")[2]] = nn.Identity()
            elif what == "conv":
                new = copy.deepcopy(layer)
                nn.init.normal_(new.weight, std=0.3)
                each.get_submodule(conv.rpartition(".")[0])._modules[conv.rpartition(".")[2]] = new
            elif what == "train a norm" and norm:
                each.get_submodule(norm).train()
            elif what == "frozen":
                layer.weight.requires_grad_(False)
            elif what == "parameter":
                layer.weight = nn.Parameter(layer.weight * -1.25)
    return what


def _input(rng: random.Random, channels: int, dtype: torch.dtype = torch.float32, least: int = 1) -> Tensor:
    x = torch.randn(
        rng.choice((1, 1, 2, 3, 5)), channels, rng.randint(least, least + 12), rng.randint(least, least + 12)
    )
    x = x.to(dtype)
    return x.to(memory_format=torch.channels_last) if rng.random() < 0.3 else x


def _all(rng: random.Random, model: nn.Module, fused: nn.Module, channels: int, least: int = 1) -> str:
    """What is done with a model and its fused twin; returns the change that was made."""
    x, other = _input(rng, channels, least=least), _input(rng, channels, least=least)
    for each in (x, x, other, x[:0], x):
        compare("inference", model, fused, each, infer)
    if rng.random() < 0.3:
        for each in (model, fused):
            each.train()
        compare("training", model, fused, torch.cat([x, x.flip(-1), 0.5 * x.flip(-2)]), step)
        for each in (model, fused):
            each.eval()
    what = _change(rng, (model, fused))
    # with the batch's statistics more than a number for each channel is needed, and each run changes the stored ones
    x = torch.cat([x, x.flip(-1), 0.5 * x.flip(-2)])
    for way in (infer, infer, step) if what != "train a norm" else (step,):
        compare(f"after a change ({what})", model, fused, x, way)
    if rng.random() < 0.2 and what not in ("hook", "train a norm"):
        dtype = rng.choice((torch.float16, torch.bfloat16))
        # PyTorch's own strided convolution in bfloat16 gives what nobody computed where its maps come out one wide
        x = x.repeat(1, 1, *(1 + 2 * (size < 3) for size in x.shape[2:]))
        for each in (model, fused):
            each.to(dtype)
        compare(f"in {dtype}", model, fused, x.to(dtype), infer)
    return what


# ---- the kinds


def module(rng: random.Random) -> str:
    if rng.random() < 0.25:
        cin, cout = rng.randint(1, 16), rng.randint(2, 30)
        model = nn.Sequential(modules.written(rng, cin, cout))
        least = 2 if any(type(m).__name__ == "OfficialGhost" and m.mode == "attn" for m in model) else 1
        calibrate(model, torch.randn(4, cin, 9, 8))
        fused = fuse(model)
        _all(rng, model, fused, cin, least)
        return "written, fused" if isinstance(fused[0], FusedGhostModule) else "written, left"
    settings = modules.settings(rng)
    ghost = FusedGhostModule(**settings)
    model = modules.Unfused(ghost)
    calibrate(model, torch.randn(4, settings["in_channels"], 9, 8))
    model = copy.deepcopy(model)
    ghost.eval()
    if rng.random() < 0.5:
        _all(rng, model, ghost, settings["in_channels"])
        return "built"
    dtype = rng.choice((torch.float32, torch.float32, torch.float16, torch.bfloat16))
    for each in (model, ghost):
        each.to(dtype)
    x = _input(rng, settings["in_channels"], dtype)
    shape = infer(model, x)[0].shape
    gates = {
        "input_gate": torch.rand(x.shape[:2]), "residual": torch.randn(shape),
        "output_gate": torch.rand(*shape[:2], rng.randint(1, 4), rng.randint(1, 4)),
    }  # fmt: skip
    given = {name: t.to(dtype) for name, t in gates.items() if rng.random() < 0.4}

    def call(m: nn.Module, x: Tensor) -> list:
        with torch.set_grad_enabled(rng.random() < 0.5):
            return [m(x, **{name: t.to(x.dtype) for name, t in given.items()})]

    for _ in range(2):
        compare(f"with {sorted(given)}", model, ghost, x, call)
    return "built, with gates"


def bottleneck(rng: random.Random) -> str:
    cin, cout, stride = rng.randint(2, 12), rng.randint(2, 12), rng.choice((1, 1, 2))
    cout = cin if stride == 1 and rng.random() < 0.5 else cout
    model = nn.Sequential(networks.bottleneck(rng, cin, cout, stride))
    calibrate(model, torch.randn(4, cin, 9, 8))
    fused = fuse(model)
    _all(rng, model, fused, cin, least=3)
    return "fused" if isinstance(fused[0], FusedGhostBottleneck) else "left"


def network(rng: random.Random) -> str:
    model = calibrate(networks.Net(rng), torch.randn(2, 3, 24, 20))
    fused, report = fuse_with_report(model)
    assert type(fused) is type(model)
    assert all(swap.fused or swap.reason for swap in report)
    assert fused.state_dict().keys() == model.state_dict().keys()
    x = _input(rng, 3, least=16)
    if rng.random() < 0.4:
        options = {"partial": True, "freeze": rng.random() < 0.5, "dynamic_batch": rng.random() < 0.3}
        try:
            captured = capture(fused, torch.cat([x, x]) if options["dynamic_batch"] else x, **options)
        except NotCaptured as error:
            raise AssertionError(f"not captured: {error}") from error
        for _ in range(2):
            compare(f"captured {options}", model, lambda x: captured(x), x, infer)
    _all(rng, model, fused, 3, least=16)
    plain = unfuse(fused)
    assert not any(isinstance(m, FusedGhostModule | FusedGhostBottleneck) for m in plain.modules())
    return f"{'some' if any(swap.fused for swap in report) else 'nothing'} fused"


def trial(kind: str, seed: int, number: int, backend: str) -> str:
    """What came of the trial of this number; AssertionError, or whatever else is raised, if it went wrong."""
    if kind == "calls":
        return fuzz_raw_ops.one(seed, number, backend)
    rng = random.Random(f"{kind}:{seed}:{number}")
    torch.manual_seed(rng.randrange(2**31))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {"modules": module, "bottlenecks": bottleneck, "networks": network}[kind](rng)
