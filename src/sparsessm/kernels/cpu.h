// What this x86-64 processor can do, and what the system keeps of its registers when processes take turns: code with
// wide registers needs both. Asked of the processor itself, because the libraries of some compilers answer no to every
// __builtin_cpu_supports (clang as the package ziglang has it, which builds the wheels). Bits: Intel SDM 2A, CPUID.
#pragma once

namespace sparsessm::cpu {

enum Register { EAX, EBX, ECX, EDX };

// One bit of one answer; false for what the processor does not know to answer.
inline bool has(unsigned leaf, unsigned sub, Register where, int bit) {
    const auto ask = [](unsigned of, unsigned part, unsigned (&found)[4]) {
        __asm__ volatile("cpuid" : "=a"(found[0]), "=b"(found[1]), "=c"(found[2]), "=d"(found[3]) : "a"(of), "c"(part));
    };
    unsigned found[4];
    ask(0, 0, found);
    if (found[EAX] < leaf) return false;
    if (sub) {
        ask(leaf, 0, found);
        if (found[EAX] < sub) return false;
    }
    ask(leaf, sub, found);
    return found[where] >> bit & 1;
}

inline bool keeps(unsigned parts) { // of XCR0: 2 SSE, 4 AVX, 0xe0 AVX-512
    if (!has(1, 0, ECX, 27)) return false;
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & parts) == parts;
}

inline bool sse42() { return has(1, 0, ECX, 20); }

inline bool avx2() { // with what level_avx2.cpp is compiled for: FMA, POPCNT, BMI1
    return keeps(0x6) && has(7, 0, EBX, 5) && has(1, 0, ECX, 12) && has(1, 0, ECX, 23) && has(7, 0, EBX, 3);
}

inline bool avx512() { // F, DQ, BW, VL
    return avx2() && keeps(0xe6) && has(7, 0, EBX, 16) && has(7, 0, EBX, 17) && has(7, 0, EBX, 30) && has(7, 0, EBX, 31);
}

inline bool vbmi2() { return avx512() && has(7, 0, ECX, 6) && has(7, 0, ECX, 11); } // and VNNI

} // namespace sparsessm::cpu
