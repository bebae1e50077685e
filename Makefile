# Two targets are for everybody: `make demo` and `make test`. The rest are their parts.
SHELL := /bin/bash
export PATH := $(PATH):/usr/sbin:/sbin

.PHONY: demo test soak bench instructions bench-control differential fuzz build check fmt clippy layers tidy docs

demo:            ## cluster + mesh + security lab on this machine, with a table of results (KEEP=1 leaves it running)
	@scripts/deps demo
	@cargo build --locked --bins
	@scripts/demo

test: build      ## everything CI runs
	bench/get-envoy
	@failed=; cargo test --workspace --locked --no-fail-fast || failed=tests; \
	  scripts/labs || failed="$$failed labs"; \
	  scripts/rootless || failed="$$failed rootless"; \
	  if [[ -n $$failed ]]; then echo "failed: $$failed" >&2; exit 1; fi

soak: build      ## ten minutes of load with faults in rotation (DURATION=seconds); fails on a leak, a lost write, a wrong decision
	scripts/soak

bench:           ## a pair of sidecars beside Envoy, HAProxy and a bare relay
	scripts/deps bench
	bench/run

bench-control:   ## the control plane with 100 and 1,000 sidecars on 500 and 2,000 services, beside istiod's figures (ARGS=options)
	cargo build --locked --profile dist -p mantlet-control -p bench-fleet
	@out=bench/results/control-$$(date -u +%Y%m%dT%H%M%S).json; \
	  target/dist/bench-fleet run --mantletd target/dist/mantletd --out $$out $(ARGS) && cp $$out bench/results/control-latest.json

instructions:    ## fixed work, counted; fails on a tenth more than bench/instructions.json
	@scripts/deps test
	bench/instructions

differential:    ## N generated cases against a real Envoy (SEED=number or random)
	@scripts/deps test
	MANTLET_DIFFERENTIAL_CASES=$(or $(N),1000000) MANTLET_DIFFERENTIAL_SEED=$(or $(SEED),random) \
	  cargo test --release --locked -p mantlet-differential --test differential five_sides -- --nocapture

fuzz:            ## every fuzz target for SECONDS_EACH seconds, with sanitizers
	fuzz/run $(or $(SECONDS_EACH),60)

build:
	@scripts/deps test
	cargo build --workspace --locked --all-targets

check: fmt clippy layers tidy docs

fmt:
	cargo fmt --all --check

clippy:
	cargo clippy --workspace --all-targets --locked -- -D warnings

layers:
	cargo run -q -p xtask --locked -- layers

tidy:
	cargo run -q -p xtask --locked -- tidy

docs:
	RUSTDOCFLAGS="-D warnings -A rustdoc::private-intra-doc-links" cargo doc --workspace --no-deps --locked --document-private-items
