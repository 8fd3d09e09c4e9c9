#!/usr/bin/env bash
# torch 2.14.1: max_pool2d on a CPU takes about fifteen times as long in NCHW as in channels_last.
#
# So the three poolings of YOLO's SPPF block, or the one behind a ResNet's stem, cost less in channels_last even if the map is
# copied there and back. The results are the same, number by number.
#
# Seen with one thread on a Xeon with AVX-512, median of 30 calls in microseconds: NCHW, channels_last, and by way of copies
#   (1, 128, 10, 10), 5x5 at stride 1        866    52     68
#   (16, 128, 10, 10), 5x5 at stride 1     14033  1376   1798
#   (1, 64, 112, 112), 3x3 at stride 2      8392   491   1580
#
# It needs no GPU, and downloads torch. It ends with 0 while NCHW takes more than four times as long in each, and twice as long as with the copies.
#   PYTHON=python3.11   the Python that makes the environment
set -euo pipefail
FOLDER=$(mktemp -d)
trap 'rm -rf "$FOLDER"' EXIT
"${PYTHON:-python3.11}" -m venv "$FOLDER/venv"
"$FOLDER/venv/bin/python" -m pip install --quiet --disable-pip-version-check "torch==2.14.1" "numpy==2.3.5"

cat >"$FOLDER/pool.py" <<'END'
import statistics
import time

import torch
import torch.nn.functional as F

torch.set_num_threads(1)
torch.manual_seed(0)


def microseconds(call):
    for _ in range(3):
        call()
    times = []
    for _ in range(30):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


for shape, window in (((1, 128, 10, 10), (5, 1, 2)), ((16, 128, 10, 10), (5, 1, 2)), ((1, 64, 112, 112), (3, 2, 1))):
    x = torch.randn(shape)
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(F.max_pool2d(x, *window), F.max_pool2d(last, *window))
    nchw, nhwc = (microseconds(lambda: F.max_pool2d(map, *window)) for map in (x, last))
    copies = microseconds(lambda: F.max_pool2d(x.contiguous(memory_format=torch.channels_last), *window).contiguous())
    print(f"{shape}, kernel, stride, padding {window}: NCHW {nchw:.0f}, channels_last {nhwc:.0f}, by way of copies {copies:.0f}")
    assert nchw > 4 * nhwc, "NCHW took more than four times as long"
    assert nchw > 2 * copies, "copies to channels_last and back paid"
END
"$FOLDER/venv/bin/python" "$FOLDER/pool.py"
