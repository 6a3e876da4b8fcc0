# Two commands: `make demo` shows what it does, `make test` proves it. Both build .venv first.
# `make test-slurm` proves the rest on a real SLURM of virtual nodes, which it installs (Debian, as root).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := OMP_NUM_THREADS=1

.PHONY: install demo test test-long test-slurm test-gpu lint docs clean
.DELETE_ON_ERROR:

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml setup.py seer_scale/data/transforms/pixels.c
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

demo: install
	$(BIN)/seer-scale data demo runs/demo-corpus
	$(RUN) $(BIN)/python tools/launch.py demo --cluster local

test: install
	$(RUN) $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=10 \
		--ignore=tests/slurm -m 'not long' $(PYTEST_ARGS)
	@echo "Without tests/slurm: make test-slurm runs them on a SLURM of virtual nodes."

# What `make test` leaves out for its time.
test-long: install
	$(RUN) $(BIN)/python -m pytest -q -n 2 --dist loadfile --durations=10 --ignore=tests/slurm --ignore=tests/gpu \
		-m long $(PYTEST_ARGS)

# SLURM=optional: skipped, with the reason, where there can be no such cluster.
SLURM ?= required
test-slurm: install
	SEER_SCALE_SLURM=$(SLURM) $(RUN) $(BIN)/python -m pytest -q -rs --durations=10 tests/slurm $(PYTEST_ARGS)

# Where there is a GPU: what the CPU cannot show.
test-gpu: install
	$(RUN) $(BIN)/python -m pytest -q -rs --durations=10 tests/gpu tests/distributed/test_norm.py \
		tests/unit/test_on_device.py $(PYTEST_ARGS)

lint: install
	$(BIN)/ruff check seer_scale tests tools docs/examples setup.py
	$(BIN)/ruff format --check seer_scale tests tools docs/examples setup.py
	$(BIN)/mypy

# The API reference, from docstrings.
docs: install
	$(BIN)/python tools/build_docs.py --folder build/docs

clean:
	rm -rf $(VENV) runs/demo runs/demo-corpus
