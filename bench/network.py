"""Whole networks, fused at each level on each backend, against every peer: latency at batch 1, throughput beyond."""

from __future__ import annotations

import argparse

import torch

from ghostfused.cli.inputs import positive
from ghostfused.cli.verify import calibrate

from . import cases, isolate, measure
from .console import Display, absences, cell
from .environment import title
from .peers import select
from .results import Writer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--network",
        default="paper",
        help="paper[:WIDTH], seed, timm:NAME[:deploy], yolov8n-ghost-backbone or file.py:function; several with commas",
    )
    parser.add_argument("--size", type=positive, default=224)
    cases.add_setting_arguments(parser, batch="1,8")
    parser.add_argument(
        "--isolate", type=positive, metavar="ROUNDS", help="each peer in a process of its own, in turns"
    )
    # a network's activations flush the cache by themselves, and its input is a small part of what it reads
    measure.add_arguments(parser, cache="warm")


def main(options: argparse.Namespace) -> int:
    """time whole networks, fused and unfused, against every peer"""
    device = measure.set_device(options)
    peers = select(options.peers, network=True)
    networks = cases.networks(options.network, options.size)
    if options.isolate:
        return isolate.main(options, list(peers), measure.BASELINE)
    settings = cases.settings(options)
    with Writer(options.output, device) as writer:
        heading = f"Whole networks at {options.size}², time per batch; {title(writer.environment)}"
        with Display(heading, ["network", "setting", *peers], len(settings) * len(networks)) as display:
            for name, network in networks.items():
                x = torch.randn(2, 3, options.size, options.size, generator=torch.Generator().manual_seed(0))
                model = calibrate(network, x)
                for setting in settings:
                    measure.set_tf32(setting.dtype == "tf32")
                    # at batch 1 what counts is how long a caller waits, host time included
                    how = measure.method(options, clock="wall" if setting.batch == 1 else "events")
                    display.case(name)
                    facts = {"kind": "network", "name": name, "count": 1, "size": options.size, **vars(setting)}

                    def write(rows: list[dict], facts: dict = facts) -> None:
                        for row in rows:
                            row |= facts
                            if row["status"] == "ok":
                                row["images_per_second"] = round(facts["batch"] / row["ms"]["p50"] * 1e3, 2)
                            writer.write(row)

                    rows = measure.measure(
                        model, tuple(x.shape[1:]), setting, peers, how, display.doing, options.others_tolerance, write
                    )
                    write(rows)
                    baseline = next((row for row in rows if row["peer"] == measure.BASELINE), None)
                    what = f"batch {setting.batch} {setting.dtype} {setting.layout}"
                    what += "" if setting.mode == "inference" else f" {setting.mode}"
                    display.row([name, what, *(cell(row, baseline) for row in rows)])
        absences(writer.rows)
    return int(any(row.get("status") in ("WRONG", "error") for row in writer.rows))
