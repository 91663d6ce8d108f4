# make demo | test | smoke | soak | arm | lint: each makes the virtual environment that it needs. Only Python, a C++ compiler and a
# package registry are required. PYTHON names the interpreter, e.g. make test PYTHON=python3.12.

PYTHON ?= python3
# Every version is pinned, also in the isolated environments in which pip builds packages: older releases of pip take
# PIP_CONSTRAINT there, newer ones only PIP_BUILD_CONSTRAINT. pip itself is the one that comes with Python.
install = PIP_CONSTRAINT=$(1) PIP_BUILD_CONSTRAINT=$(1) $(2)/bin/python -m pip --disable-pip-version-check install --quiet
LOCK := .ci/constraints.txt
OLDEST_LOCK := .ci/constraints-oldest.txt
SOURCES := pyproject.toml $(shell git ls-files --cached --others --exclude-standard hf_kvquant kernels configs 2>/dev/null)

.PHONY: demo test whole test-oldest smoke recipes newest lock sanitize soak arm wheels matrix lint format clean

# Threads that sleep while they wait: the demo stays fast beside other programs.
demo: .venv-demo/installed
	OMP_WAIT_POLICY=passive .venv-demo/bin/hf-kvquant demo

# The number of test processes, each of 1.5 GB at most.
JOBS ?= 2
PYTEST := pytest -q -rs --durations=30 -n $(JOBS) --dist worksteal

test: .venv/installed
	DIST=$(CURDIR)/build/dist OMP_NUM_THREADS=1 .venv/bin/$(PYTEST)

# Random operation sequences, and random mixes of requests in continuous batching, for longer than the tests have time:
# make soak MINUTES=600 MIXES=1000. Prints its seeds.
MINUTES ?= 30
MIXES ?= 200
soak: .venv/installed
	OMP_NUM_THREADS=1 .venv/bin/python tests/test_batching_mixes.py --mixes $(MIXES) --requests 10000
	OMP_NUM_THREADS=1 .venv/bin/python tests/test_stateful.py --minutes $(MINUTES)

# The whole products of parameters, of which `make test` has a part: every specialisation for every architecture, and every
# family with every preset. For changes of kernels/cuda, and before a release.
whole: .venv/installed
	WHOLE=1 OMP_NUM_THREADS=1 .venv/bin/$(PYTEST) $$(grep -l 'import WHOLE' tests/test_*.py)

# The core tests on the oldest supported transformers, without those that do not depend on it.
test-oldest: .venv-oldest/installed
	OMP_NUM_THREADS=1 .venv-oldest/bin/$(PYTEST) -m 'not any_host' tests/test_cache.py tests/test_saving.py tests/test_faults.py tests/test_attention.py tests/test_integration.py tests/test_generate.py tests/test_contract.py tests/test_scoring.py tests/test_static.py \
	tests/test_asked_for.py tests/test_columns.py tests/test_dtypes.py tests/test_host.py tests/test_model_state.py

# A few tests on releases of transformers between the oldest and the newest, found before that of the environment.
SMOKE := 5.19.0 5.21.1 5.23.0
smoke: $(SMOKE:%=smoke-%)
.PRECIOUS: .venv/transformers-%/installed
smoke-%: .venv/installed .venv/transformers-%/installed
	OMP_NUM_THREADS=1 SMOKE_TRANSFORMERS=$* PYTHONPATH=.venv/transformers-$* .venv/bin/pytest -q tests/test_smoke.py

# Every recipe of eval/recipes, and the server with its clients, also with packages that are not in the lock: of these the newest
# releases.
recipes: .venv-recipes/installed .venv-lighteval/installed
	OMP_NUM_THREADS=1 .venv-recipes/bin/pytest -q -rs tests/test_recipes.py tests/test_serve.py
	OMP_NUM_THREADS=1 .venv-lighteval/bin/pytest -q -rs tests/test_recipes.py -k lighteval

.venv-recipes/installed: $(SOURCES) $(LOCK)
	$(PYTHON) -m venv .venv-recipes
	$(call install,$(LOCK),.venv-recipes) . pytest peft accelerate lm-eval datasets trl smolagents \
		torchao optimum-quanto bitsandbytes gguf \
		fastapi uvicorn openai opentelemetry-api
	touch $@

