#!/usr/bin/env bash
# Builds the CPU extension under AddressSanitizer and UBSan in a scratch folder and runs the tests of
# the operations against it, once per instruction set. Exits non-zero at the first report.
#   tests/asan.sh [pytest arguments]
set -euo pipefail

python=${PYTHON:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cp -r "$root"/{csrc,fused_resnet,tests,setup.py,pyproject.toml,MANIFEST.in} "$scratch"
cd "$scratch"
rm -f fused_resnet/*.so

flags="-fsanitize=address,undefined -fno-sanitize=vptr -fno-omit-frame-pointer -g1"
CFLAGS="$flags" LDFLAGS="-fsanitize=address,undefined" FUSED_RESNET_CUDA=0 \
    "$python" setup.py -q build_ext --inplace

# The interpreter is not instrumented, so the runtime is preloaded; what leaks is Python's own.
export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0:halt_on_error=1
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
arguments=("$@")
(($#)) || arguments=(
    --backend cpu tests/conformance
    tests/ops/test_{operations,packed,inputs,wrong_arguments,winograd,bfloat16}.py
    tests/test_{whole_blocks,program,program_head,program_pools,program_calls}.py
    tests/training/test_{passes,convolutions,primitives,winograd_passes}.py
)
for isa in $("$python" -c 'import fused_resnet as fr; print(*fr.build_info()["isa_supported"])'); do
    echo "== AddressSanitizer and UBSan, $isa"
    FUSED_RESNET_ISA=$isa "$python" -m pytest -q -p no:cacheprovider \
        "${arguments[@]}"
done
