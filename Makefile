# make train [ARGS="--method topk --steps 500"]   set up, train ResNet-18 with two workers, print a table and a figure's path
# make test  [ARGS="-k payload"]                  set up, run the test suite
# make setup                                      the set-up alone: a virtual environment, dependencies, the extension
# make cuda                                       compile the CUDA kernels for every architecture and check them; needs nvcc, no GPU
# make gpu-check OUT=DIR [DEVICE=emulated]        check and time the kernels on this machine's GPU with the torch of PYTHON, 8 minutes at most; ARGS="--data DIR": with CIFAR-10
# make sanitize                                   the core and the exchange's threads under Address-, UB- and ThreadSanitizer
# make fuzz [SECONDS=60]                          feed the decoder of payloads and the loader of checkpoints with damaged bytes
# make lint                                       ruff, mypy on the package, and the format of the C++
# make check-all                                  every test, the ones that take minutes too, make sanitize and make fuzz
# make clean                                      remove what make made: environments, builds, runs and the downloaded data set
#
# REGTOPK_CUDA=auto|on|off builds the CUDA kernels into the extension where nvcc and a CUDA build of torch are (auto), always, never;
# make setup and make train, where nothing else is said, leave them out on a machine without a GPU, and make test builds them there
# for one kind of GPU, CUDAARCHS=90-real.
# TORCH=2.13.0 uses another torch, in an environment of its own and without torchvision. PYTHON=... another interpreter.

PYTHON ?= python3
TORCH ?= 2.14.1
# Kernels that nothing here can run take half of the build's time. What is built with them already stays.
ifeq ($(filter-out setup train,$(or $(MAKECMDGOALS),setup)),)
REGTOPK_CUDA ?= $(if $(or $(wildcard build/built-for-torch-$(TORCH)-cuda-auto),$(shell nvidia-smi -L 2>/dev/null)),auto,off)
endif
REGTOPK_CUDA ?= auto
export REGTOPK_CUDA
# Where no GPU can run them, the tests need the kernels for one kind of GPU; everything else builds them for all.
ifeq ($(MAKECMDGOALS)$(shell nvidia-smi -L 2>/dev/null),test)
export CUDAARCHS ?= 90-real
endif
ARGS ?=
SECONDS ?= 60

ifeq ($(TORCH),2.14.1)
VENV ?= .venv
TORCH_PACKAGES := torch==2.14.1 torchvision==0.29.1
else
VENV ?= .venv-torch-$(TORCH)
TORCH_PACKAGES := torch==$(TORCH)
# Some versions of torch refuse the newest setuptools: take the newest that this one allows.
LOOSEN := s/^setuptools==.*/setuptools>=77/
endif

BIN := $(abspath $(VENV))/bin
INSTALLED := $(VENV)/installed
# The package holds one built extension: the stamp says for which torch, and with which wish for CUDA.
BUILT := build/built-for-torch-$(TORCH)-cuda-$(REGTOPK_CUDA)
SOURCES := CMakeLists.txt setup.py pyproject.toml $(shell find csrc cuda -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.cmake' -o -name CMakeLists.txt)
WORKERS = $(or $(shell printf '%s\n' '$(ARGS)' | sed -n 's/.*--workers[ =]\{1,\}\([0-9][0-9]*\).*/\1/p'),2)

# Says every 8 seconds that the rest of a recipe's line goes on.
SAY_SO := start=$$(date +%s); while sleep 8; do echo "  ... $$(($$(date +%s) - start)) s, $(VENV) has $$(du -sh $(VENV) | cut -f1)"; done & beat=$$!; \
  trap "kill $$beat" EXIT; trap "exit 130" INT TERM;

.PHONY: setup train test cuda gpu-check sanitize fuzz lint check-all clean

setup: $(BUILT)

$(INSTALLED): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: expected Python 3.11 or newer, got $$($(PYTHON) --version 2>&1); set PYTHON=..."; exit 1; }
	@echo "make: installing torch and the rest into $(VENV), some 6 GB with its CUDA libraries"
	@$(SAY_SO) $(PYTHON) -m venv $(VENV) && sed '$(LOOSEN)' requirements.txt > $(VENV)/requirements.txt && \
	  $(BIN)/pip install --no-compile --disable-pip-version-check $(TORCH_PACKAGES) -r $(VENV)/requirements.txt
	@touch $@

$(BUILT): $(INSTALLED) $(SOURCES)
	@rm -f build/built-for-torch-*
	@echo "make: building the extension (REGTOPK_CUDA=$(REGTOPK_CUDA))"
	@$(SAY_SO) export PATH="$(BIN):$$PATH"; $(BIN)/python setup.py --quiet build_ext --inplace && \
	  $(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@cat build/torch-$(TORCH)*/kernels.txt
	@touch $@

train: setup
	@test -x $(BIN)/torchrun || \
	  { echo "make train: expected torchrun in $(VENV)/bin, got none; run make clean, then make train"; exit 1; }
	@$(BIN)/python -m experiments.launch --standalone --nproc-per-node $(WORKERS) experiments/cifar10.py $(ARGS)
	@echo "to use it yourself: . $(VENV)/bin/activate"

# A file at a time to each of two: most tests run two processes that wait for one another.
test: setup
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

cuda:
	$(PYTHON) cuda/compile.py

# No set-up: where there is a GPU there may be no network. Emulated, it needs the extension of the set-up.
DEVICE ?= cuda
GPU_PYTHON = $(if $(filter emulated,$(DEVICE)),$(BIN)/python,$(PYTHON))
gpu-check: $(if $(filter emulated,$(DEVICE)),setup)
	@test -n "$(OUT)" || { echo "make gpu-check: expected OUT=DIR, a folder for the results"; exit 1; }
	$(GPU_PYTHON) -m tests.gpu_check --out "$(OUT)" --device $(DEVICE) $(ARGS)

lint: $(VENV)/lint-installed
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc cuda tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

$(VENV)/lint-installed: requirements-lint.txt $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-lint.txt
	@touch $@

# The native tests need no torch, but their cmake is that of the environment.
build/sanitize-%: $(INSTALLED)
	PATH="$(BIN):$$PATH" cmake -S tests/native -B $@ -G Ninja -DSANITIZE=$*

# Kept: make would remove what only led from one pattern to another.
.PRECIOUS: build/sanitize-%
native-%: build/sanitize-%
	PATH="$(BIN):$$PATH" cmake --build $<

sanitize: native-address,undefined native-thread
	build/sanitize-address,undefined/test_core
	build/sanitize-address,undefined/test_completer
	build/sanitize-thread/test_core threads
	build/sanitize-thread/test_completer

fuzz: native-address,undefined setup
	build/sanitize-address,undefined/fuzz_payload $(SECONDS)
	REGTOPK_FUZZ_SECONDS=$(SECONDS) $(BIN)/python -m pytest -q tests/test_checkpoint_fuzz.py

check-all: sanitize fuzz
	$(BIN)/python -m pytest -m "long or not long" $(ARGS)

clean:
	rm -rf .venv .venv-torch-* build runs data/cifar-10-* regtopk_torch.egg-info .pytest_cache .hypothesis
	rm -f regtopk_torch/_C.*.so crash-input
	rmdir data 2>/dev/null || true
	find . -name __pycache__ -prune -exec rm -rf {} +
