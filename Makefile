# make demo    SpecVLM on a shipped clip: demo.json, demo.png
# make test    lint and all tests that this machine can run
#
# PYTHON=python3.12     the interpreter that makes .venv
# TORCH_INDEX=URL       where to take torch from, such as https://download.pytorch.org/whl/cpu
PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
SOURCES := $(shell find csrc specvlm_kernels python_ref -type f -not -name '*.so' -not -path '*/__pycache__/*')

# Without a GPU: a CPU build of torch, and no CUDA tier to wait for. Release 2.13.0 is what the tests are run with.
ifneq ($(GPU),yes)
TORCH ?= torch==2.13.0
export SPECVLM_CUDA_ARCHS ?= none
else
TORCH ?= torch
endif

.PHONY: demo test lint clean

demo: $(VENV)/.demo
	$(BIN)/specvlm compare examples/tiny_vlm/clips/$(CLIP) "$(QUESTION)" --json demo.json --overlay demo.png

CLIP ?= clip_0.mp4
QUESTION ?= What happens in the video?

test: lint
	$(BIN)/pytest tests bench --benchmark-disable -n 2 --dist loadfile

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.cpp' | xargs $(BIN)/clang-format --dry-run -Werror

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml setup.py CMakeLists.txt $(SOURCES)
	$(BIN)/pip install -q ".[vlm]"
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml setup.py CMakeLists.txt $(SOURCES)
	$(BIN)/pip install -q ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info demo.json demo.png
