# All targets run in .venv. They create or update it first.
PYTHON ?= $(shell python3.11 --version >/dev/null 2>&1 && echo python3.11 || echo python3)
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: venv demo test test-fast test-slow test-numerics docs lint type format bench bench-demo bench-sb3 bench-peers bench-lora

venv: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[contrib,dev,docs,libraries,lora,metrics,plots,tasks,trackers]'
	@touch $@

demo: $(INSTALLED)  ## train the embedded model on human ratings, and evaluate it before and after
	$(BIN)/textgym demo --overwrite

# Each worker has one thread, because two OpenMP threads become very slow if another process runs.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

test-fast: $(INSTALLED)  ## the tests that take a moment each, for use while you work
	$(PYTEST) --fast

test: $(INSTALLED)
	$(PYTEST) --durations 20

test-slow: $(INSTALLED)
	$(PYTEST) -m slow --durations 20

.PHONY: test-oldest
test-oldest:  ## the fast tests with the oldest versions that pyproject.toml allows; downloads several GB
	$(PYTHON) scripts/checks/test_oldest.py

test-numerics: $(INSTALLED)  ## the tests marked numerics with 18 settings of threads, vector width and MKL; prints a table
	$(BIN)/python scripts/checks/test_numerics.py

# This target does not use .venv, because a GPU machine has its own torch: it uses python3, unless PYTHON is given.
.PHONY: gpu
gpu:  ## checks and benchmarks on a GPU, in five minutes; `make gpu DEVICE=cpu` is a dry run on the CPU
	$(if $(filter file,$(origin PYTHON)),python3,$(PYTHON)) scripts/gpu/gpu.py $(if $(PART),--part $(PART)) \
		$(if $(DEVICE),--device $(DEVICE)) $(if $(COMMIT),--commit $(COMMIT)) $(if $(WHEELS),--wheels $(WHEELS)) \
		$(if $(PAGE),--page $(PAGE))

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: $(INSTALLED)  ## build the documentation site in build/docs; warnings are errors
	$(BIN)/python -m sphinx --builder html --fail-on-warning --keep-going --quiet docs build/docs

type: $(INSTALLED)
	@mkdir -p build/types/textgym && ln -sfn ../../../agents build/types/textgym/agents
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)
	$(BIN)/python benchmarks/rollout.py

bench-demo: $(INSTALLED)
	$(BIN)/python benchmarks/learning/ladder.py

bench-sb3: $(INSTALLED)
	$(BIN)/python benchmarks/sb3.py
	$(BIN)/python benchmarks/learning/sb3_learning.py

bench-peers: $(INSTALLED)  ## benchmarks that need no other library; benchmarks/measuring/peers.py says how to install those
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/memory.py --trl

bench-lora: $(INSTALLED)  ## needs SmolLM2; if it is missing, the error says how to install it
	$(BIN)/python benchmarks/lora.py
