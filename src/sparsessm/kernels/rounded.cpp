// bfloat16 products for x86: inputs are rounded to nearest even on the way in, sums are float32. Everything is laid out
// in tiles of 1 KB, which AMX multiplies whole; AVX512_BF16 does the same with the same tiles, row by row.
//
// A tile of the left side holds 16 rows of 32 values; of the right side 16 pairs of values, of 16 columns each. So one
// is the other with its 32-bit elements transposed.
#include "cpu.h"
#include "rounded.h"

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <dlfcn.h>
#include <exception>
#include <memory>
#include <new>
#include <stdexcept>
#include <thread>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace sparsessm::rounded {
namespace {

#include "threads.h"

constexpr int64_t SIDE = 16, DEPTH = 32, TILE = SIDE * DEPTH; // of a tile: rows, values, numbers
constexpr int64_t BLOCK = 2 * SIDE;                           // rows and columns of the result made at once
constexpr int64_t HELD = 1 << 19;                             // numbers of x that stay in the second-level cache
constexpr int64_t DEEPEST = 128;                              // tiles of a row that are multiplied at once
constexpr int64_t STEPS = 1024, PANEL = 256;                  // of moments: rows at a time, columns of the left side

int64_t up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

struct Freed {
    void operator()(uint16_t *data) const { ::operator delete[](data, std::align_val_t(64)); }
};
using Numbers = std::unique_ptr<uint16_t[], Freed>;
Numbers numbers(int64_t count) {
    return Numbers(static_cast<uint16_t *>(::operator new[](count * sizeof(uint16_t), std::align_val_t(64))));
}

// 32 values, those from `left` on zero.
__m512i rounded(const float *from, int64_t left) {
    const auto some = [&](int64_t start) {
        const int64_t count = std::clamp<int64_t>(left - start, 0, 16);
        return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from + (count ? start : 0));
    };
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(some(16), some(0)));
}

void transpose(__m512i (&r)[16]) { // of 16 x 16 elements of 32 bits
    __m512i t[16];
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

void store(uint16_t *tile, const __m512i (&r)[16]) {
    for (int i = 0; i < 16; ++i) _mm512_store_si512(tile + i * DEPTH, r[i]);
}

// Rows [row, row + 16) and values [at, at + 32) of a matrix as a tile of the left side; zeros where it has ended.
void rows_of(const Matrix &m, int64_t row, int64_t at, __m512i (&r)[16]) {
    for (int64_t i = 0; i < SIDE; ++i)
        r[i] = row + i < m.rows ? rounded(m.data + (row + i) * m.stride + at, m.width - at) : _mm512_setzero_si512();
}

// Columns [at, at + 16) of rows [row, row + 32) of a matrix, in pairs: a tile of the right side.
void pairs_of(const Matrix &m, int64_t row, int64_t last, int64_t at, __m512i (&r)[16]) {
    alignas(64) static const uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                   8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i turned = _mm512_load_si512(order);
    const int64_t count = std::clamp<int64_t>(m.width - at, 0, 16);
    const auto mask = static_cast<__mmask16>((1u << count) - 1);
    const auto one = [&](int64_t i) {
        return i < last ? _mm512_maskz_loadu_ps(mask, m.data + i * m.stride + at) : _mm512_setzero_ps();
    };
    for (int64_t i = 0; i < 16; ++i) {
        const auto both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(one(row + 2 * i + 1), one(row + 2 * i)));
        r[i] = _mm512_permutexvar_epi16(turned, both);
    }
}

// result (32 x 32) = two rows of left tiles times two columns of right tiles, `count` of them each, in order.
using Multiply = void (*)(int64_t count, const uint16_t *const left[2], const uint16_t *const right[2], float *result);

void by_vectors(int64_t count, const uint16_t *const left[2], const uint16_t *const right[2], float *result) {
    for (int64_t row = 0; row < BLOCK; row += 8) {
        __m512 sum[8][2];
        for (auto &pair : sum) pair[0] = pair[1] = _mm512_setzero_ps();
        const uint16_t *from = left[row / SIDE] + row % SIDE * DEPTH;
        for (int64_t tile = 0; tile < count; ++tile)
            for (int64_t k = 0; k < SIDE; ++k) {
                const auto b0 = reinterpret_cast<__m512bh>(_mm512_load_si512(right[0] + tile * TILE + k * DEPTH));
                const auto b1 = reinterpret_cast<__m512bh>(_mm512_load_si512(right[1] + tile * TILE + k * DEPTH));
                for (int i = 0; i < 8; ++i) {
                    int pair;
                    std::memcpy(&pair, from + tile * TILE + i * DEPTH + 2 * k, sizeof pair);
                    const auto a = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
                    sum[i][0] = _mm512_dpbf16_ps(sum[i][0], a, b0);
                    sum[i][1] = _mm512_dpbf16_ps(sum[i][1], a, b1);
                }
            }
        for (int i = 0; i < 8; ++i)
            for (int j = 0; j < 2; ++j) _mm512_store_ps(result + (row + i) * BLOCK + j * SIDE, sum[i][j]);
    }
}

