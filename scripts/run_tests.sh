#!/bin/sh
# All tests, in two lanes side by side, about equally long: the fast ones and then some long experiments, and all the
# other slow ones, which mostly wait. A long test that is new goes where less is done.
# usage: run_tests.sh PYTHON
set -u
after_the_fast="tests/test_experiments_canary.py tests/test_experiments_run.py tests/test_demo_over_tls.py"
slow=$(mktemp)
trap 'rm -f "$slow"' EXIT
others=$(for file in $after_the_fast; do printf ' --ignore=%s' "$file"; done)
# shellcheck disable=SC2086
"$1" -m pytest -m slow -o cache_dir=.pytest_cache_slow $others >"$slow" 2>&1 &
pid=$!
"$1" -m pytest -m "not slow"
fast_code=$?
# shellcheck disable=SC2086
"$1" -m pytest -m slow $after_the_fast
long_code=$?
wait "$pid"
slow_code=$?
cat "$slow"
echo "fast tests: exit code $fast_code; long ones: $long_code; other slow ones: $slow_code"
[ "$fast_code" -eq 0 ] && [ "$long_code" -eq 0 ] && [ "$slow_code" -eq 0 ]
