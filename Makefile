# What to type. Everything runs on a Debian 12 with Rust (rustup.rs) and make; what is missing is installed by `setup`.
#
#   make demo            two regions and Jaeger on this machine, before your eyes   (ARGS='...' are the demo's own)
#   make test            every test, against a real Apache Kafka and memcached     (ARGS='...' are cargo test's)
#   make browser         Chromium looks at the demo's Jaeger page; picture in target/browser
#   make faults          every fault in the middle of load, and what was lost by it (ARGS='--only kill_agent --seed 7')
#   make load            every load scenario once, release build                   (ARGS='--goals', '--scenario NAME', '--help')
#   make profile         instructions for each event and stage, counted by valgrind (ARGS='--flame': flame graphs instead)
#   make bench           what the pure cores cost by themselves, with criterion            (ARGS=offsets: those with that name)
#   make lint            format and lints, as CI checks them
#   make setup           only install what is missing
#   make kafka           only Apache Kafka for the tests, into target/kafka
#   make python          only the Python clients for the tests, into target/venv
#   make clients         memcached clients of other languages write at the front door: those tests alone

SHELL := /bin/bash
ARGS ?=
# rustup's cargo, also where the shell that started make never read its profile.
export PATH := $(PATH):$(HOME)/.cargo/bin

.PHONY: help setup kafka python clients client-programs test demo browser faults load profile bench lint

help:
	@sed -n 's/^#   //p' Makefile

setup:
	@scripts/setup.sh

kafka: setup
	@scripts/kafka-libs.sh

python: setup
	@scripts/python-env.sh

client-programs: kafka
	@scripts/clients.sh

clients: kafka python client-programs
	cargo test --features failpoints --test guarantees front_door_clients

# The last lines are cargo test's own.
test: kafka python client-programs
	cargo test --workspace --features failpoints $(ARGS)

# A release build, so that the traces show what evrepl takes; `make load` shares it. Only what it runs: each program more is
# another minute of thin LTO.
demo:
	@scripts/setup.sh demo
	cargo build --release -p evrepl -p evrepl-load --bin evrepl --bin evrepl-demo
	@target/release/evrepl-demo $(ARGS)

# After `make test` nothing is left to build: the same packages and features. actix_contract has no such test; it is named because
# cargo then builds evrepl itself, which the demo starts.
browser:
	@scripts/setup.sh browser
	cargo test --workspace --features failpoints --test browser --test actix_contract -- --ignored a_browser

# What is measured is what `cargo build --release` makes by default: incremental builds put less into one piece, and are slower.
# The demo shares them.
demo faults load profile bench: export CARGO_INCREMENTAL = 0

# A release build: with the dev profile two cores have no time left at this load, and the table of isolation shows that.
faults: kafka
	cargo build --release -p evrepl -p evrepl-load --bin evrepl --bin evrepl-faults
	@target/release/evrepl-faults $(ARGS)

# The rows of the goals: ARGS=--goals; the curves: ARGS=--growth; ten minutes: ARGS=--long. load/README.md says the rest.
load: kafka
	cargo build --release -p evrepl -p evrepl-load --bin evrepl --bin evrepl-load
	@target/release/evrepl-load $(ARGS)

# A release build of evrepl whose stacks a sampling profiler can follow. The tool itself need not be fast.
profile: kafka
	@scripts/setup.sh profile $(ARGS)
	RUSTFLAGS="-C force-frame-pointers=yes -C symbol-mangling-version=v0" CFLAGS=-fno-omit-frame-pointer \
		cargo build --profile profiling -p evrepl --bin evrepl
	cargo build -p evrepl-load --bin evrepl-profile
	@EVREPL_BIN=$(CURDIR)/target/profiling/evrepl target/debug/evrepl-profile $(ARGS)

bench:
	@scripts/setup.sh demo
	cargo bench -p evrepl --bench cores -- $(ARGS)

lint:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --features failpoints -- -D warnings
