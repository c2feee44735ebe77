# First use: `make demo` or `make test` on a fresh clone; Python 3.11+, a C++ compiler if there is one.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A known good torch; pip takes PyTorch's own build. To choose another: make demo TORCH="torch==2.9.0".
TORCH ?= torch==2.13.0
SOURCES := pyproject.toml setup.py $(wildcard csrc/*)

.PHONY: demo test lint bench engines gpu docs clean

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(TORCH)
	touch $@

$(VENV)/package: $(VENV)/torch $(SOURCES)
	$(BIN)/pip install -q -e .
	touch $@

$(VENV)/tested: $(VENV)/torch $(SOURCES)
	$(BIN)/pip install -q -e ".[test]"
	touch $@ $(VENV)/package

demo: $(VENV)/package
	$(BIN)/python -m maskprune.commands.demo

test: $(VENV)/tested
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile $(TESTS)

lint: $(VENV)/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

R := benchmarks/results
bench: $(VENV)/tested
	$(BIN)/python -m benchmarks.ops.prox --rows $(R)/prox.jsonl --overwrite
	$(BIN)/python -m benchmarks.ops.minimax_step --rows $(R)/minimax_step.jsonl --overwrite
	$(BIN)/python -m benchmarks.ops.masked_forward ops --rows $(R)/masked_forward.jsonl --overwrite
	$(BIN)/python -m benchmarks.ops.linear_kl --rounds 5 --rows $(R)/linear_kl.jsonl --overwrite
	$(BIN)/python -m benchmarks.ops.two_four --rows $(R)/two_four.jsonl --overwrite
	$(BIN)/python -m benchmarks.ops.fold ops --rows $(R)/fold.jsonl --overwrite
	$(BIN)/python -m benchmarks.ops.fold stream --gb 4 --rows $(R)/stream.jsonl --overwrite
	$(BIN)/python -m benchmarks.ops.fold memory --gb 1 4 8 --rows $(R)/stream.jsonl --overwrite
	$(BIN)/python -m benchmarks.ops.masked_forward train --rows $(R)/masked_training.jsonl --overwrite
	$(BIN)/pytest benchmarks/ops/test_ops.py --rows $(R)/ops.jsonl --overwrite
	$(BIN)/python benchmarks/latency.py --rows $(R)/latency.jsonl --overwrite
	$(BIN)/python benchmarks/latency.py --model smollm2-135m --sparsity 0.2,0.5 --regimes prefill,decode \
		--length 128 --decode-batch 1,4 --rounds 20 --seconds 45 --rows $(R)/latency.jsonl --overwrite
	$(BIN)/python benchmarks/latency.py --model wide-1024,smollm2-135m --sparsity 0.5 --regimes train \
		--variants dense,uniform,compresso --length 128 --no-structure --rows $(R)/latency.jsonl --overwrite
	$(BIN)/python benchmarks/latency.py --model llama-3.2-1b --sparsity 0.5 --regimes prefill --length 128 \
		--variants dense,uniform,compresso --rounds 9 --seconds 90 --rows $(R)/latency.jsonl --overwrite
	$(BIN)/python benchmarks/latency.py --profile --model wide-1024,smollm2-135m --sparsity 0.5 \
		--length 128 --rounds 40 --rows $(R)/latency.jsonl --overwrite
	$(BIN)/python -m benchmarks.quality.structured --set lm_weight=0 --rows $(R)/quality.jsonl --overwrite
	$(BIN)/python -m benchmarks.quality.memory --rows $(R)/memory.jsonl --overwrite -- smollm2-135m --sparsity 0.2 \
		--seq-len 512 --batch-size 1 --warm-start-blocks 2 --compensation_tokens 1024
	$(BIN)/python -m benchmarks.quality.memory --demo --rows $(R)/memory.jsonl --overwrite
	$(BIN)/python -m benchmarks.scale memory --steps 2 --rows $(R)/scale.jsonl --overwrite
	$(BIN)/python -m benchmarks.quality.two_four --start --calibration-blocks 32 --rows $(R)/two_four_start.jsonl --overwrite
	$(BIN)/python -m benchmarks.quality.two_four --rows $(R)/quality_two_four.jsonl --overwrite
	$(BIN)/python -m benchmarks.quality.two_four --arms sparsegpt-updated --calibration-blocks 264 \
		--rows $(R)/quality_two_four.jsonl --overwrite

# Pruned checkpoints in the engines named (all that are run by default: ENGINES=llama.cpp for one
# alone), each in an environment of its own in maskprune's cache.
engines: $(VENV)/tested
	$(BIN)/python -m benchmarks.engines $(ENGINES) --rows $(R)/engines.jsonl --overwrite

# On a CUDA machine, also without network: everything that travels with the checkout. Repeat the
# command until it says that all is done; each call stops in time for a ten-minute limit.
gpu:
	$(PYTHON) -m benchmarks.gpu $(GPU)

docs: $(VENV)/tested
	$(BIN)/python benchmarks/latency.py --doc docs/uniform.md --from $(R)/latency.jsonl
	$(BIN)/python -m benchmarks.engines.page --from $(R)/engines.jsonl
	$(BIN)/python -m benchmarks.quality.picture -o docs/quality.svg

clean:
	rm -rf build *.egg-info maskprune/_C*.so
