"""What is benchmarked: the Ghost modules of a network, and settings (batch × dtype × layout × mode)."""

from __future__ import annotations

import argparse
import copy
import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ghostfused import FusedGhostModule
from ghostfused.cli import inputs
from ghostfused.cli.inputs import BadInput, load_model
from ghostfused.cli.verify import DTYPES, calibrate, read_rows
from ghostfused.models.paper import GhostNet
from ghostfused.recognize import ghost

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "tests" / "data" / "ghost_configs.jsonl"
MODES = ("inference", "training_forward", "backward")
LAYOUTS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}


@dataclass(frozen=True)
class Setting:
    device: str = "cpu"
    batch: int = 1
    dtype: str = "float32"
    layout: str = "nchw"
    mode: str = "inference"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def place(self, module: nn.Module) -> nn.Module:
        """A copy of ``module`` in this setting."""
        module = copy.deepcopy(module).to(self.device, self.torch_dtype).to(memory_format=LAYOUTS[self.layout])
        return module.train(self.mode != "inference")

    def input(self, shape: tuple[int, ...]) -> Tensor:
        """(batch, *shape), the same numbers at every call, rounded to dtype."""
        x = torch.randn(self.batch, *shape, generator=torch.Generator().manual_seed(0))
        return x.to(self.device, self.torch_dtype).contiguous(memory_format=LAYOUTS[self.layout])


@dataclass(frozen=True)
class Layer:
    """One Ghost module, not fused, with the shape of its input."""

    name: str
    names: tuple[str, ...]
    """Of all modules of the network that have this shape."""
    module: nn.Module
    in_channels: int
    init_channels: int
    out_channels: int
    height: int
    width: int
    out_height: int
    out_width: int
    kernel_size: int
    stride: int
    dw_size: int
    act_primary: str
    act_cheap: str

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.in_channels, self.height, self.width

    @property
    def ratio(self) -> int:
        return -(-self.out_channels // self.init_channels)

    def floor_bytes(self, batch: int, itemsize: int) -> int:
        """x read once, the output written once."""
        read = self.in_channels * self.height * self.width
        return batch * itemsize * (read + self.out_channels * self.out_height * self.out_width)

    def flops(self, batch: int) -> int:
        """Of both convolutions, a multiply-add counted as two."""
        pixels = batch * self.out_height * self.out_width
        primary = self.in_channels * self.kernel_size**2 * self.init_channels
        return 2 * pixels * (primary + (self.out_channels - self.init_channels) * self.dw_size**2)

    def calibrated(self) -> nn.Module:
        """A float32 copy of the module on the CPU whose BatchNorms have statistics of its own activations."""
        module = copy.deepcopy(self.module).cpu().float()
        x = torch.randn(1, *self.shape, generator=torch.Generator().manual_seed(1))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return calibrate(module, x, batches=1)

    def as_row(self) -> dict:
        row = {f: getattr(self, f) for f in self.__dataclass_fields__ if f != "module"}
        return row | {"names": list(self.names), "count": len(self.names), "ratio": self.ratio}


def layer(name: str, module: nn.Module, shape: tuple[int, int, int], count: int = 1) -> Layer:
    """``module``, for inputs of (N, *shape)."""
    recognized = ghost.read(module)
    if isinstance(recognized, str):
        raise ValueError(f"{name} is no Ghost module: {recognized}")
    primary, cheap = (ghost.read_place(module, place) for place in (recognized.primary, recognized.cheap))
    assert not isinstance(primary, str)
    assert not isinstance(cheap, str)
    in_channels, height, width = shape
    stride = primary.conv.stride[0]
    return Layer(
        name, (name,) * count, module, in_channels, primary.weight.shape[0], recognized.out_channels(module), height, width,
        -(-height // stride), -(-width // stride), primary.weight.shape[2], stride, cheap.weight.shape[2],
        primary.act.name.lower(), cheap.act.name.lower(),
    )  # fmt: skip


def distinct(layers: list[Layer]) -> list[Layer]:
    """One Layer for all that have the same shape and computation, named by the first; in order of first appearance."""
    seen: dict[tuple, Layer] = {}
    for each in layers:
        key = tuple(getattr(each, f) for f in each.__dataclass_fields__ if f not in ("name", "names", "module"))
        first = seen.get(key)
        seen[key] = each if first is None else replace(first, names=first.names + each.names)
    return list(seen.values())


def layers_of(model: nn.Module, size: int = 224) -> list[Layer]:
    """The Ghost modules that ``model`` calls on a (1, 3, size, size) input, with the shapes that hooks see there."""
    model = model.eval()
    names = [name for name, module in model.named_modules() if not isinstance(ghost.read(module), str)]
    shapes: dict[str, tuple[int, int, int]] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: shapes.__setitem__(name, tuple(args[0].shape[1:]))
        )
        for name in names
    ]
    x = torch.zeros(1, 3, size, size)
    with torch.no_grad():
        inputs.attempt(f"{type(model).__name__} given {tuple(x.shape)}", lambda: model(x))
    for handle in handles:
        handle.remove()
    return distinct([layer(name, model.get_submodule(name), shapes[name]) for name in names if name in shapes])


