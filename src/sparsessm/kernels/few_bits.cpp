// Integer codes into the few bits that the kernels read, and back. Portable code.
#include "few_bits.h"

#include <algorithm>
#include <array>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

namespace sparsessm {

namespace {

// As bytes: what a stray costs, its own and the time that reading its input takes; and a change of the width, after
// which a processor has guessed wrongly what comes.
constexpr int64_t STRAY_COST = 48, CHANGE_COST = 64;
constexpr int WIDTHS = MOST_WIDTH + 1;

[[noreturn]] void refuse(const std::string &what) { throw std::invalid_argument(what); }

int nearest(int code, int width) { return std::clamp(code, least_code(width), most_code(width)); }

// Bits that a code takes: none for 0, one for -1, two for 1 and -2, ...
int bits_of(int code) {
    if (!code) return 0;
    int bits = 1;
    for (int size = code < 0 ? ~code : code; size; size >>= 1) ++bits;
    return bits;
}

// The reverse of cut_apart: 64 numbers of `width` bits.
void put_together(const uint8_t *numbers, int width, uint8_t *to) {
    if (width == 8) {
        std::memcpy(to, numbers, BLOCK);
        return;
    }
    std::memset(to, 0, 8 * width);
    int at = 0;
    for (const int bits : {4, 2, 1}) {
        if (!(width & bits)) continue;
        const int bytes = 8 * bits, mask = (1 << bits) - 1;
        for (int i = 0; i < BLOCK; ++i) {
            const int part = numbers[i] >> at & mask;
            if (bits == 1) to[i / 8] = static_cast<uint8_t>(to[i / 8] | part << i % 8);
            else to[i % bytes] = static_cast<uint8_t>(to[i % bytes] | part << i / bytes * bits);
        }
        to += bytes, at += bits;
    }
}

// The width of each block of a group, so that all of it costs least.
void choose(const std::vector<std::array<int32_t, WIDTHS + 1>> &counts, uint8_t *widths) {
    const auto blocks = static_cast<int64_t>(counts.size());
    std::vector<std::array<uint8_t, WIDTHS>> before(blocks);
    std::array<int64_t, WIDTHS> total{};
    for (int64_t block = 0; block < blocks; ++block) {
        const auto cheapest = std::min_element(total.begin(), total.end());
        std::array<int64_t, WIDTHS> next{};
        int64_t beyond = 0;
        for (int width = WIDTHS - 1; width >= 0; --width) {
            beyond += counts[block][width + 1];
            const bool changes = block && *cheapest + CHANGE_COST < total[width];
            before[block][width] = static_cast<uint8_t>(changes ? cheapest - total.begin() : width);
            next[width] = (changes ? *cheapest + CHANGE_COST : total[width]) + GROUP * 8 * width + beyond * STRAY_COST;
        }
        total = next;
    }
    auto width = static_cast<uint8_t>(std::min_element(total.begin(), total.end()) - total.begin());
    for (int64_t block = blocks - 1; block >= 0; --block) widths[block] = width, width = before[block][width];
}

// 0 to count - 1 by falling size, within each `band`.
std::vector<int32_t> by_size(const std::vector<int64_t> &size, int64_t band) {
    const auto count = static_cast<int64_t>(size.size());
    std::vector<int32_t> order(count);
    std::iota(order.begin(), order.end(), 0);
    for (int64_t from = 0; from < count; from += band)
        std::stable_sort(order.begin() + from, order.begin() + std::min(count, from + band),
                         [&](int32_t a, int32_t b) { return size[a] > size[b]; });
    return order;
}

} // namespace

Matrix codes_matrix(const Codes &c) {
    if (c.rows < 1 || c.cols < 1) refuse("a matrix needs at least one row and one column");
    if (c.cols > std::numeric_limits<uint16_t>::max()) refuse("codes have at most 65,535 columns");
    Matrix m;
    m.form = Form::codes, m.value = Value::i8, m.cols = c.cols;
    m.rows = c.order ? c.ordered : c.rows;
    m.blocks = (m.cols + BLOCK - 1) / BLOCK, m.groups = (m.rows + GROUP - 1) / GROUP, m.nonzero = m.rows * m.cols;
    const auto source = [&](int64_t r) { return c.order ? c.order[r] : r; };
    std::vector<int64_t> of_rows(m.rows), of_columns(m.cols); // bits
    for (int64_t r = 0; r < m.rows; ++r) {
        if (source(r) < 0 || source(r) >= c.rows)
            refuse("row " + std::to_string(source(r)) + " of a matrix of " + std::to_string(c.rows) + " rows");
        for (int64_t i = 0; i < m.cols; ++i) {
            const int bits = bits_of(c.codes[source(r) * c.cols + i]);
            of_rows[r] += bits, of_columns[i] += bits;
        }
    }
    m.inputs = by_size(of_columns, m.cols);
    const std::vector<int32_t> order = by_size(of_rows, BAND);
    for (const int32_t row : order)
        m.place.push_back(static_cast<uint8_t>(row % BAND)), m.scale.push_back(c.scale[source(row)]);
    if (c.columns)
        for (const int32_t column : m.inputs) m.columns.push_back(c.columns[column]);
    const auto code = [&](int64_t row, int64_t column) { // as they lie
        return static_cast<int>(c.codes[source(order[row]) * c.cols + m.inputs[column]]);
    };
    const auto exist = [&](int64_t group) { return std::min<int64_t>(GROUP, m.rows - group * GROUP); };
    m.offsets.assign(1, 0), m.stray_offsets.assign(1, 0), m.widths.resize(m.groups * m.blocks);
    for (int64_t group = 0; group < m.groups; ++group) {
        std::vector<std::array<int32_t, WIDTHS + 1>> counts(m.blocks); // codes of a block, by the bits that they take
        uint8_t *widths = &m.widths[group * m.blocks];
        for (int64_t r = 0; r < exist(group); ++r)
            for (int64_t i = 0; i < m.cols; ++i)
                ++counts[i / BLOCK][std::min(bits_of(code(group * GROUP + r, i)), WIDTHS)];
        choose(counts, widths);
        m.offsets.push_back(m.offsets.back() + std::accumulate(widths, widths + m.blocks, int64_t{0}) * GROUP * 8);
        for (int64_t r = 0; r < exist(group); ++r) {
            const size_t before = m.strays.size();
            for (int64_t i = 0; i < m.cols; ++i) {
                const int found = code(group * GROUP + r, i), more = found - nearest(found, widths[i / BLOCK]);
                if (more) m.strays.push_back({static_cast<uint16_t>(i), static_cast<int16_t>(more)});
            }
            m.stray_counts.push_back(static_cast<uint16_t>(m.strays.size() - before));
        }
        m.stray_offsets.push_back(static_cast<int64_t>(m.strays.size()));
    }
    m.own_values = Buffer(std::max<int64_t>(1, m.offsets.back()));
    uint8_t *to = m.own_values.data();
    for (int64_t group = 0; group < m.groups; ++group)
        for (int64_t block = 0; block < m.blocks; ++block) {
            const int width = m.widths[group * m.blocks + block];
            for (int64_t r = 0; r < GROUP; ++r, to += 8 * width) {
                uint8_t numbers[BLOCK] = {}; // beyond the matrix anything will do: inputs there are zero
                const int64_t count = r < exist(group) ? std::min<int64_t>(BLOCK, m.cols - block * BLOCK) : 0;
                for (int64_t i = 0; i < count; ++i) {
                    const int found = code(group * GROUP + r, block * BLOCK + i);
                    numbers[i] = static_cast<uint8_t>(nearest(found, width) - least_code(width));
                }
                put_together(numbers, width, to);
            }
        }
    m.values = m.own_values.data();
    return m;
}

void code_row(const Matrix &m, int64_t index, float *out) {
    const auto band = m.place.begin() + index / BAND * BAND;
    const int64_t lies = std::find(band, m.place.end(), static_cast<uint8_t>(index % BAND)) - m.place.begin();
    const int64_t group = lies / GROUP, place = lies % GROUP;
    const uint8_t *at = m.values + m.offsets[group];
    for (int64_t block = 0; block < m.blocks; ++block) {
        const int width = m.widths[group * m.blocks + block];
        uint8_t numbers[BLOCK];
        cut_apart(at + place * 8 * width, width, numbers);
        at += GROUP * 8 * width;
        for (int64_t i = block * BLOCK; i < std::min((block + 1) * BLOCK, m.cols); ++i)
            out[m.inputs[i]] = static_cast<float>(numbers[i % BLOCK] + least_code(width));
    }
    const Stray *stray = m.strays.data() + m.stray_offsets[group];
    for (int64_t row = group * GROUP; row < lies; ++row) stray += m.stray_counts[row];
    for (int i = 0; i < m.stray_counts[lies]; ++i) out[m.inputs[stray[i].column]] += stray[i].more;
    for (int64_t i = 0; i < m.cols; ++i)
        out[m.inputs[i]] *= m.scale[lies], out[m.inputs[i]] *= m.columns.empty() ? 1.0f : m.columns[i];
}

} // namespace sparsessm
