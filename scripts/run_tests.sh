#!/bin/sh
# All tests, in two processes side by side: the fast ones need a processor, the slow ones mostly wait.
# usage: run_tests.sh PYTHON
set -u
slow=$(mktemp)
trap 'rm -f "$slow"' EXIT
"$1" -m pytest -m slow -o cache_dir=.pytest_cache_slow >"$slow" 2>&1 &
pid=$!
"$1" -m pytest -m "not slow"
fast_code=$?
wait "$pid"
slow_code=$?
cat "$slow"
echo "fast tests: exit code $fast_code; slow tests: exit code $slow_code"
[ "$fast_code" -eq 0 ] && [ "$slow_code" -eq 0 ]
