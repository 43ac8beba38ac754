# make demo | test | offline | bench | gpu | lint | types | build | clean
# Each target sets up what it needs in $(VENV), the first time and when its inputs change.
# Nothing outside $(VENV) is touched; another torch of the machine stays as it is.

PYTHON ?= python3
VENV ?= .venv
TORCH_VERSION ?= 2.13.0
# Where to take torch from: empty for pip's usual index. PyTorch's index of CPU builds saves a
# large download on a Linux machine without a GPU.
TORCH_INDEX ?=
# What runs `make gpu`: it has torch for the GPU already, and nothing is installed into it.
GPU_PYTHON ?= python3
# Test processes.
WORKERS ?= 2
# The one of the oldest torch that is supported; beside the environment's own.
OLD_TRITON := 3.6.0
ARGS ?=

STAMPS := $(VENV)/stamps
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
# The constraint keeps a dependency of a dependency from bringing another torch.
ADD := $(PIP) install -q -c $(STAMPS)/constraints.txt
SOURCES := $(shell find csrc -type f)

# Requirements as pyproject.toml has them, one a line.
listed = $(PY) -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb')); print(*$(1), sep='\n')"

.PHONY: demo test offline bench gpu lint types build clean
# Two pips at once in one environment break it.
.NOTPARALLEL:

demo: $(STAMPS)/build $(STAMPS)/demo
	$(PY) -m fusedrnn demo $(ARGS)

# Threads that wait by spinning would take the cores from the other test processes.
test: export OMP_WAIT_POLICY = passive
test: $(STAMPS)/build $(STAMPS)/demo $(STAMPS)/test
	$(PY) -m pytest -n $(WORKERS) $(ARGS)

# Every kernel for GPUs that need not be here: by nvcc where it is, by both versions of Triton that must compile it.
offline: export PYTHONPATH := .:$(PYTHONPATH)
offline: $(STAMPS)/test $(STAMPS)/triton-$(OLD_TRITON)
	$(PY) -m benchmarks.ptxas --jobs $(WORKERS) $(ARGS)
	$(PY) -m benchmarks.offline --jobs $(WORKERS) $(ARGS)
	PYTHONPATH=$(VENV)/triton-$(OLD_TRITON):$(PYTHONPATH) $(PY) -m benchmarks.offline --jobs $(WORKERS) $(ARGS)

bench: $(STAMPS)/build $(STAMPS)/bench
	$(PY) -m fusedrnn bench $(ARGS)

# Without $(VENV) and without network.
gpu:
	$(GPU_PYTHON) -m benchmarks.gpu $(ARGS)

lint: $(STAMPS)/dev
	$(PY) -m ruff check .

types: $(STAMPS)/dev
	$(PY) -m mypy

build: $(STAMPS)/build

clean:
	rm -rf $(VENV) build dist *.egg-info fusedrnn/_C*.so

$(STAMPS)/torch-$(TORCH_VERSION):
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'fusedrnn needs Python 3.11 or later, $(PYTHON) is ' + sys.version.split()[0] + '; name another one: make PYTHON=...')"
	@echo "Setting up $(VENV) with torch $(TORCH_VERSION)"
	@$(PY) -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS)
	@echo "torch==$(TORCH_VERSION)" > $(STAMPS)/constraints.txt
	$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==$(TORCH_VERSION)
	@touch $@

$(STAMPS)/build: $(STAMPS)/torch-$(TORCH_VERSION) pyproject.toml setup.py $(SOURCES)
	@echo "Building the extension, in about half a minute; where nvcc is, in some minutes"
	@$(call listed,p['build-system']['requires']) > $(STAMPS)/build.txt
	$(ADD) -r $(STAMPS)/build.txt
	$(PIP) install -q --no-build-isolation --no-deps -e .
	@touch $@

# The models' own dependencies are left out: the demo needs their weights, not their audio libraries.
$(STAMPS)/demo: pyproject.toml | $(STAMPS)/build
	@echo "Adding the models of the demo"
	$(ADD) "fusedrnn[cli]"
	@$(call listed,(r for r in p['project']['optional-dependencies']['demo'] if 'fusedrnn' not in r)) > $(STAMPS)/demo.txt
	$(ADD) --no-deps -r $(STAMPS)/demo.txt
	@touch $@

$(STAMPS)/triton-$(OLD_TRITON): | $(STAMPS)/build
	@echo "Adding Triton $(OLD_TRITON) in a folder of its own"
	$(PIP) install -q --no-deps --target $(VENV)/triton-$(OLD_TRITON) triton==$(OLD_TRITON)
	@touch $@

# fusedrnn itself is already installed by now, so pip adds only what the extra lists.
$(STAMPS)/test $(STAMPS)/bench $(STAMPS)/dev: pyproject.toml | $(STAMPS)/build
	@echo "Adding what the extra '$(@F)' lists"
	$(ADD) "fusedrnn[$(@F)]"
	@touch $@
