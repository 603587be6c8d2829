PYTHON ?= python3

.PHONY: demo test lint

demo:
	$(PYTHON) -m nestling.cli compress builtin:smollm2-135m-instruct --to 100M --out runs/demo \
		--distill.tokens 24000 --distill.learning_rate 2e-4

lint:
	$(PYTHON) -m ruff check src tests benchmarks
	$(PYTHON) -m ruff format --check src tests benchmarks
	$(PYTHON) -m mypy

test: lint
	$(PYTHON) -m pytest -n 2