def layers_from_rows(path: Path = CONFIGS, source: str | None = None) -> list[Layer]:
    """The Ghost modules of a JSON Lines file with rows as in ghost_configs.jsonl, of one ``source`` or of all."""
    layers = []
    for i, (where, row) in enumerate(read_rows(path, source)):
        try:
            shape = row["in_channels"], row["height"], row["width"]
            layers.append(layer(f"row {i}", Unfused(_of_row(row)), shape, row["count"]))
        except (ValueError, RuntimeError, MemoryError) as error:
            raise BadInput(f"{where}: {str(error).partition(chr(10))[0]}") from None
    return distinct(layers)


def _of_row(row: dict[str, Any]) -> FusedGhostModule:
    return FusedGhostModule(
        row["in_channels"], row["out_channels"], row["ratio"], row["kernel_size"], row["stride"],
        dw_size=row["dw_size"], act_primary=row["act_primary"], act_cheap=row["act_cheap"],
    )  # fmt: skip


class Unfused(nn.Module):
    """The layers of a FusedGhostModule, called one after the other, as in a Ghost module that nobody fused."""

    def __init__(self, fused: FusedGhostModule):
        super().__init__()
        self.primary_conv, self.cheap_operation = fused.children()
        self.out_channels = fused.out_channels

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.primary_conv(x)
        return torch.cat([x1, self.cheap_operation(x1)], dim=1)[:, : self.out_channels]


def network(name: str) -> nn.Module:
    """ "paper" (GhostNet 1.0×), "paper:WIDTH", "timm:NAME:deploy" (re-parameterized), "yolov8n-ghost-backbone" (ultralytics'), or
    what ``ghostfused verify --model`` takes; random weights.

    Raises:
        BadInput: no network has that name, or making it failed.
    """
    torch.manual_seed(0)
    if name.startswith("timm:") and name.endswith(":deploy"):
        return inputs.attempt(name, lambda: _deployed(network(name.removesuffix(":deploy"))))
    if name == "yolov8n-ghost-backbone":
        return inputs.attempt(name, _yolo_backbone)
    kind, _, width = name.partition(":")
    if kind == "paper":
        return inputs.attempt(name, lambda: GhostNet(width=inputs.amount(width or "1")).eval())
    model = load_model(name)[0]
    return inputs.attempt(f"{name} in eval mode", model.eval)


def networks(names: str, size: int) -> dict[str, nn.Module]:
    """Those that an option names, with commas, all tried on an image of that size before anything is measured."""
    found = {name: network(name) for name in names.split(",")}
    for name, model in found.items():
        inputs.run_once(name, model, torch.zeros(1, 3, size, size))
    torch.manual_seed(0)
    return found


def _deployed(model: nn.Module) -> nn.Module:
    from timm.utils import reparameterize_model

    return reparameterize_model(model).eval()


def _yolo_backbone() -> nn.Module:
    from ultralytics.nn.tasks import DetectionModel

    layers = DetectionModel("yolov8n-ghost.yaml", verbose=False).get_submodule("model").children()
    return nn.Sequential(*itertools.islice(layers, 10)).eval()


def add_setting_arguments(parser: argparse.ArgumentParser, batch: str, modes: bool = True) -> None:
    several = inputs.several
    parser.add_argument("--batch", default=batch, type=several(inputs.positive), metavar="N,N", help=f"default {batch}")
    dtypes, layouts = several(inputs.dtype, DTYPES), several(inputs.layout, LAYOUTS)
    parser.add_argument("--dtype", default="float32", type=dtypes, help=f"some of {','.join(DTYPES)}")
    parser.add_argument("--layout", default="nhwc,nchw", type=layouts, help="default nhwc,nchw")
    if modes:
        parser.add_argument("--mode", default="inference", type=several(str, MODES), help=f"some of {','.join(MODES)}")


def settings(options: argparse.Namespace) -> list[Setting]:
    """Every combination that the options name."""
    axes = options.batch, options.dtype, options.layout, getattr(options, "mode", ["inference"])
    return [Setting(options.device, *values) for values in itertools.product(*axes)]
