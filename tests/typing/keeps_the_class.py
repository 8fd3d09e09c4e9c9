# mypy: warn-unused-ignores
"""What type checkers know of the public functions: ``python -m mypy`` reads this file, nothing runs it."""

from typing import assert_type

import torch
from torch import Tensor, nn

import ghostfused
from ghostfused.fuse import Report


class Classifier(nn.Module):
    def features(self, x: Tensor) -> Tensor:
        return x


def a_model_keeps_its_class(model: Classifier) -> Tensor:
    fused = ghostfused.fuse(model, level="module", inplace=True)
    assert_type(fused, Classifier)
    assert_type(ghostfused.fuse_with_report(model), tuple[Classifier, Report])
    assert_type(ghostfused.unfuse(fused), Classifier)
    return fused.features(torch.ones(1))  # no error: the method is known


def any_module_is_one(model: nn.Module) -> None:
    assert_type(ghostfused.fuse(model), nn.Module)


def what_is_no_module_is_refused() -> None:
    ghostfused.fuse("model")  # type: ignore[type-var]


def the_function_returns_a_tensor(x: Tensor, w: Tensor, norm: ghostfused.BatchNorm) -> None:
    assert_type(ghostfused.ghost_module(x, w, w, primary_bn=norm, act_primary=ghostfused.Act.RELU), Tensor)