# lighteval 0.13 does not work with some releases of the lock.
.venv-lighteval/installed: $(SOURCES) $(LOCK)
	$(PYTHON) -m venv .venv-lighteval
	grep -vE '^(fsspec|huggingface-hub|nltk|termcolor|xxhash)==' $(LOCK) > .venv-lighteval/lock
	$(call install,.venv-lighteval/lock,.venv-lighteval) . pytest lighteval 'huggingface_hub<2' 'xxhash<4'
	touch $@

# The whole suite with the newest release of everything, transformers beyond our bounds too; run it before `make lock`. Only
# torch is pinned, to its CPU build. The last lines list failed tests and versions that differ from the lock.
newest:
	rm -rf .venv-newest
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip --disable-pip-version-check install --quiet --upgrade pip
	.venv-newest/bin/python -m pip install --quiet '.[dev]' $(TORCH)
	.venv-newest/bin/python -m pip install --quiet --upgrade --no-deps transformers
	OMP_NUM_THREADS=1 .venv-newest/bin/$(PYTEST) -rfEs; result=$$?; \
		.venv-newest/bin/python -m pip freeze | tr A-Z_ a-z- > .venv-newest/versions; \
		sed 's/ *;.*//' $(LOCK) | grep -vxF -f - .venv-newest/versions | grep -vE '^(hf-kvquant|torch)\b' | \
		sed 's/^/Not in the lock: /'; exit $$result
TORCH = $(shell grep ^torch .ci/lock.in)

# The newest releases within the ranges of pyproject.toml and .ci/*.in, for every Python that we support: uv resolves for
# all of them at once, pip only for the one that runs it.
lock: .venv-lock/uv
	$(call resolve,$(LOCK)) --upgrade --extra dev
	cp $(LOCK) $(OLDEST_LOCK)
	$(call resolve,$(OLDEST_LOCK)) .ci/oldest.in
resolve = UV_PYTHON_DOWNLOADS=never .venv-lock/bin/uv pip compile --quiet --universal --python-version 3.10 --no-annotate \
	--custom-compile-command 'make lock' --output-file $(1) pyproject.toml .ci/lock.in

# The kernels' tests (CUDA kernels in the emulator), and files crafted to corrupt memory, under the sanitizers for addresses
# and undefined behaviour. Then the tests of our own threads under the one for races: torch's threads are not instrumented, and
# one process runs them, because its exit code tells of races. libasan needs libstdc++ at its start, before torch loads it.
sanitize: build/asan/installed build/tsan/installed
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so.6)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 \
		$(call test_sanitized,asan) -n $(JOBS) --dist worksteal $(EMULATED) tests/test_crafted_files.py -k "not ($(VALUES))"
	LD_PRELOAD=$$(g++ -print-file-name=libtsan.so) TSAN_OPTIONS=exitcode=66 $(call test_sanitized,tsan) -k own_threads

EMULATED := tests/test_emulator.py tests/test_cuda_append.py tests/test_cuda_attention.py
# Tests of what the kernels do with masks and values. The emulator itself checks each access to a tensor; the sanitizers add
# the arrays of a kernel, whose indices follow from the specialisation and the lengths.
VALUES := test_cuda_attention and (mask or hidden or light or large_and_small or sinks or infinite or alone)
build/asan/installed: SANITIZERS := address;undefined
build/tsan/installed: SANITIZERS := thread
build/%/installed: $(SOURCES) .venv/installed
	$(call install,$(LOCK),.venv) --no-compile --target $(@D) --upgrade --no-deps . \
		--config-settings "cmake.define.KVQUANT_SANITIZE=$(SANITIZERS)"
	touch $@
test_sanitized = OMP_NUM_THREADS=1 PYTHONPATH=build/$(1) .venv/bin/pytest -q -p no:cacheprovider tests/test_cpu_backend.py

