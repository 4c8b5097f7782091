# make test    every test, native ones included          make bench    real speech: agreement and times beside the peers
#
# Both set up everything in .venv first, from Python 3.10+, a C++ compiler and pip, in the versions of constraints.txt.
# Repeated, they do only what has changed.
PYTHON ?= python3
VENV ?= .venv
BUILD ?= build
PYTEST_ARGS ?=
# A CUDA build of torch (the default of PyPI) only where there is a GPU; the CPU build is a tenth of its size.
TORCH_INDEX ?= $(if $(shell command -v nvidia-smi),,--extra-index-url https://download.pytorch.org/whl/cpu)

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
# In the venv cmake and ninja are the pinned ones; outside make, setup.py also takes those of the system.
export PATH := $(abspath $(VENV))/bin:$(PATH)
SOURCES := setup.py CMakeLists.txt $(shell find csrc cmake -type f)
export MAX_JOBS

.PHONY: test bench speech setup lint format docs native-test triton-test keops-test sanitize cuda-compile cuda-report gpu gpu-memcheck gpu-racecheck clean

# Two processes share the tests. Their threads give way while they wait: there may be more of them than cores. So inductor
# need not start processes of its own to compile in.
WORKERS ?= 2
test: setup native-test
	OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0 TORCHINDUCTOR_COMPILE_THREADS=1 MMFAST_REQUIRE_NATIVE=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

bench: setup
	$(PY) -m benchmarks.readme_bench

# Recorded speech for tests and benchmarks, into .cache; both go on with generated signals where it cannot be fetched.
speech: setup
	$(PY) -m benchmarks.speech

setup: $(VENV)/peers.stamp $(VENV)/mmfast.stamp

$(VENV)/venv.stamp:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("mmfast needs Python 3.10 or later; $(PYTHON) is " + sys.version.split()[0] + ". Fix: make PYTHON=python3.12")'
	$(PYTHON) -m venv --clear $(VENV)
	touch $@

$(VENV)/torch.stamp: $(VENV)/venv.stamp constraints.txt
	$(PIP) pip setuptools wheel cmake ninja
	$(PIP) --retries 2 $(TORCH_INDEX) torch numpy
	touch $@

$(VENV)/mmfast.stamp: $(VENV)/torch.stamp pyproject.toml mmfast/__init__.py $(SOURCES)
	$(PIP) --no-build-isolation --editable '.[dev]'
	$(PY) -m mmfast info
	touch $@

# Libraries to compare with that would bring another torch along, so without their dependencies. The compiled part of
# torchaudio's wheel needs CUDA, which a CPU build of torch does not bring; all that is compared with is Python.
$(VENV)/peers.stamp: constraints.txt | $(VENV)/mmfast.stamp
	$(PIP) tiktoken more-itertools
	$(PIP) --no-deps --no-build-isolation torchaudio openai-whisper nnAudio
	$(PIP) --no-deps geomloss pytorch-adapt pytorch-metric-learning pytorch-ignite torch-cka torchdrift torchmetrics lightning-utilities
	$(PY) -c 'import glob, os, sysconfig, torch; [os.remove(f) for f in glob.glob(sysconfig.get_path("platlib") + "/torchaudio/lib/*.so") if torch.version.cuda is None]'
	touch $@

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $$(find csrc tests/native -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

format: setup
	$(PY) -m ruff check --fix-only .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $$(find csrc tests/native -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# The documentation as a site, in build/site; a link or a name that leads nowhere is an error.
docs: $(VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet

$(VENV)/docs.stamp: constraints.txt | $(VENV)/mmfast.stamp
	$(PIP) 'mkdocs-material' 'mkdocstrings[python]'
	touch $@

# The C++ tests: kernels and their scalar core, without torch, from the objects of the extension, in its build folder.
native-test: setup
	folder=$$($(PY) setup.py --print-build-folder) && \
	{ test -f $$folder/build.ninja || $(PY) setup.py build_ext --inplace; } && \
	cmake --build $$folder --target native_tests $(if $(MAX_JOBS),--parallel $(MAX_JOBS)) && \
	ctest --test-dir $$folder --output-on-failure --no-tests=error --parallel $(WORKERS)

# The Triton kernels in Triton's interpreter, on the CPU: in the version of the oldest torch and in the newest one, each
# beside the environment and not in it, where torch would find it in every other test.
TRITON_VERSIONS ?= 3.6.0 3.9.0
triton-test: setup $(TRITON_VERSIONS:%=$(BUILD)/triton-%.stamp)
	for version in $(TRITON_VERSIONS); do \
	    PYTHONPATH="$(BUILD)/triton-$$version$${PYTHONPATH:+:$$PYTHONPATH}" TRITON_INTERPRET=1 OMP_NUM_THREADS=1 \
	        $(PY) -m pytest tests/interpreter -n $(WORKERS) --dist worksteal $(PYTEST_ARGS) || exit 1; \
	done

# Beside KeOps, which compiles every formula at its first use, so in no other test and in one process.
keops-test: setup $(BUILD)/keops.stamp
	export PYTHONPATH="$(BUILD)/keops$${PYTHONPATH:+:$$PYTHONPATH}" KEOPS_CACHE_FOLDER=$(abspath $(BUILD))/keops-cache && \
	$(PY) -c 'import pykeops.torch' && MMFAST_SLOW_TESTS=1 $(PY) -m pytest tests/test_compat_keops.py -k drop_in $(PYTEST_ARGS)

$(BUILD)/keops.stamp: constraints.txt | $(VENV)/torch.stamp
	$(PIP) --no-deps --no-build-isolation --upgrade --target $(BUILD)/keops pybind11 keopscore pykeops
	touch $@

$(BUILD)/triton-%.stamp: | $(VENV)/venv.stamp
	$(PIP) --no-deps --upgrade --target $(BUILD)/triton-$* triton==$*
	touch $@

sanitize: $(VENV)/torch.stamp
	cmake -S . -B $(BUILD)/sanitize -G Ninja -DMMFAST_NATIVE_TESTS=ON -DMMFAST_SANITIZE=ON
	cmake --build $(BUILD)/sanitize $(if $(MAX_JOBS),--parallel $(MAX_JOBS))
	ctest --test-dir $(BUILD)/sanitize --output-on-failure --no-tests=error --parallel $(WORKERS)

# Compiles the CUDA sources without torch and without a GPU; needs nvcc, 12.8 or later for this list of GPUs.
cuda-compile: $(VENV)/torch.stamp
	TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-8.0 9.0a 10.0+PTX}" cmake -S . -B $(BUILD)/cuda -G Ninja -DMMFAST_CUDA_ONLY=ON --no-warn-unused-cli $(addprefix -DCMAKE_CUDA_COMPILER=,$(shell $(PY) setup.py --print-nvcc))
	cmake --build $(BUILD)/cuda $(if $(MAX_JOBS),--parallel $(MAX_JOBS))

# The same for one architecture, with registers, spills and shared memory of each kernel.
cuda-report: $(VENV)/torch.stamp
	TORCH_CUDA_ARCH_LIST=$${TORCH_CUDA_ARCH_LIST:-9.0a} cmake -S . -B $(BUILD)/cuda-report -G Ninja -DMMFAST_CUDA_ONLY=ON -DMMFAST_CUDA_REPORT=ON $(addprefix -DCMAKE_CUDA_COMPILER=,$(shell $(PY) setup.py --print-nvcc))
	cmake --build $(BUILD)/cuda-report --clean-first $(if $(MAX_JOBS),--parallel $(MAX_JOBS)) | $(PY) cmake/cuda_report.py

# On a machine with a GPU, in the Python environment that is active: nothing is installed or downloaded but the extension,
# which is built in place. With pytest-xdist several processes share the tests: most of their time is Triton's compiler.
ACTIVE ?= $(if $(VIRTUAL_ENV),$(VIRTUAL_ENV)/bin/python,python3)
GPU_WORKERS ?= $(shell n=$$(nproc); echo $$((n > 10 ? 10 : n)))
GPU_PARALLEL = $(shell $(ACTIVE) -c 'import xdist' 2> /dev/null && printf '%s' '-n $(GPU_WORKERS) --dist worksteal')
GPU_BENCH_ARGS ?= --quick --memory '*' --prepare $(GPU_WORKERS)
SANITIZE ?= $(if $(shell command -v compute-sanitizer),memcheck racecheck)
gpu:
	MMFAST_CUDA=1 TORCH_CUDA_ARCH_LIST=$${TORCH_CUDA_ARCH_LIST:-native} $(ACTIVE) setup.py build_ext --inplace
	OMP_NUM_THREADS=1 MMFAST_REQUIRE_CUDA=1 MMFAST_REQUIRE_NATIVE=1 $(ACTIVE) -m pytest -m cuda $(GPU_PARALLEL) $(PYTEST_ARGS)
	$(if $(SANITIZE),$(MAKE) --jobs --output-sync $(SANITIZE:%=gpu-%))
	name=$$($(ACTIVE) -c 'import datetime, torch; print(torch.cuda.get_device_name().replace(" ", "-"), datetime.date.today(), sep="-")') && \
	{ $(ACTIVE) -m benchmarks --device cuda $(GPU_BENCH_ARGS) --out benchmarks/out/$$name; status=$$?; \
	  cp benchmarks/out/$$name/rows.jsonl benchmarks/results/$$name.jsonl && exit $$status; }

# Triton has lanes that hold the same number all write it to one place, where it goes from one layout to another:
# hazards to racecheck, which is for the kernels of CUDA C++, whose order is in the sources.
gpu-memcheck: SANITIZED = -k same_bits
gpu-racecheck: SANITIZED = -k '(same_bits and (test_mel_cuda or 500-500-3 or tiny)) or test_tiny_heads_by_recordings'
gpu-memcheck gpu-racecheck: gpu-%:
	compute-sanitizer --tool $* --error-exitcode 9 --target-processes all $(ACTIVE) -m pytest -q -m cuda \
	    tests/test_mel_cuda.py tests/test_mmd_cuda.py tests/test_fusion_cuda.py $(SANITIZED)

clean:
	rm -rf $(BUILD) $(VENV) *.egg-info mmfast/_C.*.so
