// Entropy coding of integer codes: range asymmetric numeral systems (Duda, arXiv 1311.2540), four states interleaved in
// one stream (Giesen, arXiv 1402.3392), whole numbers only. docs/sparse-format.md says what each byte is. Portable.
#include "entropy.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace sparsessm::entropy {

namespace {

#include "threads.h"

constexpr int BITS = 12;
constexpr uint32_t TOTAL = 1 << BITS; // of the frequencies of a table
constexpr uint32_t LEAST = 1 << 16;   // a state is never below
constexpr int LANES = 4;              // states that take turns, column by column
constexpr int DIRECT = 16;            // magnitudes with a token of their own
constexpr int ZERO = TOKENS - 1;      // symbol of a 0; of a token t with its sign: ZERO + t, ZERO - t
constexpr int SYMBOLS = 2 * TOKENS - 1;

struct Symbol {
    uint32_t often = 0, start = 0;
};
using Table = std::array<Symbol, SYMBOLS>;
// For each slot the frequency (13 bits), slot - start (12 bits) and the symbol (7 bits).
using Slots = std::array<uint32_t, TOTAL>;

[[noreturn]] void refuse(const std::string &what) { throw std::invalid_argument(what); }

inline int token(int size) {
    if (size < DIRECT) return size;
    const int power = 31 - __builtin_clz(static_cast<unsigned>(size));
    return DIRECT + 4 * (power - 4) + (size >> (power - 2) & 3);
}

// Bits behind a token that is at least DIRECT, and the least magnitude that it stands for.
inline int extra(int token) { return (token - DIRECT) / 4 + 2; }
inline int least(int token) { return (4 + (token & 3)) << extra(token); }

inline int table_of(int row, int column, int tables) { return std::clamp(row + column - tables / 2, 0, tables - 1); }

// The index of the table for each column, of a row of each class.
std::vector<std::vector<uint8_t>> tables_by_class(const Codes &c) {
    std::vector<std::vector<uint8_t>> all(c.tables, std::vector<uint8_t>(c.cols));
    for (int row = 0; row < c.tables; ++row)
        for (int64_t j = 0; j < c.cols; ++j)
            all[row][j] = static_cast<uint8_t>(table_of(row, c.by_column[j], c.tables));
    return all;
}

uint32_t frequency(uint8_t held) {
    const uint32_t shift = held >> 5, rest = held & 31;
    return shift ? (32 + rest) << (shift - 1) : rest;
}

std::vector<Table> parse(const std::vector<uint8_t> &held, int tables) {
    std::vector<Table> all;
    for (size_t at = 0; at < held.size();) {
        const size_t most = held[at++];
        if (most >= TOKENS) refuse("'tables' has " + std::to_string(most) + " frequencies in a table; at most 59");
        if (held.size() - at < most) refuse("'tables' ends inside of a table");
        uint32_t sum = 0;
        for (size_t t = 0; t < most; ++t) sum += 2 * frequency(held[at + t]);
        if (sum > TOTAL) refuse("'tables' has frequencies of " + std::to_string(sum) + " in a table; at most 4096");
        Table made{};
        made[ZERO] = {TOTAL - sum, 0};
        uint32_t start = TOTAL - sum;
        for (size_t t = 1; t <= most; ++t) {
            const uint32_t often = frequency(held[at++]);
            made[ZERO + t] = {often, start}, made[ZERO - t] = {often, start + often};
            start += 2 * often;
        }
        all.push_back(made);
    }
    if (static_cast<int>(all.size()) != tables)
        refuse("'tables' has " + std::to_string(all.size()) + " tables, expected " + std::to_string(tables));
    return all;
}

uint32_t two_bytes(const uint8_t *at) { return uint32_t{at[0]} | uint32_t{at[1]} << 8; }

void put_two(std::vector<uint8_t> &bytes, uint32_t value) {
    bytes.push_back(value & 255), bytes.push_back(value >> 8 & 255);
}

std::vector<uint8_t> encode_rows(const Codes &c, int64_t from, int64_t until, const std::vector<Table> &tables) {
    std::vector<uint16_t> words; // last first: what is coded last is decoded first
    std::vector<uint8_t> bits;
    words.reserve((until - from) * c.cols / 4);
    std::array<uint32_t, LANES> states;
    states.fill(LEAST);
    for (int64_t row = until; row-- > from;)
        for (int64_t j = c.cols; j--;) {
            const int code = c.codes[row * c.cols + j], t = token(std::abs(code));
            const Table &table = tables[table_of(c.by_row[row], c.by_column[j], c.tables)];
            const Symbol symbol = table[code < 0 ? ZERO - t : ZERO + t];
            if (!symbol.often) refuse("a code without a frequency");
            uint32_t &state = states[j % LANES];
            if (state >= uint64_t{symbol.often} << (32 - BITS)) words.push_back(state & 65535), state >>= 16;
            state = (state / symbol.often << BITS) + state % symbol.often + symbol.start;
        }
    uint32_t held = 0;
    int many = 0;
    for (int64_t i = from * c.cols; i < until * c.cols; ++i) {
        const int size = std::abs(int{c.codes[i]}), t = token(size);
        if (t < DIRECT) continue;
        held |= static_cast<uint32_t>(size - least(t)) << many;
        for (many += extra(t); many >= 8; many -= 8, held >>= 8) bits.push_back(held & 255);
    }
    if (many) bits.push_back(held & 255);
    std::vector<uint8_t> stream;
    stream.reserve(4 * LANES + 2 * words.size() + bits.size());
    for (uint32_t state : states) put_two(stream, state & 65535), put_two(stream, state >> 16);
    for (size_t i = words.size(); i--;) put_two(stream, words[i]);
    stream.insert(stream.end(), bits.begin(), bits.end());
    return stream;
}

enum class Fault : uint8_t { none, ends, behind, uneven };

// One symbol, while there are two bytes in any case: no branch.
inline int16_t step(const uint32_t *slots, uint32_t &state, const uint8_t *&at) {
    const uint32_t slot = slots[state & (TOTAL - 1)], next = two_bytes(at);
    const uint32_t after = (slot & 8191) * (state >> BITS) + (slot >> 13 & 4095);
    const bool more = after < LEAST;
    state = more ? after << 16 | next : after;
    at += more ? 2 : 0;
    return static_cast<int16_t>(static_cast<int>(slot >> 25) - ZERO);
}

Fault decode_rows(const Codes &c, int64_t from, int64_t until, const std::vector<Slots> &slots,
                  const std::vector<std::vector<uint8_t>> &by_class, bool extras, const uint8_t *at,
                  const uint8_t *end, int16_t *codes) {
    if (end - at < 4 * LANES) return Fault::ends;
    std::array<uint32_t, LANES> s;
    for (uint32_t &state : s) {
        state = two_bytes(at) | two_bytes(at + 2) << 16, at += 4;
        if (state < LEAST) return Fault::uneven;
    }
    const Slots *all = slots.data();
    for (int64_t row = from; row < until; ++row) {
        const uint8_t *which = by_class[c.by_row[row]].data();
        int16_t *out = codes + row * c.cols;
        int64_t j = 0;
        for (; j + LANES <= c.cols && end - at >= 2 * LANES; j += LANES)
            for (int lane = 0; lane < LANES; ++lane)
                out[j + lane] = step(all[which[j + lane]].data(), s[lane], at);
        for (; j < c.cols; ++j) { // the last columns, and the last bytes: a state may read behind the end, not the memory
            uint8_t last[2] = {0, 0};
            const bool near = end - at < 2;
            const uint8_t *here = near ? last : at;
            const uint8_t *before = here;
            out[j] = step(all[which[j]].data(), s[j % LANES], here);
            if (near && here != before) return Fault::ends;
            at += here - before;
        }
    }
    for (uint32_t state : s)
        if (state != LEAST) return Fault::uneven;
    uint32_t held = 0;
    int many = 0;
    for (int64_t i = from * c.cols; extras && i < until * c.cols; ++i) {
        const int t = std::abs(int{codes[i]});
        if (t < DIRECT) continue;
        for (; many < extra(t); many += 8) {
            if (at == end) return Fault::ends;
            held |= uint32_t{*at++} << many;
        }
        const int size = least(t) + static_cast<int>(held & ((1u << extra(t)) - 1));
        held >>= extra(t), many -= extra(t);
        codes[i] = static_cast<int16_t>(codes[i] < 0 ? -size : size);
    }
    return at == end && !held ? Fault::none : Fault::behind;
}

int64_t count_groups(int64_t rows, int64_t together) { return (rows + together - 1) / together; }

} // namespace

