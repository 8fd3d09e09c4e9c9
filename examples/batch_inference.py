"""Classes of all images in a folder by a fused timm GhostNet, as JSON Lines or CSV, on one device or many::

    python examples/batch_inference.py photos predictions.jsonl --pretrained
    torchrun --nproc-per-node 8 examples/batch_inference.py photos predictions.csv --pretrained --dtype float16
    python examples/batch_inference.py photos predictions.jsonl --pretrained --ray 8

Under torchrun each process takes every world-size-th file and writes a part beside the output, which the first one joins;
on several nodes the folder of the output must be shared. ``--ray N`` has Ray Data keep N replicas busy instead, on a GPU
each where there are any; it needs ``pip install "ray[data]"``. Rows are in the order of the files' names. A file that
can't be read gets a row with the error.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import numpy as np
import timm
import torch
import torch.distributed as dist
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import ghostfused
from ghostfused.cli.inputs import dtype
from ghostfused.cli.verify import calibrate

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="folder, searched through and through")
    parser.add_argument("output", type=Path, help="FILE.jsonl or FILE.csv")
    parser.add_argument("--model", default="ghostnet_100", help="one of timm.list_models('*ghost*')")
    parser.add_argument("--pretrained", action="store_true", help="download timm's weights")
    parser.add_argument("--checkpoint", type=Path, help="weights to load; with neither, they are random")
    parser.add_argument("--size", type=int, help="height and width of the input; default: the model's own")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=4, help="processes that decode images, for each device")
    parser.add_argument("--dtype", type=dtype, default="float32", choices=list(DTYPES))
    parser.add_argument("--top", type=int, default=5, help="classes in a row")
    parser.add_argument("--device", help="default: this process's GPU if there is one, else cpu")
    parser.add_argument("--ray", type=int, metavar="N", help="replicas under Ray Data")
    options = parser.parse_args(argv)
    if options.output.suffix not in (".jsonl", ".csv"):
        parser.error(f"output: expected a name ending in .jsonl or .csv, got {options.output}")
    if not options.images.is_dir():
        parser.error(f"images: {options.images} is no folder")
    return options


class Loader(Dataset):
    """Decodes and normalizes the files as the model wants them."""

    def __init__(self, files: list[str], options: argparse.Namespace):
        self.files = files
        config = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(options.model).to_dict())
        if options.size:
            config["input_size"] = (3, options.size, options.size)
        self.transform = timm.data.create_transform(**config)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict:
        return self.load(self.files[index])

    def load(self, path: str) -> dict:
        try:
            with Image.open(path) as image:
                return {"path": path, "error": "", "image": self.transform(image.convert("RGB"))}
        except Exception as error:  # whatever is wrong with one file, the others have their turn
            blank = Image.new("RGB", (8, 8))
            return {"path": path, "error": f"{type(error).__name__}: {error}", "image": self.transform(blank)}


class Classifier:
    """The fused network on one device."""

    def __init__(self, options: argparse.Namespace, device: torch.device):
        self.device, self.dtype, self.top = device, DTYPES[options.dtype], options.top
        torch.manual_seed(0)
        checkpoint = str(options.checkpoint) if options.checkpoint else ""
        model = timm.create_model(options.model, pretrained=options.pretrained, checkpoint_path=checkpoint).eval()
        if not (options.pretrained or options.checkpoint):
            calibrate(model, torch.randn(2, 3, 64, 64))
        self.model = ghostfused.fuse(model).to(device, self.dtype, memory_format=torch.channels_last)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and classes, each (N, top), of (N, 3, H, W)."""
        x = images.to(self.device, self.dtype, non_blocking=True, memory_format=torch.channels_last)
        scores, classes = self.model(x).float().softmax(1).topk(self.top)
        return scores.cpu(), classes.cpu()


def rows(paths: Iterable[str], errors: Iterable[str], scores: Tensor, classes: Tensor) -> Iterator[dict]:
    for path, error, score, index in zip(paths, errors, scores.tolist(), classes.tolist(), strict=True):
        yield {"path": path, "error": error} if error else {"path": path, "classes": index, "scores": score}


