// From packed rows to the layout that the kernels stream, with every count checked on the way. Portable code.
#include "matrix.h"

#include "few_bits.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sparsessm {

namespace {

constexpr int64_t SLACK = 256; // kernels load whole vectors: up to one beyond the last value
constexpr int64_t HUGE_PAGE = 2 << 20, ARENA = 16 * HUGE_PAGE;

uint64_t mask_word(const uint8_t *row, int64_t bytes, int64_t block) {
    uint64_t word = 0;
    const int64_t from = block * 8, count = std::min<int64_t>(8, bytes - from);
    for (int64_t i = 0; i < count; ++i) word |= uint64_t{row[from + i]} << (8 * i);
    return word;
}

float number(const uint8_t *values, int64_t index, Value value) {
    if (value == Value::i8) return static_cast<float>(reinterpret_cast<const int8_t *>(values)[index]);
    uint32_t bits = 0;
    if (value == Value::f32) {
        std::memcpy(&bits, values + 4 * index, 4);
    } else {
        uint16_t half;
        std::memcpy(&half, values + 2 * index, 2);
        bits = uint32_t{half} << 16;
    }
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

[[noreturn]] void refuse(const std::string &what) { throw std::invalid_argument(what); }

} // namespace

Buffer::Buffer(int64_t bytes) {
    if (bytes <= 0) return;
    static std::mutex busy;
    static std::weak_ptr<uint8_t> current; // the block that is being filled, as long as somebody uses it
    static int64_t used, room;
    const int64_t whole = (bytes + SLACK + 63) / 64 * 64;
    const std::lock_guard<std::mutex> lock(busy);
    block_ = current.lock();
    if (!block_ || used + whole > room) {
        room = std::max(ARENA, (whole + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE), used = 0;
        auto *memory = static_cast<uint8_t *>(std::aligned_alloc(HUGE_PAGE, room));
        if (!memory) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
        madvise(memory, room, MADV_HUGEPAGE); // a wish: what it returns does not matter
#endif
        block_ = {memory, [](uint8_t *all) { std::free(all); }};
        current = block_;
    }
    data_ = block_.get() + used;
    used += whole;
    std::memset(data_ + bytes, 0, whole - bytes);
}

int64_t Matrix::bytes() const {
    const auto of = [](const auto &vector) { return static_cast<int64_t>(vector.size() * sizeof vector[0]); };
    if (form == Form::codes)
        return offsets.back() + of(offsets) + of(scale) + of(columns) + of(widths) + of(inputs) + of(place) + of(strays) +
               of(stray_offsets) + of(scales);
    const int64_t stored = (form == Form::sparse ? nonzero : rows * cols) * size_of(value);
    return stored + (form == Form::sparse ? groups * blocks * GROUP * 8 : 0) + of(scale);
}

void Matrix::row(int64_t index, float *out) const {
    const float unit = scale.empty() ? 1.0f : scale[index];
    if (form == Form::codes) return code_row(*this, index, out);
    if (form == Form::dense) {
        for (int64_t c = 0; c < cols; ++c) out[c] = number(values, index * cols + c, value) * unit;
        return;
    }
    std::fill(out, out + cols, 0.0f);
    const int64_t group = index / GROUP, place = index % GROUP;
    int64_t at = offsets[group];
    for (int64_t block = 0; block < blocks; ++block)
        for (int64_t r = 0; r < GROUP; ++r) {
            uint64_t mask = masks[(group * blocks + block) * GROUP + r];
            if (r != place) {
                at += __builtin_popcountll(mask);
                continue;
            }
            for (; mask; mask &= mask - 1)
                out[block * BLOCK + __builtin_ctzll(mask)] = number(values, at++, value) * unit;
        }
}

std::vector<int64_t> Matrix::shares(int threads) const {
    const auto before = [&](int64_t group) {
        if (form == Form::dense) return group;
        if (form == Form::codes) {
            const int64_t strip = (group * GROUP + STRIP - 1) / STRIP;
            return offsets[strip] + stray_offsets[strip] * static_cast<int64_t>(sizeof(Stray));
        }
        return offsets[group] * size_of(value) + group * blocks * GROUP * 8;
    };
    std::vector<int64_t> bounds(threads + 1, groups);
    bounds[0] = 0;
    for (int t = 1; t < threads; ++t) {
        const int64_t wanted = before(groups) * t / threads;
        int64_t low = bounds[t - 1], high = groups;
        while (low < high) {
            const int64_t middle = (low + high) / 2;
            if (before(middle) < wanted) low = middle + 1;
            else high = middle;
        }
        bounds[t] = low / together() * together();
    }
    return bounds;
}

Matrix sparse_matrix(const Packed &p) {
    if (p.rows < 1 || p.cols < 1) refuse("a matrix needs at least one row and one column");
    const int64_t row_bytes = (p.cols + 7) / 8;
    std::vector<int64_t> starts(p.rows + 1, 0);
    for (int64_t r = 0; r < p.rows; ++r) {
        const uint8_t *row = p.mask + r * row_bytes;
        int64_t count = 0;
        for (int64_t i = 0; i < row_bytes; ++i) count += __builtin_popcount(row[i]);
        if (p.cols % 8 && row[row_bytes - 1] >> (p.cols % 8))
            refuse("mask of row " + std::to_string(r) + " keeps columns beyond the last, " + std::to_string(p.cols - 1));
        starts[r + 1] = starts[r] + count;
    }
    if (starts[p.rows] != p.nonzero)
        refuse("the mask keeps " + std::to_string(starts[p.rows]) + " entries, there are " + std::to_string(p.nonzero) +
               " values");
    Matrix m;
    m.form = Form::sparse, m.value = p.value, m.cols = p.cols;
    m.rows = p.order ? p.ordered : p.rows;
    if (m.rows < 1) refuse("no rows chosen");
    m.blocks = (m.cols + BLOCK - 1) / BLOCK, m.groups = (m.rows + GROUP - 1) / GROUP;
    const auto source = [&](int64_t r) { return p.order ? p.order[r] : r; };
    for (int64_t r = 0; r < m.rows; ++r) {
        if (source(r) < 0 || source(r) >= p.rows)
            refuse("row " + std::to_string(source(r)) + " of a matrix of " + std::to_string(p.rows) + " rows");
        m.nonzero += starts[source(r) + 1] - starts[source(r)];
        if (p.scale) m.scale.push_back(p.scale[source(r)]);
    }
    const int64_t size = size_of(m.value);
    m.own_values = Buffer(std::max<int64_t>(1, m.nonzero * size));
    m.own_masks = Buffer(m.groups * m.blocks * GROUP * 8);
    auto *masks = reinterpret_cast<uint64_t *>(m.own_masks.data());
    uint8_t *to = m.own_values.data();
    m.offsets.reserve(m.groups + 1);
    for (int64_t group = 0; group < m.groups; ++group) {
        m.offsets.push_back((to - m.own_values.data()) / size);
        const uint8_t *from[GROUP] = {};
        for (int64_t r = 0; r < GROUP && group * GROUP + r < m.rows; ++r)
            from[r] = p.values + starts[source(group * GROUP + r)] * size;
        for (int64_t block = 0; block < m.blocks; ++block)
            for (int64_t r = 0; r < GROUP; ++r, ++masks) {
                *masks = 0;
                if (!from[r]) continue;
                *masks = mask_word(p.mask + source(group * GROUP + r) * row_bytes, row_bytes, block);
                const int64_t bytes = __builtin_popcountll(*masks) * size;
                std::memcpy(to, from[r], bytes);
                to += bytes, from[r] += bytes;
            }
    }
    m.offsets.push_back(m.nonzero);
    m.values = m.own_values.data(), m.masks = reinterpret_cast<const uint64_t *>(m.own_masks.data());
    return m;
}

Matrix dense_matrix(int64_t rows, int64_t cols, Value value, const uint8_t *values) {
    if (rows < 1 || cols < 1) refuse("a matrix needs at least one row and one column");
    Matrix m;
    m.rows = rows, m.cols = cols, m.value = value, m.nonzero = rows * cols;
    m.own_values = Buffer(rows * cols * size_of(value));
    std::memcpy(m.own_values.data(), values, rows * cols * size_of(value));
    m.values = m.own_values.data();
    m.blocks = (cols + BLOCK - 1) / BLOCK, m.groups = (rows + GROUP - 1) / GROUP;
    return m;
}

} // namespace sparsessm
