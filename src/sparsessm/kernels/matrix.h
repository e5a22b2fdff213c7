// A weight matrix as the runtime's kernels read it: dense rows as they came, or packed non-zeros under bit masks.
// Built and checked by matrix.cpp, read by product_impl.h.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

namespace sparsessm {

enum class Value : uint8_t { f32, bf16, i8 };
inline int64_t size_of(Value value) { return value == Value::f32 ? 4 : value == Value::bf16 ? 2 : 1; }

constexpr int GROUP = 4;  // rows whose blocks lie next to each other: one stream feeds four sums
constexpr int BLOCK = 64; // columns under one mask

// Memory for streaming, and readable some cache lines beyond its end. Many share one large block of huge pages: reading
// a gigabyte through small pages costs up to half of the bandwidth.
class Buffer {
  public:
    explicit Buffer(int64_t bytes = 0);
    uint8_t *data() const { return data_; }

  private:
    std::shared_ptr<uint8_t> block_;
    uint8_t *data_ = nullptr;
};

struct Matrix {
    int64_t rows = 0, cols = 0, blocks = 0, groups = 0, nonzero = 0;
    Value value = Value::f32;
    bool sparse = false;
    // Sparse: for each group, block, row of the group: the kept values. Dense: (rows, cols).
    const uint8_t *values = nullptr;
    const uint64_t *masks = nullptr;  // (groups, blocks, GROUP): bit j keeps column 64 * block + j
    std::vector<int64_t> offsets;     // (groups + 1): where a group's values begin, in values
    std::vector<float> scale;         // (rows) or empty
    Buffer own_values, own_masks;

    int64_t bytes() const; // what decoding one token reads
    // A row as floats, for the embedding.
    void row(int64_t index, float *out) const;
    // Bounds of the groups of `threads` shares of about equal bytes: share t is [bounds[t], bounds[t + 1]).
    std::vector<int64_t> shares(int threads) const;
};

// What a packed file holds (docs/sparse-format.md): bit masks row by row, values row by row.
struct Packed {
    int64_t rows, cols;
    const uint8_t *mask;   // (rows, (cols + 7) / 8)
    const uint8_t *values; // (nonzero)
    int64_t nonzero;
    Value value;
    const float *scale;    // (rows) or null
    const int64_t *order;  // which rows, in which order; null: all
    int64_t ordered;
};

// Throws std::invalid_argument where the masks and values do not fit each other: a kernel must never read beyond them.
Matrix sparse_matrix(const Packed &);
Matrix dense_matrix(int64_t rows, int64_t cols, Value, const uint8_t *values, const float *scale);

} // namespace sparsessm
