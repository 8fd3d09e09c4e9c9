#!/usr/bin/env bash
# tools/torch_stubs.sh PYTHON CC FOLDER: makes what stands in for torch's libraries where CC links for another kind of machine.
#
# They have the names of this PYTHON's torch's C functions and nothing behind them. A library that has none of the names in
# question would not do: the linker then notes no library, and the extension finds no torch when it is loaded.
set -euo pipefail
python=$1 cc=$2 folder=$3
torch=$("$python" -c "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])")
nm -D --defined-only "$torch/lib/libtorch_cpu.so" |
  sed -nE 's/.* T ((aoti_)?torch_[a-z0-9_]+)$/void \1(void) {}/p' > "$folder/torch_cpu.c"
[[ -s $folder/torch_cpu.c ]] || { echo "no C functions in $torch/lib/libtorch_cpu.so" >&2 && exit 1; }
for library in c10 torch torch_cpu; do
  [[ $library == torch_cpu ]] && source=$folder/torch_cpu.c || source=/dev/null
  "$cc" -shared -fPIC -x c "$source" -o "$folder/lib$library.so" "-Wl,-soname,lib$library.so"
done
