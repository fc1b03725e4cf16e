#!/usr/bin/env bash
# Builds the broker and the client without torch for Windows and runs their suites under wine: the seams, the hand-off,
# and a broker and clients in processes of their own. --install gets what is missing, where that is possible.
set -euo pipefail
cd "$(dirname "$0")/../.."

target=x86_64-pc-windows-gnu
linker=x86_64-w64-mingw32-gcc
packages="gcc-mingw-w64-x86-64-posix wine wine64"
suites="conformance hand_off windows"
suite_limit=180

began=$SECONDS
export CARGO_TARGET_DIR="$PWD/target/windows"
export CARGO_TARGET_X86_64_PC_WINDOWS_GNU_LINKER=$linker
export CARGO_TERM_COLOR=never
export WINEPREFIX="$CARGO_TARGET_DIR/wine" WINEDEBUG=-all
# wine offers to download a browser and .NET for every new prefix; nothing here uses either.
export WINEDLLOVERRIDES="mscoree=;mshtml="
logs="$CARGO_TARGET_DIR/logs"
mkdir -p "$logs"

skip() {
    echo "skipped: windows under wine: $1"
    exit 0
}

has_target() { [ -d "$(rustc --print target-libdir --target "$target" 2>/dev/null)" ]; }
has_linker() { command -v "$linker" >/dev/null; }
has_wine() { command -v wine >/dev/null; }

install_missing() {
    if ! has_target && command -v rustup >/dev/null; then
        timeout 180 rustup --quiet target add "$target" || true
    fi
    if ! { has_linker && has_wine; } && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        export DEBIAN_FRONTEND=noninteractive
        # shellcheck disable=SC2086 # several packages
        timeout 120 apt-get -qq update && timeout 420 apt-get -qq install -y --no-install-recommends $packages || true
    fi >"$logs/install" 2>&1
}

if [ "${1:-}" = --install ]; then install_missing; fi
has_target || skip "no standard library for $target; rustup target add $target"
has_linker || skip "no $linker; apt-get install gcc-mingw-w64-x86-64-posix"
has_wine || skip "no wine; apt-get install wine wine64"
timeout 300 cargo fetch --quiet --target "$target" || skip "crates for $target; cargo fetch --target $target with a network"

tests=()
for suite in $suites; do tests+=(--test "$suite"); done
if ! cargo test --no-run --features cli --target "$target" "${tests[@]}" 2>"$logs/build"; then
    cat "$logs/build"
    exit 1
fi
mapfile -t binaries < <(sed -n 's/^ *Executable .*(\(.*\.exe\))$/\1/p' "$logs/build")
echo "built in $((SECONDS - began)) s"

# An application's own folder comes first, so the library lies beside every binary.
library="$CARGO_TARGET_DIR/$target/debug/bcryptprimitives.dll"
"$linker" -O2 -Wall -Wextra -Werror -shared -o "$library" tests/windows/bcryptprimitives.c -ladvapi32
cp "$library" "$CARGO_TARGET_DIR/$target/debug/deps/"

# wine refuses a prefix that another user made.
[ -O "$WINEPREFIX" ] || rm -rf "$WINEPREFIX"
end_wine() { timeout 30 wine wineboot --kill >/dev/null 2>&1 || true; }
trap end_wine EXIT
if ! timeout 180 wine wineboot --init >"$logs/wineboot" 2>&1; then
    cat "$logs/wineboot"
    echo "wine cannot make its prefix in $WINEPREFIX"
    exit 1
fi
# wine keeps shared memory's files that Windows deletes with their last user.
rm -rf "$WINEPREFIX"/drive_c/users/*/{Temp,AppData/Local/Temp}/shared_memory-rs

passed=0
failed=0
run_suite() {
    local suite=$1 binary=$2 log="$logs/$1" at=$SECONDS status=0 good bad
    timeout --kill-after=10 "$suite_limit" wine "$binary" </dev/null >"$log" 2>&1 || status=$?
    good=$(sed -n 's/^test result: .* \([0-9]*\) passed; .*/\1/p' "$log")
    bad=$(sed -n 's/^test result: .* passed; \([0-9]*\) failed; .*/\1/p' "$log")
    if [ -z "$good" ] || [ "$status" != 0 ] || [ "$good" = 0 ]; then
        cat "$log"
        echo "$suite: FAILED with status $status (124: not done in $suite_limit s)"
        # A suite without counts counts as one failure.
        bad=${bad:-1}
        [ "$bad" != 0 ] || bad=1
    fi
    passed=$((passed + ${good:-0}))
    failed=$((failed + bad))
    echo "$suite: ${good:-0} passed, $bad failed in $((SECONDS - at)) s"
}

at=0
for suite in $suites; do
    run_suite "$suite" "${binaries[at]}"
    at=$((at + 1))
done
echo "windows under $(wine --version 2>/dev/null): $passed passed, $failed failed, total $((SECONDS - began)) s"
[ "$failed" = 0 ]
