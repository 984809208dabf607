# Two commands need nothing but Python 3.10 to 3.13 and make:
#   make quickstart    train on handwritten digits, generate, compute and log an FID (minutes on two CPU cores);
#                      with CONFIG=digits_cond.yml digits of every class, a row for each
#   make test          lint and run the test suite

PYTHON ?= python3
BIN := .venv/bin
EXP ?= exp
CONFIG ?= digits.yml
TRAIN ?=
IMAGES ?= 500
BENCH ?=
GPU ?=

.PHONY: install quickstart test lint clean soak bench gpu

install: .venv/installed

.venv/installed: pyproject.toml .ci/requirements.py
	$(PYTHON) -m venv .venv
	$(BIN)/python .ci/requirements.py dev offline > .venv/requirements.txt
	$(BIN)/pip install --disable-pip-version-check -r .venv/requirements.txt
	touch $@

quickstart: install
	$(BIN)/python train_ddp.py --config $(CONFIG) --exp $(EXP) --resume_training $(TRAIN)
	$(BIN)/python generate.py --config $(CONFIG) --exp $(EXP) --num_samples $(IMAGES) --timesteps 50 --eta 1 --fid_stats auto $(if $(findstring cond,$(CONFIG)),--classes 0-9)

lint: install
	$(BIN)/ruff check .

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile     # each file in one of two processes, of one thread

soak: install
	$(BIN)/python -m benchmarks.soak --minutes 10
	$(BIN)/python -m benchmarks.fuzz --minutes 10

bench: install
	$(BIN)/python .ci/requirements.py bench > .venv/bench.txt
	$(BIN)/pip install --disable-pip-version-check -q -r .venv/bench.txt
	$(BIN)/python -m benchmarks $(BENCH)

# On a machine with a GPU, where torch is: what is installed there is used as it is, and what is missing costs its part.
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu $(GPU)

clean:
	rm -rf .venv
