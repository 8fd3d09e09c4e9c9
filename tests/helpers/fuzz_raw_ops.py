"""Malformed calls of the raw ops, drawn by seed: each ends in an error that names an argument, or in the right result.

``python tests/helpers/fuzz_raw_ops.py --calls 100000 --seed 1`` draws others than the tests do. A crash is told apart by the last
line that ``--trace FILE`` has written: the call's number, with which ``--first`` begins anew.
"""

from __future__ import annotations

import argparse
import collections
import functools
import os
import random
import re
import resource
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[2]))

import fuzz_training_ops
import torch
from raw_op_faults import DTYPES, Call, damage
from torch import Tensor, nn

from ghostfused import capture, fuse, ops
from ghostfused.backends import BACKENDS, reference
from ghostfused.backends.triton import INTERPRETED
from ghostfused.cli.verify import calibrate
from ghostfused.models import paper
from ghostfused.numerics import TOLERANCES, relative_error, rounded_anew
from ghostfused.ops import encoding
from ghostfused.ops.schemas import TRAINING_OPS
from ghostfused.spec import STEPS, Act, Step, tensor_names
from ghostfused.spec.checks import absent_memory, validate
from ghostfused.spec.takes import COMMON, TAKES
from ghostfused.testing import Case, DepthwiseCase, SqueezeExciteCase, convert, judge, make

WORDS = {"code", "numbers", "tensors", "program", *(name for kind in STEPS.values() for name in kind.__annotations__)}
REFUSALS = WORDS | {"kernels"}
"""Of which an error has one, or another of the call's own arguments' names."""
NOT_BY_PYTORCH = ("eps must be positive", "value cannot be converted to type float without overflow")
"""What PyTorch's own layers say of numbers that the kernels take: the batch_norm of torch 2.11 of 0, others of 1e300."""
COMPILED = ("cpu", "cuda")
LARGEST = 2**20
"""Elements of a tensor in calls of kernels that PyTorch or Triton's interpreter runs: they take any number, and their time."""
MEMORY = 12 << 30
"""Bytes of addresses that the command may use: a call that needs more of them has slipped through the bounds."""


# ---- what a valid call is


def _ghost(rng: random.Random, backend: str) -> Case:
    conv = TAKES.get(backend, COMMON).windows and rng.random() < 0.3
    norms = ("bn", "bias", "bn+bias", "bn_no_affine", "none")
    acts = [act.name.lower() for act in Act]
    ratio = rng.choice((2, 2, 3))
    return Case(
        batch=rng.choice((0, 1, 2, 5)), in_channels=rng.randint(1, 9), height=rng.randint(1, 9), width=rng.randint(1, 18),
        out_channels=ratio * rng.randint(1, 9), ratio=ratio, dw_size=rng.choice((1, 3, 5, 7)),
        kernel_size=rng.choice((3, 5)) if conv else 1, stride=rng.choice((1, 2)) if conv else 1,
        dilation=rng.choice((1, 2)) if conv else 1, act_primary=rng.choice(acts), act_cheap=rng.choice(acts),
        per_channel_slope=rng.random() < 0.5, primary_norm=rng.choice(norms), cheap_norm=rng.choice(norms),
        input_gate=rng.random() < 0.3, residual=rng.random() < 0.3, output_gate=rng.random() < 0.3,
    )  # fmt: skip


def _case(rng: random.Random, backend: str) -> Case | DepthwiseCase | SqueezeExciteCase:
    common: dict[str, Any] = {
        "dtype": rng.choice(DTYPES), "layout": rng.choice(("nchw", "nhwc")), "sliced": rng.random() < 0.3,
        "seed": rng.randrange(2**20),
    }  # fmt: skip
    kind = rng.randrange(3)
    if kind == 0:
        case: Any = _ghost(rng, backend)
    elif kind == 1:
        kernel = rng.choice(((3, 3), (5, 5), (7, 7), (1, 5), (5, 1)))
        case = DepthwiseCase(rng.choice((0, 1, 2)), rng.randint(1, 20), rng.randint(1, 9), rng.randint(1, 20), kernel)
    else:
        case = SqueezeExciteCase(rng.choice((0, 1, 3)), rng.randint(1, 20), rng.randint(1, 6), rng.randint(1, 9), 5)
    return case.__class__(**{**case.__dict__, **common})