std::vector<int64_t> tally(const Codes &c, int threads) {
    constexpr int64_t STEP = 64;
    std::vector<int64_t> total(c.tables * TOKENS);
    const auto by_class = tables_by_class(c);
    std::mutex busy;
    parallel_for(count_groups(c.rows, STEP), c.rows * c.cols, threads, [&](int64_t unit) {
        std::array<int64_t, MOST_TABLES * TOKENS> mine{};
        for (int64_t row = unit * STEP; row < std::min(c.rows, (unit + 1) * STEP); ++row)
            for (int64_t j = 0; j < c.cols; ++j)
                ++mine[by_class[c.by_row[row]][j] * TOKENS + token(std::abs(int{c.codes[row * c.cols + j]}))];
        const std::lock_guard<std::mutex> lock(busy);
        for (size_t i = 0; i < total.size(); ++i) total[i] += mine[i];
    });
    return total;
}

void assign(const Codes &c, const int32_t *prices, uint8_t *by_row, int threads) {
    parallel_for(c.rows, c.rows * c.cols, threads, [&](int64_t row) {
        std::array<int32_t, MOST_TABLES * TOKENS> often{}; // by the class of the column
        std::array<bool, MOST_TABLES> there{};
        int most = 0;
        for (int64_t j = 0; j < c.cols; ++j) {
            const int t = token(std::abs(int{c.codes[row * c.cols + j]})), column = c.by_column[j];
            ++often[column * TOKENS + t], most = std::max(most, t), there[column] = true;
        }
        int64_t best = INT64_MAX;
        for (int mine = 0; mine < c.tables; ++mine) {
            int64_t cost = 0;
            for (int column = 0; column < c.tables; ++column) {
                if (!there[column]) continue;
                const int32_t *price = prices + table_of(mine, column, c.tables) * TOKENS;
                for (int t = 0; t <= most; ++t) cost += int64_t{price[t]} * often[column * TOKENS + t];
            }
            if (cost < best) best = cost, by_row[row] = static_cast<uint8_t>(mine);
        }
    });
}

