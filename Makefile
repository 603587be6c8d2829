# make test is the test command; PYTHON chooses the interpreter: make test PYTHON=.venv/bin/python
PYTHON ?= python3

.PHONY: demo test lint bench docs

demo:
	$(PYTHON) -m nestling.cli compress builtin:smollm2-135m-instruct --to 100M --out runs/demo \
		--distill.tokens 20000 --calibration_tokens 4096 --evaluation_tokens 4096

test: lint
	$(PYTHON) -m pytest -n 2

lint:
	$(PYTHON) -m ruff check src tests benchmarks
	$(PYTHON) -m ruff format --check src tests benchmarks
	$(PYTHON) -m mypy

bench:
	$(PYTHON) benchmarks/claims.py

docs:
	@grep -m1 -H '^# ' *.md docs/*.md | sed 's/:# /: /'
