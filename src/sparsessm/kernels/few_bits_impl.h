// Products with codes of few bits, for decoding. Included by product_impl.h, in the namespace of its level.

#if defined(__AVX2__)
#define INTEGERS 1 // bytes of codes meet bytes of inputs; else both are floats
// The numbers of eight bits are taken as signed ones, where an instruction for all that are not would overflow.
template <int WIDTH> constexpr bool SIGNED = !BYTES && WIDTH == 8;
#else
#define INTEGERS 0
template <int WIDTH> constexpr bool SIGNED = true;
#endif

// What a number that is stored as zero stands for where numbers are multiplied as they are stored.
template <int WIDTH> constexpr float LEAST = SIGNED<WIDTH> ? 0.0f : static_cast<float>(least_code(WIDTH));

// The 64 stored numbers of a row's block as bytes (few_bits.h): shifts and masks of vectors that are loaded several times
// over. No shift or rotation moves a wanted bit into another byte.
#if defined(__AVX512BW__)
using Numbers = __m512i;

template <int WIDTH> static inline Numbers numbers(const uint8_t *from) {
    if constexpr (WIDTH == 8) return _mm512_loadu_si512(from);
    __m512i out{};
    if constexpr (WIDTH & 4) {
        const __m512i both = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)));
        const __m512i turned = _mm512_srlv_epi64(both, _mm512_setr_epi64(0, 0, 0, 0, 4, 4, 4, 4));
        out = _mm512_and_si512(turned, _mm512_set1_epi8(15));
    }
    if constexpr (WIDTH & 2) {
        constexpr int at = WIDTH & 4;
        const __m512i all = _mm512_broadcast_i32x4(
            _mm_loadu_si128(reinterpret_cast<const __m128i *>(from + 8 * (WIDTH & 4))));
        const __m512i turns = _mm512_setr_epi64(at, at, at - 2, at - 2, at - 4, at - 4, at - 6, at - 6);
        out = _mm512_or_si512(out, _mm512_and_si512(_mm512_rolv_epi64(all, turns), _mm512_set1_epi8(3 << at)));
    }
    if constexpr (WIDTH & 1) {
        uint64_t bits;
        std::memcpy(&bits, from + 8 * (WIDTH & 6), 8);
        out = _mm512_mask_add_epi8(out, bits, out, _mm512_set1_epi8(1 << (WIDTH & 6)));
    }
    return out;
}

// Sums of some of the products with 64 bytes of inputs.
template <int WIDTH> static inline vec products(Numbers n, const int8_t *inputs) {
    const __m512i q = _mm512_load_si512(inputs);
#if BYTES
    return vec(_mm512_cvtepi32_ps(_mm512_dpbusd_epi32(__m512i{}, n, q)));
#else
    __m512i pairs;
    if constexpr (SIGNED<WIDTH>) {
        const __m512i code = _mm512_xor_si512(n, _mm512_set1_epi8(static_cast<char>(0x80)));
        const __m512i turned = _mm512_mask_sub_epi8(q, _mm512_movepi8_mask(code), __m512i{}, q);
        pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(code), turned);
    } else {
        pairs = _mm512_maddubs_epi16(n, q);
    }
    return vec(_mm512_cvtepi32_ps(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1))));
#endif
}
#elif defined(__AVX2__)
struct Numbers {
    __m256i low, high; // columns 0 to 31, 32 to 63
};

template <int WIDTH> static inline Numbers numbers(const uint8_t *from) {
    const auto load = [&](int at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from + at)); };
    const auto every = [](int byte) { return _mm256_set1_epi8(static_cast<char>(byte)); };
    if constexpr (WIDTH == 8) return {load(0), load(32)};
    Numbers out{};
    if constexpr (WIDTH & 4) {
        const __m256i both = load(0);
        out = {_mm256_and_si256(both, every(15)), _mm256_and_si256(_mm256_srli_epi16(both, 4), every(15))};
    }
    if constexpr (WIDTH & 2) {
        constexpr int at = WIDTH & 4;
        const __m256i all = _mm256_broadcastsi128_si256(
            _mm_loadu_si128(reinterpret_cast<const __m128i *>(from + 8 * (WIDTH & 4))));
        const auto turned = [&](int first, int second) { // each half by its own number of bits, to the left or right
            const __m256i left = _mm256_setr_epi64x(first, first, second, second);
            const __m256i right = _mm256_sub_epi64(__m256i{}, left); // a count that is too large gives zeros
            return _mm256_and_si256(_mm256_or_si256(_mm256_sllv_epi64(all, left), _mm256_srlv_epi64(all, right)),
                                    every(3 << at));
        };
        out = {_mm256_or_si256(out.low, turned(at, at - 2)), _mm256_or_si256(out.high, turned(at - 4, at - 6))};
    }
    if constexpr (WIDTH & 1) {
        const auto spread = [&](int half) { // bit i into byte i
            int32_t bits;
            std::memcpy(&bits, from + 8 * (WIDTH & 6) + 4 * half, 4);
            const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(bits),
                                                      _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202,
                                                                         0x0303030303030303));
            const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
            return _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit), every(1 << (WIDTH & 6)));
        };
        out = {_mm256_or_si256(out.low, spread(0)), _mm256_or_si256(out.high, spread(1))};
    }
    return out;
}

