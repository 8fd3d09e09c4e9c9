"""How near the CPU kernel comes to the multiply-adds that the cores can do: GFLOP/s of every Ghost module, and % of the peak.

The peak is that of the kernel's own instruction set and of the multiply-adds that it uses for the dtype, measured on as many
threads by a loop of them in registers, in turns with each module. The op alone is timed, in a warm cache; ``overhead`` measures what Python adds.
"""

from __future__ import annotations

import argparse
import functools
from unittest import mock

import torch
from torch import Tensor

from ghostfused import FusedGhostModule, functional
from ghostfused.backends import cpu
from ghostfused.ops.schemas import forward_op
from ghostfused.spec import GhostArgs

from . import cases, measure, module
from .console import milliseconds, table
from .environment import title
from .results import Writer
from .timing import Timed, time_interleaved

PEAK_STEPS = 4000
"""Of the multiply-add loop per sample: tens of microseconds, as the modules take."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    module.add_module_arguments(parser)
    cases.add_setting_arguments(parser, batch="1", modes=False)
    measure.add_arguments(parser, cache="warm")


def _with_input(args: GhostArgs, x: Tensor) -> GhostArgs:
    return args._replace(x=x)


def main(options: argparse.Namespace) -> int:
    """GFLOP/s of the CPU kernel on every Ghost module, and % of the measured multiply-add peak"""
    if reason := cpu.unavailable():
        print(f"absent  cpu: {reason}")
        return 1
    from ghostfused import _cpu  # type: ignore[attr-defined]

    device = measure.set_device(options, only="cpu")
    how = measure.method(options)
    layers, shown = module.layers(options), []
    with Writer(options.output, device) as writer, torch.inference_mode():
        for setting in cases.settings(options):
            peak_loop = functools.partial(_cpu.multiply_adds, PEAK_STEPS, setting.dtype == "bfloat16")
            operations = peak_loop()
            for layer in layers:
                x = setting.input(layer.shape)
                fused = setting.place(FusedGhostModule.from_module(layer.calibrated(), backend="cpu"))
                with mock.patch.object(functional, "run", wraps=functional.run) as run:
                    fused(x)
                functions = {
                    "peak": Timed(lambda _, loop=peak_loop: loop()),  # type: ignore[misc]
                    "module": Timed(
                        lambda args: forward_op("cpu")(*args), functools.partial(_with_input, run.call_args.args[0])
                    ),
                }
                timings = time_interleaved(functions, [x], how).of
                gflops = layer.flops(setting.batch) / timings["module"].p50 / 1e6
                peak = operations / timings["peak"].p50 / 1e6
                percent = 100 * gflops / peak
                writer.write(
                    {
                        "kind": "cpu_peak",
                        **layer.as_row(),
                        **vars(setting),
                        "isa": cpu.build_info()["chosen"],  # type: ignore[index]
                        "ms": timings["module"].as_row(),
                        "gflops": round(gflops, 2),
                        "peak_gflops": round(peak, 2),
                        "peak_percent": round(percent, 2),
                    }
                )
                shape = f"{layer.in_channels}→{layer.out_channels} {layer.height}×{layer.width}"
                what = f"{setting.batch} {setting.dtype} {setting.layout}"
                cells = [milliseconds(timings["module"].p50), f"{gflops:.1f}", f"{peak:.1f}", f"{percent:.0f}"]
                shown.append([f"{layer.name} ×{len(layer.names)}", shape, what, *cells])
    heading = f"Ghost modules of {options.configs or options.network} in the CPU kernel; {title(writer.environment)}"
    table(heading, ["module", "input", "setting", "time", "GFLOP/s", "peak GFLOP/s", "% of peak"], shown)
    return 0