class _Net(nn.Module):
    """A stem, bottlenecks and a classifier."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            paper.ConvBnAct(3, 8),
            paper.GhostBottleneck(8, 17, 12, stride=2, se_ratio=0.25),
            paper.GhostBottleneck(12, 24, 12),
        )
        self.pool, self.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(12, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.body(x)).flatten(1))


class _Joined(nn.Module):
    """Maxima, and maps one after the other."""

    def __init__(self):
        super().__init__()
        self.first, self.last = paper.GhostModule(3, 8), nn.Conv2d(40, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.first(x), 3, 2, 1)
        y = nn.functional.max_pool2d(x, 5, 1, 2)
        return self.last(torch.cat([x, y, nn.functional.max_pool2d(y, 5, 1, 2), torch.cat([y, x], 1)], 1))


def compared(kept: encoding.Program, x: Tensor) -> encoding.Program:
    """``kept``, whose result is a matrix, and each image's likeness to all others: a result as another's weight."""
    steps: list[Step] = []
    encoding.run_program(lambda args: steps.append(args) or args.new_output(), x, *kept)  # type: ignore[func-returns-value]
    last = 2 * (len(kept.tensors) + len(steps))
    return kept._replace(code=[*kept.code, list(STEPS).index("linear"), last, last + 1, -1])


@functools.cache
def _programs(backend: str) -> list[tuple[int, encoding.Program]]:
    """What fused bottlenecks record of themselves and what a captured network is, and the channels of their input."""
    torch.manual_seed(3)
    net = calibrate(_Net(), torch.randn(4, 3, 9, 10))
    found = []
    for channels, model in ((8, net.body[1]), (12, net.body[2])):
        fused = fuse(model)
        with torch.no_grad():
            fused(torch.randn(2, channels, 9, 10))
        (kept,) = fused._cache._state.programs.values()
        found.append((channels, kept.program))
    if backend == "cpu":  # whose programs have the steps of whole networks
        x = torch.randn(2, 3, 9, 10)
        whole = program_of(net, x)
        joined = program_of(calibrate(_Joined(), torch.randn(4, 3, 9, 10)), x)
        found += [(3, whole), (3, compared(whole, x)), (3, joined), (3, joined)]
    return found


def program_of(model: nn.Module, x: Tensor) -> encoding.Program:
    """The one program that ``model`` is when it is captured."""
    (variant,) = capture(model, x)._variants.values()
    (kept,) = variant.lowered.programs
    return kept.program


def _valid(rng: random.Random, backend: str) -> Call:
    if rng.random() < (0.4 if backend in TRAINING_OPS else 0.1):
        return fuzz_training_ops.draw(rng, backend)
    if rng.random() < 0.6 or backend.startswith("triton"):
        args = make(_case(rng, backend))
        return Call(args.op, list(args), list(type(args).__annotations__))
    channels, (tensors, code, numbers) = rng.choice(_programs(backend))
    x = torch.randn(rng.choice((0, 1, 2, 7, 17)), channels, rng.randint(1, 9), rng.randint(1, 12))
    if rng.random() < 0.3:
        x = x.to(memory_format=torch.channels_last)
    op = rng.choice(("program", "replay")) if backend in COMPILED else "program"
    return Call(op, [x, [t.detach() for t in tensors], list(code), list(numbers)], ["x", "tensors", "code", "numbers"])


# ---- what comes of it


def _moved(value: Any, device: str) -> Any:
    """``value`` with its tensors on ``device``, of the same strides, and with as little memory as they have here."""
    if isinstance(value, list):
        return [_moved(each, device) for each in value]
    if not isinstance(value, Tensor) or value.is_meta or value.layout != torch.strided:
        return value
    t = value.resolve_neg()
    if absent_memory(t) is None:
        buffer = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
        return buffer.to(device).as_strided(t.shape, t.stride(), t.storage_offset())
    gone = torch.empty(t.shape, dtype=t.dtype, device=device)
    gone.untyped_storage().resize_(0)
    return gone


def _is_on_gpu(backend: str) -> bool:
    return backend == "cuda" or (backend.startswith("triton") and not INTERPRETED)


def _is_compiled(op: str, backend: str) -> bool:
    """Whether a kernel of ours runs the op, and not PyTorch's operations."""
    if op in fuzz_training_ops.GRADIENT_OPS:
        return False
    return backend in COMPILED and (backend == "cuda" or op not in fuzz_training_ops.NAMES)


