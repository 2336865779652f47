# make lab | test | reproduce | env | clean      PYTHON=python3.12 chooses the Python, ARGS=... goes to the command
.PHONY: env lab test reproduce clean
.DEFAULT_GOAL := lab
.DELETE_ON_ERROR:

SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
runs = $(shell $(1) -c '$(SUPPORTED)' 2>/dev/null && echo $(1))
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,$(call runs,$(p))) python3)

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
READY := $(VENV)/.ready
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)

env: $(READY)

lab: $(READY)
	@$(BIN)/hmlab lab $(ARGS)

test: $(READY)
	@$(BIN)/python tests/browser.py
	@$(BIN)/python -m pytest $(ARGS)

reproduce: $(READY)
	@$(BIN)/hmlab reproduce --out reports $(ARGS)

clean:
	rm -rf $(VENV) build dist reports .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	$(if $(call runs,$(PYTHON)),,$(error $(PYTHON): expected Python 3.11 to 3.13, found \
	  $(or $(shell $(PYTHON) --version 2>/dev/null),none); choose one with make PYTHON=python3.12))
	$(if $(shell $(PYTHON) -c 'import ensurepip, venv; print(1)' 2>/dev/null),,\
	  $(error $(PYTHON) cannot make environments: apt-get install python3-venv))
	@$(PYTHON) -m venv $(VENV)
	@.ci/torch $(BIN)/python $(TORCH)
	@echo "installing hmlab and what it needs (a few minutes the first time)"
	@$(PIP) install -c constraints.txt -e '.[all]'
	@touch $@