void by_tiles(int64_t count, const uint16_t *const left[2], const uint16_t *const right[2], float *result) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t tile = 0; tile < count * TILE; tile += TILE) {
        _tile_loadd(4, left[0] + tile, 64);
        _tile_loadd(6, right[0] + tile, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, right[1] + tile, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, left[1] + tile, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    constexpr int64_t bytes = BLOCK * sizeof(float);
    _tile_stored(0, result, bytes);
    _tile_stored(1, result + SIDE, bytes);
    _tile_stored(2, result + SIDE * BLOCK, bytes);
    _tile_stored(3, result + SIDE * BLOCK + SIDE, bytes);
}

// Part `which` of `parts` of some numbers on their way into the second-level cache.
void ahead(const uint16_t *from, int64_t count, int64_t which, int64_t parts) {
    const int64_t lines = count / DEPTH;
    for (int64_t line = lines * which / parts; line < lines * (which + 1) / parts; ++line)
        _mm_prefetch(reinterpret_cast<const char *>(from + line * DEPTH), _MM_HINT_T1);
}

// The thread's tiles, for the length of one piece of work.
class Tiles {
  public:
    explicit Tiles(const std::string &unit) : configured(unit == "amx"), multiply(configured ? by_tiles : by_vectors) {
        if (!configured) return;
        struct alignas(64) {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } shape;
        _tile_loadconfig(&shape);
    }
    ~Tiles() {
        if (configured) _tile_release();
    }
    Tiles(const Tiles &) = delete;
    Tiles &operator=(const Tiles &) = delete;

  private:
    bool configured;

  public:
    const Multiply multiply;
};

bool tiles_allowed() { // the kernel must be asked once for each process
#if defined(__linux__) && defined(SYS_arch_prctl)
    constexpr int request = 0x1023, tile_data = 18;
    static const bool allowed = syscall(SYS_arch_prctl, request, tile_data) == 0;
    return allowed;
#else
    return false;
#endif
}

void refuse_unknown(const std::string &unit) {
    const auto known = units();
    if (std::find(known.begin(), known.end(), unit) == known.end())
        throw std::invalid_argument("this CPU has no bfloat16 products by '" + unit + "'");
}

} // namespace

std::vector<std::string> units() {
    static const std::vector<std::string> found = [] {
        std::vector<std::string> names;
        if (cpu::avx512() && cpu::has(7, 1, cpu::EAX, 5)) {
            names.push_back("avx512bf16");
            if (cpu::has(7, 0, cpu::EDX, 22) && cpu::has(7, 0, cpu::EDX, 24) && tiles_allowed()) names.push_back("amx");
        }
        return names;
    }();
    return found;
}

int64_t packed_size(int64_t rows, int64_t width) { return up(rows, BLOCK) * up(width, DEPTH); }

void pack(const Matrix &weight, bool turned, uint16_t *packed, int threads) {
    const int64_t deep = up(turned ? weight.rows : weight.width, DEPTH) / DEPTH;
    const int64_t strips = up(turned ? weight.width : weight.rows, BLOCK) / SIDE;
    parallel_for(strips, weight.rows * weight.width, threads, [&](int64_t strip) {
        __m512i r[16];
        for (int64_t k = 0; k < deep; ++k) {
            if (turned) {
                pairs_of(weight, k * DEPTH, weight.rows, strip * SIDE, r);
            } else {
                rows_of(weight, strip * SIDE, k * DEPTH, r);
                transpose(r);
            }
            store(packed + (strip * deep + k) * TILE, r);
        }
    });
}

