#!/usr/bin/env bash
# On a CPU PyTorch's GELU of infinity is NaN or infinity, as the tensor's memory happens to lie.
#
# F.gelu of a dense float32 or bfloat16 tensor of more than one element is oneDNN's, which returns NaN for +inf. PyTorch's own
# kernel, which runs for one element, for other strides, for float64 and with oneDNN switched off, returns inf, the limit. So an
# overflow before a GELU is a NaN or stays an infinity depending on the memory that the tensor has. approximate="tanh" is
# inf in all of them.
#
# Seen with torch 2.14.1, Python 3.11, on x86-64 with AVX-512:
#   dense      nan
#   every 2nd  inf
#   1 element  inf
#   float64    inf
#   no oneDNN  inf
#   tanh       inf
#
# It needs no GPU, and downloads what pip installs for torch, up to 3 GB. It ends with 0 while all are as seen.
#   PYTHON=python3.11   the Python that makes the environment
set -euo pipefail
FOLDER=$(mktemp -d)
trap 'rm -rf "$FOLDER"' EXIT
"${PYTHON:-python3}" -m venv "$FOLDER/venv"
"$FOLDER/venv/bin/pip" install --quiet "torch==2.14.1" numpy

"$FOLDER/venv/bin/python" - >"$FOLDER/seen" <<'END'
import torch
import torch.nn.functional as F

x = torch.full((64,), float("inf"))

def show(name, y):
    print(f"{name:10}", *sorted({str(v) for v in y.flatten().tolist()}))

show("dense", F.gelu(x))
show("every 2nd", F.gelu(x[::2]))
show("1 element", F.gelu(x[:1]))
show("float64", F.gelu(x.double()))
with torch.backends.mkldnn.flags(enabled=False):
    show("no oneDNN", F.gelu(x))
show("tanh", F.gelu(x, approximate="tanh"))
END
cat "$FOLDER/seen"
diff "$FOLDER/seen" - <<'END'
dense      nan
every 2nd  inf
1 element  inf
float64    inf
no oneDNN  inf
tanh       inf
END
