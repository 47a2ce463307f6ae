# The commands of the README. Each installs what it needs first (tools/setup.sh).
TORCH_VERSION ?= 2.11.0
PYTHON ?= python3
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
STAGES ?=
DEMO_ARGS ?=
BENCH_ARGS ?=

VENV := .venv/torch-$(TORCH_VERSION)
# With a GPU and a CUDA compiler the LibTorch layer is built with its CUDA kernels.
TORCH_PRESET := $(shell nvidia-smi -L >/dev/null 2>&1 && PATH=$$PATH:/usr/local/cuda/bin command -v nvcc >/dev/null && echo gpu || echo torch)
TORCH_BUILD := build/$(TORCH_PRESET)-$(TORCH_VERSION)
RUN_PYTHON := PYTHONPATH=python SUBBYTE_TORCH_LIB=$(CURDIR)/$(TORCH_BUILD)/subbyte_torch/libsubbyte_torch.so $(VENV)/bin/python
export TORCH_VERSION PYTHON JOBS TORCH_PRESET
# Clones in different folders share what ccache holds.
export CCACHE_BASEDIR := $(CURDIR)
export CCACHE_NOHASHDIR := 1

.PHONY: help setup test demo core torch bench bench-torch format clean

help:
	@echo 'make demo     quantize SmolLM2-135M, measure it, write demo_output/report.html (DEMO_ARGS=--quick for a minute-long run)'
	@echo 'make test     everything that must hold: checks, tests in C++ and Python, sanitizers, fuzzing, packaging, CUDA compilation'
	@echo '              TORCH_VERSION=2.15.0 tests against another PyTorch; STAGES="core python" runs some stages only'
	@echo 'make core     the edit-test loop of the core: build it and run its tests'
	@echo 'make torch    build the LibTorch layer for the PyTorch of $(VENV)'
	@echo 'make bench    subbyte bench: the limits of this machine, then the operations as shares of them'
	@echo 'make bench-torch  the operations against PyTorch'\''s float32 product (BENCH_ARGS="--threads 1,2 --m 64")'
	@echo 'make format   clang-format over all C++ and CUDA sources'
	@echo 'make setup    only install what the others need'
	@echo 'make clean    remove build/ (.venv/ stays)'

setup:
	@tools/setup.sh

test: setup
	@$(VENV)/bin/python tools/run_tests.py $(STAGES)

demo: torch
	@cmake --preset core >/dev/null
	@cmake --build build/core --target subbyte run_checkpoint -j $(JOBS)
	@$(RUN_PYTHON) -m examples.demo $(DEMO_ARGS)

core: setup
	@cmake --preset core >/dev/null
	@cmake --build build/core --target core_tests -j $(JOBS)
	@build/core/subbyte/core_tests --gtest_brief=1

torch: setup
	@cmake --preset $(TORCH_PRESET) -B $(TORCH_BUILD) -DPython_EXECUTABLE=$(CURDIR)/$(VENV)/bin/python >/dev/null
	@cmake --build $(TORCH_BUILD) --target subbyte_torch -j $(JOBS)

bench: setup
	@cmake --preset core >/dev/null
	@cmake --build build/core --target subbyte -j $(JOBS)
	@build/core/subbyte/cli/subbyte bench

bench-torch: torch
	@$(RUN_PYTHON) bench/compare_torch.py $(BENCH_ARGS)

format:
	@git ls-files '*.h' '*.cc' '*.cpp' '*.cu' '*.cuh' | xargs clang-format-14 -i

clean:
	rm -rf build
