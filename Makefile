# All but cuda-check set up .venv first. Another interpreter: make demo PYTHON=python3.12
#   make demo    the whole way through on drawn pets, in a few minutes
#   make test    the tests, in a few minutes on two cores
#   make check   the tests and what takes longer: the web page, kills, damaged files, failed writes, memory
#   make lint    ruff: style and format
#   make cuda-check   what needs a GPU, with the packages that python3 has: no installation

PYTHON ?= python3
RUN := .venv/bin/python
DEMO := --data datasets/demo

.PHONY: demo test check lint cuda-check clean

demo: .venv/ready
	$(RUN) data_prepare.py --source synthetic --limit 1000 --size 128 --out datasets/demo
	$(RUN) data_rechunk.py $(DEMO)
	rm -rf runs/demo
	$(RUN) train_mtl.py $(DEMO) --epochs 16 --out runs/demo --model runs/demo/mtl_model.pt
	$(RUN) mtl_vis.py $(DEMO) --model runs/demo/mtl_model.pt

test: .venv/ready
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --maxprocesses 8 --dist loadgroup

check: lint
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m '' -n auto --maxprocesses 8 --dist loadgroup

lint: .venv/ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

cuda-check:
	$(PYTHON) benchmarks/cuda_check.py

.venv/ready: requirements.txt requirements-dev.txt study/requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo 'error: Python 3.10 or newer is needed; make $(MAKECMDGOALS) PYTHON=...'; exit 1; }
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --upgrade pip
	$(RUN) -m pip install -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv datasets/demo runs/demo mask.png
