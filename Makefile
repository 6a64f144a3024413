# The two commands: `make book` and `make test`. All of it needs Python 3.11, git and make; see README.md.
SHELL := bash
.SHELLFLAGS := -eo pipefail -c
PYTHON ?= python3
SYSTEM ?= token_ring
BIN := .venv/bin
PY := $(BIN)/python

.PHONY: book test quick tiny notebooks lab assignments sizes assets machine clean distclean

book: .venv/book assets             ## execute the chapters, build the site into _build/html
	$(PY) book/_ext/build.py

test: .venv/test assets machine     ## lint, chapters, site without warnings, every test; pytest comes last
	$(BIN)/ruff check .
	$(BIN)/codespell
	$(PY) book/_ext/build.py
	$(PY) -m pytest

quick: .venv/test                   ## one system: its tests and its chapter; make quick SYSTEM=token_ring
	$(PY) book/_ext/chapters.py $(SYSTEM)
	$(PY) -m pytest -q $(or $(wildcard tests/*/test_$(SYSTEM).py),$(error no tests/*/test_$(SYSTEM).py: which system?))

tiny: .venv/test                    ## each feature once, in three seconds
	@$(PY) -m pytest -q tests/test_tiny.py

notebooks: .venv/book               ## notebooks/<part>/<chapter>.ipynb beside each chapter
	$(PY) book/_ext/notebooks.py

lab: .venv/classroom notebooks      ## JupyterLab on them
	$(BIN)/jupyter lab notebooks

assignments: .venv/classroom        ## the student release into _build/assignments
	$(PY) book/_ext/assignments.py

sizes:                              ## lines a module, longest last
	@find toolkit -name '*.py' -exec wc -l {} + | sort -n

assets: .venv/book                  ## scripts and fonts that the site serves itself
	$(PY) book/_ext/assets.py

machine:                            ## Chromium and SimGrid, where we may install them
	@.ci/machine

# One virtual environment. A stamp is made again only when pyproject.toml changes; each waits for the one before it.
.venv/book: pyproject.toml
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[book]'
	@touch $@

.venv/classroom: .venv/book
	$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[book,classroom]'
	@touch $@

.venv/test: .venv/classroom
	$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[book,classroom,test]'
	@touch $@

clean:                              ## everything that was made, but not the environment
	rm -rf _build .pytest_cache .ruff_cache .hypothesis
	find notebooks -name '*.ipynb' -delete
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv
