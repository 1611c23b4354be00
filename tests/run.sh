#!/usr/bin/env bash
# All suites, one after another; ends with `N passed, N failed` over all of them.
#   tests/run.sh            everything
#   tests/run.sh unit       only the suite of that name
#   tests/run.sh cluster browser restart     of the cluster suite only what has one of these words in its name
#   tests/run.sh matrix [ROW...]             the fault matrix, by name only: it takes more than an hour (MATRIX_ROUNDS=3 runs
#                                            each row three times, FIRE_SECONDS=600 keeps servings under fire for ten minutes)
# A suite that ran no test is a failure: it says that something was not found, not that all is well.
set -uo pipefail
cd "$(dirname "$0")/.."
source tests/tools/env.sh
export VICUNA_TEST_DATA="${VICUNA_TEST_DATA:-$PWD/../shared/data}"
only="${1:-}"
log="$(mktemp -d)"
trap 'rm -rf "$log"' EXIT
passed=0 failed=0

# suite NAME COMMAND...: runs a cargo test command and adds its closing lines up.
suite() {
    local name="$1" started=$SECONDS ran bad; shift
    [[ -z "$only" || "$only" == "$name" ]] || return 0
    printf '\n== %s\n' "$name"
    "$@" 2>&1 | tee "$log/$name"
    local status=${PIPESTATUS[0]}
    ran=$(awk '/^test result:/ { sum += $4 } END { print sum + 0 }' "$log/$name")
    bad=$(awk '/^test result:/ { sum += $6 } END { print sum + 0 }' "$log/$name")
    if ((status != 0 && bad == 0)) || ((ran + bad == 0)); then
        echo "suite $name did not run to its end (exit $status, $ran passed)"
        bad=$((bad + 1))
    fi
    passed=$((passed + ran)) failed=$((failed + bad))
    printf '== %s: %d passed, %d failed, %d s\n' "$name" "$ran" "$bad" $((SECONDS - started))
}

# What the golden tests compare with, the clients that drive the gateway, and what its pages are made with and looked at;
# without them they would say that they are skipped.
golden_suite() {
    tests/tools/transformers.sh && tests/tools/chat_templates.sh && tests/tools/peft.sh && tests/tools/openai.sh &&
        tests/tools/gradio.sh && tests/tools/browser.sh && tests/tools/ui.sh &&
        cargo test --release --locked --workspace --exclude vicuna-tests --test '*' --no-fail-fast
}

# The whole workspace even for one test: cargo unites the features of all packages that a command names, and another
# choice of packages would compile their dependencies once more (tests/tools/features.sh watches over that).
cluster_suite() {
    tests/tools/browser.sh && cargo build --release --locked --workspace --bins &&
        cargo test --release --locked --workspace --test cluster -- "$@"
}

suite unit cargo test --release --locked --workspace --lib --bins --no-fail-fast
suite golden golden_suite
suite cluster cluster_suite "${@:2}"
if [[ "$only" == matrix ]]; then suite matrix cluster_suite --matrix "${@:2}"; fi

printf '\n%d passed, %d failed\n' "$passed" "$failed"
((failed == 0 && passed > 0))
