# Needs make, python3 (3.11 or newer) and its venv module. Everything else goes into .venv.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
CLIENTS := .venv/clients
NODE := tests/compat/node

.PHONY: help run demo test clients lint docs bench bench-routing bench-deciding faults soak fuzz cancel clean

help:
	@echo 'make run    serve; ARGS="-b gpu1 -b gpu2" for your hosts'
	@echo 'make demo   a simulated fleet, the balancer and traffic, to watch'
	@echo 'make test   all tests; ARGS="-k name" for some'
	@echo 'make clients the tests of all client libraries, Python (extra clients) and npm; needs npm'
	@echo 'make lint   format, lint and types'
	@echo 'make docs   write anew what docs/ has from the code: metrics, verdicts, errors, routing ...'
	@echo 'make bench  CPU, delay and memory beside nginx, HAProxy and Go, about an hour; ARGS="--only chat --rounds 1"'
	@echo 'make bench-routing   strategies in the virtual world, an hour; ARGS="--workloads chat --seeds 1"'
	@echo 'make bench-deciding  CPU time of a decision; ARGS=--growth'
	@echo 'make faults the fault table on real processes, about 45 minutes; ARGS="killed frozen" for some'
	@echo 'make soak   many streams for ten minutes: memory and pauses'
	@echo 'make fuzz   random bytes for every parser, a minute each; ARGS="--only body --seed 7"'
	@echo 'make cancel how soon a host sees that a client has gone'
	@echo 'make clean  remove .venv and caches'

run: $(READY)
	@$(BIN)/ollama-balancer $(ARGS)

demo: $(READY)
	@$(BIN)/ollama-balancer demo $(ARGS)

test: $(READY)
	$(BIN)/pytest $(ARGS)

clients: $(CLIENTS)
	CI=true $(BIN)/pytest -m compat $(ARGS)

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(READY)
	$(BIN)/python docs/generate.py

bench: $(READY)
	$(BIN)/python bench/wire.py $(ARGS)

bench-routing: $(READY)
	$(BIN)/python bench/routing.py $(ARGS)

bench-deciding: $(READY)
	$(BIN)/python bench/deciding.py $(ARGS)

soak: $(READY)
	$(BIN)/python bench/soak.py $(ARGS)

fuzz: $(READY)
	$(BIN)/python -m bench.fuzz $(ARGS)

faults: $(READY)
	$(BIN)/python bench/faults.py $(ARGS)

cancel: $(READY)
	$(BIN)/python bench/cancel.py $(ARGS)

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage $(NODE)/node_modules
	find balancer tests bench docs -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'Python 3.11 or newer is needed; name it: make PYTHON=python3.12'; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo 'The venv module of Python is missing: apt install python3-venv'; exit 1; }
	@echo 'Setting up .venv, once ...'
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[test,lint]'
	@touch $@

$(CLIENTS): $(READY) $(NODE)/package.json
	@command -v npm >/dev/null || { echo 'npm is missing: apt install nodejs npm'; exit 1; }
	@echo 'Setting up further client libraries ...'
	@$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[clients]'
	@cd $(NODE) && npm install --no-package-lock --no-audit --no-fund --loglevel=error
	@touch $@
