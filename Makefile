# Two commands do all the set-up: `make demo` (the main job) and `make test`.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
NATIVE = $(shell find edge/mote -name '*.[ch]' -o -name '*.py') edge/wire/protocol.cddl setup.py pyproject.toml

# For the tests: cross compilers, emulators and what builds the exported library.
TOOLS = mosquitto qemu-system-arm gcc-arm-none-eabi clang cmake qemu-user gcc-aarch64-linux-gnu gcc-arm-linux-gnueabihf chromedriver
PAGE = $(addprefix ontology/http/page/,package.json package-lock.json index.html page.css page.js icon.svg)

.PHONY: demo test test-fast test-slow fuzz coverage instructions boards vocabulary check page docs screenshots lock clean tools-demo tools-test

demo: $(VENV)/.demo
	$(BIN)/tinyfleet demo $(ARGS)

test: $(VENV)/.test page check
	$(BIN)/pytest -n auto --dist worksteal $(ARGS)

# The loop while editing: under a minute.
test-fast: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/python tests/language.py
	$(BIN)/pytest -n auto --dist worksteal -m "not slow and not thorough" $(ARGS)

test-slow: $(VENV)/.test
	$(BIN)/pytest -m slow $(ARGS)

# Made-up inputs for all that reads bytes from outside: two minutes for each target, those of
# the device's C code under sanitizers. ARGS="--seconds 600" is longer; ARGS=--keep adds what is new to tests/corpus.
fuzz: $(VENV)/.test
	$(BIN)/python tests/fuzzing.py $(ARGS)

# Branches that the tests take: of the C engine, at least 95 %, and of the Python code, at least 90 %.
coverage: $(VENV)/.test
	$(BIN)/python tests/branch_coverage.py $(ARGS)
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -q -n auto --dist worksteal
	$(BIN)/coverage combine -q
	$(BIN)/coverage report --fail-under=90

# Instructions and bytes of the engine's models on emulated cores.
instructions: $(VENV)/.test
	$(BIN)/python benchmarks/instructions.py $(ARGS)

# The catalogue of boards as a graph, for `tinyfleet graph load`. BOARDS is the folder of the public board files.
BOARDS ?= $(TINYFLEET_DATA)/boards
boards: $(VENV)/.demo
	$(BIN)/tinyfleet graph build-catalogue $(BOARDS) --out build/boards.ttl $(ARGS)

# The vocabulary as an HTML page.
vocabulary: $(VENV)/.demo
	$(BIN)/tinyfleet graph export-vocabulary --out build/vocabulary.html

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/language.py
	@sh tools/types.sh
	$(BIN)/mypy
	$(BIN)/mypy benchmarks

# Packages from the lock, tools from Debian at the same time, then the project with its C engine.
$(VENV)/.demo: requirements.lock $(NATIVE)
	@sh tools/install.sh $(PYTHON) $(VENV) requirements.lock mosquitto qemu-system-arm gcc-arm-none-eabi
	@touch $@

$(VENV)/.test: requirements-dev.lock $(NATIVE)
	@sh tools/install.sh $(PYTHON) $(VENV) requirements-dev.lock $(TOOLS)
	@touch $@ $(VENV)/.demo

# The query page of the endpoint, from npm's YASGUI. Without npm there is none.
page: ontology/http/page/dist/index.html
ontology/http/page/dist/index.html: tools/page.sh $(PAGE)
	@sh tools/page.sh

# The documentation site, into build/site. Its diagrams' script comes from npm. A dead link is an error.
docs: $(VENV)/.docs
	@sh tools/mermaid.sh
	@sh tools/types.sh
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/.docs: requirements-docs.lock $(VENV)/.demo
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements-docs.lock
	@touch $@

# The screenshots in docs/images, from the real pages.
screenshots: $(VENV)/.test page
	$(BIN)/python tools/screenshots.py

# Needs `uv`. Writes no index address.
LOCK = uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header pyproject.toml
lock:
	echo 'setuptools>=75' | $(LOCK) - --extra edge --extra server --extra broker --extra firmware -o requirements.lock
	echo 'setuptools>=75' | $(LOCK) - --extra dev -o requirements-dev.lock
	$(LOCK) --extra docs -c requirements-dev.lock -o requirements-docs.lock

clean:
	rm -rf $(VENV) build *.egg-info ontology/http/page/dist ontology/http/page/node_modules edge/_mote*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .tinyfleet
