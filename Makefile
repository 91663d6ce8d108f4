# make demo | test | soak | arm | lint: each makes the virtual environment that it needs. Only Python, a C++ compiler and a
# package registry are required. PYTHON names the interpreter, e.g. make test PYTHON=python3.12.

PYTHON ?= python3
PIP := -m pip --disable-pip-version-check install --quiet --constraint .ci/constraints.txt
SOURCES := pyproject.toml .ci/constraints.txt $(shell git ls-files --cached --others --exclude-standard hf_kvquant kernels configs 2>/dev/null)

.PHONY: demo test test-oldest sanitize soak arm matrix lint format clean

demo: .venv/installed
	.venv/bin/hf-kvquant demo

# In so many processes, of 1.5 GB each at most; half of the work is to compile every CUDA specialisation.
JOBS ?= 2
PYTEST := pytest -q -rs -n $(JOBS) --dist worksteal

test: .venv/installed
	OMP_NUM_THREADS=1 .venv/bin/$(PYTEST)

# Random operation sequences for longer than the tests have time: make soak MINUTES=600. Prints its seeds.
MINUTES ?= 30
soak: .venv/installed
	OMP_NUM_THREADS=1 .venv/bin/python tests/test_stateful.py --minutes $(MINUTES)

# The oldest transformers that is supported; it needs huggingface-hub below 2.
test-oldest: .venv-oldest/installed
	OMP_NUM_THREADS=1 .venv-oldest/bin/$(PYTEST) tests/test_cache.py tests/test_saving.py tests/test_faults.py tests/test_attention.py tests/test_integration.py tests/test_generate.py tests/test_contract.py tests/test_scoring.py tests/test_static.py

# The kernels' tests, and files that are made to corrupt memory, on a library that watches addresses and undefined
# behaviour (the CUDA kernels in the emulator), then on one that watches for races: only on threads of its own, because
# torch's are not instrumented, and in one process, whose exit code tells of races. The first library looks for libstdc++
# when it starts, before torch brings it.
sanitize: .venv/installed
	$(call build_sanitized,asan,address;undefined)
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so.6)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 \
		$(call test_sanitized,asan) -n $(JOBS) --dist worksteal $(EMULATED) tests/test_crafted_files.py
	$(call build_sanitized,tsan,thread)
	LD_PRELOAD=$$(g++ -print-file-name=libtsan.so) TSAN_OPTIONS=exitcode=66 $(call test_sanitized,tsan) -k own_threads

EMULATED := tests/test_emulator.py tests/test_cuda_append.py tests/test_cuda_attention.py
build_sanitized = .venv/bin/python $(PIP) --target build/$(1) --upgrade --no-deps . \
	--config-settings "cmake.define.KVQUANT_SANITIZE=$(2)"
test_sanitized = OMP_NUM_THREADS=1 PYTHONPATH=build/$(1) .venv/bin/pytest -q -p no:cacheprovider tests/test_cpu_backend.py

# The CPU kernels as ARM code on an emulated processor. The compiler for it takes 400 MB, so only this installs it.
arm: .venv/arm
	PATH=$(CURDIR)/.venv/bin:$$PATH OMP_NUM_THREADS=1 .venv/bin/pytest -q tests/test_arm.py

# Every model family with every preset; resumes where it was stopped, and writes the tables of the documents.
matrix: .venv/installed
	cd eval && OMP_NUM_THREADS=1 ../.venv/bin/python model_matrix.py

lint: .venv-lint/installed
	.venv-lint/bin/ruff check .
	.venv-lint/bin/ruff format --check .
	.venv-lint/bin/clang-format --dry-run --Werror $$(git ls-files '*.h' '*.cc' '*.cu')

format: .venv-lint/installed
	.venv-lint/bin/ruff check --fix .
	.venv-lint/bin/ruff format .
	.venv-lint/bin/clang-format -i $$(git ls-files '*.h' '*.cc' '*.cu')

# The package is installed as a user would have it (a wheel, not the source folder), again whenever a source changes.
.venv/installed: $(SOURCES)
	$(PYTHON) -m venv .venv
	.venv/bin/python $(PIP) '.[dev]'
	touch $@

.venv/arm: .venv/installed .ci/arm.txt
	.venv/bin/python $(PIP) --requirement .ci/arm.txt
	touch $@

.venv-oldest/installed: $(SOURCES)
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python $(PIP) 'transformers==5.17.0' 'huggingface-hub<2' . pytest pytest-xdist hypothesis
	touch $@

.venv-lint/installed: .ci/lint.txt
	$(PYTHON) -m venv .venv-lint
	.venv-lint/bin/python $(PIP) --requirement .ci/lint.txt
	touch $@

clean:
	rm -rf .venv .venv-oldest .venv-lint build dist
