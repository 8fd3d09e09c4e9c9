#!/usr/bin/env bash
# torch 2.14.1: batch statistics of float32 maps on a CPU lose up to a thousand times the precision in channels_last.
#
# F.batch_norm(training=True), and so nn.BatchNorm2d in train mode or without running statistics, adds up the pixels of a
# channel one after the other in float32 where the map is in channels_last. In NCHW the same call is right to rounding.
# The error grows with the number of pixels; a mean other than 0 makes it larger. GhostNet's maps at 112² are of that size.
#
# Seen with one thread, largest error of the output over the largest output, against float64, for NCHW and channels_last:
#   (6, 9, 19, 22), mean 0       8.7e-08  5.2e-07
#   (64, 24, 56, 56), mean 0     9.5e-08  2.7e-05
#   (64, 9, 112, 112), mean 10   2.2e-07  2.0e-04
#
# It needs no GPU, and downloads torch. It ends with 0 while the last two are off in channels_last alone.
#   PYTHON=python3.11   the Python that makes the environment
set -euo pipefail
FOLDER=$(mktemp -d)
trap 'rm -rf "$FOLDER"' EXIT
"${PYTHON:-python3.11}" -m venv "$FOLDER/venv"
"$FOLDER/venv/bin/python" -m pip install --quiet --disable-pip-version-check "torch==2.14.1" "numpy==2.3.5"

cat >"$FOLDER/sums.py" <<'END'
import torch
import torch.nn.functional as F

torch.set_num_threads(1)
torch.manual_seed(0)


def error(x, memory_format):
    right = F.batch_norm(x.double(), None, None, training=True)
    out = F.batch_norm(x.contiguous(memory_format=memory_format), None, None, training=True)
    return float((out - right).abs().max() / right.abs().max())


for shape, mean in (((6, 9, 19, 22), 0), ((64, 24, 56, 56), 0), ((64, 9, 112, 112), 10)):
    x = torch.randn(shape) + mean
    nchw, nhwc = error(x, torch.contiguous_format), error(x, torch.channels_last)
    print(f"{shape}, mean {mean}: NCHW {nchw:.1e}, channels_last {nhwc:.1e}")
    assert nchw < 1e-6, "NCHW was right to rounding"
    assert shape[0] < 64 or nhwc > 1e-5, "channels_last was off by more than 1e-5"
END
"$FOLDER/venv/bin/python" "$FOLDER/sums.py"
