#!/usr/bin/env bash
# Feeds every fuzz target with mutated seeds, each for so many seconds (20, or the first argument), and stops at the
# first one that fails. A nightly toolchain, where there is one, adds the address sanitizer; stable Rust does without.
# What was found worth keeping stays in corpus/ and is where the next run goes on.
set -euo pipefail
cd "$(dirname "$0")"
seconds=${1:-20}
build=${CARGO_TARGET_DIR:-$PWD/../../target}/fuzz

cargo fuzz --version >/dev/null 2>&1 || cargo install --locked cargo-fuzz

case $(rustup toolchain list 2>/dev/null || true) in
*nightly*) toolchain=(+nightly) sanitizer=address ;;
*) toolchain=() sanitizer=none ;;
esac
options=(--fuzz-dir "$PWD" --target-dir "$build" --sanitizer "$sanitizer")

cargo "${toolchain[@]}" fuzz build "${options[@]}"
ulimit -c 0
for target in $(cargo fuzz list --fuzz-dir "$PWD"); do
    mkdir -p "corpus/$target"
    limits=(-max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -detect_leaks=0 -print_final_stats=1)
    [ ! -f "dict/$target" ] || limits+=(-dict="dict/$target")
    log=$build/$target.log
    if ! cargo "${toolchain[@]}" fuzz run "${options[@]}" "$target" "corpus/$target" "seeds/$target" -- \
        "${limits[@]}" >"$log" 2>&1; then
        grep -A 2 'panicked at' "$log" >&2 || grep -E 'ERROR|SUMMARY|^error' "$log" >&2 || tail "$log" >&2
        input=$(sed -n 's/.*Test unit written to //p' "$log")
        echo "$target fails on ${input:-what $log tells}; $log has all that was said" >&2
        exit 1
    fi
    echo "$target: $(sed -n 's/^stat::number_of_executed_units: *//p' "$log") inputs in $seconds s, none fails"
done
