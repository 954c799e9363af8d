# Two commands on a fresh machine:   make demo    make test
# Both set up what they need: a virtual environment in .venv and, as root on Debian, the packages for rendering.

PYTHON ?= python3
BIN := .venv/bin
SEED ?= 0
ARGS ?=

.PHONY: demo test check setup clean

demo: setup            ## seven minutes: a fleet of four simulated robots goes from half to expert
	$(BIN)/sop run metaworld --name demo-seed$(SEED) --seed $(SEED) --again $(ARGS)

test: setup            ## everything: unit, contract, simulator and end-to-end tests
	@scripts/run_tests.sh $(BIN)/python

check: setup           ## lint, types, fast tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not slow"

setup: .venv/installed
	@scripts/install_system_packages.sh $(BIN)/python

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[learner,metaworld,link,fleet,ray,dev,bench]'
	@touch $@

clean:                 ## remove the environment and caches; runs/ stays
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
