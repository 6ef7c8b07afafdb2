# make demo    erase a style and an object from the embedded model, on this machine's CPU or GPU
# make test    set-up, lint, tests (also what continuous integration runs); JOBS=N: so many side by side, 2 by default
# make fuzz    foreign input of every kind, CASES=10000 for each test (a few in `make test`)
# make lint    ruff and mypy only
# make bench   timings of one update, by method, and of the kernels
# make dist    wheel and source archive for a package index, in output/dist; REPOSITORY=https://host/owner/name
# make chaos   stop and kill runs at twelve moments, in five ways to train, by three signals (a part is in make test)
# make clean   remove what runs and checks left (not .venv)
#
# make kernels-report   compile every kernel for six GPUs that need not be here; writes kernels/REPORT.md
# make triton-matrix    the kernels' tests, interpreted, on Triton 3.4, 3.6 and the newest
# make bench-step     what an update of the whole trainer costs, beside the published ways, on this machine
# make gpu-step       on a GPU: full-size SDXL with random weights; STEP=tables, levers, caps, baselines, wholes, profile
# make gpu-kernels      on a GPU: the kernels' tests, compute-sanitizer, benchmarks; writes benchmarks/results/
#
# Each target installs what it needs into .venv first; once that is done, it costs nothing.
# PYTHON=/path/to/python chooses the interpreter; pip's own settings (PIP_INDEX_URL, PIP_FIND_LINKS, ...) are honoured.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && exit; done; echo python3)
CXX ?= c++
VENV := .venv
READY := $(VENV)/.ready
INSTALL := $(VENV)/bin/python -m pip install --disable-pip-version-check
PIP := $(INSTALL) -c constraints.txt

# DeepSpeed's launcher and torch.compile look for python and ninja on PATH.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export CXX
# What DeepSpeed would find out by itself, with a warning in every process.
export DS_ACCELERATOR ?= $(if $(wildcard /proc/driver/nvidia/version),cuda,cpu)

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-style demo-object test lint bench kernels-report triton-matrix gpu-kernels bench-step gpu-step chaos fuzz dist clean

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "error: Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) -V 2>/dev/null || echo "not there"); use make PYTHON=/path/to/python" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "error: $(PYTHON) cannot make virtual environments; install its venv package (Debian: python3-venv)" >&2; exit 2; }
	@$(PYTHON) -c 'import os, sys, sysconfig as s; sys.exit(not os.path.exists(s.get_path("include") + "/Python.h"))' || { \
		echo "error: the headers of $(PYTHON) are missing; install its development package (Debian: python3-dev)" >&2; exit 2; }
	@command -v $(firstword $(CXX)) >/dev/null || { \
		echo "error: no C++ compiler ($(CXX)); Triton and torch.compile compile with it (Debian: g++), or set CXX" >&2; exit 2; }
	@test -x $(VENV)/bin/python || { echo "Setting up $(VENV) with $$($(PYTHON) -V) ..."; $(PYTHON) -m venv $(VENV); }
	@echo "Installing torch (the largest download) ..."
	@$(PIP) --quiet setuptools wheel ninja
	@$(PIP) --no-input torch
	@echo "Installing the other requirements ..."
	@# DeepSpeed's set-up imports torch: in an isolated build pip would fetch a second one for it.
	@DS_BUILD_OPS=0 $(PIP) --quiet --no-build-isolation deepspeed
	@$(PIP) --quiet --no-build-isolation -e '.[dev]'
	@touch $@
	@echo "$(VENV) is ready."

define ERASE
$(VENV)/bin/deepspeed --quiet --num_gpus 1 fastunlearn/train.py --config configs/minicanvas_$(1).toml \
	--output_dir output/demo_$(1) --overwrite_output_dir true
endef

demo-style: $(READY)
	$(call ERASE,style)

demo-object: $(READY)
	$(call ERASE,object)

demo: $(READY)
	$(call ERASE,style)
	$(call ERASE,object)
	@echo
	@echo "Done. For each of the two runs, X = style and X = object:"
	@echo "  output/demo_X/samples/before_after.png   the same seeds before and after"
	@echo "  output/demo_X/README.md                  what was erased, and the figures"
	@echo "  output/demo_X/unet                       the edited U-Net, in diffusers' format"
	@echo "Measure again:  $(VENV)/bin/fastunlearn evaluate --model output/demo_style"

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

# Side by side, a file at a time: what a file's tests share is made once. In the order of tests/conftest.py.
JOBS ?= 2
test: lint
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

chaos: $(READY)
	FASTUNLEARN_CHAOS=1 $(VENV)/bin/python -m pytest -n $(JOBS) tests/chaos

CASES ?= 10000
fuzz: $(READY)
	FASTUNLEARN_FUZZ=$(CASES) $(VENV)/bin/python -m pytest -n $(JOBS) tests/fuzz

bench: $(READY)
	@mkdir -p output
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest benchmarks --benchmark-json=output/benchmark.json
	$(VENV)/bin/python benchmarks/ops/kernel_table.py output/benchmark.json --output output/kernels.md
	@echo "The kernels' table: output/kernels.md"

kernels-report: $(READY)
	env -u TRITON_INTERPRET OMP_NUM_THREADS=1 $(VENV)/bin/python -m fastunlearn_kernels.testing.report --output kernels/REPORT.md

# Beside the environment, not in it: torch's own Triton stays as it is. Until 3.6 the interpreter calls int() on arrays of
# one element, which NumPy 2.4 no longer allows.
TRITON_VERSIONS ?= 3.4.0 3.6.0 newest
KERNEL_TESTS := $(addprefix tests/ops/test_kernels_,ops.py latent.py surgery.py 8bit.py)
triton-matrix: $(READY)
	@for version in $(TRITON_VERSIONS); do \
		folder=output/triton-$$version; \
		test $$version != newest -a -d $$folder/triton || \
			$(INSTALL) --quiet --no-deps --upgrade --target $$folder 'numpy<2.4' \
				$$(echo triton==$$version | sed s/==newest//) || exit; \
		export PYTHONPATH=$$folder OMP_NUM_THREADS=1 TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES=; \
		$(VENV)/bin/python -c 'import triton; print("Triton", triton.__version__)' || exit; \
		$(VENV)/bin/python -m pytest $(KERNEL_TESTS) || exit; \
	done

gpu-kernels: $(READY)
	VENV=$(VENV) bash benchmarks/gpu_proof.sh

bench-step: $(READY)
	@mkdir -p output
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/update/throughput.py --sweep engine=zero,fused surgery=off,int8 \
		--sweep baseline=paper_kscu,quick_kscu,esd_sdxl,doco_loop --markdown output/throughput.md

STEP ?= all
gpu-step: $(READY)
	VENV=$(VENV) bash benchmarks/gpu_whole_step.sh $(STEP)

dist: $(READY)
	$(VENV)/bin/python .ci/package_index.py $(REPOSITORY)

clean:
	rm -rf output build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .benchmarks
