"""Every Ghost module of a network, alone, in every setting, against every peer."""

from __future__ import annotations

import argparse
import itertools
import time
from dataclasses import replace
from pathlib import Path

import torch

from ghostfused.cli import inputs
from ghostfused.cli.inputs import BadInput

from . import cases, measure, traffic
from .cases import Layer, Setting
from .console import Display, absences, cell
from .environment import title
from .peers import Peer, select
from .results import Writer
from .timing import copy_bandwidth, matmul_gflops


def add_module_arguments(parser: argparse.ArgumentParser) -> None:
    """Which modules; ``layers`` reads them."""
    parser.add_argument(
        "--network", default="paper", help="paper[:WIDTH] (default: GhostNet 1.0×), seed, timm:NAME or file.py:function"
    )
    parser.add_argument("--size", type=inputs.positive, default=224, help="height and width of the network's input")
    parser.add_argument("--configs", type=Path, metavar="FILE.jsonl", help="the modules are rows of this file instead")
    parser.add_argument("--source", help="only rows of --configs with this source")
    parser.add_argument("--only", metavar="NAME,NAME", help="only modules whose name contains one of these")
    parser.add_argument("--shard", type=_shard, metavar="I/N", help="only every Nth module, from the Ith (from 0) on")


def _shard(text: str) -> slice:
    first, _, step = text.partition("/")
    if not (first.isdigit() and step.isdigit() and int(first) < int(step)):
        raise argparse.ArgumentTypeError(f"expected I/N with I below N, got {text!r}")
    return slice(int(first), None, int(step))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_module_arguments(parser)
    parser.add_argument(
        "--time-limit", type=inputs.amount, metavar="SECONDS", help="start no further case after this time"
    )
    cases.add_setting_arguments(parser, batch="1")
    measure.add_arguments(parser)


def layers(options: argparse.Namespace) -> list[Layer]:
    """The Ghost modules that the options name."""
    if options.configs:
        found = cases.layers_from_rows(options.configs, options.source)
    else:
        found = cases.layers_of(cases.network(options.network), options.size)
    if options.only:
        found = [each for each in found if any(part in name for part in options.only.split(",") for name in each.names)]
    if not found:
        raise BadInput(
            f"--only: expected a part of a module's name, got {options.only!r}"
            if options.only
            else "--network: expected one with Ghost modules, got none"
        )
    if not (shard := found[options.shard or slice(None)]):
        raise BadInput(f"--shard: expected I below the number of modules, {len(found)}")
    return shard


def traffic_of(layer: Layer, peer: Peer, setting: Setting, itemsize: int) -> int | None:
    """Bytes that ``peer`` moves by arithmetic, where bench/traffic.py knows its execution."""
    if peer.traffic is None or setting.mode != "inference" or layer.kernel_size != 1 or layer.stride != 1:
        return None
    return traffic.module_traffic(layer.as_row(), setting.batch, itemsize)[peer.traffic]


def rates(row: dict, moved: int | None, copy_gb_s: float) -> dict:
    """GB/s by the bytes that the peer moves, as % of copy bandwidth; and how near it comes to the fused floor's time."""
    seconds = row["ms"]["p50"] / 1e3
    out = {"floor_percent": round(100 * row["floor_bytes"] / (copy_gb_s * 1e9) / seconds, 2)}
    if moved is not None:
        gb_s = moved / seconds / 1e9
        out |= {"moved_bytes": moved, "gb_s": round(gb_s, 3), "copy_percent": round(100 * gb_s / copy_gb_s, 2)}
    return out


def _by_mode(settings: list[Setting]) -> list[list[Setting]]:
    """Those that differ in mode only together: a run that is stopped has all modes of its modules."""
    groups: dict[Setting, list[Setting]] = {}
    for setting in settings:
        groups.setdefault(replace(setting, mode=""), []).append(setting)
    return list(groups.values())


def main(options: argparse.Namespace) -> int:
    """time every Ghost module of a network against every peer"""
    device = measure.set_device(options)
    how = measure.method(options)
    peers = select(options.peers)
    found, settings = layers(options), cases.settings(options)
    start = time.perf_counter()
    with Writer(options.output, device) as writer:
        copy_gb_s = copy_bandwidth(device)
        for dtype in options.dtype:
            gflops = matmul_gflops(device, cases.DTYPES[dtype])
            writer.write({"kind": "roofs", "dtype": dtype, "copy_gb_s": copy_gb_s, "matmul_gflops": gflops})
        heading = (
            f"Ghost modules of {options.configs or options.network}; {title(writer.environment)}; {how.cache} cache"
        )
        columns = ["module", "input", "setting", *peers]
        with Display(heading, columns, len(found) * len(settings)) as display:
            for settings_of_layer in _by_mode(settings):
                for layer, setting in itertools.product(found, settings_of_layer):
                    measure.set_tf32(setting.dtype == "tf32")
                    itemsize = torch.tensor([], dtype=setting.torch_dtype).element_size()
                    if options.time_limit and time.perf_counter() - start > options.time_limit:
                        print(f"--time-limit: {layer.name}, {' '.join(map(str, vars(setting).values()))} was not run")
                        continue
                    display.case(layer.name)
                    rows = measure.measure(
                        layer.calibrated(), layer.shape, setting, peers, how, display.doing, options.others_tolerance
                    )
                    for row in rows:
                        row |= {"kind": "module", **layer.as_row(), **vars(setting)}
                        row |= {"floor_bytes": layer.floor_bytes(setting.batch, itemsize)}
                        row["flops"] = layer.flops(setting.batch)
                        if row["status"] == "ok":
                            row |= rates(row, traffic_of(layer, peers[row["peer"]], setting, itemsize), copy_gb_s)
                        writer.write(row)
                    display.row(_cells(layer, setting, rows))
        absences(writer.rows)
    return int(any(row.get("status") in ("WRONG", "error") for row in writer.rows))


def _cells(layer: Layer, setting: Setting, rows: list[dict]) -> list[str]:
    name = layer.name + (f" ×{len(layer.names)}" if len(layer.names) > 1 else "")
    shape = f"{layer.in_channels}→{layer.out_channels} {layer.height}×{layer.width}"
    baseline = next((row for row in rows if row["peer"] == measure.BASELINE), None)
    what = f"{setting.batch} {setting.dtype} {setting.layout}" + (
        "" if setting.mode == "inference" else f" {setting.mode}"
    )
    return [name, shape, what, *(cell(row, baseline) for row in rows)]
