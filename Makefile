# Everything runs in .venv, which is made on first use: needs Python >= 3.10, g++ and make.
PYTHON ?= python3
# The CPU build is enough; on machines whose package index serves the CUDA build, name the index of CPU builds.
TORCH ?= torch==2.13.0
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.built
# Where ccache is installed, its compilers come first: what has not changed is not compiled again, in a fresh clone either.
CCACHE := $(firstword $(wildcard /usr/lib/ccache /usr/lib64/ccache))
export CCACHE_BASEDIR ?= $(CURDIR)
export CCACHE_NOHASHDIR ?= 1
export PATH := $(CURDIR)/$(VENV)/bin:$(if $(CCACHE),$(CCACHE):)$(PATH)
SOURCES := setup.py $(shell find csrc moecomm -name '*.cpp' -o -name '*.hpp' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh' -o -name '*.pyx' -o -name '*.pxd' | grep -v _native/.*cpp)

.PHONY: help bench bench-check docs lint wheel test test-python test-mpi explore build cuda-check ptx-check clean transformers mpich
help:       ## this list
	@grep -hE '^[a-z-]+: *.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

# An edit of pyproject.toml that asks for nothing new installs nothing.
$(VENV)/.ready: pyproject.toml
	@if [ -e $@ ] && $(PY) tools/satisfied.py ucx mpi bench test; then touch $@; else $(MAKE) -s --no-print-directory install; fi

.PHONY: install
install:
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --upgrade pip
	$(PY) -m pip install -q "$(TORCH)" cython 'setuptools>=77' wheel 'libucx-cu13>=1.19,<2'
	$(PY) -m pip install -q --no-build-isolation -e '.[ucx,mpi,bench,test]'   # builds the extensions, too
	@touch $(VENV)/.ready $(VENV)/.built

$(VENV)/.built: $(VENV)/.ready $(SOURCES)
	$(PY) setup.py -q build_ext --inplace
	@touch $@

include tests/cpp/build.mk

build: $(VENV)/.built ## the extension, in place

wheel: build ## an sdist and a wheel in dist/; the wheel is repaired by auditwheel where that is installed
	$(PY) setup.py -q sdist --dist-dir dist
	$(PY) -m pip wheel . -q --no-build-isolation --no-deps -w dist
	@if $(PY) -c 'import auditwheel' 2>/dev/null; then $(PY) -m auditwheel repair --exclude 'libcuda*' -w dist dist/moecomm-*-linux_*.whl && rm dist/moecomm-*-linux_*.whl; \
	else echo 'auditwheel is not installed: the wheel is for machines like this one'; fi

bench: build ## tokens through both hops, verified, beside what a user would pick instead (a few minutes)
	-@$(MAKE) -s --no-print-directory $(RIVALS)/.ready
	@$(PY) -m bench suite

BASE ?= HEAD
bench-check: build ## fails if this checkout is slower than the commit BASE, run in turns on this machine
	@$(PY) -m bench compare $(BASE)

# Intel MPI and oneCCL, in an environment of their own: a process has one MPI. Without them the benchmark says so and goes on.
.PHONY: rivals
RIVALS := .venv-rivals
rivals: $(RIVALS)/.ready ## the environment of the baselines tuned-impi and tuned-oneccl
$(RIVALS)/.ready: bench/oneccl.cpp | $(VENV)/.ready
	$(PYTHON) -m venv $(RIVALS)
	$(PY) -c 'import site; print(site.getsitepackages()[0])' > "$$($(RIVALS)/bin/python -c 'import site; print(site.getsitepackages()[0])')/base.pth"
	timeout 300 $(RIVALS)/bin/python -m pip install -q --ignore-installed impi-rt 'mpi4py>=4.1' 'oneccl-cpu==2021.16.*' || { rm -rf $(RIVALS); exit 1; }
	timeout 300 $(RIVALS)/bin/python -m pip download -q --no-deps -d $(RIVALS)/src 'oneccl-devel==2021.16.*' || { rm -rf $(RIVALS); exit 1; }
	cd $(RIVALS)/src && $(PYTHON) -m zipfile -e *.whl . && rm *.whl
	g++ -O2 -std=c++17 -shared -fPIC -I"$$(echo $(RIVALS)/src/*.data/data/include)" -o $(RIVALS)/lib/libmoecomm_oneccl.so bench/oneccl.cpp -L$(RIVALS)/lib -l:libccl.so.1 || { rm -rf $(RIVALS); exit 1; }
	rm -rf $(RIVALS)/src
	@touch $@

# The site has an environment of its own. Tests do not need it: tests/docs checks links, anchors and examples without MkDocs.
DOCS := .venv-docs
docs: $(DOCS)/.ready ## the site of docs/, in build/site; every warning (a broken link, an unlisted page) is an error
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --quiet
$(DOCS)/.ready: pyproject.toml
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install -q 'mkdocs-material>=9.5,<10'   # the extra `docs` of pyproject.toml
	@touch $@

test: lint build test-cpp test-python ptx-check test-mpi explore ## every suite

lint: $(READY) ## formatters, linters, spelling, types; says which of them could not be installed
	-@$(PY) tools/lint.py --install
	@$(PY) tools/lint.py

test-python: $(READY) ## units, rank threads, launchers, failures, a short benchmark
	-@$(MAKE) -s --no-print-directory transformers mpich examples $(CLIENTS)/.ready
	$(PY) -m pytest -q tests

explore: build ## 100,000 random schedules of all protocols, after every known bug has been found again
	$(PY) -m moecomm explore --mutations --schedules 100000

# Its own environment on top of .venv: no other test depends on it. Where it cannot be installed its tests are skipped.
HF := .venv-transformers
transformers: $(HF)/.ready ## the environment that tests/nn/test_transformers.py runs in
$(HF)/.ready: $(VENV)/.ready
	$(PYTHON) -m venv $(HF)
	$(PY) -c 'import site; print(site.getsitepackages()[0])' > "$$($(HF)/bin/python -c 'import site; print(site.getsitepackages()[0])')/base.pth"
	$(HF)/bin/python -c 'import torch'
	timeout 300 $(HF)/bin/python -m pip install -q 'transformers>=5.23' accelerate || { rm -rf $(HF); exit 1; }
	@touch $@

# The extra `examples` of pyproject.toml. Where it cannot be installed the tests of examples/deepseek_v3 that need it are skipped.
.PHONY: examples
examples: $(READY)
	@$(PY) tools/satisfied.py examples > /dev/null || timeout 300 $(PY) -m pip install -q --no-build-isolation -e '.[examples]'

.PHONY: v3-serve
v3-serve: $(READY) ## DeepSeek-V3 in miniature, served and loaded; every token compared with one process (a minute or two)
	-@$(MAKE) -s --no-print-directory examples
	@mkdir -p build/v3-serve && OMP_NUM_THREADS=1 $(PY) -m examples.deepseek_v3.serve bench --out build/v3-serve/results.json \
	  --prefill 4x2+1/2 --decode 4x2+1/2 \
	  $$([ -e build/v3-train/checkpoint/index.json ] && echo --model build/v3-train)

.PHONY: v3-train
v3-train: examples build ## DeepSeek-V3 in miniature: pre-training and long context on 2 ranks, results in build/v3-train (minutes)
	OMP_NUM_THREADS=1 $(MPIRUN) --mca mpi_yield_when_idle 1 -n 2 $(PY) -m examples.deepseek_v3.train --out build/v3-train

.PHONY: v3-ranks
v3-ranks: examples build ## DeepSeek-V3 in miniature: the training curves of 1, 2, 4 and 8 ranks agree (minutes)
	OMP_NUM_THREADS=1 $(PY) -m examples.deepseek_v3.same_curve --mpirun '$(MPIRUN) --mca mpi_yield_when_idle 1'

# As for transformers, for clients of deep_ep, which the drop-in serves (docs/deep_ep.md).
.PHONY: clients
CLIENTS := .venv-clients
clients: $(CLIENTS)/.ready build ## Megatron and torchtitan over the drop-in for deep_ep, in an environment of their own
	$(PY) -m pytest -q tests/deep_ep/test_clients.py
$(CLIENTS)/.ready: $(VENV)/.ready
	$(PYTHON) -m venv $(CLIENTS)
	$(PY) -c 'import site; print(site.getsitepackages()[0])' > "$$($(CLIENTS)/bin/python -c 'import site; print(site.getsitepackages()[0])')/base.pth"
	timeout 300 $(CLIENTS)/bin/python -m pip install -q --no-deps 'megatron-core==0.16.1' 'torchtitan==0.3.0' 'spmd_types==0.2.3' || { rm -rf $(CLIENTS); exit 1; }
	timeout 300 $(CLIENTS)/bin/python -m pip install -q packaging tyro docstring_parser || { rm -rf $(CLIENTS); exit 1; }
	@touch $@

# The same for vLLM and SGLang, by hand: 400 MB. Their own requirements ask for a GPU's torch, so they come without them.
.PHONY: clients-heavy
HEAVY := .venv-clients-heavy
clients-heavy: $(HEAVY)/.ready build ## vLLM and SGLang over the drop-in for deep_ep, in an environment of their own (400 MB, minutes)
	$(PY) -m pytest -q tests/deep_ep/test_heavy_clients.py
$(HEAVY)/.ready: tests/support/heavy_clients.txt tests/support/heavy_clients_alone.txt | $(VENV)/.ready
	$(PYTHON) -m venv $(HEAVY)
	$(PY) -c 'import site; print(site.getsitepackages()[0])' > "$$($(HEAVY)/bin/python -c 'import site; print(site.getsitepackages()[0])')/base.pth"
	$(HEAVY)/bin/python -m pip install -q -r tests/support/heavy_clients.txt || { rm -rf $(HEAVY); exit 1; }
	$(HEAVY)/bin/python -m pip install -q --no-deps vllm==0.33.0 sglang==0.5.23 -r tests/support/heavy_clients_alone.txt || { rm -rf $(HEAVY); exit 1; }
	@touch $@

cuda-check: $(READY) ## the CUDA sources, as far as they can be checked without a GPU
	@$(PY) -c 'import nvidia.cu13, os; assert os.path.exists(nvidia.cu13.__path__[0] + "/bin/nvdisasm")' 2>/dev/null || $(PY) -m pip install -q nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm || true
	@$(PY) tools/nccl_headers.py > /dev/null || timeout 300 $(PY) -m pip install -q --no-deps nvidia-nccl-cu13==2.32.3 || true
	@$(PY) tools/cuda_check.py

# nvcc from PATH, else from its wheels; where there is neither, the check says so and is skipped.
ptx-check: $(READY) ## the PTX that nvcc makes of the kernels, run without a GPU under the emulated GPU's tests; MUTANTS=1 for its mutants
	@PYTHONPATH=tools $(PY) -c 'import sys; from ptx import build; sys.exit(build.why_not() is not None)' \
	  || timeout 300 $(PY) -m pip install -q nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl || true
	@PYTHONPATH=tools $(PY) -m ptx $(if $(MUTANTS),mutants,check)

# MPICH beside Open MPI needs an environment of its own. Where it cannot be installed its test is skipped.
MPICH := .venv-mpich
mpich: $(MPICH)/.ready ## the environment that the MPICH test runs in
$(MPICH)/.ready: $(VENV)/.ready
	$(PYTHON) -m venv $(MPICH)
	$(PY) -c 'import site; print(site.getsitepackages()[0])' > "$$($(MPICH)/bin/python -c 'import site; print(site.getsitepackages()[0])')/base.pth"
	timeout 300 $(MPICH)/bin/python -m pip install -q mpich 'mpi4py>=4.1' || { rm -rf $(MPICH); exit 1; }
	@touch $@

MPIRUN := mpirun --allow-run-as-root --oversubscribe --bind-to none
MPI_SUITE := $(PY) -m pytest -q --color=no -p no:cacheprovider --with-mpi tests/mpi
test-mpi: $(READY) ## the same cases under mpirun: UCX over shared memory, over tcp, without direct stores; nodes of other shapes
	$(MPIRUN) -n 4 $(MPI_SUITE)
	UCX_TLS=tcp,self $(MPIRUN) -n 4 $(MPI_SUITE) -k "edges or random"
	MOECOMM_UCX_DIRECT=0 $(MPIRUN) -n 4 $(MPI_SUITE) -k "edges or random"
	$(MPIRUN) -n 6 $(MPI_SUITE) -k edges
	$(MPIRUN) -n 8 $(MPI_SUITE) -k "rail or mismatch or decode or many_steps"

clean:      ## all that was built
	rm -rf $(VENV) $(DOCS) $(HF) $(CLIENTS) $(MPICH) $(RIVALS) build dist *.egg-info moecomm/_native/*.so moecomm/_native/*.cpp
