# Everything on a fresh machine with Python 3.11 or newer:  make app | make demo | make test
# On Linux without a GPU, TORCH_INDEX=https://download.pytorch.org/whl/cpu avoids the large CUDA packages.
# LOCKED=1 takes from PyPI just the files whose hashes are in requirements.lock.
# NO_GPU_EXTRAS=1 leaves out the optional kernels that app and demo install where the GPU has ready-made ones.

PYTHON ?= python3
TORCH_INDEX ?=
LOCKED ?=
NO_GPU_EXTRAS ?=
# Processes that share the tests. Each takes about 1 GB.
WORKERS ?= 2
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile
PROMPT ?= a red ball rolls left over green grass at night

# Threads that spin while they wait would take the cores from the tests' own servers and browsers.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: app demo quick test check format screenshots clean

app: $(if $(NO_GPU_EXTRAS),.venv/.app,.venv/.gpu)  ## the page on http://127.0.0.1:7860 (ARGS="--share", "--port 8080", ...)
	$(BIN)/python app.py $(ARGS)

demo: $(if $(NO_GPU_EXTRAS),.venv/.app,.venv/.gpu)  ## one small video without a browser; prints its path
	$(BIN)/python -m lightx2v.infer --preset demo_t2v_distill_lora --prompt "$(PROMPT)" $(ARGS)

quick: .venv/.dev  ## some tests of every package, in about a minute
	$(PYTEST) -m "not (slow or multi or browser or gpu)" $(ARGS)

# Coverage has a cheap way of counting in Python 3.12 and newer.
test: check  ## static checks, then every test; without ARGS also the line coverage of lightx2v/
	COVERAGE_CORE=$$($(BIN)/python -c 'import sys; print("sysmon" if sys.version_info >= (3, 12) else "ctrace")') \
		$(PYTEST) $(or $(ARGS),--cov --cov-report=)

check: .venv/.dev  ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: .venv/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

screenshots: .venv/.dev  ## pictures of the page's main states, into assets/screenshots
	$(BIN)/python scripts/screenshots.py

clean:  ## removes .venv; videos stay in outputs
	rm -rf .venv

.venv/.python:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed, this is ' + sys.version)"
	$(PYTHON) -m venv .venv
	touch $@

.venv/.app: .venv/.python requirements.txt constraints.txt
	$(if $(LOCKED),$(BIN)/python -m pip install --quiet --require-hashes -r requirements.lock,$(PIP) -r requirements.txt)
	touch $@

.venv/.gpu: .venv/.app requirements-gpu.txt
	$(BIN)/python scripts/gpu_extras.py
	touch $@

.venv/.dev: .venv/.app requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	touch $@
