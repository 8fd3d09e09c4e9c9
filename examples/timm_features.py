"""Features and classes of a timm GhostNet, fused against unfused, on a photo::

    python examples/timm_features.py --model ghostnet_100 --pretrained
    python examples/timm_features.py --model ghostnetv2_100 --checkpoint mine.pth --image photo.jpg

With neither --pretrained (which downloads) nor --checkpoint the weights are random, and the classes mean nothing. The exit
code is 1 if an output of the fused network misses its limit.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

import ghostfused
from ghostfused.cli.verify import calibrate
from ghostfused.numerics import TOLERANCES, relative_error


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ghostnet_100", help="one of timm.list_models('*ghost*')")
    parser.add_argument("--pretrained", action="store_true", help="download timm's weights")
    parser.add_argument("--checkpoint", type=Path, help="weights to load")
    parser.add_argument("--image", type=Path, help="default: a photo that scikit-learn ships")
    parser.add_argument("--size", type=int, help="height and width of the input; default: the model's own")
    parser.add_argument("--top", type=int, default=5, help="classes to print")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def build(options: argparse.Namespace, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    checkpoint = str(options.checkpoint) if options.checkpoint else ""
    return timm.create_model(options.model, pretrained=options.pretrained, checkpoint_path=checkpoint, **kwargs).eval()


def main(argv: list[str] | None = None) -> int:
    options, console = arguments(argv), Console()
    trained = options.pretrained or options.checkpoint
    classifier = build(options)
    # the levels before each reduction of size, as detection and segmentation heads take them
    features = build(options, features_only=True)

    config = timm.data.resolve_model_data_config(classifier)
    if options.size:
        config["input_size"] = (3, options.size, options.size)
    image = (
        Image.open(options.image).convert("RGB") if options.image else Image.fromarray(load_sample_image("flower.jpg"))
    )
    x = timm.data.create_transform(**config)(image)[None].to(options.device)

    table = Table(
        "output", "shape", "error", "PyTorch's error", "", title=f"{options.model}, {tuple(x.shape)} {x.dtype}"
    )
    ok = True
    for model, names in (
        (classifier, ["classes"]),
        (features, [f"features, stride {n}" for n in features.feature_info.reduction()]),
    ):
        if not trained:
            calibrate(model, x.cpu())  # statistics of its own activations, so that every layer counts
        model.to(options.device)
        fused = ghostfused.fuse(model)
        exact = outputs(copy.deepcopy(model).double().cpu(), x.double().cpu())
        before, after = outputs(model, x), outputs(fused, x)
        for name, expected, unfused, ours in zip(names, exact, before, after, strict=True):
            error, torch_error = relative_error(ours, expected), relative_error(unfused, expected)
            tolerance = TOLERANCES[x.dtype]
            good = error <= max(tolerance.factor * torch_error, tolerance.floor)
            ok &= good
            verdict = "[green]same" if good else "[red]WRONG"
            table.add_row(name, str(tuple(ours.shape)), f"{error:.1e}", f"{torch_error:.1e}", verdict)
        if model is classifier:
            scores, classes = after[0].softmax(1)[0].topk(options.top)
            unfused_scores = before[0].softmax(1)[0, classes]
    console.print(table)
    for index, score, unfused_score in zip(classes.tolist(), scores.tolist(), unfused_scores.tolist(), strict=True):
        name = class_name(index) if trained else "untrained: no meaning"
        console.print(f"class {index:4}  fused {score:.6f}  unfused {unfused_score:.6f}  {name}", highlight=False)
    return 0 if ok else 1


@torch.inference_mode()
def outputs(model: Callable, x: Tensor) -> list[Tensor]:
    """The logits, or the feature maps."""
    out = model(x)
    return [out] if isinstance(out, Tensor) else list(out)


def class_name(index: int) -> str:
    info = timm.data.ImageNetInfo()
    return info.index_to_description(index) if index < info.num_classes() else ""


if __name__ == "__main__":
    sys.exit(main())
