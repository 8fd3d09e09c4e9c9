"""What the raw ops do with calls that nobody should make: an error that names the argument, before memory is touched."""

from __future__ import annotations

import copy

import fuzz_raw_ops
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghostfused import functional, ops
from ghostfused.backends import cpu
from ghostfused.cli.verify import calibrate
from ghostfused.models import paper
from ghostfused.numerics import TOLERANCES, relative_error
from ghostfused.ops import encoding
from ghostfused.spec import STEPS, tensor_names
from ghostfused.testing import Case, DepthwiseCase, SqueezeExciteCase, make, make_args, to_device

needs_kernel = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
BACKENDS = [pytest.param("cpu", marks=needs_kernel), "reference"]

CASES = {
    "forward": Case(
        2, 6, 5, 7, 8, primary_norm="bn+bias", cheap_norm="bn+bias", act_primary="prelu", act_cheap="prelu",
        per_channel_slope=True, input_gate=True, residual=True, output_gate=True,
    ),
    "depthwise": DepthwiseCase(2, 6, 5, 7, norm="bn+bias", act="prelu"),
    "squeeze_excite": SqueezeExciteCase(2, 6, 3, 5, 7),
}  # fmt: skip
NAMED = [(op, name) for op in CASES for name in tensor_names(STEPS[op])]


def freed(t: Tensor) -> Tensor:
    """As FSDP leaves a parameter between two uses."""
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def cut(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(t.untyped_storage().nbytes() - t.element_size())
    return t


FAULTS = {
    "freed": (freed, "storage"),
    "cut": (cut, "storage"),
    "meta": (lambda t: t.to("meta"), "x's device"),
    "sparse": (Tensor.to_sparse, "dense tensor"),
    "quantized": (lambda t: torch.empty_quantized(t.shape, torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)), "dense"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("op", "name"), NAMED)
@pytest.mark.parametrize("fault", ["freed", "cut", "meta", "sparse"])
def test_memory_that_is_not_there_is_refused_by_name(fault, op, name, backend):
    make_fault, message = FAULTS[fault]
    args = make(CASES[op])
    changed = args._replace(**{name: make_fault(getattr(args, name))})
    blamed = r"\w+" if fault == "meta" and name == "x" else name  # then the others are what isn't on x's device
    with pytest.raises(RuntimeError, match=f"^{blamed}: .*{message}"):
        ops.forward_op(backend, op)(*changed)


REQUIRED = [(op, name) for op, name in NAMED if STEPS[op].__annotations__[name] is Tensor]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("op", "name"), REQUIRED)
def test_none_is_refused_by_name(op, name, backend, device):
    """PyTorch hands None on to an op, where a tensor must be, and to its fake if another tensor is on the meta device."""
    args = to_device(make(CASES[op]), device)._replace(**{name: None})
    with pytest.raises((TypeError, RuntimeError), match=f"^{name}: expected "):
        ops.forward_op(backend, op)(*args)


@pytest.mark.parametrize(("op", "name"), [*REQUIRED, *((op, "grad_output") for op in CASES)])
def test_backward_ops_refuse_none_by_name(op, name):
    args = make(CASES[op])
    settings = [False, ""] if op == "forward" else []
    needs_grad = [t is not None for t in args.tensors]
    fields = {"grad_output": torch.ones(args.output_shape())} | args._asdict() | {name: None}
    backward = ops.training_op("backward", "reference") if op == "forward" else ops.backward_op(op)
    with pytest.raises(TypeError, match=f"^{name}: expected a Tensor, got None"):
        backward(*fields.values(), *settings, needs_grad)


@pytest.mark.parametrize(("op", "name"), NAMED)
def test_functions_refuse_freed_memory_by_name(op, name):
    """And don't hand it to PyTorch instead, which reads it."""
    args = make(CASES[op])
    with pytest.raises(ValueError, match=f"^{name}: .*storage"):
        functional.run(args._replace(**{name: freed(getattr(args, name))}))


@pytest.mark.parametrize("op", ["depthwise", "squeeze_excite"])
def test_backward_ops_refuse_freed_memory_by_name(op):
    args = make(CASES[op])
    grad, needs_grad = torch.ones(args.output_shape()), [t is not None for t in args.tensors]
    for name, fields in {"x": (grad, *args._replace(x=freed(args.x))), "grad_output": (freed(grad), *args)}.items():
        with pytest.raises(RuntimeError, match=f"^{name}: .*storage"):
            ops.backward_op(op)(*fields, needs_grad)
    with pytest.raises(RuntimeError, match=f"needs_grad: expected {len(needs_grad)} bools"):
        ops.backward_op(op)(grad, *args, needs_grad[1:])


