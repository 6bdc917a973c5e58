# Each target is one plain command; `make` alone lists them.
.DEFAULT_GOAL := help
.PHONY: help demo test test-kubernetes lint bench fuzz image

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-15s %s\n", $$1, $$2}' Makefile

demo: deps ## Judge a rollout on this machine, with one tenant failing
	@cargo build --release --locked -p coalmine-agent -p coalmine-aggregator
	@target/release/coalmine demo

test: deps lint ## Run every test; installs nginx, Prometheus, PostgreSQL and others through apt where they are missing
	@deploy/deps.sh nginx=nginx-light promtool=prometheus prometheus=prometheus pgrep=procps musl-gcc=musl-tools \
		/usr/lib/postgresql/15/bin/postgres=postgresql-15 openssl=openssl strace=strace python3=python3 mount=mount curl=curl
	@rustup target add x86_64-unknown-linux-musl >/dev/null 2>&1 || echo "no musl target: the static build is not tested"
	@cargo test --workspace --locked

test-kubernetes: deps ## Run the tests against a real Kubernetes API server, built with Go once and cached
	@deploy/deps.sh nginx=nginx-light openssl=openssl
	@tests/kubernetes/assets.sh >/dev/null
	@cargo test --locked -p coalmine-tests --test kubernetes

lint: deps ## Check the form and the lints
	@cargo fmt --all --check
	@cargo clippy --workspace --all-targets --locked -- -D warnings
	@cargo clippy -p coalmine-tests --test kubernetes --locked -- -D warnings

bench: deps ## Print speed and cost as ratios against peers, in one run
	@deploy/deps.sh nginx=nginx-light haproxy=haproxy h2load=nghttp2-client openssl=openssl \
		/usr/lib/postgresql/15/bin/postgres=postgresql-15
	@cargo build --release --locked -p coalmine-agent -p coalmine-aggregator
	@cargo run --release --locked -p coalmine-tests --bin bench
	@COALMINE_SEEDS=$(SEEDS) cargo test --locked -p coalmine-tests --test simulation -- --nocapture

# How many simulations of agents, partitions and crashes.
SEEDS = 200

# For how long each target runs.
SECONDS = 20

fuzz: deps ## Feed every parser with mutated input; SECONDS=60 for longer than 20 s each
	@deploy/deps.sh c++=g++ python3=python3-venv
	@tests/fuzz/run.sh $(SECONDS)
	@tests/fuzz/openapi.sh

image: ## Build both container images and run each; TWICE=1 shows that two builds are the same
	@deploy/image.sh $(if $(TWICE),--twice)

.PHONY: deps
deps:
	@deploy/deps.sh cc=gcc