def _is_huge(value: Any) -> bool:
    return (
        any(map(_is_huge, value)) if isinstance(value, list) else isinstance(value, Tensor) and value.numel() > LARGEST
    )


def _run(call: Call, backend: str) -> Any:
    arguments = _moved(call.arguments, "cuda") if _is_on_gpu(backend) else call.arguments
    torch.set_num_threads(2)  # a batch is cut into pieces for them
    try:
        if call.op in fuzz_training_ops.NAMES:
            return fuzz_training_ops.run(call, arguments, backend)
        if call.op != "replay":
            return ops.forward_op(backend, call.op)(*arguments).cpu()
        x, *rest = arguments
        drop = BACKENDS[backend].extension.module.drop_program
        return ops.KeptProgram(backend, encoding.Program(*rest), drop)(x).cpu()
    finally:
        torch.set_num_threads(1)  # PyTorch's small convolutions would wait for each other


def _check(run: Callable[[Step], Tensor], out: Tensor, args: Step) -> None:
    """One step, which ``run`` runs, against the reference in float64.

    One run of PyTorch's may be near it by luck, and ours far: then others count, on inputs that differ by less than rounding.
    """
    expected = _exact(args)
    assert out.shape == expected.shape, f"shape {tuple(out.shape)}, expected {tuple(expected.shape)}"
    if getattr(args, "allow_tf32", False) and out.dtype == torch.float32 and expected.isfinite().all() and out.numel():
        verdict = judge(out, args)  # type: ignore[arg-type]
        assert verdict.ok, verdict
        return
    tolerance = TOLERANCES[out.dtype]
    error = relative_error(out, expected) if expected.numel() else 0.0
    limit = tolerance.floor
    near = [_rounded_anew(args, seed) for seed in range(4)]
    for each in (args, *near):
        own = reference.run(each)
        if not expected.numel() or not (expected.isfinite().all() and own.isfinite().all()):
            return  # of what isn't finite only the shape is compared
        limit = max(limit, tolerance.factor * relative_error(own, expected))
        if error <= limit:
            return
    if error < 2 * limit:
        error = statistics.median([error, *(relative_error(run(each), _exact(each)) for each in near)])
    assert error <= limit, f"error {error:.2e}, limit {limit:.2e}"


def _exact(args: Step) -> Tensor:
    return reference.run(convert(args, torch.float64))  # type: ignore[arg-type,type-var]


def _rounded_anew(args: Step, seed: int) -> Step:
    given = zip(tensor_names(type(args)), args.tensors, strict=True)
    return args._replace(**{name: rounded_anew(t, 1, seed)[0] for name, t in given if t is not None})


def _run_step(backend: str, args: Step) -> Tensor:
    """The step by itself, as an op or as a program of one."""
    if args.op in ops.OPS:
        return _run(Call(args.op, list(args), []), backend)
    x, *others = args
    code = [list(STEPS).index(args.op), 0]
    tensors: list[Tensor] = []
    for value in others:
        if isinstance(value, Tensor):
            tensors.append(value)
        code.append(2 * len(tensors) if isinstance(value, Tensor) else -1 if value is None else int(value))
    return _run(Call("program", [x, tensors, code, []], []), backend)