template <int WIDTH> static inline vec products(Numbers n, const int8_t *inputs) {
    const auto *q = reinterpret_cast<const __m256i *>(inputs);
    const auto pairs = [](__m256i numbers, __m256i q) {
        if constexpr (!SIGNED<WIDTH>) return _mm256_maddubs_epi16(numbers, q);
        const __m256i code = _mm256_xor_si256(numbers, _mm256_set1_epi8(static_cast<char>(0x80)));
        return _mm256_maddubs_epi16(_mm256_abs_epi8(code), _mm256_sign_epi8(q, code));
    };
    const __m256i low = pairs(n.low, _mm256_load_si256(q)), high = pairs(n.high, _mm256_load_si256(q + 1));
    const auto four = [](__m256i two) { return _mm256_madd_epi16(two, _mm256_set1_epi16(1)); };
    // four products of at most 63 times 127 fit into 16 bits
    const __m256i sum = WIDTH <= 6 ? four(_mm256_add_epi16(low, high)) : _mm256_add_epi32(four(low), four(high));
    return vec(_mm256_cvtepi32_ps(sum));
}
#endif

// What blocks [block, end) of one width add to the sums of four rows and COLS columns of inputs.
template <int WIDTH, int COLS>
static const uint8_t *add_codes(const Inputs &in, int64_t first, const uint8_t *at, int64_t block, int64_t end,
                                vec (*sums)[COLS], float *below) {
    if constexpr (!SIGNED<WIDTH>)
        for (int b = 0; b < COLS; ++b) {
            const float *before = in.before.data() + (first + b) * (in.width / BLOCK + 1);
            below[b] += LEAST<WIDTH> * (before[end] - before[block]);
        }
    vec acc[GROUP][COLS]; // else the compiler leaves them in memory
    std::memcpy(acc, sums, sizeof acc);
    for (; block < end; ++block) {
#pragma GCC unroll 8
        for (int line = 0; line < GROUP * WIDTH * 8; line += 64) PREFETCH(at + line);
#pragma GCC unroll 4
        for (int r = 0; r < GROUP; ++r, at += 8 * WIDTH) {
#if INTEGERS
            const Numbers own = numbers<WIDTH>(at);
            for (int b = 0; b < COLS; ++b) {
                const int64_t i = (first + b) * (in.width / BLOCK) + block;
                acc[r][b] += splat(in.scale[i]) * products<WIDTH>(own, &in.q[i * BLOCK]);
            }
#else
            uint8_t whole[BLOCK];
            cut_apart(at, WIDTH, whole);
            for (int i = 0; i < BLOCK; ++i) whole[i] = static_cast<uint8_t>(whole[i] + least_code(WIDTH));
            const float *x = in.x.data() + first * in.width + block * BLOCK;
#pragma GCC unroll 16
            for (int p = 0; p < BLOCK; p += LANES) {
                vec w;
                widen<Value::i8>(whole + p, LANES, &w);
                for (int b = 0; b < COLS; ++b) acc[r][b] += w * load(x + b * in.width + p);
            }
#endif
        }
    }
    std::memcpy(sums, acc, sizeof acc);
    return at;
}

// Four rows times COLS columns of inputs.
template <int COLS>
static void dot_codes(const Matrix &m, const Inputs &in, int64_t first, int64_t group, float (*sums)[GROUP]) {
    vec acc[GROUP][COLS] = {};
    float below[COLS] = {}; // what the least of the codes adds, which numbers are stored above
    const uint8_t *at = m.values + m.offsets[group], *widths = m.widths.data() + group * m.blocks;
    for (int64_t block = 0, end; block < m.blocks; block = end) {
        for (end = block + 1; end < m.blocks && widths[end] == widths[block];) ++end;
        switch (widths[block]) {
        case 0: break;
        case 1: at = add_codes<1, COLS>(in, first, at, block, end, acc, below); break;
        case 2: at = add_codes<2, COLS>(in, first, at, block, end, acc, below); break;
        case 3: at = add_codes<3, COLS>(in, first, at, block, end, acc, below); break;
        case 4: at = add_codes<4, COLS>(in, first, at, block, end, acc, below); break;
        case 5: at = add_codes<5, COLS>(in, first, at, block, end, acc, below); break;
        case 6: at = add_codes<6, COLS>(in, first, at, block, end, acc, below); break;
        case 7: at = add_codes<7, COLS>(in, first, at, block, end, acc, below); break;
        default: at = add_codes<8, COLS>(in, first, at, block, end, acc, below);
        }
    }
    for (int b = 0; b < COLS; ++b) {
        add_up(&acc[0][b], COLS, sums[b]);
        for (int r = 0; r < GROUP; ++r) sums[b][r] += below[b];
    }
    const Stray *stray = m.strays.data() + m.stray_offsets[group];
    for (int64_t r = 0; r < std::min<int64_t>(GROUP, m.rows - group * GROUP); ++r) {
        constexpr int WAYS = 4; // independent sums, as each waits for the one before it
        float more[WAYS][COLS] = {};
        const Stray *last = stray + m.stray_counts[group * GROUP + r];
        const auto add = [&](float *to, const Stray &one) {
            for (int b = 0; b < COLS; ++b)
                to[b] += static_cast<float>(one.more) * in.x[(first + b) * in.width + one.column];
        };
        for (; stray + WAYS <= last; stray += WAYS)
#pragma GCC unroll 4
            for (int way = 0; way < WAYS; ++way) add(more[way], stray[way]);
        for (; stray < last; ++stray) add(more[0], *stray);
        for (int b = 0; b < COLS; ++b) sums[b][r] += (more[0][b] + more[1][b]) + (more[2][b] + more[3][b]);
    }
}