void linear(const std::string &unit, const Matrix &x, const uint16_t *packed, int64_t out, const float *bias, float *y,
            int threads) {
    refuse_unknown(unit);
    if (!x.rows) return;
    const int64_t deep = up(x.width, DEPTH) / DEPTH, strip = deep * TILE, held = std::clamp<int64_t>(deep, 1, DEEPEST);
    const int64_t most = std::max(BLOCK, HELD / (held * DEPTH) / BLOCK * BLOCK);
    const int64_t tall = std::min(most, up((x.rows + threads - 1) / threads, BLOCK)); // rows for one thread at a time
    parallel_for((x.rows + tall - 1) / tall, x.rows * x.width * out / 16, threads, [&](int64_t panel) {
        const int64_t first = panel * tall, blocks = up(std::min(tall, x.rows - first), BLOCK) / BLOCK;
        const Numbers left = numbers(blocks * 2 * held * TILE);
        const Tiles tiles(unit);
        alignas(64) float result[BLOCK * BLOCK];
        for (int64_t begin = 0; begin == 0 || begin < deep; begin += held) { // sums go on in y
            const int64_t here = std::min(held, deep - begin), tall_strip = here * TILE;
            __m512i r[16];
            for (int64_t i = 0; i < 2 * blocks; ++i)
                for (int64_t k = 0; k < here; ++k) {
                    rows_of(x, first + i * SIDE, (begin + k) * DEPTH, r);
                    store(left.get() + i * tall_strip + k * TILE, r);
                }
            for (int64_t column = 0; column < out; column += BLOCK) {
                const uint16_t *const b = packed + column / SIDE * strip + begin * TILE, *const right[2] = {b, b + strip};
                const int64_t count = std::min(BLOCK, out - column), next = column + BLOCK < out ? tall_strip : 0;
                const auto low = static_cast<__mmask16>((1u << std::min<int64_t>(count, 16)) - 1);
                const auto high = static_cast<__mmask16>((1u << std::max<int64_t>(count - 16, 0)) - 1);
                const auto part = [&](__mmask16 some, const float *from) {
                    return from && some ? _mm512_maskz_loadu_ps(some, from) : _mm512_setzero_ps();
                };
                const float *const shift = begin || !bias ? nullptr : bias + column;
                const __m512 more[2] = {part(low, shift), part(high, shift ? shift + 16 : nullptr)};
                for (int64_t block = 0; block < blocks; ++block) {
                    const uint16_t *const a = left.get() + 2 * block * tall_strip, *const rows[2] = {a, a + tall_strip};
                    ahead(right[0] + 2 * strip, next, block, blocks);
                    ahead(right[1] + 2 * strip, next, block, blocks);
                    tiles.multiply(here, rows, right, result);
                    const int64_t start = first + block * BLOCK, end = std::min(start + BLOCK, x.rows);
                    for (int64_t row = start; row < end; ++row) {
                        const float *from = result + (row - start) * BLOCK;
                        float *to = y + row * out + column;
                        const __m512 before[2] = {begin ? part(low, to) : more[0], begin ? part(high, to + 16) : more[1]};
                        _mm512_mask_storeu_ps(to, low, _mm512_add_ps(_mm512_load_ps(from), before[0]));
                        if (high)
                            _mm512_mask_storeu_ps(to + 16, high, _mm512_add_ps(_mm512_load_ps(from + 16), before[1]));
                    }
                }
            }
        }
    });
}

bool add_moments(const std::string &unit, const Matrix &left, const Matrix &right, double *total, int threads) {
    refuse_unknown(unit);
    const bool same = left.data == right.data && left.width == right.width && left.stride == right.stride;
    const int64_t most = std::min(up(left.rows, DEPTH), STEPS);
    const int64_t tall = up(left.width, BLOCK) / SIDE, wide = up(right.width, BLOCK) / SIDE; // in tiles
    const Numbers a = numbers(tall * SIDE * most), b = numbers(wide * SIDE * most);
    for (int64_t begin = 0; begin < left.rows; begin += STEPS) {
        const int64_t end = std::min(begin + STEPS, left.rows), deep = up(end - begin, DEPTH) / DEPTH;
        const int64_t strip = deep * TILE;
        const int64_t cost = (end - begin) * (left.width + right.width);
        parallel_for(same ? wide : tall + wide, cost, threads, [&](int64_t which) {
            __m512i r[16];
            const bool first = which >= wide; // columns of the left side
            const int64_t column = first ? which - wide : which;
            for (int64_t k = 0; k < deep; ++k) {
                const int64_t at = column * strip + k * TILE;
                pairs_of(first ? left : right, begin + k * DEPTH, end, column * SIDE, r);
                if (!first) store(b.get() + at, r);
                if (!first && !same) continue;
                transpose(r);
                store(a.get() + at, r);
            }
        });
        const int64_t panels = up(left.width, PANEL) / PANEL;
        parallel_for(panels, (end - begin) * left.width * right.width / 16, threads, [&](int64_t panel) {
            const Tiles tiles(unit);
            alignas(64) float result[BLOCK * BLOCK];
            const int64_t low = panel * PANEL, high = std::min(low + PANEL, left.width);
            for (int64_t column = same ? low : 0; column < right.width; column += BLOCK) {
                const uint16_t *const over = b.get() + column / SIDE * strip, *const columns[2] = {over, over + strip};
                const int64_t last = same ? std::min(high, column + BLOCK) : high;
                const int64_t count = std::min(BLOCK, right.width - column);
                for (int64_t row = low; row < last; row += BLOCK) {
                    const uint16_t *const from = a.get() + row / SIDE * strip, *const rows[2] = {from, from + strip};
                    tiles.multiply(deep, rows, columns, result);
                    for (int64_t i = 0; i < std::min(BLOCK, left.width - row); ++i) {
                        double *to = total + (row + i) * right.width + column;
                        for (int64_t j = 0; j < count; ++j) to[j] += result[i * BLOCK + j];
                    }
                }
            }
        });
    }
    return same;
}

} // namespace sparsessm::rounded
