#!/usr/bin/env bash
# Builds tools/fuzz_matrix.cpp with the kernels and runs it; see there. With --aarch64 it is cross-compiled
# (g++-aarch64-linux-gnu) and run by qemu (qemu-user), without the address sanitizer, which qemu cannot host.
set -euo pipefail
cd "$(dirname "$0")/.."
kernels=src/sparsessm/kernels out=build/fuzz_matrix run=()
flags=(-std=gnu++17 -g1 -O1 -fno-math-errno -ffp-contract=fast "-I$kernels" -fno-sanitize-recover=all)
if [ "${1:-}" = --aarch64 ]; then
    shift
    compiler=aarch64-linux-gnu-g++ out+=-aarch64 run=(qemu-aarch64 -L /usr/aarch64-linux-gnu)
    flags+=(-DSPARSESSM_ARM -fsanitize=undefined,float-cast-overflow -static-libubsan)
    declare -A levels=([dotprod]="-march=armv8.2-a+dotprod")
else
    compiler=g++
    flags+=(-DSPARSESSM_X86 -fsanitize=address,undefined,float-cast-overflow)
    wide="-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mpopcnt -mbmi -mprefer-vector-width=512"
    declare -A levels=([avx2]="-mavx2 -mfma -mpopcnt -mbmi" [avx512]="$wide" [avx512vbmi2]="$wide -mavx512vbmi2 -mavx512vnni")
fi
mkdir -p "$out"
objects=()
for part in matrix network few_bits levels level_portable; do # portable code first, as CMakeLists.txt has it
    objects+=("$out/$part.o")
    "$compiler" "${flags[@]}" -c "$kernels/$part.cpp" -o "$out/$part.o"
done
for level in "${!levels[@]}"; do # the options of a level are several words
    objects+=("$out/level_$level.o")
    # shellcheck disable=SC2086
    "$compiler" "${flags[@]}" ${levels[$level]} -c "$kernels/level_$level.cpp" -o "$out/level_$level.o"
done
"$compiler" "${flags[@]}" tools/fuzz_matrix.cpp "${objects[@]}" -o "$out/fuzz" -pthread -ldl
exec "${run[@]}" "$out/fuzz" "$@"