std::vector<uint8_t> encode(const Codes &c, const std::vector<uint8_t> &tables, int64_t together, int64_t *ends,
                            int threads) {
    const std::vector<Table> known = parse(tables, c.tables);
    std::vector<std::vector<uint8_t>> streams(count_groups(c.rows, together));
    parallel_for(static_cast<int64_t>(streams.size()), c.rows * c.cols * 8, threads, [&](int64_t group) {
        streams[group] = encode_rows(c, group * together, std::min(c.rows, (group + 1) * together), known);
    });
    std::vector<uint8_t> whole; // is kept as long as a run goes: no more memory than it has bytes
    whole.reserve(std::accumulate(streams.begin(), streams.end(), size_t{0},
                                  [](size_t sum, const auto &stream) { return sum + stream.size(); }));
    for (const auto &stream : streams) {
        whole.insert(whole.end(), stream.begin(), stream.end());
        *ends++ = static_cast<int64_t>(whole.size());
    }
    return whole;
}

void decode(const Codes &c, const std::vector<uint8_t> &tables, const uint8_t *stream, const int64_t *ends,
            int64_t together, int16_t *codes, int threads) {
    const std::vector<Table> known = parse(tables, c.tables);
    std::vector<Slots> slots(known.size());
    bool extras = false;
    for (size_t k = 0; k < known.size(); ++k)
        for (uint32_t symbol = 0; symbol < SYMBOLS; ++symbol) {
            const auto [often, start] = known[k][symbol];
            for (uint32_t i = 0; i < often; ++i) slots[k][start + i] = often | i << 13 | symbol << 25;
            extras |= often && symbol >= ZERO + DIRECT;
        }
    const auto by_class = tables_by_class(c);
    std::vector<Fault> faults(count_groups(c.rows, together), Fault::none);
    parallel_for(static_cast<int64_t>(faults.size()), c.rows * c.cols * 4, threads, [&](int64_t group) {
        const int64_t from = group * together, until = std::min(c.rows, from + together);
        const uint8_t *begin = stream + (group ? ends[group - 1] : 0), *end = stream + ends[group];
        faults[group] = decode_rows(c, from, until, slots, by_class, extras, begin, end, codes);
    });
    for (size_t group = 0; group < faults.size(); ++group) {
        const std::string where = " rows " + std::to_string(static_cast<int64_t>(group) * together) + " and on";
        if (faults[group] == Fault::ends) refuse("'stream' ends inside of" + where);
        if (faults[group] == Fault::behind) refuse("'stream' goes on behind" + where);
        if (faults[group] == Fault::uneven) refuse("'stream' does not come out even in" + where);
    }
}

} // namespace sparsessm::entropy
