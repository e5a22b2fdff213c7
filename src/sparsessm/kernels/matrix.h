// A weight matrix as the runtime's kernels read it: dense rows as they came, packed non-zeros under bit masks, or integer
// codes of few bits. Built and checked by matrix.cpp and few_bits.cpp, read by product_impl.h and few_bits_impl.h.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

namespace sparsessm {

enum class Value : uint8_t { f32, bf16, i8 };
inline int64_t size_of(Value value) { return value == Value::f32 ? 4 : value == Value::bf16 ? 2 : 1; }

enum class Form : uint8_t { dense, sparse, codes };

constexpr int GROUP = 4;  // rows whose blocks lie next to each other: one stream feeds four sums
constexpr int BLOCK = 64; // columns under one mask
constexpr int STRIP = 16; // rows of codes that lie in the lanes of a vector
constexpr int BAND = 64;  // rows of codes that lie in the order of their sizes

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

// What a code is more than the nearest one that the bits of its piece can say, or a part of that.
struct Stray {
    uint16_t column; // as it lies
    int8_t more;
    uint8_t place; // the row of the strip, and by how many bits `more` is shifted
    int row() const { return place >> 4; }
    int value() const { return more * (1 << (place & 15)); }
};

struct Matrix {
    int64_t rows = 0, cols = 0, blocks = 0, groups = 0, nonzero = 0;
    Value value = Value::f32;
    Form form = Form::dense;
    // Sparse: for each group, block, row of the group: the kept values. Dense: (rows, cols). Codes: for each strip and
    // piece of 32 columns a line of 64 bytes for each bit of its width (few_bits.h).
    const uint8_t *values = nullptr;
    const uint64_t *masks = nullptr;  // (groups, blocks, GROUP): bit j keeps column 64 * block + j
    std::vector<int64_t> offsets;     // (groups + 1): where a group's values begin; of codes (strips + 1), in bytes
    std::vector<float> scale;         // (rows) or empty
    // Of codes. Columns lie in the order of their sizes, and so do the rows of a band: what lies together has about as
    // many bits. scale and columns are in these orders.
    std::vector<uint8_t> widths;        // (strips, pieces): bits of a code
    std::vector<int32_t> inputs;        // (cols): which input a column is for; empty: each for its own
    std::vector<uint8_t> place;         // (rows): which row of its band it is
    std::vector<float> columns;         // (cols) or empty: factors of the inputs
    int64_t scale_columns = 0;          // columns that share a scale, whole pieces; 0: all
    int64_t band = STRIP;               // rows that stay together
    std::vector<float> scales;          // (strips, spans, STRIP) or empty: then `scale` has ones
    bool odd = false;                   // what is stored is n of the code 2n + 1
    std::vector<Stray> strays;          // strip by strip, by column
    std::vector<int64_t> stray_offsets; // (strips + 1)
    Buffer own_values, own_masks;

    // Groups of columns that share a scale, padding included.
    int64_t spans() const { return (blocks * BLOCK + scale_columns - 1) / scale_columns; }
    int64_t pieces() const { return 2 * blocks; } // of a strip
    const float *scales_of(int64_t strip, int64_t column) const { // (STRIP)
        return scales.data() + (strip * spans() + column / scale_columns) * STRIP;
    }
    int64_t input(int64_t column) const { return inputs.empty() ? column : inputs[column]; }
    int64_t bytes() const; // what decoding one token reads
    // A row as floats, for the embedding.
    void row(int64_t index, float *out) const;
    // How many groups must stay with one thread: their rows lie in another order.
    int64_t together() const { return form == Form::codes ? band / GROUP : 1; }
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
// Integer codes: value = code * scale of the row, or of the row's group of columns, * factor of the column.
struct Codes {
    int64_t rows, cols;
    const int16_t *codes;  // (rows, cols), or null:
    const int8_t *bytes;   // the same of codes of 8 bits
    const float *scale;    // (rows, groups of columns)
    const float *columns;  // (cols) or null
    const int64_t *order;  // which rows, in which order; null: all
    int64_t ordered;
    bool sorted;           // large columns and rows may lie together, columns only if all have one scale
    int64_t scale_columns; // columns of a scale, whole pieces; 0: all
};
Matrix codes_matrix(const Codes &, int threads);
// Bytes are codes too, each column where it was.
Matrix bytes_matrix(int64_t rows, int64_t cols, const int8_t *values, const float *scale, int threads);

Matrix dense_matrix(int64_t rows, int64_t cols, Value, const uint8_t *values); // of floats

} // namespace sparsessm
