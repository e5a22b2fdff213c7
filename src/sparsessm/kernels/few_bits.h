// How 64 codes of a row lie in `width` words of 8 bytes, width 0 to 8 (8: a byte each). A width is a sum of 4, 2 and 1,
// and so a code is cut, lowest bits first: its four bits lie in 32 bytes, byte i holding columns i and i + 32; then two
// bits in 16 bytes, byte i holding columns i, i + 16, i + 32 and i + 48; then one bit in 8 bytes, bit i of them being
// column i. Whatever the width, a vector of codes is then some loads, shifts and masks, and no look-up. Codes are stored
// as they are above the least that the width has, -2^(width - 1).
#pragma once
#include "matrix.h"

#include <cstring>

namespace sparsessm {

constexpr int MOST_WIDTH = 8;
constexpr int least_code(int width) { return width ? -(1 << (width - 1)) : 0; }
constexpr int most_code(int width) { return width ? (1 << (width - 1)) - 1 : 0; }

// Row `index` of a matrix of codes, as floats.
void code_row(const Matrix &, int64_t index, float *out);

// The 64 stored numbers of a row's block.
static inline void cut_apart(const uint8_t *from, int width, uint8_t *to) {
    const auto word = [&](int i) {
        uint64_t found;
        std::memcpy(&found, from + 8 * i, 8);
        return found;
    };
    const auto every = [](int byte) { return 0x0101010101010101ull * static_cast<uint64_t>(byte); };
    if (width == 8) {
        std::memcpy(to, from, BLOCK);
        return;
    }
    uint64_t out[8] = {};
    int at = 0;
    if (width & 4) {
        for (int i = 0; i < 4; ++i) out[i] = word(i) & every(15), out[i + 4] = word(i) >> 4 & every(15);
        from += 32, at += 4;
    }
    if (width & 2) {
        for (int i = 0; i < 8; ++i) out[i] |= (word(i % 2) >> (i / 2 * 2) & every(3)) << at;
        from += 16, at += 2;
    }
    if (width & 1) {
        const uint64_t bits = word(0);
        for (int i = 0; i < 8; ++i) { // each bit of a byte into a byte of its own, then to its lowest bit
            const uint64_t spread = every(static_cast<int>(bits >> (8 * i) & 255)) & 0x8040201008040201ull;
            out[i] |= ((spread + every(127)) >> 7 & every(1)) << at;
        }
    }
    std::memcpy(to, out, BLOCK);
}

} // namespace sparsessm