# The CPU kernels as ARM code on an emulated processor. The compiler for it takes 400 MB, so only this installs it.
arm: .venv/arm
	PATH=$(CURDIR)/.venv/bin:$$PATH OMP_NUM_THREADS=1 .venv/bin/pytest -q tests/test_arm.py

# Wheels that install without a compiler, in dist/; those for this machine are installed alone, and generate.
wheels: .venv-wheels/installed
	rm -rf dist
	.ci/wheels .venv-wheels/bin/python dist
	WHEELS=$(CURDIR)/dist OMP_NUM_THREADS=1 .venv/bin/pytest -q tests/test_distribution.py -k built_for

.venv-wheels/installed: .venv/installed
	$(PYTHON) -m venv .venv-wheels
	$(call install,$(LOCK),.venv-wheels) auditwheel build cmake ninja wheel ziglang
	touch $@

# Every model family with the presets of 8 and 4 bits; resumes where it was stopped, and writes the tables of the documents.
matrix: .venv/installed
	cd eval && OMP_NUM_THREADS=1 ../.venv/bin/python model_matrix.py

# mypy reads the types of what is installed there: torch, transformers, the stubs of PyYAML.
lint: .venv-lint/installed .venv/installed
	.venv-lint/bin/ruff check .
	.venv-lint/bin/ruff format --check .
	.venv-lint/bin/clang-format --dry-run --Werror $$(git ls-files '*.h' '*.cc' '*.cu')
	.venv-lint/bin/mypy --python-executable .venv/bin/python

format: .venv-lint/installed
	.venv-lint/bin/ruff check --fix .
	.venv-lint/bin/ruff format .
	.venv-lint/bin/clang-format -i $$(git ls-files '*.h' '*.cc' '*.cu')

# The sdist, and the wheel that is built from it: compiling takes a minute, so all environments of tests take this one.
build/dist/built: $(SOURCES) README.md $(LOCK)
	rm -rf $(@D)
	$(PYTHON) -m venv build/environment
	$(call install,$(LOCK),build/environment) build
	PIP_CONSTRAINT=$(CURDIR)/$(LOCK) PIP_BUILD_CONSTRAINT=$(CURDIR)/$(LOCK) build/environment/bin/python -m build --outdir $(@D)
	touch $@

# The package is installed as a user would have it (a wheel, not the source folder), again whenever a source changes: pip
# does not replace an installed wheel by one of the same version. Python compiles modules at their first import; an
# environment has ten times as many as are imported.
install_built = $(2)/bin/python -m pip --disable-pip-version-check uninstall -qq --yes hf_kvquant; \
	$(call install,$(1),$(2)) --no-compile
.venv/installed: build/dist/built
	$(PYTHON) -m venv .venv
	$(call install_built,$(LOCK),.venv) "$$(echo build/dist/*.whl)[dev]"
	touch $@

.venv-demo/installed: $(SOURCES) $(LOCK)
	$(PYTHON) -m venv .venv-demo
	$(call install,$(LOCK),.venv-demo) --no-compile '.[demo]'
	touch $@

.venv/transformers-%/installed: | .venv/installed
	PIP_CONSTRAINT= .venv/bin/python -m pip --disable-pip-version-check install --quiet --no-compile --no-deps --upgrade \
		--target $(@D) transformers==$*
	touch $@

.venv/arm: .venv/installed
	$(call install,$(LOCK),.venv) cmake unicorn ziglang
	touch $@

.venv-oldest/installed: build/dist/built $(OLDEST_LOCK) .ci/oldest.in
	$(PYTHON) -m venv .venv-oldest
	$(call install_built,$(OLDEST_LOCK),.venv-oldest) build/dist/*.whl --requirement .ci/oldest.in
	touch $@

.venv-lint/installed: $(LOCK)
	$(PYTHON) -m venv .venv-lint
	$(call install,$(LOCK),.venv-lint) --no-compile ruff clang-format mypy
	touch $@

.venv-lock/uv:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip --disable-pip-version-check install --quiet uv
	touch $@

clean:
	rm -rf .venv .venv-demo .venv-recipes .venv-lighteval .venv-oldest .venv-newest .venv-wheels .venv-lint .venv-lock \
		build dist
