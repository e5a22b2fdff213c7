// Products of matrices that are rounded to bfloat16 and summed in float32: what the processor has for them.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace sparsessm::rounded {

// Instruction sets with such products, slowest first: "avx512bf16", "amx"; empty where there are none.
std::vector<std::string> units();

// A matrix (rows, width) rounded and laid out for a product's right side takes so many numbers of 16 bits.
int64_t packed_size(int64_t rows, int64_t width);

struct Matrix { // float32, rows `stride` apart
    const float *data;
    int64_t rows, width, stride;
};

// turned: `weight` is given with its columns as rows.
void pack(const Matrix &weight, bool turned, uint16_t *packed, int threads);

// y (x.rows, out) = x weight' + bias, weight (out, x.width) as `pack` laid it out; bias may be null.
void linear(const std::string &unit, const Matrix &x, const uint16_t *packed, int64_t out, const float *bias, float *y,
            int threads);

// total (left.width, right.width) += left' right, summed in float32 over some rows at a time. Where right is left only
// blocks on and above the diagonal are added to; returns whether it is.
bool add_moments(const std::string &unit, const Matrix &left, const Matrix &right, double *total, int threads);

} // namespace sparsessm::rounded