def _checked_step(backend: str, args: Step) -> Tensor:
    out = _run_step(backend, args)
    validate(args)
    _check(functools.partial(_run_step, backend), out, args)
    return out


def _check_call(out: Any, call: Call, backend: str) -> None:
    """A program makes bit for bit what its steps make one by one."""
    if call.op in fuzz_training_ops.NAMES:
        return fuzz_training_ops.check(call, out, functools.partial(_run, backend=backend))
    if call.op in STEPS:
        return _check(functools.partial(_run_step, backend), out, STEPS[call.op](*call.arguments))
    expected = encoding.run_program(functools.partial(_checked_step, backend), *call.arguments)
    assert out.shape == expected.shape, f"shape {tuple(out.shape)}, expected {tuple(expected.shape)}"
    assert torch.equal(out.nan_to_num(), expected.nan_to_num()), "not what the program's steps make"
    return None


def describe(call: Call) -> str:
    def text(value: Any) -> str:
        if isinstance(value, list):
            return f"[{', '.join(map(text, value))}]"
        if isinstance(value, Tensor):
            memory = f"{value.stride()}" if value.layout == torch.strided else f"{value.layout}"
            return f"{value.dtype} {tuple(value.shape)} {memory} {value.device} {absent_memory(value) or ''}"
        return repr(value)

    return "\n".join([call.op, *(f"  {name}: {text(v)}" for name, v in zip(call.names, call.arguments, strict=True))])


def one(seed: int, number: int, backend: str) -> str:
    """Draws and makes one call; returns what came of it, and raises AssertionError if it may not."""
    rng = random.Random(f"{seed}:{number}")
    torch.manual_seed(rng.randrange(2**31))
    call = _valid(rng, backend)
    faults = rng.choice((0, 1, 1, 1, 2, 3))
    for _ in range(faults):
        damage(rng, call)
    if not _is_compiled(call.op, backend) and _is_huge(call.arguments):
        return "too large to run"
    try:
        out = _run(call, backend)
    except (RuntimeError, TypeError, ValueError) as error:
        if not faults and backend != "cuda":  # PyTorch's own operations are missing where that runs on a CPU
            raise AssertionError(f"a valid call is refused: {error}\n{describe(call)}") from error
        # PyTorch finds the op by its tensors, and says so where there are none
        if not (REFUSALS | {*call.names}) & set(re.findall(r"\w+", str(error))) and "no tensor arguments" not in str(
            error
        ):
            raise AssertionError(f"an error that names no argument: {error}\n{describe(call)}") from error
        return "error"
    try:
        _check_call(out, call, backend)
    except Exception as error:
        if any(each in str(error) for each in NOT_BY_PYTORCH):
            return "error"
        raise AssertionError(f"not what PyTorch makes of it: {error}\n{describe(call)}") from error
    return "right result"


def run(seed: int, calls: int, backend: str, first: int = 0, trace: Path | None = None) -> collections.Counter[str]:
    """How often what came of calls ``first`` … ``first + calls - 1``."""
    counts: collections.Counter[str] = collections.Counter()
    for number in range(first, first + calls):
        if trace:
            trace.write_text(f"{number}\n")
        try:
            counts[one(seed, number, backend)] += 1
        except AssertionError as error:
            raise AssertionError(f"call {number} of seed {seed}: {error}") from error
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calls", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--backend", choices=BACKENDS, default="cpu")
    parser.add_argument("--trace", type=Path)
    options = parser.parse_args()
    if "libasan" not in os.environ.get("LD_PRELOAD", ""):  # which takes addresses for all the memory there could be
        # what takes this much has gone wrong, and would take the machine along
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    counts = run(options.seed, options.calls, options.backend, options.first, options.trace)
    print(f"{Path(ops.__file__).parent}: {options.backend}, seed {options.seed}, {options.calls} calls: {dict(counts)}")


if __name__ == "__main__":
    main()
