#!/usr/bin/env bash
# The training benchmarks on one NVIDIA GPU, for the shapes of Llama-3-8B with random weights: time and peak memory of a
# step on a bf16 base, and on an NF4 base (bitsandbytes, double quantisation).
#
#   scripts/bench_train_gpu.sh OUTPUT_DIR [options of bench_train.py]
#
# Options come last and override what stands here. All layers are used if the GPU's memory holds them (about 80 GB for
# bf16: every in-place method needs weights of its own), else as many as fit, which is printed. Without a GPU,
#
#   scripts/bench_train_gpu.sh OUTPUT_DIR --device cpu --layers 1 --hidden 64
#
# runs all of it at toy size. PYTHON names the interpreter (default: .venv/bin/python). Results: OUTPUT_DIR/*.json, for
# scripts/figures.py. The exit code is 1 if any budget was missed.
set -uo pipefail

if [[ $# -lt 1 || "$1" == -* ]]; then
    echo "usage: ${0##*/} OUTPUT_DIR [options of bench_train.py]" >&2
    exit 2
fi
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
output="$1"
shift
python="${PYTHON:-$root/.venv/bin/python}"
mkdir -p "$output" || exit 2

common=(--shape llama-3-8b --device cuda --dtype bfloat16 --batch 4 --tokens 512)
missed=0
for base in bf16 nf4; do
    quantised=()
    [[ "$base" == nf4 ]] && quantised=(--nf4)
    for what in steps memory; do
        file="$output/$what-$base.json"
        rm -f "$file"
        echo "== $what, $base base"
        "$python" "$root/scripts/bench_train.py" "$what" "${common[@]}" ${quantised[@]+"${quantised[@]}"} \
            --json "$file" "$@"
        code=$?
        # 1 is a missed budget, for which the figures are there; what went wrong otherwise left none.
        if [[ $code -ne 0 && ! -s "$file" ]]; then
            echo "${0##*/}: $what on the $base base failed (exit code $code)" >&2
            exit "$code"
        fi
        [[ $code -ne 0 ]] && missed=1
    done
done
exit "$missed"
