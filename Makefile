# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
# `make demo` and `make test` install what they need into $(VENV) first. A second call finds the stamp and starts at once.
# TORCH=cuda takes PyPI's CUDA build of torch; the default is the CPU build. A torch that already works is kept.

SHELL := /bin/bash
VENV ?= .venv
TORCH ?= cpu
TORCH_VERSION := 2.13.0
CPU_INDEX := https://download.pytorch.org/whl/cpu
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed-$(TORCH)
DEMO := space/examples/chopin_prelude_op28_no7.mid

.PHONY: help install install-eval install-peft demo test test-slow style quality
help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## / - /'

install: $(STAMP)  ## create the environment: torch first, then requirements.txt, then this project (editable)

$(PY):
	@for python in $(PYTHON) python3.11 python3.12 python3.13 python3.14 python3; do \
	    "$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null || continue; \
	    "$$python" -c 'import venv, ensurepip' 2>/dev/null || { \
	        echo "$$python has no venv module: install it (Debian and Ubuntu: apt-get install python3-venv)" >&2; exit 2; }; \
	    echo "creating $(VENV) with $$("$$python" --version)"; \
	    exec "$$python" -m venv "$(VENV)"; \
	done; \
	echo "no Python 3.11 to 3.14 found (symusic, which reads MIDI, has no build for a newer one): install one, or run" \
	    "make PYTHON=/path/to/python3.11" >&2; exit 2

# torch comes first and by itself: any later requirement would otherwise draw the CUDA build and its 3 GB of libraries.
# `===` excludes a local `+cpu` build.
$(STAMP): requirements.txt pyproject.toml | $(PY)
	@if $(PY) -c 'import sys, torch; sys.exit("$(TORCH)" == "cuda" and torch.version.cuda is None)' 2>/dev/null; then \
	    echo "keeping torch $$($(PY) -c 'import torch; print(torch.__version__)')"; \
	elif [ "$(TORCH)" = cuda ]; then \
	    $(PIP) install -q "torch===$(TORCH_VERSION)"; \
	else \
	    $(PIP) install -q "torch==$(TORCH_VERSION)+cpu" --extra-index-url $(CPU_INDEX) \
	        || $(PIP) install -q "torch==$(TORCH_VERSION)"; \
	fi
	$(PIP) install -q -r requirements.txt
	$(PIP) install -q --no-deps -e .
	@$(PY) -c 'import torch, transformers; print("installed: torch", torch.__version__, "transformers", transformers.__version__)'
	@touch $@

# Without its dependencies: transkun asks for torchaudio, which breaks `import transformers` beside a CPU torch, and for
# ncls and pydub, which nothing here uses and which Python 3.13 and later have no builds of, or cannot import.
install-eval: install  ## add the transcriber: for scripts.evaluate, --verify and prompts without MIDI
	$(PIP) install -q moduleconf==0.1.4 pretty_midi==0.2.11.post0 librosa==0.11.0
	$(PIP) install -q --no-deps transkun==2.0.1

install-peft: install  ## add peft: for scripts.adapt
	$(PIP) install -q peft==0.21.2

demo: install  ## render a bundled performance on the default piano: demo.wav and demo.png
	$(PY) -m scripts.render $(DEMO) demo.wav --force
	$(PY) -m scripts.plots demo.wav $(DEMO) demo.png

test: install  ## the default tests, without network, on two cores
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile

test-slow: install  ## the tests that need minutes
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -m slow

style: install  ## format and fix
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

quality: install  ## check format and lint, change nothing
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
