# Every target sets up what it needs in .venv; PYTHON chooses the interpreter for it.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-gpu test-ray lint golden bench bench-gpu peers soak fuzz oracle browser clean

EXAMPLE := examples/bytes-llama
DEMO := .demo/bytes-llama-nvfp4a16

demo: .venv/ready
	@rm -rf .demo && mkdir .demo
	$(BIN)/streamq inspect $(EXAMPLE)
	$(BIN)/streamq plan $(EXAMPLE) $(DEMO) --scheme nvfp4a16
	$(BIN)/streamq convert $(EXAMPLE) $(DEMO) --scheme nvfp4a16 --stats
	$(BIN)/streamq verify $(DEMO) --source $(EXAMPLE)
	$(BIN)/python examples/bits_per_byte.py $(EXAMPLE) $(DEMO)

test: .venv/ready-test lint
	$(BIN)/python -m pytest -n auto --ignore tests/test_ray.py
	@$(MAKE) --no-print-directory test-ray

# In one process, as its tests share a cluster.
test-ray: .venv/ready-test
	@if $(BIN)/python -c 'import ray'; then $(BIN)/python -m pytest tests/test_ray.py; \
	else echo "test: SKIPPED the cluster of nodes: ray cannot be installed here"; fi

# On a machine with a GPU; everything else that tests the Triton kernels is in `make test`.
test-gpu: .venv/ready-test
	STREAMQ_TEST_GPU=1 $(BIN)/python -m pytest tests/test_triton_device.py tests/test_pipeline_device.py

lint: .venv/ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# mypy cannot be told that kernels/ is streamq.kernels, so it gets a tree where it is.
	@rm -rf .venv/typed && mkdir -p .venv/typed/streamq
	@ln -s $(CURDIR)/streamq/* .venv/typed/streamq/ && ln -s $(CURDIR)/kernels .venv/typed/streamq/kernels
	cd .venv/typed && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p streamq

golden: .venv/ready
	$(BIN)/python -m streamq.kernels.golden.make

bench: .venv/ready
	$(BIN)/python bench/run.py $(BENCH)

bench-gpu: .venv/ready-test
	$(BIN)/python bench/gpu.py $(BENCH)

# The other tools that `make bench BENCH=--peers` races; llm-compressor is the llmc of `make oracle`.
peers: $(patsubst bench/requirements/%.txt,peer-%,$(wildcard bench/requirements/*.txt))

peer-%:
	@test -x .oracle/$*/bin/python || $(PYTHON) -m venv .oracle/$*
	@.oracle/$*/bin/python -m pip install -q --disable-pip-version-check -r bench/requirements/$*.txt \
	|| { rm -rf .oracle/$*; echo "peers: SKIPPED $*: bench/requirements/$*.txt cannot be installed here"; }

SOAK := header_fuzz kernels convert crash batch batch_failures compress compress_failures edge \
  hub_sources hub_destinations triton triton_values triton_targets triton_sparse ascendc ascendc_checks

soak: .venv/ready-test
	$(BIN)/python -m pytest -n auto --hypothesis-profile soak $(SOAK:%=tests/test_%.py)
	$(BIN)/python tests/kills.py 500

# Each target for FUZZ seconds, guided by coverage; a crash stops it and leaves the input here.
FUZZ ?= 120
fuzz: $(addprefix fuzz-,header index config recipe record jobs)

fuzz-%: .venv/ready-test
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[fuzz]'
	$(BIN)/python fuzz/run.py $* -max_total_time=$(FUZZ) -max_len=4096 -timeout=20

# Each client in an environment of its own; one whose wheels cannot be had is named and skipped.
# no-deps.txt names what asks for newer packages than it needs.
oracle: $(patsubst oracle/%/requirements.txt,oracle-%,$(wildcard oracle/*/requirements.txt))
	@ls .oracle/*/passed  # fails if every client was skipped

oracle-%: pyproject.toml
	@test -x .oracle/$*/bin/python || $(PYTHON) -m venv .oracle/$*
	@rm -f .oracle/$*/passed
	@if .oracle/$*/bin/python -m pip install -q --disable-pip-version-check \
	    -r oracle/$*/requirements.txt -e . \
	    && { ! test -f oracle/$*/no-deps.txt || .oracle/$*/bin/python -m pip install -q \
	    --disable-pip-version-check --no-deps -r oracle/$*/no-deps.txt; }; \
	then .oracle/$*/bin/python -m pytest -p no:cacheprovider oracle/$* && touch .oracle/$*/passed; \
	else echo "oracle: SKIPPED $*: oracle/$*/requirements.txt cannot be installed here"; fi

# The quality report in a headless Chromium; its screenshots go to docs/images.
browser: .venv/ready-test
	@if command -v chromium > /dev/null && command -v chromedriver > /dev/null; then \
	    $(BIN)/python -m pip install -q --disable-pip-version-check -r browser/requirements.txt \
	    && $(BIN)/python -m pytest -p no:cacheprovider browser; \
	else echo "browser: SKIPPED: no chromium with chromedriver here (apt-get install chromium chromium-driver)"; fi

.venv/ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -e .
	@touch $@

.venv/ready-test: .venv/ready
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[test,lint]'
	@# A CPU build of torch is enough: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu keeps CUDA out.
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[test-triton]' \
	|| echo "test: SKIPPED the Triton kernels: torch and triton cannot be installed here"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[test-ray]' \
	|| echo "test: the cluster of nodes will be SKIPPED: ray cannot be installed here"
	@touch $@

clean:
	rm -rf .venv .demo .bench .oracle .fuzz build dist *.egg-info