def test_training_ops_refuse_freed_memory_by_name():
    args = make(CASES["forward"])
    given = {name: getattr(args, name) for name in ops.TRAIN_FIELDS}
    for name in [name for name, t in given.items() if isinstance(t, Tensor)]:
        with pytest.raises(RuntimeError, match=rf"^{name}: .*storage"):
            ops.training_op("train_forward", "reference")(*(given | {name: freed(given[name])}).values(), "")
    grad, needs_grad = freed(torch.ones(args.output_shape())), [True] * len(args.tensors)
    with pytest.raises(RuntimeError, match=r"^grad_output: .*storage"):
        ops.training_op("backward", "reference")(grad, *args, False, "", needs_grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("op", "name"), NAMED)
def test_negative_views_are_what_they_show(op, name, backend):
    args = make(CASES[op])
    value = getattr(args, name)
    view = torch._neg_view(-value)
    assert view.is_neg()
    out = ops.forward_op(backend, op)(*args._replace(**{name: view}))
    assert torch.equal(out, ops.forward_op(backend, op)(*args))


@needs_kernel
def test_a_negative_view_is_not_kept():
    """The dispatcher would hand a copy of it to the op, and what is written later would be missed."""
    args = make(CASES["squeeze_excite"])
    out = functional.run(args, "cpu")
    found = encoding.encode([(args, out)], args.x, {id(t) for t in args.tensors})
    assert found is not None
    tensors = [found.tensors[0], torch._neg_view(found.tensors[1]), *found.tensors[2:]]
    with pytest.raises(RuntimeError, match=r"tensors\[1\]: expected no negative view"):
        ops.KeptProgram("cpu", found._replace(tensors=tensors), cpu.extension.module.drop_program)
    negative = args._replace(reduce_bias=torch._neg_view(args.reduce_bias))
    assert encoding.encode([(negative, out)], args.x, {id(t) for t in negative.tensors}) is None


@needs_kernel
@pytest.mark.parametrize("eps", [float("nan"), -1e-5, float("-inf")])
@pytest.mark.parametrize(("op", "name"), [("forward", "primary_eps"), ("forward", "cheap_eps"), ("depthwise", "eps")])
def test_eps_that_is_no_eps(op, name, eps):
    args = make(CASES[op])._replace(**{name: eps})
    with pytest.raises(RuntimeError, match=f"^{name}: expected a number that is not negative"):
        ops.forward_op("cpu", op)(*args)
    if eps != eps:  # of which PyTorch makes NaN
        assert functional.run(args).isnan().any()
        return
    with pytest.raises(ValueError, match=f"^{name}: expected a number that is not negative"):
        functional.run(args)


# ---- sizes


def row(length: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """One number, so many times."""
    return torch.ones((), dtype=dtype).expand(1, 1, 1, length)


def depthwise_arguments(x: Tensor) -> tuple:
    return x, torch.ones(1, 1, 3, 3, dtype=x.dtype), *[None] * 6, 0.0, 0, 0.0, 2


@needs_kernel
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("length", [2**31 - 1, 2**31, 2**30])
def test_rows_that_no_kernel_counts(length, turned):
    x = row(length).transpose(2, 3) if turned else row(length)
    with pytest.raises(RuntimeError, match=r"^x: .*expected"):
        ops.forward_op("cpu", "depthwise")(*depthwise_arguments(x))


@needs_kernel
@pytest.mark.parametrize("shape", [(1, 2**26 + 1, 1, 1), (2**31, 1, 1, 1), (2**20, 4, 2**20, 2**20), (1, 1, 2**31, 2)])
@pytest.mark.parametrize("op", CASES)
def test_sizes_beyond_the_bounds_are_refused(op, shape):
    args = make(CASES[op])
    x = torch.ones(()).expand(shape)
    if op == "forward":
        args = make_args(Case(in_channels=1, out_channels=2))
        args = args._replace(x=x, primary_weight=torch.ones(()).expand(1, shape[1], 1, 1))
    elif op == "depthwise":
        args = args._replace(x=x, weight=torch.ones(()).expand(shape[1], 1, 3, 3), **dict.fromkeys(("bias", "mean", "var", "gamma", "beta"), None))  # fmt: skip
    else:
        wide = torch.ones(()).expand(2, shape[1])
        args = args._replace(x=x, reduce_weight=wide, expand_weight=wide.T, reduce_bias=None, expand_bias=None)
    with pytest.raises(RuntimeError, match="expected"):
        ops.forward_op("cpu", op)(*args)


@needs_kernel
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dilation": 2**31 - 1}, "dilation: expected"),
        ({"dilation": 2**24}, "dilation: expected"),
        ({"stride": 2**31}, "stride: expected"),
        ({"out_channels": 2**62}, "out_channels: expected"),
        ({"primary_weight": torch.ones(()).expand(8, 6, 1025, 1025)}, "primary_weight: expected"),
    ],
)
def test_settings_beyond_the_bounds_are_refused(changes, message):
    args = make_args(Case(2, 6, 5, 7, 16, kernel_size=3))._replace(**changes)
    with pytest.raises(RuntimeError, match=message):
        ops.forward_op("cpu")(*args)


