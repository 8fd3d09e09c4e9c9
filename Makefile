# Everything below sets up its own virtual environment and is quick when run again.
PYTHON ?= python3
TORCH ?= torch==2.14.1 torchvision==0.29.1
VENV := .venv
PY := $(VENV)/bin/python
SOURCES := $(shell find csrc -type f)
# One architecture for local builds: the GPU's if there is one, else sm_80 with PTX, which the CPU runner executes.
export TORCH_CUDA_ARCH_LIST ?= $(or $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1),8.0+PTX)

.PHONY: demo test check docs format bench readme-figures counts rehearse wheels matrix clean

$(VENV)/installed: pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade "setuptools>=77" wheel ninja $(TORCH)
	GHOSTFUSED_CUDA=0 GHOSTFUSED_CPU=0 $(PY) -m pip install --quiet --no-build-isolation -e ".[dev]"
	touch $@

# The package is installed in place: only a change of C++ or CUDA needs a build.
$(VENV)/built: $(VENV)/installed setup.py $(SOURCES)
	$(PY) -m pip install --quiet --no-build-isolation --no-deps -e .
	touch $@

demo: $(VENV)/built
	$(PY) examples/demo.py

test: $(VENV)/built
	$(PY) tests/run.py

check: $(VENV)/built
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(filter-out %.map,$(SOURCES))
	$(PY) tests/oldest_torch.py $(VENV)/oldest-torch

# The package is read, not imported. The variable silences the notice of Material's makers.
docs: $(VENV)/installed
	$(PY) tools/api_pages.py
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet --strict

format: $(VENV)/built
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(filter-out %.map,$(SOURCES))

bench: $(VENV)/built
	$(PY) -m bench suite --quick

readme-figures: $(VENV)/built
	$(PY) -m bench readme

# Counts of the machine code, with no GPU: tools/sass/results/sass_*.jsonl and the tables of docs/counts.md.
counts: $(VENV)/built
	tools/sass/baselines.sh $(PY)
	$(PY) -m tools.sass.tables

# A session on a machine with a GPU, without one: see tests/rehearse.sh.
PYTHON312 ?= python3.12
rehearse:
	PYTHON312=$(PYTHON312) tests/rehearse.sh $(VENV)-rehearsal

# The wheels, into dist/: for this kind of CPU, with the architectures that setup.py names or others; and for aarch64, where its
# cross compiler is.
WHEEL_ARCHITECTURES ?=
wheels: $(VENV)/installed
	TORCH_CUDA_ARCH_LIST="$(WHEEL_ARCHITECTURES)" tools/wheel.sh $(abspath $(PY))
	$(if $(shell which aarch64-linux-gnu-g++),tools/wheel.sh $(abspath $(PY)) aarch64,@echo no wheel for aarch64: it needs g++-aarch64-linux-gnu)

# That wheel on each Python and torch, one after the other: see tests/matrix.py.
matrix:
	$(PYTHON) tests/matrix.py out/matrix

clean:
	rm -rf $(VENV) $(VENV)-rehearsal build dist out *.egg-info ghostfused/*.so
