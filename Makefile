# Targets: demo, test, check (lint, types, tests), zoo, gpu-check, gpu-test, gpu-bench, clean. Each sets up what it needs; done twice in a row
# it costs nothing. Settings: TORCH (version), PYTHON, VENV, PIP_ARGS (say, an index with CPU builds of torch).

TORCH ?= 2.13.0
PYTHON ?= python3
VENV ?= .venv
ZOO ?= .venv-zoo
ZOO_TORCH ?= 2.14.1
ZOO_TORCHVISION ?= 0.29.1
# One architecture is enough to load and to trace; gpu-check compiles the kernels for all.
ZOO_CUDA_ARCH ?= 9.0
PIP_ARGS ?=
PYTEST_ARGS ?=

UV := $(shell command -v uv)
BIN := $(VENV)/bin
ZOO_BIN := $(ZOO)/bin
# Idle OpenMP threads sleep: spinning ones take the cores from the other processes of a small machine.
export OMP_WAIT_POLICY ?= passive

ifdef UV
new_venv = uv venv --quiet --allow-existing --python $(PYTHON) $(1)
install = uv pip install --quiet --python $(1)/bin/python $(PIP_ARGS)
else
new_venv = $(PYTHON) -m venv $(1)
install = $(1)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)
endif

say_what_is_missing = $(1)/python -I -c "import psap_kernels; mend = psap_kernels.build_info()['mend']; \
	mend and print('Without compiled kernels: psap runs on the slower reference. To mend it:', mend)"

# setuptools first: older ones know neither bdist_wheel nor licence expressions; then torch, since the
# extension builds against the torch it will run with (no build isolation).
TOOLS := "setuptools>=77" wheel
ifndef UV
TOOLS += "pip>=24"
endif

METADATA := pyproject.toml $(wildcard setup.py)
NATIVE := $(METADATA) $(shell find csrc -type f 2>/dev/null)
SOURCES := $(NATIVE) $(shell find psap psap_kernels -type f ! -name '*.pyc' ! -name '*.so')
CXX_SOURCES = $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cuh' -o -name '*.cu')

TORCH_READY := $(VENV)/.psap-torch-$(TORCH)
READY := $(VENV)/.psap-installed
ZOO_TORCH_READY := $(ZOO)/.psap-torch-$(ZOO_TORCH)-$(ZOO_TORCHVISION)
ZOO_READY := $(ZOO)/.psap-installed

.PHONY: help setup demo test check lint types zoo gpu-check gpu-test gpu-bench clean

help:
	@head -n 2 Makefile

$(TORCH_READY):
	$(call new_venv,$(VENV))
	$(call install,$(VENV)) --upgrade $(TOOLS)
	$(call install,$(VENV)) "torch==$(TORCH)" numpy
	rm -f $(VENV)/.psap-torch-*
	touch $@

$(READY): $(TORCH_READY) $(NATIVE)
	$(call install,$(VENV)) --no-build-isolation --editable ".[dev]"
	@$(call say_what_is_missing,$(BIN))
	touch $@

setup: $(READY)

demo: $(READY)
	$(BIN)/python examples/digits.py --out out/demo

test: $(READY)
	$(BIN)/python -m pytest -q --numprocesses auto --maxprocesses 4 --dist loadfile $(PYTEST_ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(if $(CXX_SOURCES),$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES))

types: $(READY)
	$(BIN)/mypy

check: lint types test

$(ZOO_TORCH_READY):
	$(call new_venv,$(ZOO))
	$(call install,$(ZOO)) --upgrade $(TOOLS)
	$(call install,$(ZOO)) "torch==$(ZOO_TORCH)" "torchvision==$(ZOO_TORCHVISION)" timm einops
	rm -f $(ZOO)/.psap-torch-*
	touch $@

# A real install, not an editable one: it must not overwrite the extension that $(VENV) has in the tree.
# Without build/lib, where modules that are gone since would come from. Where there is nvcc, with the CUDA part.
$(ZOO_READY): $(ZOO_TORCH_READY) $(SOURCES)
	rm -rf build/lib*
	TORCH_CUDA_ARCH_LIST="$(ZOO_CUDA_ARCH)" $(call install,$(ZOO)) --no-build-isolation ".[test]"
	@$(call say_what_is_missing,$(ZOO_BIN))
	touch $@

# pytest's exit code 5: no test was selected; then the import alone is the test.
zoo: $(ZOO_READY)
	$(ZOO_BIN)/python -I -c "import psap, psap_kernels, torch, torchvision, timm; \
	print('psap', psap.__version__, 'imports with torch', torch.__version__)"
	$(ZOO_BIN)/pytest -q -m zoo || { code=$$?; [ $$code -eq 5 ] && echo "no zoo test yet"; }

# Without a GPU: what compilers make of the GPU kernels. PSAP_CUDA=1: what is missing is an error, not a skip.
gpu-check: $(READY)
	PSAP_CUDA=1 $(BIN)/python -m pytest -q -m "slow or not slow" $(wildcard tests/kernels/test_compile_gate.py \
	tests/kernels/test_triton_aot.py) $(PYTEST_ARGS)

# On a machine with an NVIDIA GPU, with a CUDA build of torch in $(VENV); both in under ten minutes. Without
# compute-sanitizer the first one fails, unless SKIP_SANITIZER has the reason to do without.
gpu-test: $(READY)
	$(BIN)/python -m benchmarks gpu-ready
	$(BIN)/python -m pytest -q -m gpu $(PYTEST_ARGS)
	$(BIN)/python -m benchmarks sanitize $(if $(SKIP_SANITIZER),--skip "$(SKIP_SANITIZER)")

gpu-bench: $(READY)
	$(BIN)/python -m benchmarks gpu

clean:
	rm -rf $(VENV) $(ZOO) build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find psap psap_kernels tests benchmarks examples -name __pycache__ -exec rm -rf {} + 2>/dev/null || true
	rm -f psap_kernels/*.so
