#!/usr/bin/env bash
# Triton 3.6.0's interpreter can't loop to a kernel's integer argument under numpy 2.4 and later.
#
# The interpreter holds a kernel's integer as an array of one element, and range() asks for int() of that array
# (triton/runtime/interpreter.py, tensor's __index__). numpy deprecated int() of an array with dimensions in 1.25 and
# refuses it from 2.4 on. triton 3.6.0 sets no limit on numpy's version. Triton 3.8.0 squeezes the array first.
#
# Seen with Python 3.12, for triton and numpy:
#   3.6.0, 2.3.5   3 rounds
#   3.6.0, 2.4.6   InterpreterError: TypeError('only 0-dimensional arrays can be converted to Python scalars')
#   3.6.0, 2.5.2   the same
#   3.8.0, 2.5.2   3 rounds
#
# It needs no GPU and no torch, and downloads about 400 MB. It ends with 0 while all four are as seen.
#   PYTHON=python3.12   the Python that makes the environment (numpy 2.5 needs 3.12)
set -euo pipefail
FOLDER=$(mktemp -d)
trap 'rm -rf "$FOLDER"' EXIT
"${PYTHON:-python3.12}" -m venv "$FOLDER/venv"

cat >"$FOLDER/rounds.py" <<'END'
import triton
from triton.runtime.errors import InterpreterError

rounds = []

@triton.jit
def kernel(n):
    for _ in range(n):
        rounds.append(1)

try:
    kernel[(1,)](3)
    print(len(rounds), "rounds")
except InterpreterError as error:
    print("InterpreterError:", error)
END

# expect TRITON NUMPY PATTERN: what those versions print
expect() {
  local said
  "$FOLDER/venv/bin/python" -m pip install --quiet --disable-pip-version-check "triton==$1" "numpy==$2"
  said=$(TRITON_INTERPRET=1 "$FOLDER/venv/bin/python" "$FOLDER/rounds.py" 2>&1 | tail -n 1)
  echo "triton $1, numpy $2: $said"
  [[ $said == $3 ]] || { echo "expected: $3" && exit 1; }
}

REFUSAL="InterpreterError: *only 0-dimensional arrays can be converted to Python scalars*"
expect 3.6.0 2.3.5 "3 rounds"
expect 3.6.0 2.4.6 "$REFUSAL"
expect 3.6.0 2.5.2 "$REFUSAL"
expect 3.8.0 2.5.2 "3 rounds"
