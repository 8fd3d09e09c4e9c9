"""The ops themselves, ``torch.ops.ghostfused.*``, have no derivatives, and say so: no tangent or gradient is lost without a word."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from ghostfused import FusedGhostModule, backends, ops
from ghostfused.backends import reference
from ghostfused.ops import autograd
from ghostfused.testing import Case, DepthwiseCase, SqueezeExciteCase, make

OPS = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("ghostfused::"))
VALUES = {"float": 0.5, "int": 1, "bool": True, "str": "", "List[int]": [1], "List[float]": [0.5], "List[bool]": [True]}


@pytest.mark.parametrize("name", OPS)
def test_a_tangent_of_any_tensor_is_refused_by_name(name):
    """Before anything else is looked at: these arguments are of the right types, no more."""
    op = getattr(torch.ops.ghostfused, name.partition("::")[2]).default
    of_tensors = [a for a in op._schema.arguments if "Tensor" in str(a.type)]
    assert of_tensors or name.endswith("keep_program")
    for dual in of_tensors:
        with forward_ad.dual_level():

            def value(argument, dual=dual):
                kind = str(argument.type)
                if "Tensor" not in kind:
                    return VALUES[kind]
                t = forward_ad.make_dual(torch.ones(2), torch.ones(2)) if argument is dual else torch.ones(2)
                return [torch.ones(2), t] if "List" in kind else t

            for context in (torch.no_grad(), torch.enable_grad()):
                with (
                    context,
                    pytest.raises(NotImplementedError, match=rf"^{dual.name}: expected no tangent: {name} has"),
                ):
                    op(*map(value, op._schema.arguments))


def calls():
    """Every forward op of backends that run here, as a function of its first tensor; and a program of one step."""
    cases = (
        Case(1, 4, 4, 3, 7, act_primary="silu", act_cheap="hardswish", residual=True),
        DepthwiseCase(1, 4, 4, 5, act="silu"),
        SqueezeExciteCase(2, 4, 3, 2, 3, gate="sigmoid", act="silu"),
    )
    for case in cases:
        for backend in ("cpu", "reference"):
            if backends.BACKENDS[backend].unavailable() is None:
                yield pytest.param(make(case), ops.forward_op(backend, make(case).op), id=f"{backend}-{make(case).op}")


@pytest.mark.parametrize(("args", "op"), calls())
def test_what_a_call_does_with_derivatives(args, op):
    def f(x):
        return op(x, *args[1:])

    def lost(*_):
        return jvp(f, (args.x,), (args.x,))

    expected = f(args.x)
    torch.testing.assert_close(vmap(f)(args.x[None])[0], expected)
    with torch.inference_mode():
        torch.testing.assert_close(f(args.x), expected)
    for transform in (lost, jacfwd(f), grad(lambda x: f(x).sum()), jacrev(f), hessian(lambda x: f(x).sum())):
        with pytest.raises(NotImplementedError, match=op.name()):
            transform(args.x)
    for wanted in (i for i, t in enumerate(args) if isinstance(t, torch.Tensor)):
        given = [t.clone().requires_grad_() if i == wanted else t for i, t in enumerate(args)]
        out = op(*given)
        torch.testing.assert_close(out, expected)
        with pytest.raises(NotImplementedError, match=f"^{op.name()}: the op has no derivative"):
            (out + given[wanted].sum()).sum().backward()
        with torch.no_grad():
            assert not op(*given).requires_grad
    # what depends on nothing that is differentiated is let through
    out, tangent = jvp(lambda t: f(args.x) * t, (torch.ones(()),), (torch.ones(()),))
    torch.testing.assert_close(tangent, out)
    torch.testing.assert_close(grad(lambda t: (f(args.x) * t).sum())(torch.ones(())), expected.sum())


def test_functions_around_an_op_differentiate_it():
    args = make(Case(1, 4, 4, 3, 7, act_primary="silu"))
    weight = args.primary_weight.requires_grad_()
    for backend in (name for name in ("cpu", "reference") if backends.BACKENDS[name].unavailable() is None):
        (ours,) = torch.autograd.grad(autograd.call(backend, args).square().sum(), weight)
        (right,) = torch.autograd.grad(reference.run(args).square().sum(), weight)
        torch.testing.assert_close(ours, right)


@pytest.mark.skipif(backends.BACKENDS["cpu"].unavailable() is not None, reason="programs are kept by the CPU kernels")
def test_programs_say_so_too():
    module, x = FusedGhostModule(4, 6).eval(), torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        expected = module(x)
    (kept,) = module._cache._state.programs.values()
    replay, program = torch.ops.ghostfused.replay_cpu, torch.ops.ghostfused.program_cpu
    torch.testing.assert_close(replay(x, kept.number), expected)
    with pytest.raises(NotImplementedError, match="ghostfused::replay_cpu"):
        replay(x.clone().requires_grad_(), kept.number).sum().backward()
    with pytest.raises(NotImplementedError, match="ghostfused::program_cpu"):  # its tensors are parameters
        program(x, *kept.program).sum().backward()
    with pytest.raises(NotImplementedError, match=r"^x: expected no tangent: ghostfused::replay_cpu"):
        jvp(lambda x: replay(x, kept.number), (x,), (x,))
