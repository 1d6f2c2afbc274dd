# Two commands matter: `make demo` and `make test`. Both install what they miss (Debian, Ubuntu); vLLM's
# environment is kept in KVTIER_CACHE, ~/.cache/kvtier.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help deps demo demo-cluster sim-faults run test bench lint wheel clean

help: ## these lines
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

deps: ## install what is missing to build and test
	@bash scripts/install-deps.sh

demo: deps ## kvtierd and real vLLM on this machine: hits across kill -9, a flipped byte, changed weights
	@bash scripts/demo.sh

sim-faults: deps ## the cluster's protocols under seeded faults (SEEDS=1000)
	@cargo build --locked -p kvtier-simulator
	@target/debug/kvtier-sim faults --seeds $(or $(SEEDS),1000)

demo-cluster: deps ## four nodes in network namespaces, S3, Valkey: peers, a lost directory, a cut link, kill -9 of all
	@bash scripts/demo-cluster.sh

run: deps ## kvtierd in the foreground, with CONFIG=file.toml or a small config of its own
	@bash scripts/run.sh "$(CONFIG)"

test: deps ## every test; the last line is the sum (KVTIER_SKIP=s3,vllm does without those)
	@bash scripts/test.sh

bench: deps ## benchmarks against their floors, release profile (ARGS=--quick for fewer samples)
	@cargo build --release --locked -p kvtierd -p kvtier-connector-ffi -p kvtier-benches
	@target/release/kvtier-bench $(ARGS)

lint: deps ## format, dependency rules, walls, clippy, licences
	@bash scripts/lint.sh

wheel: deps ## the vLLM plugin with libkvtier.so inside, in python/dist
	@bash scripts/wheel.sh

clean: ## build outputs; vLLM's environment in KVTIER_CACHE stays
	@cargo clean
	@rm -rf python/build python/dist python/*.egg-info
