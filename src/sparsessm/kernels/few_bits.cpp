// Integer codes into the few bits that the kernels read, and back. Portable code.
#include "few_bits.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>
#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace sparsessm {

namespace {

// As bytes: what a stray costs, its own and the time that reading its input takes; and a change of the width, after
// which a processor has guessed wrongly what comes.
constexpr int64_t STRAY_COST = 48, CHANGE_COST = 128;
constexpr int WIDTHS = MOST_WIDTH + 1, NUMBERS = STRIP * PIECE;
constexpr int64_t FEWEST_BANDS = 4; // that are worth sorting: threads share out whole ones

[[noreturn]] void refuse(const std::string &what) { throw std::invalid_argument(what); }

#include "threads.h"

// Bits that codes take: none for 0, one for -1, two for 1 and -2, ...; read off an exponent, which vectors can do.
void bits_of(const int16_t *codes, int64_t count, int32_t *bits) {
    for (int64_t i = 0; i < count; ++i) {
        const int32_t code = codes[i], size = code < 0 ? ~code : code;
        const auto odd = static_cast<float>(2 * size + 1);
        int32_t exponent;
        std::memcpy(&exponent, &odd, sizeof exponent);
        bits[i] = code ? (exponent >> 23) - 126 : 0;
    }
}

bool all_odd(const int16_t *codes, int64_t count) {
    int16_t bits = 1;
    for (int64_t i = 0; i < count; ++i) bits = static_cast<int16_t>(bits & codes[i]);
    return bits & 1;
}

// The reverse of `number`, for a whole piece: (UNITS, LINE) numbers.
void put_together(const uint8_t *numbers, int width, uint8_t *to) {
    if (width == 8) {
        std::memcpy(to, numbers, NUMBERS);
        return;
    }
    std::memset(to, 0, LINE * width);
    int at = 0;
    for (const int bits : {4, 2, 1}) {
        if (!(width & bits)) continue;
        for (int unit = 0; unit < UNITS; ++unit) {
            uint8_t *line = to + LINE * (unit % bits);
            const uint8_t *from = numbers + LINE * unit;
            const int shift = unit / bits * bits, mask = (1 << bits) - 1;
            for (int i = 0; i < LINE; ++i) line[i] = static_cast<uint8_t>(line[i] | (from[i] >> at & mask) << shift);
        }
        to += LINE * bits, at += bits;
    }
}

// The width of each piece of a strip, so that all of it costs least; beyond: how many codes of a piece a width lacks.
void choose(const std::vector<std::array<int32_t, WIDTHS>> &beyond, uint8_t *widths) {
    const auto pieces = static_cast<int64_t>(beyond.size());
    std::vector<std::array<uint8_t, WIDTHS>> before(pieces);
    std::array<int64_t, WIDTHS> total{};
    for (int64_t piece = 0; piece < pieces; ++piece) {
        const auto cheapest = std::min_element(total.begin(), total.end());
        std::array<int64_t, WIDTHS> next{};
        for (int width = 0; width < WIDTHS; ++width) {
            const bool changes = piece && *cheapest + CHANGE_COST < total[width];
            before[piece][width] = static_cast<uint8_t>(changes ? cheapest - total.begin() : width);
            next[width] = (changes ? *cheapest + CHANGE_COST : total[width]) + LINE * width;
            next[width] += beyond[piece][width] * STRAY_COST;
        }
        total = next;
    }
    auto width = static_cast<uint8_t>(std::min_element(total.begin(), total.end()) - total.begin());
    for (int64_t piece = pieces - 1; piece >= 0; --piece) widths[piece] = width, width = before[piece][width];
}

int16_t count_beyond(const int16_t *codes, int width) {
    const auto least = static_cast<int16_t>(least_code(width)), most = static_cast<int16_t>(most_code(width));
    int16_t count = 0;
    for (int i = 0; i < NUMBERS; ++i) count = static_cast<int16_t>(count + (codes[i] < least || codes[i] > most));
    return count;
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

// What a code is more than its width can say, as strays.
void stray(int more, int64_t column, int row, std::vector<Stray> &to) {
    while (more) {
        int shift = 0;
        while (std::abs(more) >> shift > 127) ++shift;
        const int part = more < 0 ? -(-more >> shift) : more >> shift;
        const auto place = static_cast<uint8_t>(row << 4 | shift);
        to.push_back({static_cast<uint16_t>(column), static_cast<int8_t>(part), place});
        more -= part * (1 << shift);
    }
}

struct Strip {
    std::vector<uint8_t> packed;
    std::vector<Stray> strays;
};

// Rows of codes, those of a strip, as they lie: (pieces, UNITS, LINE).
Strip pack(const std::vector<int16_t> &codes, bool odd, uint8_t *widths) {
    const auto pieces = static_cast<int64_t>(codes.size()) / NUMBERS;
    std::vector<std::array<int32_t, WIDTHS>> beyond(pieces);
    for (int64_t piece = 0; piece < pieces; ++piece) {
        for (int width = 0; width < WIDTHS; ++width)
            beyond[piece][width] = count_beyond(&codes[piece * NUMBERS], width);
        if (odd) beyond[piece][0] = 2 * NUMBERS; // never: a stored 0 is a code of 1
    }
    choose(beyond, widths);
    Strip made;
    for (int64_t piece = 0; piece < pieces; ++piece) {
        const int width = widths[piece];
        const auto least = static_cast<int16_t>(least_code(width)), most = static_cast<int16_t>(most_code(width));
        const int16_t *from = &codes[piece * NUMBERS];
        uint8_t numbers[NUMBERS], lines[NUMBERS];
        for (int i = 0; i < NUMBERS; ++i)
            numbers[i] = static_cast<uint8_t>(std::min(std::max(from[i], least), most) - least);
        for (int i = 0; beyond[piece][width] && i < NUMBERS; ++i)
            if (const int more = from[i] - (numbers[i] + least); more)
                stray(more, piece * PIECE + i / LINE * 4 + i % 4, i % LINE / 4, made.strays);
        put_together(numbers, width, lines);
        made.packed.insert(made.packed.end(), lines, lines + LINE * width);
    }
    return made;
}

// A row of codes; `room` holds it where it has to be widened.
const int16_t *row_of(const Codes &c, int64_t row, std::vector<int16_t> &room) {
    if (c.codes) return c.codes + row * c.cols;
    room.assign(c.bytes + row * c.cols, c.bytes + (row + 1) * c.cols);
    return room.data();
}

} // namespace

Matrix codes_matrix(const Codes &c, int threads) {
    if (c.rows < 1 || c.cols < 1) refuse("a matrix needs at least one row and one column");
    if (c.cols > std::numeric_limits<uint16_t>::max()) refuse("codes have at most 65,535 columns");
    Matrix m;
    m.form = Form::codes, m.value = Value::i8, m.cols = c.cols;
    m.rows = c.order ? c.ordered : c.rows;
    m.blocks = (m.cols + BLOCK - 1) / BLOCK, m.groups = (m.rows + GROUP - 1) / GROUP, m.nonzero = m.rows * m.cols;
    const auto source = [&](int64_t r) { return c.order ? c.order[r] : r; };
    for (int64_t r = 0; r < m.rows; ++r)
        if (source(r) < 0 || source(r) >= c.rows)
            refuse("row " + std::to_string(source(r)) + " of a matrix of " + std::to_string(c.rows) + " rows");
    const int64_t bands = (m.rows + BAND - 1) / BAND, strips = (m.rows + STRIP - 1) / STRIP, pieces = m.pieces();
    if (c.scale_columns % PIECE)
        refuse("a scale is for " + std::to_string(c.scale_columns) + " columns; allowed: multiples of 32");
    m.scale_columns = c.scale_columns < m.cols ? c.scale_columns : 0;
    const int64_t scales = m.scale_columns ? (m.cols + m.scale_columns - 1) / m.scale_columns : 1; // of a row
    std::atomic<bool> odd{true};
    std::vector<int64_t> of_rows(m.rows), of_columns(m.cols); // bits
    std::vector<int32_t> of_bands(bands * m.cols);
    parallel_for(bands, m.nonzero, threads, [&](int64_t band) {
        std::vector<int32_t> bits(m.cols);
        std::vector<int16_t> room;
        for (int64_t r = band * BAND; r < std::min(m.rows, (band + 1) * BAND); ++r) {
            const int16_t *row = row_of(c, source(r), room);
            if (odd && !all_odd(row, m.cols)) odd = false;
            bits_of(row, m.cols, bits.data());
            of_rows[r] = std::accumulate(bits.begin(), bits.end(), 0);
            for (int64_t i = 0; i < m.cols; ++i) of_bands[band * m.cols + i] += bits[i];
        }
    });
    for (int64_t band = 0; band < bands; ++band)
        for (int64_t i = 0; i < m.cols; ++i) of_columns[i] += of_bands[band * m.cols + i];
    m.odd = odd;
    if (c.sorted && !c.scale_columns) m.inputs = by_size(of_columns, m.cols);
    const bool bands_sorted = c.sorted && bands >= FEWEST_BANDS;
    m.band = bands_sorted ? BAND : STRIP;
    const std::vector<int32_t> order = by_size(of_rows, bands_sorted ? BAND : 1);
    for (const int32_t row : order) {
        m.place.push_back(static_cast<uint8_t>(row % BAND));
        m.scale.push_back(m.scale_columns ? 1.0f : c.scale[source(row)]);
    }
    if (m.scale_columns) m.scales.resize(strips * m.spans() * STRIP);
    for (int64_t r = 0; m.scale_columns && r < m.rows; ++r)
        for (int64_t i = 0; i < scales; ++i)
            m.scales[(r / STRIP * m.spans() + i) * STRIP + r % STRIP] = c.scale[source(order[r]) * scales + i];
    if (c.columns)
        for (int64_t i = 0; i < m.cols; ++i) m.columns.push_back(c.columns[m.input(i)]);
    m.widths.resize(strips * pieces);
    std::vector<Strip> made(strips);
    parallel_for(strips, m.nonzero, threads, [&](int64_t strip) {
        std::vector<int16_t> codes(pieces * NUMBERS), room; // beyond the matrix zeros
        for (int64_t r = 0; r < std::min<int64_t>(STRIP, m.rows - strip * STRIP); ++r) {
            const int16_t *row = row_of(c, source(order[strip * STRIP + r]), room);
            for (int64_t i = 0; i < m.cols; ++i) {
                const int16_t code = row[m.input(i)];
                codes[i / 4 * LINE + byte_of(r, i)] = static_cast<int16_t>(m.odd ? (code - 1) / 2 : code);
            }
        }
        made[strip] = pack(codes, m.odd, &m.widths[strip * pieces]);
    });
    m.offsets.assign(1, 0), m.stray_offsets.assign(1, 0);
    for (const Strip &strip : made) {
        m.offsets.push_back(m.offsets.back() + static_cast<int64_t>(strip.packed.size()));
        m.strays.insert(m.strays.end(), strip.strays.begin(), strip.strays.end());
        m.stray_offsets.push_back(static_cast<int64_t>(m.strays.size()));
    }
    m.own_values = Buffer(std::max<int64_t>(1, m.offsets.back()));
    for (int64_t strip = 0; strip < strips; ++strip) {
        std::copy(made[strip].packed.begin(), made[strip].packed.end(), m.own_values.data() + m.offsets[strip]);
        made[strip] = {};
    }
    m.values = m.own_values.data();
    return m;
}

Matrix bytes_matrix(int64_t rows, int64_t cols, const int8_t *values, const float *scale, int threads) {
    return codes_matrix({rows, cols, nullptr, values, scale, nullptr, nullptr, 0, false, 0}, threads);
}

void code_row(const Matrix &m, int64_t index, float *out) {
    const auto band = m.place.begin() + index / BAND * BAND;
    const int64_t lies = std::find(band, m.place.end(), static_cast<uint8_t>(index % BAND)) - m.place.begin();
    const int64_t strip = lies / STRIP;
    const uint8_t *at = m.values + m.offsets[strip], *widths = m.widths.data() + strip * m.pieces();
    for (int64_t i = 0; i < m.cols; ++i) {
        const int width = widths[i / PIECE];
        const int found = width ? number(at, width, i % PIECE / 4, byte_of(lies % STRIP, i)) + least_code(width) : 0;
        out[m.input(i)] = static_cast<float>(found);
        if (i % PIECE == PIECE - 1) at += LINE * width;
    }
    for (int64_t i = m.stray_offsets[strip]; i < m.stray_offsets[strip + 1]; ++i)
        if (const Stray &one = m.strays[i]; one.row() == lies % STRIP)
            out[m.input(one.column)] += static_cast<float>(one.value());
    for (int64_t i = 0; i < m.cols; ++i) {
        float &value = out[m.input(i)];
        if (m.odd) value = 2 * value + 1;
        value *= m.scale[lies];
        if (m.scale_columns) value *= m.scales_of(strip, i)[lies % STRIP];
        if (!m.columns.empty()) value *= m.columns[i];
    }
}

} // namespace sparsessm
