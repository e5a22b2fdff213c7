// How integer codes of few bits lie. Sixteen rows are a strip: four columns of each are 64 numbers, one byte each, row by
// row, which meet four inputs of all rows alike. Eight of these units, 32 columns, are a piece, whose codes all have its
// width, 0 to 8 bits (8: bytes as they are). A width is a sum of 4, 2 and 1, and so a code is cut, lowest bits first:
// four bits lie in four lines of 64 bytes, line i holding units i and i + 4; then two bits in two lines, line i holding
// units i, i + 2, i + 4 and i + 6; then one bit in one line, bit i of its bytes being unit i. Whatever the width, a
// vector of codes is then some shifts and masks of whole lines. Codes are stored as they are above the least that the
// width has, -2^(width - 1).
//
// That rows lie in the lanes and no sum has to go across them is how llama.cpp repacks its blocks for products.
#pragma once
#include "matrix.h"

namespace sparsessm {

constexpr int MOST_WIDTH = 8, UNITS = 8, LINE = 64;
constexpr int PIECE = 4 * UNITS; // columns
constexpr int least_code(int width) { return width ? -(1 << (width - 1)) : 0; }
constexpr int most_code(int width) { return width ? (1 << (width - 1)) - 1 : 0; }
constexpr int64_t byte_of(int64_t row, int64_t column) { return 4 * row + column % 4; } // of a line

// The stored number at a byte of a unit.
static inline int number(const uint8_t *piece, int width, int64_t unit, int64_t byte) {
    if (width == 8) return piece[LINE * unit + byte];
    int out = 0, at = 0;
    if (width & 4) out = piece[LINE * (unit % 4) + byte] >> (unit / 4 * 4) & 15, piece += 4 * LINE, at = 4;
    if (width & 2) out |= (piece[LINE * (unit % 2) + byte] >> (unit / 2 * 2) & 3) << at, piece += 2 * LINE, at += 2;
    if (width & 1) out |= (piece[byte] >> unit & 1) << at;
    return out;
}

// Row `index` of a matrix of codes, as floats.
void code_row(const Matrix &, int64_t index, float *out);

} // namespace sparsessm
