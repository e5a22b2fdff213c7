// Products with codes of few bits. Included by product_impl.h, in the namespace of its level.
//
// Rows of a strip are the lanes. What they meet, four bytes of inputs, is the same for all of them; each lane sums its
// own row, as integers over a piece of 32 columns and as floats over the pieces. Integers are exact, and so a result
// does not depend on how many columns of inputs are multiplied together, and is the same at all levels that fuse products
// and sums of floats.

constexpr int PARTS = STRIP / LANES; // vectors of rows
constexpr int MOST_COLS = LANES == 16 ? 8 : 4;
typedef uint16_t pairs __attribute__((vector_size(4 * LANES)));

static inline pairs line(const uint8_t *from) {
    pairs out;
    std::memcpy(&out, from, sizeof out);
    return out;
}

// BITS bits of every byte from FROM on, at TO. No wanted bit comes into another byte.
template <int BITS, int TO, int FROM> static inline pairs cut(pairs all) {
    constexpr uint16_t mask = ((1 << BITS) - 1) << TO;
    const pairs moved = FROM > TO ? all >> (FROM > TO ? FROM - TO : 0) : all << (TO > FROM ? TO - FROM : 0);
    return moved & static_cast<uint16_t>(mask << 8 | mask);
}

// The stored numbers of unit K of a piece (few_bits.h), those of a vector of rows.
template <int WIDTH, int K> static inline pairs numbers(const uint8_t *piece) {
    if constexpr (WIDTH == 8) return line(piece + LINE * K);
    pairs out{};
    if constexpr (WIDTH & 4) out = cut<4, 0, K / 4 * 4>(line(piece + LINE * (K % 4)));
    if constexpr (WIDTH & 2) out |= cut<2, WIDTH & 4, K / 2 * 2>(line(piece + LINE * ((WIDTH & 4) + K % 2)));
    if constexpr (WIDTH & 1) out |= cut<1, WIDTH & 6, K>(line(piece + LINE * (WIDTH & 6)));
    return out;
}

// `multiply_add` adds four products of a lane to a sum of its kind, `as_integers` makes integers of 32 bits of it. AT_ONCE
// units may be added up before: AT_ONCE * 2 * 127 * (2^WIDTH - 1) must be below 2^15 where sums have 16 bits.
#if BYTES
using Sum = __m512i;
template <int> constexpr int AT_ONCE = UNITS;
template <int> constexpr bool SIGNED = false; // numbers are taken as they are stored

template <int> static inline Sum multiply_add(Sum sum, pairs numbers, int32_t q) {
    return _mm512_dpbusd_epi32(sum, __m512i(numbers), _mm512_set1_epi32(q));
}
static inline ivec as_integers(Sum sum) { return ivec(sum); }
#elif defined(__AVX2__)
template <int WIDTH> constexpr int AT_ONCE = WIDTH <= 4 ? UNITS : WIDTH >= 7 ? 1 : UNITS >> (WIDTH - 4);
template <int WIDTH> constexpr bool SIGNED = WIDTH == 8; // two products of 255 and 127 are beyond 16 bits
#if LANES == 16
using Sum = __m512i;
template <int WIDTH> static inline Sum multiply_add(Sum sum, pairs numbers, int32_t q) {
    const __m512i n = __m512i(numbers), inputs = _mm512_set1_epi32(q);
    if constexpr (!SIGNED<WIDTH>) return _mm512_add_epi16(sum, _mm512_maddubs_epi16(n, inputs));
    const __m512i code = _mm512_xor_si512(n, _mm512_set1_epi8(static_cast<char>(0x80)));
    const __m512i turned = _mm512_mask_sub_epi8(inputs, _mm512_movepi8_mask(code), __m512i{}, inputs);
    return _mm512_add_epi16(sum, _mm512_maddubs_epi16(_mm512_abs_epi8(code), turned));
}
static inline ivec as_integers(Sum sum) { return ivec(_mm512_madd_epi16(sum, _mm512_set1_epi16(1))); }
#else
using Sum = __m256i;
template <int WIDTH> static inline Sum multiply_add(Sum sum, pairs numbers, int32_t q) {
    const __m256i n = __m256i(numbers), inputs = _mm256_set1_epi32(q);
    if constexpr (!SIGNED<WIDTH>) return _mm256_add_epi16(sum, _mm256_maddubs_epi16(n, inputs));
    const __m256i code = _mm256_xor_si256(n, _mm256_set1_epi8(static_cast<char>(0x80)));
    return _mm256_add_epi16(sum, _mm256_maddubs_epi16(_mm256_abs_epi8(code), _mm256_sign_epi8(inputs, code)));
}
static inline ivec as_integers(Sum sum) { return ivec(_mm256_madd_epi16(sum, _mm256_set1_epi16(1))); }
#endif
#elif defined(__ARM_FEATURE_DOTPROD)
using Sum = ivec;
template <int> constexpr int AT_ONCE = UNITS;
template <int WIDTH> constexpr bool SIGNED = WIDTH == 8; // the instruction takes all bytes as signed

