#!/usr/bin/env bash
# Runs the Rust tests with nextest where it is installed, else with cargo's own runner.
set -eu
# Tests run side by side: a thread that spins while it waits for another keeps a third from computing.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
if cargo nextest --version >/dev/null 2>&1; then
    exec cargo nextest run --release --no-fail-fast --show-progress none --status-level fail "$@"
fi
echo "cargo-nextest is not installed: using cargo test"
exec cargo test --release --no-fail-fast "$@"
