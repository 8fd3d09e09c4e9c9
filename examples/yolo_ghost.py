"""A YOLO detector made of Ghost modules, run by ultralytics' own ``predict``, fused against unfused::

    python examples/yolo_ghost.py --weights my_trained_yolov8n_ghost.pt --source photo.jpg
    python examples/yolo_ghost.py

Without --weights the network is built from ultralytics' YAML: its weights are random and its boxes mean nothing, but both
networks must still find the same. The picture with boxes goes to --output; the exit code is 1 if the detections differ.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchvision.ops import box_iou
from torchvision.transforms.functional import to_tensor
from ultralytics import YOLO
from ultralytics.utils import ASSETS

import ghostfused
from ghostfused.cli.verify import calibrate


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="a checkpoint of ultralytics' trainer")
    parser.add_argument("--yaml", default="yolov8n-ghost.yaml", help="the network to build without --weights")
    parser.add_argument(
        "--source", type=Path, default=ASSETS / "bus.jpg", help="default: a photo that ultralytics ships"
    )
    parser.add_argument("--size", type=int, default=640)
    parser.add_argument("--conf", type=float, default=0.25, help="least score of a detection")
    parser.add_argument("--max-det", type=int, default=20, help="most detections")
    parser.add_argument("--device", default="0" if torch.cuda.is_available() else "cpu", help="as ultralytics takes it")
    parser.add_argument("--output", type=Path, default=Path("out/yolo_ghost.jpg"))
    return parser.parse_args(argv)


def build(options: argparse.Namespace) -> YOLO:
    if options.weights:
        return YOLO(options.weights)
    torch.manual_seed(0)
    yolo = YOLO(options.yaml, task="detect")
    photo = Image.open(options.source).convert("RGB").resize((options.size, options.size))
    calibrate(yolo.model, to_tensor(photo)[None])  # statistics of its own activations, so that every layer counts
    for branch in yolo.model.model[-1].cv3:  # the bias says that objects are rare, which training would refine
        torch.nn.init.zeros_(branch[-1].bias)
    return yolo


def main(argv: list[str] | None = None) -> int:
    options, console = arguments(argv), Console()
    yolo = build(options)
    fused_yolo = copy.deepcopy(yolo)
    fused_yolo.model, report = ghostfused.fuse_with_report(yolo.model)
    for swap in report:
        if not swap.fused:
            console.print(f"left as it was: {swap.fqn} ({swap.kind}): {swap.reason}", highlight=False)
    settings = {
        "source": options.source, "imgsz": options.size, "conf": options.conf, "max_det": options.max_det,
        "device": options.device, "verbose": False,
    }  # fmt: skip
    (expected,) = yolo.predict(**settings)
    (found,) = fused_yolo.predict(**settings)

    table = Table("class", "score", "unfused score", "overlap", title=f"{options.source.name}, {options.size} pixels")
    pairs = match(expected.boxes.data, found.boxes.data)
    for before, after, overlap in pairs:
        name = found.names[int(after[5])] if options.weights else f"{found.names[int(after[5])]} (untrained)"
        table.add_row(name, f"{after[4]:.5f}", f"{before[4]:.5f}", f"{overlap:.5f}")
    console.print(table)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    found.save(options.output)
    same = len(pairs) == len(expected.boxes) == len(found.boxes) > 0
    console.print(
        f"{sum(swap.fused for swap in report)} modules fused; {len(expected.boxes)} detections unfused, "
        f"{len(found.boxes)} fused, {len(pairs)} in common; {options.output}"
    )
    return 0 if same else 1


def match(before: Tensor, after: Tensor) -> list[tuple[Tensor, Tensor, float]]:
    """The detections of both, rows of (x1, y1, x2, y2, score, class), that agree: same class, scores within 0.001 and
    an intersection over union above 0.99; with that overlap."""
    overlaps = box_iou(before[:, :4], after[:, :4])
    agree = (before[:, None, 5] == after[None, :, 5]) & ((before[:, None, 4] - after[None, :, 4]).abs() < 1e-3)
    overlaps = overlaps * agree
    pairs = []
    for i, row in enumerate(overlaps):
        if len(row) and float(row.max()) > 0.99:
            j = int(row.argmax())
            pairs.append((before[i], after[j], float(row[j])))
            overlaps[:, j] = 0
    return pairs


if __name__ == "__main__":
    sys.exit(main())
