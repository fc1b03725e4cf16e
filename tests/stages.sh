#!/usr/bin/env bash
# Runs make targets one after the other, each to its end, and sums up: what passed, what failed, how long it took.
set -u
failed=0
summary=""
for stage in "$@"; do
    echo "== $stage"
    began=$SECONDS
    if make --no-print-directory "$stage"; then verdict=passed; else verdict=FAILED; failed=$((failed + 1)); fi
    summary+=$(printf '%-16s %-7s %5d s' "$stage" "$verdict" $((SECONDS - began)))$'\n'
done
echo
printf '%s' "$summary"
echo "total ${SECONDS} s"
echo "$(($# - failed)) passed, $failed failed"
exit $((failed > 0))