template <int WIDTH> static inline Sum multiply_add(Sum sum, pairs numbers, int32_t q) {
    const int8x16_t n = vreinterpretq_s8_u16(uint16x8_t(numbers)), inputs = vreinterpretq_s8_s32(vdupq_n_s32(q));
    return ivec(vdotq_s32(int32x4_t(sum), SIGNED<WIDTH> ? veorq_s8(n, vdupq_n_s8(-128)) : n, inputs));
}
static inline ivec as_integers(Sum sum) { return sum; }
#else
using Sum = ivec;
template <int> constexpr int AT_ONCE = UNITS;
template <int> constexpr bool SIGNED = false;

template <int> static inline Sum multiply_add(Sum sum, pairs numbers, int32_t q) {
    ivec four;
    std::memcpy(&four, &numbers, sizeof four);
    for (int i = 0; i < 4; ++i) sum += (four >> (8 * i) & 255) * static_cast<int8_t>(q >> (8 * i));
    return sum;
}
static inline ivec as_integers(Sum sum) { return sum; }
#endif

// ---- inputs, in chunks of columns that are multiplied together; the columns of a chunk lie next to each other

static int64_t chunk(int64_t left) {
    return left >= MOST_COLS ? MOST_COLS : left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

// Of each chunk, with the columns of the chunk as the last axis.
struct CodeInputs {
    Aligned<float> x;      // (64 * blocks, ...): as rounded, for strays; not filled where there are none
    Aligned<int32_t> q;    // (16 * blocks, ...): four bytes
    Aligned<float> scale;  // (blocks, ...): what a unit of q is worth
    Aligned<int32_t> minus_sums; // (pieces, ...): minus the sum of q
    int64_t width = 0;     // 64 * blocks
};

// Columns [first, first + cols) of the batch.
static void prepare_chunk(const Matrix &m, const float *x, int64_t stride, int64_t first, int64_t cols,
                          CodeInputs &in) {
    const bool strays = !m.strays.empty();
    alignas(64) float values[BLOCK];
    alignas(64) int8_t bytes[BLOCK];
    for (int64_t b = 0; b < cols; ++b)
        for (int64_t block = 0; block < m.blocks; ++block) {
            const float *from = x + (first + b) * stride;
            const int64_t c0 = block * BLOCK, count = std::min<int64_t>(BLOCK, m.cols - c0);
            if (m.inputs.empty()) std::memcpy(values, from + c0, count * sizeof(float));
            else
                for (int64_t i = 0; i < count; ++i) values[i] = from[m.inputs[c0 + i]];
            if (!m.columns.empty())
                for (int64_t i = 0; i < count; ++i) values[i] *= m.columns[c0 + i];
            std::fill(values + count, values + BLOCK, 0.0f);
            float unit;
            int32_t sums[BLOCK / PIECE];
            quantise(values, bytes, &unit, sums);
            in.scale[first * m.blocks + block * cols + b] = unit;
            float *to = in.x.data() + first * in.width + c0 * cols + b;
            int32_t *four = &in.q[first * (in.width / 4) + c0 / 4 * cols + b];
            if (cols == 1) {
                std::memcpy(four, bytes, sizeof bytes);
                if (strays) std::memcpy(to, values, sizeof values);
            } else {
                for (int i = 0; i < BLOCK / 4; ++i) std::memcpy(four + i * cols, bytes + 4 * i, 4);
                for (int i = 0; strays && i < BLOCK; ++i) to[i * cols] = values[i];
            }
            for (int piece = 0; piece < BLOCK / PIECE; ++piece)
                in.minus_sums[first * m.pieces() + (block * 2 + piece) * cols + b] = -sums[piece];
        }
}

static void make_room(const Matrix &m, int64_t batch, CodeInputs &in) {
    in.width = m.blocks * BLOCK;
    in.x.resize(m.strays.empty() ? 0 : batch * in.width), in.q.resize(batch * in.width / 4);
    in.scale.resize(batch * m.blocks), in.minus_sums.resize(batch * m.pieces());
}

// ---- products

// What a piece adds to the integers of a vector of rows.
template <int WIDTH, int COLS, size_t... K>
__attribute__((always_inline)) static inline void add_units(const uint8_t *piece, const int32_t *q, ivec *total,
                                                            std::index_sequence<K...>) {
    Sum sum[COLS] = {};
    const auto unit = [&](auto k) {
        const pairs own = numbers<WIDTH, k>(piece);
        for (int b = 0; b < COLS; ++b) {
            sum[b] = multiply_add<WIDTH>(sum[b], own, q[k * COLS + b]);
            if constexpr ((k + 1) % AT_ONCE<WIDTH> == 0) total[b] += as_integers(sum[b]), sum[b] = Sum{};
        }
    };
    (unit(std::integral_constant<int, K>{}), ...);
}

// What COUNT pieces of one block add to the sums of all rows; scales: their own there, or null. Not inlined: with eight
// columns gcc 12 would keep minus_sums in registers, and a fifth of the speed would be lost.
template <int WIDTH, int COLS, int COUNT>
__attribute__((noinline)) static void add_block(const uint8_t *at, const int32_t *q, const int32_t *minus_sums,
                                                const float *scale,
                             const float *scales, bool odd, vec (*sums)[COLS]) {
    const auto minus = [&](int b) {
        return ivec{} + (COUNT == 2 ? minus_sums[b] + minus_sums[COLS + b] : minus_sums[b]);
    };
#pragma GCC unroll 4
    for (int part = 0; part < PARTS; ++part) {
        ivec total[COLS];
        for (int b = 0; b < COLS; ++b) total[b] = minus(b) * (SIGNED<WIDTH> ? 0 : -least_code(WIDTH));
#pragma GCC unroll 2
        for (int i = 0; i < COUNT; ++i)
            add_units<WIDTH, COLS>(at + i * LINE * WIDTH + part * 4 * LANES, q + i * UNITS * COLS, total,
                                   std::make_index_sequence<UNITS>{});
        if (odd)
            for (int b = 0; b < COLS; ++b) total[b] += total[b] - minus(b);
        for (int b = 0; b < COLS; ++b) {
            vec whole = __builtin_convertvector(total[b], vec);
            if (scales) whole *= load(scales + part * LANES);
            sums[part][b] += splat(scale[b]) * whole;
        }
    }
}

// Pieces [piece, end), all of one width; those of a block become floats together, as one scale is for all of it.
template <int WIDTH, int COLS>
static const uint8_t *add_pieces(const Matrix &m, const CodeInputs &in, int64_t first, int64_t strip, const uint8_t *at,
                                 int64_t piece, int64_t end, vec (*sums)[COLS]) {
    vec own[PARTS][COLS]; // else the compiler leaves them in memory
    std::memcpy(own, sums, sizeof own);
    const int32_t *q = &in.q[first * (in.width / 4)], *minus_sums = &in.minus_sums[first * m.pieces()];
    const float *scale = &in.scale[first * m.blocks];
    const auto add = [&](auto count) {
        constexpr int LINES = decltype(count)::value * WIDTH;
#pragma GCC unroll 16
        for (int i = 0; i < LINES; ++i) PREFETCH(at + LINE * i);
        add_block<WIDTH, COLS, count>(at, q + piece * UNITS * COLS, minus_sums + piece * COLS, scale + piece / 2 * COLS,
                                      m.scale_columns ? m.scales_of(strip, piece * PIECE) : nullptr, m.odd, own);
        piece += count, at += count * LINE * WIDTH;
    };
    const std::integral_constant<int, 1> one{};
    const std::integral_constant<int, 2> two{};
    if (piece % 2) add(one);
    while (m.scale_columns % BLOCK == 0 && piece + 2 <= end) add(two);
    while (piece < end) add(one);
    std::memcpy(sums, own, sizeof own);
    return at;
}

// A strip times COLS columns of inputs -> out (STRIP, COLS), without the scales of rows.
template <int COLS>
static void dot_strip(const Matrix &m, const CodeInputs &in, int64_t first, int64_t strip, float (*out)[STRIP]) {
    vec sums[PARTS][COLS] = {};
    const uint8_t *at = m.values + m.offsets[strip], *widths = m.widths.data() + strip * m.pieces();
    for (int64_t piece = 0, end; piece < m.pieces(); piece = end) {
        for (end = piece + 1; end < m.pieces() && widths[end] == widths[piece];) ++end;
        switch (widths[piece]) {
        case 0: // all are zero; odd codes never are
            for (int64_t i = piece; i < end; ++i)
                for (int b = 0; b < COLS; ++b) // not zero if an input is no number
                    for (int part = 0; part < PARTS; ++part)
                        sums[part][b] += splat(in.scale[first * m.blocks + i / 2 * COLS + b] * 0.0f);
            break;
        case 1: at = add_pieces<1, COLS>(m, in, first, strip, at, piece, end, sums); break;
        case 2: at = add_pieces<2, COLS>(m, in, first, strip, at, piece, end, sums); break;
        case 3: at = add_pieces<3, COLS>(m, in, first, strip, at, piece, end, sums); break;
        case 4: at = add_pieces<4, COLS>(m, in, first, strip, at, piece, end, sums); break;
        case 5: at = add_pieces<5, COLS>(m, in, first, strip, at, piece, end, sums); break;
        case 6: at = add_pieces<6, COLS>(m, in, first, strip, at, piece, end, sums); break;
        case 7: at = add_pieces<7, COLS>(m, in, first, strip, at, piece, end, sums); break;
        default: at = add_pieces<8, COLS>(m, in, first, strip, at, piece, end, sums);
        }
    }
    for (int b = 0; b < COLS; ++b)
        for (int part = 0; part < PARTS; ++part) store(out[b] + part * LANES, sums[part][b], LANES);
    const int64_t begin = m.stray_offsets[strip], end = m.stray_offsets[strip + 1];
    if (begin == end) return;
    float more[STRIP][COLS] = {};
    const float *x = in.x.data() + first * in.width;
    for (int64_t i = begin; i < end; ++i) {
        const Stray &one = m.strays[i];
        auto value = static_cast<float>(m.odd ? 2 * one.value() : one.value());
        if (m.scale_columns) value *= m.scales_of(strip, one.column)[one.row()];
        for (int b = 0; b < COLS; ++b) more[one.row()][b] += value * x[one.column * COLS + b];
    }
    for (int r = 0; r < STRIP; ++r)
        for (int b = 0; b < COLS; ++b) out[b][r] += more[r][b];
}

// Rows of groups [begin, end) times `batch` columns of inputs, which are prepared.
static void project_codes(const Matrix &m, const CodeInputs &in, int64_t batch, int64_t begin, int64_t end, float *out,
                          int64_t stride) {
    const int64_t strips = (std::min(m.rows, end * GROUP) + STRIP - 1) / STRIP;
    for (int64_t strip = begin * GROUP / STRIP; strip < strips; ++strip) {
        const int64_t r0 = strip * STRIP, rows = std::min<int64_t>(STRIP, m.rows - r0);
        for (int64_t b = 0, cols; b < batch; b += cols) { // the second turn finds the strip in a cache
            float sums[MOST_COLS][STRIP];
            cols = chunk(batch - b);
            if (cols == MOST_COLS) dot_strip<MOST_COLS>(m, in, b, strip, sums);
            else if (cols == 4) dot_strip<4>(m, in, b, strip, sums);
            else if (cols == 2) dot_strip<2>(m, in, b, strip, sums);
            else dot_strip<1>(m, in, b, strip, sums);
            for (int64_t c = 0; c < cols; ++c) {
                float *to = out + (b + c) * stride + r0 / BAND * BAND;
                for (int64_t r = 0; r < rows; ++r) to[m.place[r0 + r]] = sums[c][r] * m.scale[r0 + r];
            }
        }
    }
}

static void prepare_codes(const Matrix &m, const float *x, int64_t stride, int64_t batch, CodeInputs &in) {
    make_room(m, batch, in);
    for (int64_t b = 0, cols; b < batch; b += cols) cols = chunk(batch - b), prepare_chunk(m, x, stride, b, cols, in);
}

// Columns of inputs whose bytes stay in the second-level cache while strips go by.
constexpr int64_t TOKENS = 16 * MOST_COLS;

static void product_codes(const Product &p, int threads) {
    const Matrix &m = p.matrix;
    const int64_t bands = (m.groups + m.together() - 1) / m.together(), cost = p.length * m.nonzero / LANES;
    CodeInputs in;
    for (int64_t from = 0; from < p.length; from += TOKENS) {
        const int64_t tokens = std::min(TOKENS, p.length - from), chunks = (tokens + MOST_COLS - 1) / MOST_COLS;
        make_room(m, tokens, in);
        parallel_for(chunks, tokens * m.cols, threads, [&](int64_t unit) {
            const int64_t end = std::min(tokens, (unit + 1) * MOST_COLS);
            for (int64_t b = unit * MOST_COLS, cols; b < end; b += cols)
                cols = chunk(end - b), prepare_chunk(m, p.x + from * p.x_stride, p.x_stride, b, cols, in);
        });
        parallel_for(bands, cost, threads, [&](int64_t band) {
            const int64_t begin = band * m.together(), end = std::min(m.groups, begin + m.together());
            project_codes(m, in, tokens, begin, end, p.out + from * p.out_stride, p.out_stride);
            finish(p, from, tokens, begin * GROUP, std::min(m.rows, end * GROUP));
        });
    }
}
