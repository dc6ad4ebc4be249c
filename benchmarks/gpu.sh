#!/usr/bin/env bash
# Measures on one GPU, in at most 8 minutes, all that docs/speed.md says about GPUs, the most important first.
#
#   benchmarks/gpu.sh                          tables on the terminal, results in $OUT (default: outputs/gpu)
#   TINY=1 benchmarks/gpu.sh                   tries it on CPU with tiny shapes; the times mean nothing
#   GUIDED_DIFFUSION=FOLDER benchmarks/gpu.sh  also times a checkout of guided-diffusion
#   PYTHON=python3 benchmarks/gpu.sh           the interpreter; it needs torch >= 2.6 with CUDA and Triton
#
# On a machine without a network, carry what it lacks as wheels. Here, once:
#   pip download --no-deps -d wheels diffusers==0.42.1    (and other dependencies of pyproject.toml that it lacks)
# and there, in a copy of this repository, with its own torch:
#   pip install --no-index --find-links wheels --no-deps diffusers==0.42.1
#   PYTHONPATH=src benchmarks/gpu.sh
# If the package is not installed, `diffusers_adm.pipelines` is missing below src/; the script links it.
#
# Each part has its own time limit, so that one that hangs costs no other, and writes its output as it goes.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-outputs/gpu}
TINY=${TINY:-}
GUIDED_DIFFUSION=${GUIDED_DIFFUSION:-}
mkdir -p "$OUT"

if ! "$PYTHON" -c 'import diffusers_adm.pipelines' 2>/dev/null; then
  LINKED=$(mktemp -d)
  trap 'rm -rf "$LINKED"' EXIT
  cp -R src/diffusers_adm "$LINKED/diffusers_adm"
  cp -R pipelines "$LINKED/diffusers_adm/pipelines"
  export PYTHONPATH="$LINKED${PYTHONPATH:+:$PYTHONPATH}"
fi
if [ -n "$TINY" ]; then
  DEVICE=(--device cpu --tiny) KERNELS=(--batch_sizes 1 --only float32 channels_last) TRAINING=(--batch_size 2 --repeats 1)
  SAMPLING=(--batch_sizes 1 --steps 2 --repeats 1)
else
  DEVICE=(--device cuda) KERNELS=() TRAINING=(--batch_size 128) SAMPLING=(--batch_sizes 1 32)
fi
GUIDED=()
if [ -n "$GUIDED_DIFFUSION" ]; then GUIDED=(--guided_diffusion "$GUIDED_DIFFUSION"); fi

failed=0
part() {  # NAME SECONDS COMMAND...
  # A slow CPU may take longer for the tiny shapes than a GPU for all.
  local name=$1 limit=$(($2 * (${#TINY} > 0 ? 5 : 1)))
  shift 2
  echo "== $name (at most $limit s)"
  timeout "$limit" "$@" 2>&1 | tee "$OUT/$name.txt"
  local status=${PIPESTATUS[0]}
  # 1: measured, and a row misses its goal, which the table says.
  case $status in
    0) ;;
    1) if grep -q 'Traceback\|Error' "$OUT/$name.txt"; then failed=1; echo "== $name failed"; fi ;;
    124) failed=1; echo "== $name ran out of time" ;;
    *) failed=1; echo "== $name failed with status $status" ;;
  esac
}
kernels() {  # NAME SECONDS ARGUMENTS...
  local name=$1 limit=$2
  shift 2
  part "$name" "$limit" env ${TINY:+TRITON_INTERPRET=1} "$PYTHON" benchmarks/bench_kernels.py "${DEVICE[@]}" \
    --json "$OUT/$name.json" "$@"
}
network() {  # NAME SECONDS ARGUMENTS...
  local name=$1 limit=$2
  shift 2
  part "$name" "$limit" "$PYTHON" benchmarks/bench_adm64.py "${DEVICE[@]}" --json "$OUT/$name.json" "$@"
}

# 480 s in all. Compiling takes most of it.
if [ -n "$TINY" ]; then
  kernels kernels 300 "${KERNELS[@]}"
else
  part tests 40 "$PYTHON" -m pytest -q -p no:cacheprovider tests/ops/test_adagn_triton.py -k TestKernels
  kernels kernels 90 --only bfloat16
fi
network training 130 --part training --which ours-eager ours-compiled theirs-compiled guided-diffusion \
  "${TRAINING[@]}" "${GUIDED[@]}"
network sampling 100 --part sampling "${SAMPLING[@]}"
network ema 30 --part ema "${TRAINING[@]}"
if [ -z "$TINY" ]; then
  kernels kernels-search 60 --only bfloat16 channels_last --search
  kernels kernels-other-dtypes 30 --only float16 float32
fi
exit $failed
