# The verbs of this project; CI calls these and nothing else.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# torch-sys reads LIBTORCH from the environment; the .libtorch link that setup makes is the one place to say it.
unexport LIBTORCH
SETUP = VENV='$(VENV)' LIBTORCH='$(LIBTORCH)' CUDA='$(CUDA)' PYTHON='$(PYTHON)' scripts/setup
HAS_NEXTEST = command -v cargo-nextest >/dev/null
# Tests that take minutes live in modules named `long`.
LONG = ::long::

.PHONY: help build setup programs demo demo-compare demo-dance test test-long fuzz lint fmt docs bench audit clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@printf '\n%s\n' 'VENV=DIR or LIBTORCH=DIR reuse a torch 2.11.0; CUDA=0 leaves the CUDA compiler out.'

setup: ## name what is missing, make .venv and the .libtorch link
	@$(SETUP)

build: setup ## release programs in target/release
	cargo build --release -p tunefleet-coordinator -p tunefleet-keeper -p tunefleet-sandbox -p tunefleet-worker

.PHONY: deb
deb: build ## Debian packages of both programs in target/debian (cargo install --locked cargo-deb)
	mkdir -p target/man
	target/release/coordinator man target/man
	target/release/worker man target/man
	cargo deb -p tunefleet-coordinator --no-build --output target/debian/
	cargo deb -p tunefleet-worker --no-build --output target/debian/

demo: build ## collect, train, export and complete on this machine; DEMO_REPOS="path url ..." adds repositories
	@scripts/demo $(DEMO_REPOS)

demo-compare: build ## full fine-tuning beside an adapter, with a report; GENERAL="path ..." DOMAIN="path ..."
	@scripts/demo-compare $(GENERAL) -- $(DOMAIN)

demo-dance: build ## a copilot and an assistant on one small base, mixed and measured
	@scripts/demo-dance

# In one build with the tests: without them, crates that tests take more features of would be built twice.
programs: ## debug programs, which the end-to-end tests start, and the tests
	cargo build --workspace --bins --tests

# Several tests at once: a helper of libtorch's that waits must not take a core from another test.
test test-long: export OMP_WAIT_POLICY = passive

# One thread more than there are cores: end-to-end tests wait for processes much of their time.
test: setup-tests programs ## everything but the long tests
	if $(HAS_NEXTEST); then cargo nextest run --workspace --test-threads $$(( $$(nproc) + 1 )); \
	else cargo test --workspace --lib --bins --tests -- --skip '$(LONG)'; fi

test-long: setup-tests programs ## the tests that take minutes; SAMPLE=1 runs a bounded sample
	export TUNEFLEET_LONG_SAMPLE='$(SAMPLE)'; \
	if $(HAS_NEXTEST); then cargo nextest run --workspace --profile long --no-tests pass; \
	else cargo test --workspace --lib --bins --tests -- '$(LONG)'; fi

fuzz: setup ## readers of notebooks and segments under libFuzzer; SECONDS=60 for each
	@scripts/fuzz $(SECONDS)

.PHONY: setup-tests
setup-tests:
	@$(SETUP) --tests

lint: setup ## formatting, clippy, licences and sources, the coordinator without torch
	cargo fmt --all --check
	scripts/check-no-torch
	scripts/check-text
	cargo clippy --workspace --all-targets -- -D warnings
	if command -v cargo-deny >/dev/null; then cargo deny --all-features check bans licenses sources; \
	else echo 'lint: cargo-deny is not installed, licences and bans are unchecked (cargo install --locked cargo-deny)' >&2; fi

fmt: ## format everything
	cargo fmt --all

docs: ## pages that follow from the code: docs/job-file.md, the tables of docs/convert.md
	TUNEFLEET_BLESS=1 cargo test -p tunefleet-tests --test it the_job_file_page
	TUNEFLEET_BLESS=1 cargo test -p tunefleet-coordinator the_guide_has_a_row_for_every_setting

bench: setup-tests ## throughput beside transformers, FSDP2, peft and bitsandbytes, in alternating pairs
	@scripts/bench

audit: ## known advisories; needs an advisory database
	cargo deny check advisories

clean: ## remove what was built and what the demo made; .venv stays
	cargo clean
	rm -rf demo
