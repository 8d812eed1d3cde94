# Every target sets up what it needs; on a fresh machine only Python ≥ 3.11, git and make are there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The pinned set that is tested; newer torch with CUDA works too: make demo PINS=
PINS ?= -c deploy/pins.txt
# Processes of `make test`, each with one thread of arithmetic; "logical" is one per core.
WORKERS ?= logical

.PHONY: demo test long lint bench gpu gpu-check peers proofs quality scaling-law watch scale slurm drills clean

demo: $(VENV)/ready
	@$(BIN)/python -m deploy.demo

test: $(VENV)/ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --maxprocesses=8 --dist=worksteal \
		-m "not long and not gpu and not peers and not proof and not watch and not slurm"

long: $(VENV)/ready-dev
	$(BIN)/python -m pytest -q -m long

lint: $(VENV)/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

proofs: $(VENV)/ready-dev
	$(BIN)/python -m pytest -q -m proof --durations=0

bench: $(VENV)-peers/ready $(VENV)/ready-dev
	SLUICE_PEERS_PYTHON=$(CURDIR)/$(VENV)-peers/bin/python $(BIN)/python -m tests.benchmarks

gpu: $(VENV)/ready-dev
	$(BIN)/python -m tests.benchmarks.require_gpu
	$(BIN)/python -m pytest -q -m gpu
	$(BIN)/python -m tests.benchmarks --device cuda

gpu-check:  # installs nothing: in an image with torch, make gpu-check PYTHON=python3
	$(PYTHON) -m tests.benchmarks.gpu_check

peers: $(VENV)-peers/ready $(VENV)-dashboards/ready $(VENV)/ready-dev
	SLUICE_PEERS_PYTHON=$(CURDIR)/$(VENV)-peers/bin/python \
	SLUICE_DASHBOARDS_PYTHON=$(CURDIR)/$(VENV)-dashboards/bin/python $(BIN)/python -m pytest -q -m peers

drills: $(VENV)/ready-dev
	-@$(BIN)/python -m pip install -qq --disable-pip-version-check $(PINS) -e ".[fuzz]"  # the drill that needs it says so
	$(BIN)/python -m tests.drills

scale: $(VENV)/ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.scale
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.drills --only rank

watch: $(VENV)/ready-dev $(VENV)-grafana/ready
	$(BIN)/python -m pytest -q -m watch

slurm: $(VENV)/ready-dev
	$(BIN)/python -m pytest -q -m slurm tests/deploy

quality: $(VENV)-peers/ready $(VENV)/ready-dev
	SLUICE_PEERS_PYTHON=$(CURDIR)/$(VENV)-peers/bin/python nice $(BIN)/python -m tests.benchmarks.quality

scaling-law: $(VENV)/ready-dev
	$(BIN)/python -m tests.benchmarks.scaling_law

$(VENV)/ready: pyproject.toml deploy/pins.txt
	@$(PYTHON) -c 'import sys; sys.exit("Sluice needs Python 3.11 or newer; this is " + sys.version.split()[0] + ": make PYTHON=python3.12 …" if sys.version_info < (3, 11) else 0)'
	@echo "setting up $(VENV) (once; about a minute)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check $(PINS) torch
	@$(BIN)/python -m pip install -qq --disable-pip-version-check $(PINS) -e .
	@touch $@

$(VENV)/ready-dev: $(VENV)/ready
	@$(BIN)/python -m pip install -qq --disable-pip-version-check $(PINS) -e ".[dev]"
	@touch $@

$(VENV)-peers/ready: deploy/pins-peers.txt
	@echo "setting up $(VENV)-peers with SAELens, sparsify and dictionary_learning (once; some minutes)"
	@$(PYTHON) -m venv $(VENV)-peers
	@$(VENV)-peers/bin/python -m pip install -qq --disable-pip-version-check -c deploy/pins-peers.txt torch
	@$(VENV)-peers/bin/python -m pip install -qq --disable-pip-version-check -c deploy/pins-peers.txt sae-lens eai-sparsify
	@# Its dependencies, a buffer's nnsight above all, hold other libraries back; its trainers need none beyond these.
	@$(VENV)-peers/bin/python -m pip install -qq --disable-pip-version-check -c deploy/pins-peers.txt --no-deps dictionary-learning
	@touch $@

$(VENV)-grafana/ready: tests/grafana/package.json tests/grafana/package-lock.json
	@command -v npm > /dev/null || { echo "npm is not installed: apt-get install nodejs npm"; exit 1; }
	@echo "setting up $(VENV)-grafana with Grafana's own packages (once; some minutes, 600 MB)"
	@mkdir -p $(@D) && cp $^ $(@D)
	@cd $(@D) && npm ci --ignore-scripts --no-audit --no-fund --loglevel=error
	@touch $@

$(VENV)-dashboards/ready: deploy/pins-dashboards.txt
	@echo "setting up $(VENV)-dashboards with SAEDashboard and Neuronpedia's package (once; some minutes)"
	@$(PYTHON) -m venv $(VENV)-dashboards
	@$(VENV)-dashboards/bin/python -m pip install -qq --disable-pip-version-check -c deploy/pins-dashboards.txt torch
	@$(VENV)-dashboards/bin/python -m pip install -qq --disable-pip-version-check -c deploy/pins-dashboards.txt sae-dashboard neuronpedia
	@# Another library's dependencies, which are not used here and may be built for another torch.
	@$(VENV)-dashboards/bin/python -m pip uninstall -qqy torchvision torchaudio
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-peers $(VENV)-dashboards $(VENV)-grafana runs .pytest_cache .hypothesis .mypy_cache .ruff_cache
