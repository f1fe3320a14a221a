#!/usr/bin/env bash
# On a GPU machine: build, GPU tests, compute-sanitizer, benchmark; logs and results in OUT_DIR, all in ten minutes.
#   bash bench/gpu_check.sh OUT_DIR
# Exits with 1 if any step failed. PYTHON names the interpreter (default python3); BENCH_COMMIT goes into the record
# where the checkout has no .git.
set -uo pipefail

if [ $# -ne 1 ]; then
    echo "usage: bash bench/gpu_check.sh OUT_DIR" >&2
    exit 2
fi
cd "$(dirname "$0")/.." || exit 2
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1
total=590
failed=()

left() { echo $((total - SECONDS)); }

# step NAME LIMIT_S COMMAND...: runs it within its limit and what is left of the ten minutes
step() {
    local name=$1 limit=$2 started=$SECONDS status
    shift 2
    [ "$limit" -gt "$(left)" ] && limit=$(left)
    if [ "$limit" -lt 5 ]; then
        echo "== $name: no time left"
        failed+=("$name")
        return
    fi
    # SIGINT first: pytest then still says how far it came
    timeout --signal=INT --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1
    status=$?
    echo "== $name: exit $status after $((SECONDS - started)) s (124: out of time), see $name.log"
    tail -n 20 "$out/$name.log"
    [ "$status" -ne 0 ] && failed+=("$name")
}

nvidia-smi >"$out/nvidia-smi.log" 2>&1
if compgen -G 'specvlm_kernels/_C*.so' >/dev/null; then
    echo "== build: skipped, specvlm_kernels/_C*.so is there"
elif command -v nvcc >/dev/null || [ -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ]; then
    step build 120 "$python" setup.py build_ext --inplace
else
    echo "== build: skipped, nvcc was not found: Triton and torch only"
fi

# Side by side where pytest-xdist is there: what takes the time is compiling and the references, not the kernels.
# pyproject.toml has one -q already; a second would hide the counts. conftest.py adds the reasons of skipped tests
workers=()
if "$python" -c 'import xdist' 2>/dev/null; then
    cores=$(nproc)
    workers=(-n "$((cores < 14 ? cores : 14))" --dist worksteal)  # nothing waits behind a slow test
fi
step tests 300 "$python" -m pytest tests -m gpu "${workers[@]}" --tb=short --durations=5

if command -v compute-sanitizer >/dev/null; then
    # API errors are left out: PyTorch asks for things that some drivers refuse, and copes
    step memcheck 90 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 86 "$python" -m bench.sanitize
else
    echo "== memcheck: skipped, compute-sanitizer was not found"
fi

commit=()
[ -n "${BENCH_COMMIT:-}" ] && commit=(--commit "$BENCH_COMMIT")
step small-steps 20 "$python" -m bench --small-steps --json "$out/small_steps.json" "${commit[@]}"
step overhead 20 "$python" -m bench --overhead --json "$out/overhead.json" "${commit[@]}"

# What is left is the benchmark's: about 200 s, of which it compiles for a third at most (see bench/ahead.py). It
# starts no case in the last 30 s.
time_left=$(left)
seconds=$((time_left - 30 < 330 ? time_left - 30 : 330))
bench=("$python" -m bench --json "$out/bench.json" --plot "$out/bench.png" --max-seconds "$seconds")
[ "$time_left" -lt 200 ] && bench+=(--quick)
step bench "$time_left" "${bench[@]}" "${commit[@]}"

if [ ${#failed[@]} -gt 0 ]; then
    echo "FAILED: ${failed[*]}"
    exit 1
fi
echo "all steps passed in $SECONDS s"
