# The README's two commands are `make demo` and `make test`. Both build .venv from requirements.lock when it is missing.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1
# Two that compute, and one for the Slurm, which mostly waits (tests/conftest.py).
WORKERS := -n 3 --dist loadfile --no-loadscope-reorder

.PHONY: help demo test test-full test-slurm coverage docs gpu gpu-wheels lint format lock clean

help:
	@echo "make demo        pack Fashion-MNIST, pre-train, interrupt, resume, fine-tune, evaluate: minutes on 2 cores"
	@echo "make test        lint, types, and the tests (a real Slurm too where root and apt are there)"
	@echo "make test-full   the long matrix as well: hours"
	@echo "make test-slurm  the tests on a real four-node Slurm alone (root, Debian or Ubuntu)"
	@echo "make coverage    the share of lines and branches that the tests run, against its floor"
	@echo "make docs        the pages as a site with search, in site/ (Python 3.11 or newer)"
	@echo "make gpu         ask one NVIDIA GPU everything that we want to know (docs/benchmarks/gpu.md)"
	@echo "make gpu-wheels  the packages of ours that a container with torch lacks, as wheels"
	@echo "make format      format the sources"
	@echo "make lock        write requirements.lock anew from pyproject.toml"

.venv/.stamp: requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

demo: .venv/.stamp
	$(BIN)/dattrain demo --out demo-out

lint: .venv/.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --num-workers 2

test: lint
	$(BIN)/python -m pytest $(WORKERS)

test-full: lint
	$(BIN)/python -m pytest --full $(WORKERS)

test-slurm: .venv/.stamp
	$(BIN)/python -m pytest tests/slurm

coverage: .venv/.stamp
	$(BIN)/python -m pytest $(WORKERS) --cov

docs: .venv/.stamp
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs site

gpu: .venv/.stamp
	$(BIN)/python -m benchmarks.gpu --out gpu-out

gpu-wheels: .venv/.stamp
	benchmarks/gpu/wheels.sh wheels 3.12

format: .venv/.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The header line keeps the command; torch and torchvision stay at releases that match.
lock: .venv/.stamp
	$(PYTHON) -m venv .venv-lock && .venv-lock/bin/python -m pip install -q uv
	printf "torch==2.14.1\ntorchvision==0.29.1\n" | .venv-lock/bin/uv pip compile --universal --python-version 3.10 --extra dev --no-header --no-annotate \
	  --no-emit-index-url -q pyproject.toml -c - -o requirements.lock.new
	{ sed -n 1p requirements.lock; cat requirements.lock.new; } >.lock && mv .lock requirements.lock
	rm -rf requirements.lock.new .venv-lock

clean:
	rm -rf .venv demo-out build site .coverage *.egg-info .pytest_cache .mypy_cache .ruff_cache