def predict(files: list[str], options: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    """By this process alone."""
    classifier = Classifier(options, device)
    loader = DataLoader(
        Loader(files, options), options.batch, num_workers=options.workers, pin_memory=device.type == "cuda"
    )
    for batch in loader:
        yield from rows(batch["path"], batch["error"], *classifier(batch["image"]))


def predict_with_ray(files: list[str], options: argparse.Namespace) -> Iterator[dict]:
    """By ``options.ray`` replicas, which Ray Data keeps supplied with decoded images."""
    import ray

    load = Loader([], options).load

    class Replica:
        def __init__(self):
            self.classifier = Classifier(options, torch.device(options.device or device_of_process(0)))

        def __call__(self, batch: dict) -> dict:
            scores, classes = self.classifier(torch.from_numpy(np.stack(batch["image"])))
            return {
                "path": batch["path"],
                "error": batch["error"],
                "scores": scores.numpy(),
                "classes": classes.numpy(),
            }

    ray.data.DataContext.get_current().execution_options.preserve_order = True
    data = ray.data.from_items([{"path": file} for file in files])
    data = data.map(lambda row: {**(loaded := load(row["path"])), "image": loaded["image"].numpy()})
    data = data.map_batches(
        Replica,
        batch_size=options.batch,
        compute=ray.data.ActorPoolStrategy(size=options.ray),
        num_gpus=1 if torch.cuda.is_available() else 0,
    )
    for batch in data.iter_batches(batch_size=options.batch):
        yield from rows(batch["path"], batch["error"], torch.tensor(batch["scores"]), torch.tensor(batch["classes"]))


def device_of_process(local_rank: int) -> str:
    return f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"


def write(path: Path, predictions: Iterable[dict], total: int, top: int, show: bool) -> None:
    """The predictions as they come, in the format that the name says."""
    names = ["path", *itertools.chain(*((f"class{i}", f"score{i}") for i in range(1, top + 1))), "error"]
    columns = TextColumn("images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with path.open("w", newline="") as file, Progress(*columns, disable=not show) as progress:
        task = progress.add_task("", total=total)
        table = csv.writer(file)
        if path.suffix == ".csv":
            table.writerow(names)
        for row in predictions:
            if "error" in row:
                print(f"{row['path']}: {row['error']}", file=sys.stderr)
            if path.suffix == ".csv":
                pairs = zip(row.get("classes", [""] * top), row.get("scores", [""] * top), strict=True)
                table.writerow([row["path"], *itertools.chain(*pairs), row.get("error", "")])
            else:
                file.write(json.dumps(row) + "\n")
            progress.advance(task)


def join(output: Path, parts: list[Path]) -> None:
    """A row of each part in turn: the order in which the files were dealt out."""
    with ExitStack() as stack:
        file, *texts = (
            stack.enter_context(path.open(mode, newline=""))
            for path, mode in ((output, "w"), *((p, "r") for p in parts))
        )
        if output.suffix == ".csv":
            tables = [csv.reader(text) for text in texts]
            header, *_ = [next(table) for table in tables]
            csv.writer(file).writerows(itertools.chain([header], _in_turn(tables)))
        else:
            file.writelines(_in_turn(texts))
    for part in parts:
        part.unlink()


def _in_turn(parts: list) -> Iterator:
    return (row for rows in itertools.zip_longest(*parts) for row in rows if row is not None)


def main(argv: list[str] | None = None) -> None:
    options = arguments(argv)
    files = sorted(str(p) for p in options.images.rglob("*") if p.suffix.lower() in SUFFIXES)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if options.ray:
        write(options.output, predict_with_ray(files, options), len(files), options.top, show=True)
    elif world == 1:
        device = torch.device(options.device or device_of_process(0))
        write(options.output, predict(files, options, device), len(files), options.top, show=True)
    else:
        # for the barriers alone: where the last process ends, the first may have waited for long
        dist.init_process_group("gloo", timeout=timedelta(days=7))
        device = torch.device(options.device or device_of_process(int(os.environ["LOCAL_RANK"])))
        mine = files[rank::world]
        parts = [
            options.output.with_name(f"{options.output.stem}.part{i}{options.output.suffix}") for i in range(world)
        ]
        write(parts[rank], predict(mine, options, device), len(mine), options.top, show=rank == 0)
        dist.barrier()
        if rank == 0:
            join(options.output, parts)
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
