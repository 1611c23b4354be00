# The two commands are `make demo` and `make test`; each sets up what it needs.
SHELL := /bin/bash
.DELETE_ON_ERROR:
ENV := source tests/tools/env.sh

.PHONY: help demo demo-down test tools build crds ui lint deny clean

help:
	@echo "make demo       train, reclaim, resume, serve and chat on a real local cluster, and leave it up"
	@echo "make demo-down  remove every trace of it"
	@echo "make test       all tests, the cluster suite included"
	@echo "make lint       formatting, clippy, one build of each dependency;  make deny: licences, bans and sources of dependencies"
	@echo "make ui         bundle the gateway's pages anew from the TypeScript in runtime/gateway/ui/src"
	@echo "make crds       regenerate crds/yaml and the CRD chart from the types in crds/src"

tools:
	@tests/tools/all.sh

build: tools
	@$(ENV) && cargo build --release --locked --workspace --bins

demo: build
	@$(ENV) && "$$CARGO_TARGET_DIR/release/demo" up

demo-down:
	@$(ENV) && "$$CARGO_TARGET_DIR/release/demo" down

test: tools
	@tests/run.sh

crds:
	@$(ENV) && cargo run --release --locked -p vicuna-crds --bin crdgen

ui:
	@tests/tools/ui.sh build

lint:
	@$(ENV) && tests/tools/features.sh && cargo fmt --all --check && cargo clippy --release --locked --workspace --all-targets -- -D warnings

deny:
	@$(ENV) && tests/tools/deny.sh && cargo deny --locked --offline check bans licenses sources

clean:
	@$(ENV) && cargo clean