@needs_kernel
def test_any_stride_of_a_dimension_of_one():
    args = make_args(Case(1, 6, 1, 7, 8, dw_size=5))
    x = torch.empty(42).as_strided((1, 6, 1, 7), (2**62, 7, 2**61, 1)).copy_(args.x)
    assert torch.equal(ops.forward_op("cpu")(*args._replace(x=x)), ops.forward_op("cpu")(*args))


@needs_kernel
def test_what_the_kernel_has_no_scratch_memory_for_the_reference_runs(monkeypatch):
    """Asked for by name it is refused, and else it is what PyTorch makes of it."""
    x = torch.randn(1, 1, 1, 1).expand(1, 1, 2, 2**26)
    args = STEPS["depthwise"](*depthwise_arguments(x))
    with pytest.raises(RuntimeError, match=r"x: a thread would need .* floats of scratch memory"):
        functional.run(args, "cpu")
    out = functional.run(args)
    assert out.shape == args.output_shape()
    torch.testing.assert_close(out[0, 0, 0, 1:4], (6 * x[0, 0, 0, 0]).expand(3))


# ---- programs


class Embedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(paper.GhostBottleneck(4, 8, 6), paper.GhostBottleneck(6, 12, 6))
        self.pool, self.embed = nn.AdaptiveAvgPool2d(1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(self.pool(self.body(x)).flatten(1))


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@needs_kernel
@pytest.mark.parametrize("batch", [3, 16, 1001])
@pytest.mark.usefixtures("two_threads")
def test_a_program_that_mixes_images_is_not_cut_into_pieces(batch):
    """The result, how alike the images are, has the batch as its second size as well."""
    model, x = calibrate(Embedding(), torch.randn(4, 4, 5, 5)), torch.randn(batch, 4, 5, 5)
    found = fuzz_raw_ops.compared(fuzz_raw_ops.program_of(model, x), x)
    with torch.no_grad():
        y, exact = model(x), copy.deepcopy(model).double()(x.double())
        out = ops.forward_op("cpu", "program")(x, *found)
        kept = ops.KeptProgram("cpu", found, cpu.extension.module.drop_program)
        replayed = kept(x)
    own, expected = F.linear(y, y), F.linear(exact, exact)
    tolerance = TOLERANCES[torch.float32]
    limit = max(tolerance.factor * relative_error(own, expected), tolerance.floor)
    assert out.shape == (batch, batch)
    assert relative_error(out, expected) <= limit
    assert torch.equal(out, replayed)


@needs_kernel
@pytest.mark.usefixtures("two_threads")
def test_a_map_that_is_given_is_not_cut_into_pieces():
    """A residual among the tensors belongs to all images at once."""
    args = make_args(Case(33, 6, 5, 7, 6, residual=True))
    out = ops.forward_op("cpu")(*args)
    found = encoding.encode([(args, out)], args.x, {id(t) for t in args.tensors})
    assert found is not None
    assert torch.equal(ops.forward_op("cpu", "program")(args.x, *found), out)


@needs_kernel
def test_a_batch_beyond_the_bounds_is_not_cut_into_pieces():
    with pytest.raises(RuntimeError, match=r"^x: expected 0 … 1073741824 along a dimension, got 2147483647"):
        pool(torch.ones(()).expand(2**31 - 1, 3, 2, 2))


@needs_kernel
@pytest.mark.usefixtures("two_threads")
def test_pieces_of_a_very_large_batch():
    x = torch.randn(20000, 1, 2, 2)
    torch.testing.assert_close(pool(x), x.mean((2, 3), keepdim=True))


@needs_kernel
@pytest.mark.parametrize("op", STEPS)
def test_programs_name_the_step_and_the_argument(op):
    """In the order of the op's fields, whatever the field."""
    fields = STEPS[op].__annotations__
    numbers = [0.0] * sum(kind is float for kind in fields.values())
    coded = [name for name, kind in fields.items() if kind is not float]
    x, given = torch.ones(2, 3, 4, 4), [torch.ones(1)]
    run = ops.forward_op("cpu", "program")
    for i, name in enumerate(coded):
        kind = fields[name]
        valid = [0 if k is Tensor else 0 if k in (int, bool) else -1 for k in (fields[n] for n in coded)]
        for wrong in ([2], [2, 9]) if kind is bool else ([4], [-2], [3]) if kind not in (int,) else ():
            code = [list(STEPS).index(op), *valid[:i], wrong[-1], *valid[i + 1 :]]
            with pytest.raises(RuntimeError, match=rf"code: step 0 \({op}\): {name}: "):
                run(x, given, code, numbers)
        with pytest.raises(RuntimeError, match=rf"code: step 0 \({op}\): {name}: "):
            run(x, given, [list(STEPS).index(op), *valid[:i]], numbers)
    if numbers:
        with pytest.raises(RuntimeError, match=r": expected more numbers than 0"):
            run(x, given, [list(STEPS).index(op), *valid], [])
    with pytest.raises(RuntimeError, match="numbers: expected"):
        run(x, given, [list(STEPS).index(op), *valid], [*numbers, 1.0])


@needs_kernel
def test_a_step_names_its_arguments_as_its_op_does():
    pool, linear = list(STEPS).index("global_pool"), list(STEPS).index("linear")
    code = [pool, 0, linear, 5, 2, -1]
    x = torch.ones(1, 3, 4, 4)
    with pytest.raises(RuntimeError, match=r"step 1 \(linear\): x: expected shape \(1, 4, 1, 1\), got \(1, 3, 1, 1\)"):
        ops.forward_op("cpu", "program")(x, [torch.ones(7, 4)], code, [])
    again = [pool, 0, pool, 5, pool, 4]
    with pytest.raises(RuntimeError, match=r"step 2 \(global_pool\): x: tensor 2 is read after its last use"):
        ops.forward_op("cpu", "program")(x, [torch.ones(7, 4)], again, [])
    with pytest.raises(RuntimeError, match=r"step 1 \(linear\): weight: .*storage"):
        ops.forward_op("cpu", "program")(x, [freed(torch.ones(7, 3))], code, [])


@needs_kernel
def test_a_wrong_program_is_not_kept():
    with pytest.raises(RuntimeError, match=r"code: step 0 \(global_pool\): x: expected a place below 2"):
        ops.forward_op("cpu", "keep_program")([torch.ones(1)], [list(STEPS).index("global_pool"), 4], [])


# ---- means


def pool(x: Tensor) -> Tensor:
    return ops.forward_op("cpu", "program")(x, [], [list(STEPS).index("global_pool"), 0], [])


@needs_kernel
@pytest.mark.parametrize("channels", [1, 3, 7, 8, 12, 17])
@pytest.mark.parametrize("layout", ["nchw", "nhwc", "columns"])
def test_means_of_large_maps(channels, layout):
    x = torch.rand(1, channels, 300, 512) + 1
    if layout == "nhwc":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "columns":
        x = x[..., ::2]
    expected = x.double().mean((2, 3), keepdim=True)
    tolerance = TOLERANCES[torch.float32]
    limit = max(tolerance.factor * relative_error(x.mean((2, 3), keepdim=True), expected), tolerance.floor)
    assert relative_error(pool(x), expected) <= limit


@needs_kernel
@pytest.mark.parametrize("strides", [(0, 0), (0, 1), (1, 0)])
@pytest.mark.parametrize("channels", [1, 3])
def test_means_of_more_numbers_than_float32_counts(channels, strides):
    x = torch.full((8192,), 0.1).as_strided((1, channels, 8192, 8192), (0, 0, *strides))
    if strides == (0, 0):
        x = torch.full((4, 1), 0.1).as_strided((1, channels, 8192, 8192), (0, 1, 0, 0))
    assert relative_error(pool(x), torch.full((1, channels, 1, 1), 0.1).double()) <= TOLERANCES[torch.float32].floor


@needs_kernel
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_means_keep_infinities_and_nan(layout):
    x = torch.ones(1, 3, 9, 20)
    x[0, 1, 1, 1], x[0, 2, 8, 19] = float("inf"), float("nan")
    out = pool(x.to(memory_format=layout))
    assert torch.equal(out.flatten().nan_to_num(7.0, posinf=9.0), torch.tensor([1.0, 9.0, 7.0]))
