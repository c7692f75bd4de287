# make serve: install, then serve a copy of the sample data    make ohif: a newer viewer
# make test: install, then all tests    make lint: style, types, imports
PYTHON ?= python3
VENV ?= .venv
SAMPLES := served/sample-datastore
DATASET ?= $(SAMPLES)
BIN := $(VENV)/bin
SERVES := $(VENV)/.serves
STAMP := $(VENV)/.installed

# uv does not read pip's configuration: hand it the folders of wheels that pip is told to look in, if any.
FIND_LINKS = $(addprefix --find-links ,$(sort $(shell $(BIN)/python -m pip config list 2>/dev/null \
	| sed -n "s/^[^=]*find-links='\(.*\)'$$/\1/p" | sed 's/\\n/ /g')))

.PHONY: install serve ohif test test-fast test-server test-faults lint format docs clean

install: $(STAMP)

$(BIN)/uv: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt uv
	@touch $@

INSTALL = $(BIN)/uv pip install --python $(BIN)/python $(FIND_LINKS) -c constraints.txt

# What serves, and no more: each package costs a first start seconds.
$(SERVES): pyproject.toml constraints.txt | $(BIN)/uv
	$(INSTALL) -e '.[server,evaluation,postgresql,openvino]'
	@touch $@

$(STAMP): pyproject.toml constraints.txt | $(BIN)/uv
	$(INSTALL) --compile-bytecode -e '.[server,dev]'
	@touch $(SERVES) $@

# Bytecode is kept, whatever the environment says: otherwise each start compiles MONAI Label and its packages anew.
serve: export PYTHONDONTWRITEBYTECODE =
serve: $(SERVES) $(filter $(SAMPLES),$(DATASET))
	$(BIN)/segqc serve $(DATASET)

# A newer OHIF than MONAI Label's package carries, by the machine's npm, or PyPI's where there is none.
ohif: $(SERVES)
	command -v npm > /dev/null || $(INSTALL) --quiet -e '.[ohif]'
	$(BIN)/segqc ohif

# A copy, once: what annotators submit and what the server keeps is no part of the checkout.
$(SAMPLES):
	@mkdir -p $(@D)
	@rm -rf $@.new && cp -R sample-datastore $@.new && mv $@.new $@

test: test-fast test-server

# One thread per process: the networks of tests are tiny, and threads that wait for one another are slow beside others.
test-fast test-server: export OMP_NUM_THREADS = 1
# Bytecode is kept, whatever the environment says: each worker and each process of a test would compile all of it anew.
test-fast test-server: export PYTHONDONTWRITEBYTECODE =

# In memory where there is room: tests make and remove thousands of folders, for each of which a disk may take milliseconds.
MEMORY := $(shell df -Pk /dev/shm 2> /dev/null | awk 'NR == 2 && $$4 > 4000000 { print $$6 }')
ifneq ($(MEMORY),)
test-fast: export TMPDIR = $(MEMORY)
endif

# What a passed test has written goes at once: a whole run is half a gigabyte.
test-fast: install
	$(BIN)/python -m pytest -q -m "not server and not slow" -o faulthandler_timeout=300 \
		-o tmp_path_retention_policy=failed -n auto --maxprocesses 8 --dist loadfile

# Several at a time, but for those in a browser, which draws too slowly beside other work.
test-server: install
	$(BIN)/python -m pytest -q -m "server and not slow" --ignore tests/e2e -n auto --maxprocesses 4 --dist loadfile
	$(BIN)/python -m pytest -q -m "server and not slow" tests/e2e

# The full counts, on SQLite and PostgreSQL: 200 kills, 10 of the whole server, a crowd for 120 s. About 20 minutes.
test-faults: install
	SEGQC_KILLS=200 SEGQC_CROWD_SECONDS=120 SEGQC_TEST_POSTGRESQL=required $(BIN)/python -m pytest -q tests/test_faults.py

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/python .ci/check_scripts.py

format: install
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# The pages of docs/ with a reference of all modules from their docstrings; begin at site/index.html.
docs: install
	$(INSTALL) --quiet -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build dist site
