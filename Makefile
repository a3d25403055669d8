# Start with `make demo` and `make check`. Each sets up a virtual environment in .venv with the versions of constraints.txt
# if needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Tests create and remove some hundred thousand folders, which takes minutes on disk: use memory if there is room.
ROOM := $(shell df -Pk /dev/shm 2>/dev/null | awk 'NR == 2 && $$4 > 4000000 {print "PYTEST_DEBUG_TEMPROOT=/dev/shm"}')

.PHONY: demo check format setup table clean

demo: setup
	$(BIN)/crosscal run

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(ROOM) OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Generate the tables of benchmarks/README.md from benchmarks/results/*.json.
table: setup
	$(BIN)/python benchmarks/table.py

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; try: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m crosscal.warm_up
	touch $(READY)

clean:
	rm -rf $(VENV) runs .crosscal .pytest_cache .ruff_cache
