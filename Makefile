# Everything runs in .venv, which every target below makes or brings up to date first.
PYTHON ?= $(shell python3.11 --version >/dev/null 2>&1 && echo python3.11 || echo python3)
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: venv demo test test-fast test-slow test-numerics docs lint type format bench bench-demo bench-sb3 bench-peers bench-lora

venv: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[contrib,dev,docs,libraries,lora,metrics,plots,tasks,trackers]'
	@touch $@

demo: $(INSTALLED)  ## trains the embedded model on real human ratings and shows before and after
	$(BIN)/textgym demo

# Each worker has one thread: two OpenMP threads collapse when another process runs.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

test-fast: $(INSTALLED)  ## all units and no training: what a developer runs while working
	$(PYTEST) -m "not slow and not training and not gpu"

test: $(INSTALLED)
	$(PYTEST) --durations 20

test-slow: $(INSTALLED)
	$(PYTEST) -m slow --durations 20

.PHONY: test-oldest
test-oldest:  ## the fast tests with the oldest versions that pyproject.toml allows; downloads several GB
	$(PYTHON) scripts/test_oldest.py

test-numerics: $(INSTALLED)  ## the tests marked numerics under 18 kinds of arithmetic, and a table of them
	$(BIN)/python scripts/test_numerics.py

# No environment of ours, since a GPU machine brings its torch: python3, unless PYTHON is given.
.PHONY: gpu
gpu:  ## checks and measurements on a GPU in five minutes; `make gpu DEVICE=cpu` rehearses them
	$(if $(filter file,$(origin PYTHON)),python3,$(PYTHON)) scripts/gpu.py $(if $(PART),--part $(PART)) \
		$(if $(DEVICE),--device $(DEVICE)) $(if $(COMMIT),--commit $(COMMIT)) $(if $(WHEELS),--wheels $(WHEELS)) \
		$(if $(PAGE),--page $(PAGE))

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: $(INSTALLED)  ## the documentation as a site in build/docs; a warning is an error
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
	$(BIN)/python benchmarks/ladder.py

bench-sb3: $(INSTALLED)
	$(BIN)/python benchmarks/sb3.py
	$(BIN)/python benchmarks/sb3_learning.py

bench-peers: $(INSTALLED)  ## what needs no peer; benchmarks/measuring/peers.py says how to install those
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/memory.py --trl

bench-lora: $(INSTALLED)  ## needs SmolLM2, and says how to install it
	$(BIN)/python benchmarks/lora.py
