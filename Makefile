# `make demo` and `make test` start from a fresh clone, and from any later state of .venv.
PYTHON ?= python3
BIN := .venv/bin
RUNS := runs/demo
MISSING = import importlib.util as i; print(*[n for n in '$(1)'.split() if not i.find_spec(n)])
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-slow lint types docs bench wheel-test clean

demo: .venv/core
	$(BIN)/lightning-iclr fit --config vit/digits --trainer.default_root_dir $(RUNS)
	checkpoint=$$(ls -t $(RUNS)/lightning_logs/*/checkpoints/last.ckpt | head -n 1); \
	$(BIN)/lightning-iclr test --config vit/digits --trainer.default_root_dir $(RUNS) --ckpt_path "$$checkpoint" \
	  && echo "Pictures to open:" \
	  && ls "$$(dirname "$$(dirname "$$checkpoint")")"/figures/*.png

test: .venv/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2

test-slow: .venv/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n 2

lint: .venv/dev
	$(BIN)/pre-commit run --all-files --show-diff-on-failure

types: .venv/dev
	$(BIN)/mypy

docs: .venv/dev
	$(BIN)/mkdocs build --strict --site-dir site

wheel-test: .venv/test
	maintainers/wheel_test.sh $(BIN)/python

bench: .venv/bench
	for part in speed memory-peaks ablation accuracy masked-patch claim; do \
	  OMP_NUM_THREADS=1 $(BIN)/python benchmarks/vit.py $$part || exit 1; \
	done
	for part in speed flower claim shakespeare; do \
	  OMP_NUM_THREADS=1 $(BIN)/python benchmarks/fedopt.py $$part || exit 1; \
	done
	for part in speed memory claim; do \
	  OMP_NUM_THREADS=1 $(BIN)/python benchmarks/pmi_masking.py $$part || exit 1; \
	done

clean:
	rm -rf .venv runs site dist

# Each stamp installs the package with one more set of extras; it is made again when the pins or the metadata change,
# or when the environment under it is gone or lacks what the target runs.
CORE := pip lightning_iclr torch lightning torchmetrics datasets jsonargparse matplotlib
TEST := $(CORE) accelerate daft gensim duckdb opacus flwr pytest xdist pytest_timeout build hatchling sklearn scipy transformers tensorboard
BENCH := $(TEST) ray
DEV := $(TEST) latex2mathml ruff mypy pre_commit mkdocs material mkdocstrings

.venv/core: EXTRAS :=
.venv/test: EXTRAS := [test,tensorboard]
.venv/bench: EXTRAS := [test,tensorboard,flower]
.venv/dev: EXTRAS := [dev,tensorboard]

missing = $(if $(shell $(BIN)/python -c "$(call MISSING,$(1))" 2>&1),rebuild)
.venv/core: $(call missing,$(CORE))
.venv/test: $(call missing,$(TEST))
.venv/bench: $(call missing,$(BENCH))
.venv/dev: $(call missing,$(DEV))

.venv/core .venv/test .venv/bench .venv/dev: pyproject.toml constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.$(EXTRAS)'
	@touch $@

.PHONY: rebuild
rebuild:
