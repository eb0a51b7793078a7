# SPDX-License-Identifier: Apache-2.0
# Everything there is to remember; `make` alone lists it.

VENV   := .venv
BIN    := $(VENV)/bin
EXTRAS := simulation,device,text,ray,dev
# Made last by an install that went well, so that a broken one is done again.
STAMP  := $(VENV)/.installed

# The first interpreter that really starts and is new enough; PYTHON=... chooses another.
FIND_PYTHON = for python in $(PYTHON) python3.11 python3 python3.12 python3.13; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo "$$python" && break; done

.DEFAULT_GOAL := help
.PHONY: help install demo test long explore check bench chaos clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP)  ## make .venv with everything in it (again only when pyproject or constraints change)

$(STAMP): pyproject.toml constraints.txt
	@python="$$($(FIND_PYTHON))"; \
	if [ -z "$$python" ]; then \
		echo "fedloom needs Python 3.11 or newer and found none; install it, or say PYTHON=/path/to/python3.11" >&2; \
		exit 2; \
	fi; \
	[ -x $(BIN)/python ] || "$$python" -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "could not make $(VENV) with $$python; on Debian: apt-get install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

demo: install  ## fine-tune a pre-trained model over 20 simulated clients, into runs/demo
	$(BIN)/fedloom simulate examples/digits-lora.toml --out runs/demo --force

# One worker more than cores: tests of deployments wait for other processes most of their time.
test: install  ## run the suite, on all cores
	$(BIN)/python -m pytest -n $$(( $$(nproc) + 1 )) --dist worksteal

check: install  ## lint, format, types and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_import_rules.py tests/test_packaging.py

bench: install  ## measure, and print the figures beside their targets
	$(BIN)/fedloom bench wire --out bench/wire.json
	$(BIN)/fedloom bench aggregation --out bench/aggregation.json
	$(BIN)/fedloom bench secure-aggregation --out bench/secure-aggregation.json
	$(BIN)/fedloom bench device --out bench/device.json
	$(BIN)/fedloom bench split --out bench/split.json
	$(BIN)/fedloom bench deployment --out bench/deployment.json
	$(BIN)/fedloom bench simulation --out bench/simulation.json

long: install  ## run the tests that the suite has no time for
	$(BIN)/python -m pytest -n $$(( $$(nproc) + 1 )) --dist worksteal -m long

explore: install  ## run the tests of properties on examples that are drawn anew
	HYPOTHESIS_PROFILE=explore $(BIN)/python -m pytest -n $$(( $$(nproc) + 1 )) --dist worksteal \
		$$(grep -rlE '^from hypothesis( |\.)' tests)

chaos: install  ## kill processes and break connections while a deployment runs
	$(BIN)/python -m pytest -s -m chaos

clean:  ## remove caches and builds (keeps .venv and runs)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
