"""Calls of the ops that train, drawn by seed for ``fuzz_raw_ops``: the two of a training step, the six kernels that CUDA's extension
registers one by one, and the gradients of the other ops."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from typing import Any

import cuda_runtime
import fake_gpu
import torch
from raw_op_faults import DTYPES, Call
from torch import Tensor

from ghostfused.backends import training_step
from ghostfused.numerics import TOLERANCES, rounded_anew
from ghostfused.ops import OPS, schemas
from ghostfused.spec import Act, Args, DepthwiseArgs, GhostArgs, SqueezeExciteArgs, memory_format, tensor_names
from ghostfused.spec.checks import absent_memory
from ghostfused.testing import Case, DepthwiseCase, SqueezeExciteCase, make, make_args
from ghostfused.testing.judge_training import _error

STEP_OPS = ("train_forward", "backward")
GRADIENT_OPS: dict[str, type[Args]] = {
    "depthwise_backward": DepthwiseArgs,
    "squeeze_excite_backward": SqueezeExciteArgs,
}
"""Each with what its forward takes; one op for all backends."""
KERNELS = tuple(schemas.TRAINING_KERNELS)
NAMES = (*STEP_OPS, *GRADIENT_OPS, *KERNELS)
_FILLED = ("out", "mean", "var", "dz1", "dz2", "y2", "product", "sums", "weight")
_SMOOTH = ("none", "silu", "gelu", "gelu_tanh", "mish")
_REFERENCE = training_step.KERNELS["reference"]


def op_of(name: str, backend: str) -> Any:
    """The op that a call of ``name`` is of."""
    return getattr(torch.ops.ghostfused, name if name in GRADIENT_OPS else f"{name}_{backend}").default


def argument_names(name: str, backend: str) -> list[str]:
    return [argument.name for argument in op_of(name, backend)._schema.arguments]


# ---- valid calls


def draw(rng: random.Random, backend: str) -> Call:
    names: tuple[str, ...] = KERNELS if backend == "cuda" else ()
    if backend != "cuda" or not cuda_runtime.ON_CPU or fake_gpu.installed:  # else PyTorch's own operations are missing
        names += (*STEP_OPS * 2 * (backend in schemas.TRAINING_OPS), *GRADIENT_OPS)
    name = rng.choice(names)
    if name in GRADIENT_OPS:
        args = make(_other_case(rng, name))
        arguments = [_like_output(rng, args), *args, _needs(rng, args)]
    else:
        arguments = _of_ghost_module(rng, name, make_args(_ghost_case(rng)))
    return Call(name, arguments, argument_names(name, backend))


def _common(rng: random.Random) -> dict[str, Any]:
    layout, sliced = rng.choice(("nchw", "nhwc")), rng.random() < 0.3
    return {"dtype": rng.choice(DTYPES), "layout": layout, "sliced": sliced, "seed": rng.randrange(2**20)}


def _other_case(rng: random.Random, name: str) -> DepthwiseCase | SqueezeExciteCase:
    sizes = {"batch": rng.choice((0, 1, 3)), "height": rng.randint(1, 8), "width": rng.randint(1, 11)}
    if name == "depthwise_backward":
        return DepthwiseCase(channels=rng.randint(1, 9), stride=rng.choice((1, 2)), act="silu", **sizes, **_common(rng))
    return SqueezeExciteCase(channels=rng.randint(1, 9), reduced=rng.randint(1, 5), act="silu", gate="sigmoid", **sizes,
                             **_common(rng))  # fmt: skip


def _ghost_case(rng: random.Random) -> Case:
    """A Ghost module's, without kinks in half precision, where PyTorch's own gradients differ from run to run."""
    common, ratio = _common(rng), rng.choice((2, 2, 3))
    acts = [act.name.lower() for act in Act] if common["dtype"] == torch.float32 else _SMOOTH
    return Case(
        batch=rng.choice((0, 1, 2, 3)), in_channels=rng.randint(1, 9), height=rng.randint(1, 8), width=rng.randint(1, 11),
        out_channels=ratio * rng.randint(1, 6), ratio=ratio, dw_size=rng.choice((1, 3, 3, 5)),
        act_primary=rng.choice(acts), act_cheap=rng.choice(acts), per_channel_slope=rng.random() < 0.5,
        primary_norm=rng.choice(("bn", "bn+bias", "bn_no_affine")), cheap_norm=rng.choice(("bn", "bn+bias", "bn_no_affine")),
        input_gate=rng.random() < 0.3, residual=rng.random() < 0.3, output_gate=rng.random() < 0.3, **common,
    )  # fmt: skip


def _like_output(rng: random.Random, args: Args) -> Tensor:
    return torch.empty_like(args.new_output()).copy_(torch.randn(args.output_shape()))


def _needs(rng: random.Random, args: Args) -> list[bool]:
    without = ("mean", "var")  # for which PyTorch has no gradient
    names = tensor_names(type(args))
    return [t is not None and n not in without and rng.random() < 0.7 for n, t in zip(names, args.tensors, strict=True)]


def _of_ghost_module(rng: random.Random, name: str, a: GhostArgs) -> list:
    if name == "train_forward":
        return [*(getattr(a, field) for field in schemas.TRAIN_FIELDS), ""]
    if name == "backward":
        return [_like_output(rng, a), *a, rng.random() < 0.7, "", _needs(rng, a)]
    a = training_step.with_norms_in_one_dtype(a)
    return [*a, *_memory(rng, name, a).values()]


def _memory(rng: random.Random, kernel: str, a: GhostArgs) -> dict[str, Any]:
    """What ``kernel`` takes after GhostArgs, with NaN in all that it is to fill."""

    def sometimes(t: Tensor) -> Tensor | None:
        return t if rng.random() < 0.7 else None

    def floats(*shape: int) -> Tensor:
        return torch.full(shape, float("nan"))

    def like_map(channels: int) -> Tensor:
        n, _, h, w = a.output_shape()
        empty = torch.empty((n, channels, h, w), dtype=a.x.dtype, memory_format=memory_format(a.x))
        return empty.fill_(float("nan"))

    cp, new = a.init_channels, a.cheap_weight.shape[0]
    out = like_map(a.out_channels)
    y1 = like_map(cp).copy_(training_step.primary_conv(a))
    if kernel == "primary_statistics":
        return {"out": out, "mean": floats(cp), "var": floats(cp)}
    if kernel in ("cheap_statistics", "normalize"):
        out[:, :cp] = y1
        if kernel == "normalize":
            _REFERENCE.cheap_statistics(a, out)
            return {"out": out}
        return {"out": out, "mean": floats(new), "var": floats(new)}
    if kernel == "normalize_backward":
        return {"dz1": like_map(cp).copy_(torch.randn(y1.shape)), "y1": y1, "means1": torch.randn(2, cp)}
    grad, batch = _like_output(rng, a), rng.random() < 0.7
    if kernel == "cheap_backward":
        return {
            "grad": grad, "y1": y1, "dz2": like_map(new), "y2": like_map(new) if batch else None,
            "product": sometimes(like_map(a.out_channels)), "sums": sometimes(floats(3, new)),
        }  # fmt: skip
    dz2, y2, _ = _REFERENCE.cheap_backward(a, grad, y1, batch, False, None)
    dz2, y2 = (t if t is None else like_map(new).copy_(t) for t in (dz2, y2))
    dz1 = sometimes(like_map(cp))
    return {
        "grad": grad, "y1": y1, "dz2": dz2, "y2": y2, "means2": torch.randn(2, new) if batch else None, "batch_statistics": batch,
        "dz1": dz1, "sums": None if dz1 is None else sometimes(floats(3, cp)),
        "weight": sometimes(torch.full_like(a.cheap_weight, float("nan"), memory_format=torch.contiguous_format)),
    }  # fmt: skip


# ---- what they give


def run(call: Call, arguments: list, backend: str) -> dict[str, Tensor]:
    """The results of the op, on the CPU, by their names; ``arguments`` are the call's, on the backend's device."""
    made = op_of(call.op, backend)(*arguments)
    given = dict(zip(call.names, arguments, strict=True))
    if call.op in KERNELS:  # what has been filled, by way of its storage: ptx-on-cpu copies no strides
        given |= {name: _on_cpu(t) for name, t in given.items() if name in _FILLED and isinstance(t, Tensor)}
    return _named(call.op, given, [t.cpu() for t in made or ()])


def _on_cpu(t: Tensor) -> Tensor:
    buffer = torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage())
    return buffer.cpu().as_strided(t.shape, t.stride(), t.storage_offset())


def _named(op: str, given: dict[str, Any], made: Any) -> dict[str, Tensor]:
    """What an op has returned, or filled, by name; of filled memory what its kernel is to fill."""
    if op == "train_forward":
        return dict(zip(("out", *(f"batch_{name}" for name in schemas.STATISTICS)), made, strict=False))
    if op in ("backward", *GRADIENT_OPS):
        wanted = [
            n
            for n, need in zip(tensor_names(GRADIENT_OPS.get(op, GhostArgs)), given["needs_grad"], strict=True)
            if need
        ]
        return dict(zip(wanted, made, strict=True))
    cp = given["primary_weight"].shape[0]
    if op.endswith("statistics"):
        out = given["out"][:, :cp] if op == "primary_statistics" else given["out"]
        return {"out": out, "batch_mean": given["mean"], "batch_var": given["var"]}
    filled = {"normalize": ("out",), "normalize_backward": ("dz1",), "cheap_backward": ("dz2", "y2", "product", "sums"),
              "primary_backward": ("dz1", "sums", "weight")}  # fmt: skip
    results = {name: given[name] for name in filled[op] if given[name] is not None}
    if "sums" in results and given["cheap_act" if op == "cheap_backward" else "primary_act"] != Act.PRELU:
        results["sums"] = results["sums"][:2]  # what the third is only PReLU's says
    return results


def _nudged(value: Any, seed: int) -> Any:
    return rounded_anew(value, 1, seed)[0] if isinstance(value, Tensor) else value


def _by_reference(call: Call, dtype: torch.dtype | None, seed: int | None) -> dict[str, Tensor]:
    """The same by the reference; with a ``seed`` on numbers that differ by less than rounding."""

    def own(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        t = value if seed is None else _nudged(value, seed)
        return torch.empty_like(t, dtype=dtype).copy_(t)

    arguments = [own(value) for value in call.arguments]
    given = dict(zip(call.names, arguments, strict=True))
    if call.op in GRADIENT_OPS:
        return _named(call.op, given, schemas._backward(GRADIENT_OPS[call.op], *arguments))
    if call.op == "train_forward":
        return _named(call.op, given, training_step.train_forward(_REFERENCE, schemas.train_args(arguments[:-1]), ""))
    a = GhostArgs(**{name: given[name] for name in GhostArgs.__annotations__})
    if call.op == "backward":
        made = training_step.backward(
            _REFERENCE, given["grad_output"], a, given["batch_statistics"], "", given["needs_grad"]
        )
        return _named(call.op, given, made)
    return _named(call.op, {**given, **_KERNEL_CALLS[call.op](a, given)}, None)


def _statistics(kernel: Callable, a: GhostArgs, given: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(("mean", "var"), kernel(a, given["out"]), strict=True))


def _cheap_backward(a: GhostArgs, given: dict[str, Any]) -> dict[str, Any]:
    names = ("dz2", "y2", "sums")
    asked = given["y2"] is not None, given["sums"] is not None, given["product"]
    return dict(zip(names, _REFERENCE.cheap_backward(a, given["grad"], given["y1"], *asked), strict=True))


def _primary_backward(a: GhostArgs, given: dict[str, Any]) -> dict[str, Any]:
    names = ("dz1", "sums", "weight")
    read = [given[name] for name in ("grad", "y1", "dz2", "y2", "means2", "batch_statistics")]
    # the sums are of what dz1 is made of, asked for or not
    asked = (
        given["dz1"] is not None or given["sums"] is not None,
        given["sums"] is not None,
        given["weight"] is not None,
    )
    return dict(zip(names, _REFERENCE.primary_backward(a, *read, *asked), strict=True))


_KERNEL_CALLS: dict[str, Callable[[GhostArgs, dict[str, Any]], dict[str, Any]]] = {
    "primary_statistics": lambda a, given: _statistics(_REFERENCE.primary_statistics, a, given),
    "cheap_statistics": lambda a, given: _statistics(_REFERENCE.cheap_statistics, a, given),
    "normalize": lambda a, given: _REFERENCE.normalize(a, given["out"]) or {},
    "normalize_backward": lambda a, given: (
        _REFERENCE.normalize_backward(a, given["dz1"], given["y1"], given["means1"]) or {}
    ),
    "cheap_backward": _cheap_backward,
    "primary_backward": _primary_backward,
}


def check(call: Call, results: dict[str, Tensor], run: Callable[[Call], dict[str, Tensor]]) -> None:
    """Asserts that ``results`` are what PyTorch makes of the call, of which ``arguments`` are as they were before it.

    One run may be near float64 by luck, and ours far: then others count, by ``run`` on inputs that differ by less than rounding.
    """
    assert not any(isinstance(v, Tensor) and absent_memory(v) for v in call.arguments), (
        "memory that isn't there was read"
    )
    given = dict(zip(call.names, call.arguments, strict=True))
    exact = _by_reference(call, torch.float64, None)
    assert {n: t.shape for n, t in results.items()} == {n: t.shape for n, t in exact.items()}, "other results"
    dtype = given["x"].dtype
    own = [_by_reference(call, None, seed) for seed in (None, 0, 1)]
    everything = [t for each in (exact, *own) for t in each.values()]
    kinked = {
        Act(int(given[f"{half}act"])).name.lower() for half in ("primary_", "cheap_", "") if f"{half}act" in given
    }
    if not all(t.isfinite().all() for t in everything) or (dtype != torch.float32 and not kinked <= {*_SMOOTH}):
        return
    tolerance = TOLERANCES["tf32" if given.get("allow_tf32") and dtype == torch.float32 else dtype]
    errors = {name: _far(name, results, exact) for name in exact}
    limit = tolerance.floor
    for attempt in range(30):
        # the worst of all: one of few numbers may be exact by luck
        limit = max(limit, *(tolerance.factor * _far(name, each, exact) for each in own for name in exact), 0.0)
        if max(errors.values(), default=0.0) <= limit:
            return
        if attempt == 1 and max(errors.values()) < 2 * limit:
            runs = [errors]
            for seed in range(4):
                near = call._replace(arguments=[_nudged(v, seed) for v in call.arguments])
                right, ours = _by_reference(near, torch.float64, None), run(near)
                runs.append({name: _far(name, ours, right) for name in right})
            errors = {name: statistics.median(each[name] for each in runs) for name in exact}
        own = [_by_reference(call, torch.float64, 2 + attempt)]
    raise AssertionError(f"errors {errors}, limit {limit:.2e}")


def _far(name: str, results: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    return _error(name, results, exact) if exact[name].numel() else 0.0


assert set(GRADIENT_OPS) == {f"{op}_backward" for op in OPS if op != "forward"}
