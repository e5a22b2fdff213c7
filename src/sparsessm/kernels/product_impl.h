// Products with a weight matrix whose zeros are not stored. Included by scan_impl.h's levels, in their namespace.
//
// `project` is for decoding, a few columns at a time and bound by memory: a group of four rows is one stream of masks
// and values; each mask expands its values into vectors that meet the inputs in column order. `product` is for prompts,
// bound by arithmetic: tokens are the lanes, and only the set bits of a mask are visited. The inputs of a block stay in
// the first-level cache meanwhile.

#if defined(__AVX512VBMI2__) && defined(__AVX512VNNI__)
#define BYTES 1 // expand instructions for bytes, and dot products of them
#else
#define BYTES 0
#endif
#if defined(__AVX2__)
#define HALVES 1 // bfloat16 comes as pairs of columns: the even ones are shifted up, the odd ones only masked
#else
#define HALVES 0
#endif

// Columns that one piece of a mask covers, STEP / LANES vectors of weights.
template <Value V> constexpr int STEP = (HALVES && V == Value::bf16) ? 2 * LANES : LANES;

static inline float one(const uint8_t *at, Value value) {
    if (value == Value::i8) return static_cast<float>(static_cast<int8_t>(*at));
    uint32_t bits = 0;
    std::memcpy(&bits, at, value == Value::f32 ? 4 : 2);
    if (value == Value::bf16) bits <<= 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

#if defined(__AVX2__)
// For each byte of a mask where the packed values go, as a shuffle of eight 16-bit values; and, for 32-bit lanes, where
// they come from. Faster than the expand instructions where those are microcode (Zen 4), and hardly slower elsewhere.
struct Lookup {
    alignas(64) uint8_t halves[256][16]{}, lanes[256][8]{}, iota[64]{};
    constexpr Lookup() {
        for (int i = 0; i < 64; ++i) iota[i] = static_cast<uint8_t>(i);
        for (int mask = 0; mask < 256; ++mask)
            for (int lane = 0, next = 0; lane < 8; ++lane) {
                const bool kept = mask >> lane & 1;
                halves[mask][2 * lane] = static_cast<uint8_t>(kept ? 2 * next : 0x80);
                halves[mask][2 * lane + 1] = static_cast<uint8_t>(kept ? 2 * next + 1 : 0x80);
                lanes[mask][lane] = static_cast<uint8_t>(kept ? next++ : 0);
            }
    }
};
// Made by the compiler: code of this level that ran while the extension loads would stop a CPU that lacks it.
static constexpr Lookup lookup{};

static inline uint64_t count(uint64_t mask) { return static_cast<uint64_t>(__builtin_popcountll(mask)); }

// Eight columns of 16-bit values, those that the byte `mask` keeps; the others are zero.
static inline __m128i spread(const uint8_t *from, uint64_t mask) {
    return _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)),
                            _mm_load_si128(reinterpret_cast<const __m128i *>(lookup.halves[mask])));
}

// Sixteen columns.
static inline __m256i spread_two(const uint8_t *from, uint64_t mask) {
    const uint64_t first = mask & 0xff;
    return _mm256_inserti128_si256(_mm256_castsi128_si256(spread(from, first)),
                                   spread(from + 2 * count(first), mask >> 8 & 0xff), 1);
}
#endif

#if defined(__AVX512F__)
// Loads that the compiler must not fold into an expand instruction: from memory that is microcode on Zen 4, and slow.
static inline __m512i whole(const uint8_t *from) {
    __m512i out = _mm512_loadu_si512(from);
    asm("" : "+v"(out));
    return out;
}

static inline __m512i expand_halves(uint32_t bits, __m512i from) {
#if BYTES
    return _mm512_maskz_expand_epi16(bits, from);
#else
    return from; // not called
#endif
}
#endif

// The next vectors of a row: `bits` says which of the STEP columns have a value at `from`.
// bfloat16 has two ways, by shuffles or, if `wide`, by the expand instruction: each keeps other parts of the core busy.
template <Value V> static inline void expand(const uint8_t *from, uint64_t bits, vec *to, bool wide) {
#if defined(__AVX512F__)
    if constexpr (V == Value::f32) {
        to[0] = vec(_mm512_maskz_expand_ps(static_cast<__mmask16>(bits), _mm512_castsi512_ps(whole(from))));
    } else if constexpr (V == Value::bf16) {
        const __m512i both = BYTES && wide ? expand_halves(bits, whole(from)) : _mm512_inserti64x4(
            _mm512_castsi256_si512(spread_two(from, bits)),
            spread_two(from + 2 * count(bits & 0xffff), bits >> 16), 1);
        to[0] = vec(_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)));                           // even columns
        to[1] = vec(_mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(0xffff0000)))); // odd columns
    } else {
        const __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)));
        to[0] = vec(_mm512_cvtepi32_ps(_mm512_maskz_expand_epi32(static_cast<__mmask16>(bits), wide)));
    }
#elif LANES == 8
    if constexpr (V == Value::bf16) {
        const __m256i both = spread_two(from, bits);
        to[0] = vec(_mm256_castsi256_ps(_mm256_slli_epi32(both, 16)));
        to[1] = vec(_mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(0xffff0000))));
        return;
    }
    const __m256i order = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(lookup.lanes[bits])));
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i kept = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), bit), bit);
    __m256i raw = V == Value::f32 ? _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from))
                                  : _mm256_castps_si256(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(
                                        _mm_loadl_epi64(reinterpret_cast<const __m128i *>(from)))));
    to[0] = vec(_mm256_castsi256_ps(_mm256_and_si256(kept, _mm256_permutevar8x32_epi32(raw, order))));
#else
    for (int lane = 0; lane < LANES; ++lane) {
        to[0][lane] = 0;
        if (bits >> lane & 1) to[0][lane] = one(from, V), from += size_of(V);
    }
#endif
}

// The same of a dense row: `count` of the STEP columns exist.
template <Value V> static inline void widen(const uint8_t *from, int count, vec *to) {
#if defined(__AVX512F__)
    if constexpr (V == Value::f32) {
        to[0] = vec(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from));
    } else {
        const __m512i both = _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << count) - 1), from);
        to[0] = vec(_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)));
        to[1] = vec(_mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(0xffff0000))));
    }
#else
    uint8_t bytes[4 * LANES];
    if (count < STEP<V>) {
        std::memset(bytes, 0, sizeof bytes);
        std::memcpy(bytes, from, count * size_of(V));
        from = bytes;
    }
#if LANES == 8
    if constexpr (V == Value::f32)
        to[0] = vec(_mm256_loadu_ps(reinterpret_cast<const float *>(from)));
    else {
        const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from));
        to[0] = vec(_mm256_castsi256_ps(_mm256_slli_epi32(both, 16)));
        to[1] = vec(_mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(0xffff0000))));
    }
#else
    for (int lane = 0; lane < LANES; ++lane) to[0][lane] = one(from + lane * size_of(V), V);
#endif
#endif
}

// ---- decoding: inputs of up to `batch` columns, laid out as the weights come out of expand and widen

// Room that begins at a cache line: a vector that straddles two costs twice.
template <typename T> class Aligned {
  public:
    T *resize(int64_t count) {
        room_.resize(count + 64 / sizeof(T));
        return data_ = reinterpret_cast<T *>((reinterpret_cast<uintptr_t>(room_.data()) + 63) & ~uintptr_t{63});
    }
    T *data() const { return data_; }
    T &operator[](int64_t i) const { return data_[i]; }

  private:
    std::vector<T> room_;
    T *data_ = nullptr;
};

struct Inputs {
    Aligned<float> x;           // (batch, 64 * blocks), zero beyond cols
    Aligned<int8_t> q;          // the same as bytes, for dot products of bytes
    std::vector<float> scale;   // (batch, blocks): what a unit of q is worth
    std::vector<int32_t> shift; // (batch, blocks): -128 times the sum of q
    int64_t width = 0;
};

constexpr float TINY = 1e-30f; // 127 / TINY is finite, TINY / 127 not a denormal

// The bytes of weights meet bytes of inputs, with one scale for 64 of them; every level rounds them alike.
// A block with NaN or Inf is NaN, one that is all but zero is zero, as in matrix.py.
// `sums` are those of q, of each half of the block.
static void quantise(float *x, int8_t *q, float *scale, int32_t *sums) {
    constexpr int VECTORS = BLOCK / LANES;
    typedef int8_t bytes __attribute__((vector_size(LANES)));
    ivec largest{}; // bits of magnitudes: in their order NaN is above all numbers
    for (int i = 0; i < VECTORS; ++i) {
        ivec bits;
        std::memcpy(&bits, x + i * LANES, sizeof bits);
        bits &= 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    int32_t magnitude = 0;
    for (int lane = 0; lane < LANES; ++lane) magnitude = std::max<int32_t>(magnitude, largest[lane]);
    float most;
    std::memcpy(&most, &magnitude, sizeof most);
    if (magnitude >= 0x7f800000) {
        *scale = most - most, sums[0] = sums[1] = 0; // NaN
        std::memset(q, 0, BLOCK);
        std::fill(x, x + BLOCK, *scale);
        return;
    }
    const float unit = most > TINY ? most / 127.0f : 0.0f, inverse = most > TINY ? 127.0f / most : 0.0f;
    ivec total[2] = {};
    for (int i = 0; i < VECTORS; ++i) {
        const ivec whole = nearest(load(x + i * LANES) * splat(inverse));
        const bytes narrow = __builtin_convertvector(whole, bytes);
        std::memcpy(q + i * LANES, &narrow, sizeof narrow);
        store(x + i * LANES, __builtin_convertvector(whole, vec) * splat(unit), LANES);
        total[i / (VECTORS / 2)] += whole;
    }
    *scale = unit, sums[0] = sum(total[0]), sums[1] = sum(total[1]);
}

static void prepare(const Matrix &m, const float *x, int64_t stride, int64_t batch, Inputs &in) {
    in.width = m.blocks * BLOCK;
    in.x.resize(batch * in.width);
    for (int64_t b = 0; b < batch; ++b) {
        float *to = in.x.data() + b * in.width;
        std::memcpy(to, x + b * stride, m.cols * sizeof(float));
        std::memset(to + m.cols, 0, (in.width - m.cols) * sizeof(float));
    }
    if (m.value == Value::i8) {
        in.q.resize(batch * in.width), in.scale.resize(batch * m.blocks), in.shift.resize(batch * m.blocks);
        for (int64_t i = 0; i < batch * m.blocks; ++i) {
            int32_t sums[2];
            quantise(&in.x[i * BLOCK], &in.q[i * BLOCK], &in.scale[i], sums);
            in.shift[i] = -128 * (sums[0] + sums[1]);
        }
    } else if (HALVES && m.value == Value::bf16) { // even columns, then odd ones, of each 2 * LANES
        for (int64_t at = 0; at < batch * in.width; at += 2 * LANES) {
            float even[LANES], odd[LANES];
            for (int i = 0; i < LANES; ++i) even[i] = in.x[at + 2 * i], odd[i] = in.x[at + 2 * i + 1];
            std::memcpy(&in.x[at], even, sizeof even), std::memcpy(&in.x[at + LANES], odd, sizeof odd);
        }
    }
}

constexpr int64_t AHEAD = 2048; // bytes: measured; asking further ahead for the second-level cache costs more
#define PREFETCH(address) __builtin_prefetch((address) + AHEAD)

// The sums over the lanes of a group's four rows.
static inline void add_up(const vec *acc, int64_t stride, float *sums) {
#if defined(__AVX2__)
    __m256 half[GROUP];
    for (int r = 0; r < GROUP; ++r) {
#if LANES == 16
        const __m512 whole = __m512(acc[r * stride]);
        half[r] = _mm256_add_ps(_mm512_castps512_ps256(whole), _mm512_extractf32x8_ps(whole, 1));
#else
        half[r] = __m256(acc[r * stride]);
#endif
    }
    const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
#else
    for (int r = 0; r < GROUP; ++r) sums[r] = sum(acc[r * stride]);
#endif
}

// Four packed rows times COLS columns of inputs.
template <Value V, int COLS>
static void dot_packed(const Matrix &m, const Inputs &in, int64_t first, int64_t group, float (*sums)[GROUP]) {
    constexpr int VECTORS = STEP<V> / LANES;
    vec acc[GROUP][COLS] = {};
    const uint8_t *values = m.values + m.offsets[group] * size_of(V);
    const uint64_t *masks = m.masks + group * m.blocks * GROUP;
    const float *x = in.x.data() + first * in.width;
    for (int64_t block = 0; block < m.blocks; ++block, masks += GROUP, x += BLOCK) {
#pragma GCC unroll 4
        for (int r = 0; r < GROUP; ++r) {
            const uint64_t mask = masks[r];
            PREFETCH(values);
#pragma GCC unroll 16
            for (int p = 0; p < BLOCK / STEP<V>; ++p) {
                vec w[VECTORS];
                const uint64_t bits = mask >> (p * STEP<V>) & ((uint64_t{1} << STEP<V>) - 1);
                expand<V>(values, bits, w, p % 2 == 1);
                values += __builtin_popcountll(bits) * size_of(V);
#pragma GCC unroll 2
                for (int k = 0; k < VECTORS; ++k)
#pragma GCC unroll 4
                    for (int b = 0; b < COLS; ++b)
                        acc[r][b] += w[k] * load(x + b * in.width + p * STEP<V> + k * LANES);
            }
        }
    }
    for (int b = 0; b < COLS; ++b) add_up(&acc[0][b], COLS, sums[b]);
}

// Four dense rows, one after the other: the memory sees one stream.
template <Value V, int COLS>
static void dot_dense(const Matrix &m, const Inputs &in, int64_t first, int64_t group, float (*sums)[GROUP]) {
    // as many sums for one column as for four: a column's result must not depend on those beside it
    constexpr int VECTORS = STEP<V> / LANES, WAYS = 4;
    vec acc[GROUP][COLS];
    for (int r = 0; r < GROUP; ++r) {
        // rows beyond the last repeat it; nobody reads their sums
        const uint8_t *row = m.values + std::min(group * GROUP + r, m.rows - 1) * m.cols * size_of(V);
        const float *x = in.x.data() + first * in.width;
        vec part[WAYS][COLS] = {};
        int64_t left = m.cols;
        for (; left >= BLOCK; left -= BLOCK, x += BLOCK) {
#pragma GCC unroll 16
            for (int p = 0; p < BLOCK / STEP<V>; ++p) {
                vec w[VECTORS];
                widen<V>(row, STEP<V>, w);
                row += STEP<V> * size_of(V);
#pragma GCC unroll 2
                for (int k = 0; k < VECTORS; ++k)
#pragma GCC unroll 4
                    for (int b = 0; b < COLS; ++b)
                        part[(p * VECTORS + k) % WAYS][b] += w[k] * load(x + b * in.width + p * STEP<V> + k * LANES);
            }
        }
        for (; left > 0; left -= STEP<V>, row += STEP<V> * size_of(V), x += STEP<V>) {
            vec w[VECTORS];
            widen<V>(row, static_cast<int>(std::min<int64_t>(left, STEP<V>)), w);
            for (int k = 0; k < VECTORS; ++k)
                for (int b = 0; b < COLS; ++b) part[0][b] += w[k] * load(x + b * in.width + k * LANES);
        }
        for (int b = 0; b < COLS; ++b) {
            acc[r][b] = part[0][b];
            for (int way = 1; way < WAYS; ++way) acc[r][b] += part[way][b];
        }
    }
    for (int b = 0; b < COLS; ++b) add_up(&acc[0][b], COLS, sums[b]);
}

#if BYTES
// Bytes times bytes. A weight w is taken as w + 128, which the instruction wants unsigned; `shift` takes it off again.
template <int COLS>
static inline void meet(const Inputs &in, int64_t first, int64_t block, int64_t blocks, __m512i w, vec *acc) {
    w = _mm512_xor_si512(w, _mm512_set1_epi8(static_cast<char>(0x80)));
    for (int b = 0; b < COLS; ++b) {
        const int64_t at = (first + b) * blocks + block;
        const __m512i shift = _mm512_zextsi128_si512(_mm_cvtsi32_si128(in.shift[at]));
        const __m512i sum = _mm512_dpbusd_epi32(shift, w, _mm512_loadu_si512(&in.q[at * BLOCK]));
        acc[b] += splat(in.scale[at]) * vec(_mm512_cvtepi32_ps(sum));
    }
}

// Four packed rows.
template <int COLS>
static void dot_bytes(const Matrix &m, const Inputs &in, int64_t first, int64_t group, float (*sums)[GROUP]) {
    vec acc[GROUP][COLS] = {};
    const uint8_t *values = m.values + m.offsets[group];
    const uint64_t *masks = m.masks + group * m.blocks * GROUP;
    for (int64_t block = 0; block < m.blocks; ++block, masks += GROUP)
#pragma GCC unroll 4
        for (int r = 0; r < GROUP; ++r) {
            PREFETCH(values);
            const __m512i w = _mm512_maskz_expand_epi8(masks[r], whole(values));
            values += __builtin_popcountll(masks[r]);
            meet<COLS>(in, first, block, m.blocks, w, acc[r]);
        }
    for (int b = 0; b < COLS; ++b) add_up(&acc[0][b], COLS, sums[b]);
}
#endif

template <Value V, Form FORM, int COLS>
static inline void dots(const Matrix &m, const Inputs &in, int64_t first, int64_t group, float (*sums)[GROUP]) {
#if BYTES
    if constexpr (FORM == Form::sparse && V == Value::i8) {
        dot_bytes<COLS>(m, in, first, group, sums);
        return;
    }
#endif
    if constexpr (FORM == Form::sparse) dot_packed<V, COLS>(m, in, first, group, sums);
    else dot_dense<V, COLS>(m, in, first, group, sums);
}

template <Value V, Form FORM>
static void project_groups(const Matrix &m, const Inputs &in, int64_t batch, int64_t begin, int64_t end, float *out,
                           int64_t stride) {
    for (int64_t group = begin; group < end; ++group) {
        const int64_t first = group * GROUP, rows = std::min<int64_t>(GROUP, m.rows - first);
        for (int64_t b = 0; b < batch;) { // the group is in the first-level cache from the second turn on
            float sums[4][GROUP];
            // a dense row has four sums a column: sixteen only where there are registers for them
            const int64_t cols = std::min<int64_t>(FORM != Form::dense || LANES == 16 ? 4 : 2, batch - b);
            if (cols == 4) dots<V, FORM, 4>(m, in, b, group, sums);
            else if (cols == 3) dots<V, FORM, 3>(m, in, b, group, sums);
            else if (cols == 2) dots<V, FORM, 2>(m, in, b, group, sums);
            else dots<V, FORM, 1>(m, in, b, group, sums);
            for (int64_t c = 0; c < cols; ++c)
                for (int64_t r = 0; r < rows; ++r)
                    out[(b + c) * stride + first + r] = sums[c][r] * (m.scale.empty() ? 1.0f : m.scale[first + r]);
            b += cols;
        }
    }
}

// ---- prompts: lanes are tokens

constexpr int CHUNK = 8; // groups whose sums stay in the cache with the inputs of a block

// Positions of the set bits, and their values as floats, both rounded up to a multiple of UNROLL by zeros: loops whose
// ends vary less are predicted better. Returns how many there are then.
constexpr int UNROLL = 4;
template <Value V> static inline int list(uint64_t mask, const uint8_t *from, uint8_t *index, float *values) {
    const int count = __builtin_popcountll(mask), padded = (count + UNROLL - 1) / UNROLL * UNROLL;
#if BYTES
    _mm512_store_si512(index, _mm512_maskz_compress_epi8(mask, _mm512_load_si512(lookup.iota)));
#else
    for (int i = 0; mask; mask &= mask - 1) index[i++] = static_cast<uint8_t>(__builtin_ctzll(mask));
    std::memset(index + count, 0, UNROLL);
#endif
    for (int i = 0; i < BLOCK; i += LANES) { // all, wanted or not: a branch would be mispredicted
#if LANES == 16
        const __m512i raw =
            V == Value::f32    ? _mm512_loadu_si512(from + 4 * i)
            : V == Value::bf16 ? _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(
                                                       reinterpret_cast<const __m256i *>(from + 2 * i))), 16)
                               : _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(
                                     _mm_loadu_si128(reinterpret_cast<const __m128i *>(from + i)))));
        _mm512_store_si512(values + i, raw);
#elif LANES == 8
        const __m256i raw =
            V == Value::f32    ? _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from + 4 * i))
            : V == Value::bf16 ? _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(
                                                       reinterpret_cast<const __m128i *>(from + 2 * i))), 16)
                               : _mm256_castps_si256(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(
                                     _mm_loadl_epi64(reinterpret_cast<const __m128i *>(from + i)))));
        _mm256_store_si256(reinterpret_cast<__m256i *>(values + i), raw);
#else
        for (int lane = 0; lane < LANES && i + lane < count; ++lane) // slow enough as it is
            values[i + lane] = one(from + (i + lane) * size_of(V), V);
#endif
    }
    std::memset(values + count, 0, UNROLL * sizeof(float));
    return padded;
}

// sums (groups * GROUP, NV * LANES) of up to CHUNK groups; x (64 * blocks, NV * LANES).
template <Value V, int NV>
static void walk(const Matrix &m, const float *x, int64_t begin, int64_t end, float *sums) {
    constexpr int64_t W = NV * LANES;
    constexpr int WAYS = NV == 1 ? 4 : 2; // independent sums hide the latency of an addition
    struct Row {
        alignas(64) uint8_t index[BLOCK + 64];
        alignas(64) float values[BLOCK + 2 * LANES];
        int count;
    } ahead[2]; // the next row is listed before this one is summed up: its loads need not wait for the list
    const uint8_t *from[CHUNK];
    for (int64_t g = begin; g < end; ++g) from[g - begin] = m.values + m.offsets[g] * size_of(V);
    const int64_t rows = (end - begin) * GROUP;
    std::memset(sums, 0, rows * W * sizeof(float));
    const auto next = [&](int64_t row, int64_t block) {
        const uint64_t mask = m.masks[((begin + row / GROUP) * m.blocks + block) * GROUP + row % GROUP];
        Row &to = ahead[row % 2];
        to.count = list<V>(mask, from[row / GROUP], to.index, to.values);
        from[row / GROUP] += __builtin_popcountll(mask) * size_of(V);
    };
    for (int64_t block = 0; block < m.blocks; ++block, x += BLOCK * W) {
        next(0, block);
        for (int64_t r = 0; r < rows; ++r) {
            if (r + 1 < rows) next(r + 1, block);
            const Row &row = ahead[r % 2];
            float *to = sums + r * W;
            vec acc[WAYS][NV] = {};
            for (int k = 0; k < NV; ++k) acc[0][k] = load(to + k * LANES);
            for (int i = 0; i < row.count; i += UNROLL)
#pragma GCC unroll 4
                for (int j = 0; j < UNROLL; ++j) {
                    const vec w = splat(row.values[i + j]);
                    const float *column = x + row.index[i + j] * W;
#pragma GCC unroll 4
                    for (int k = 0; k < NV; ++k) acc[j % WAYS][k] += w * load(column + k * LANES);
                }
            for (int k = 0; k < NV; ++k) {
                for (int way = 1; way < WAYS; ++way) acc[0][k] += acc[way][k];
                store(to + k * LANES, acc[0][k], LANES);
            }
        }
    }
}

template <int NV> static void walk(const Matrix &m, const float *x, int64_t begin, int64_t end, float *sums) {
    if (m.value == Value::f32) walk<Value::f32, NV>(m, x, begin, end, sums);
    else if (m.value == Value::bf16) walk<Value::bf16, NV>(m, x, begin, end, sums);
    else walk<Value::i8, NV>(m, x, begin, end, sums);
}

// (tokens, cols) -> (64 * blocks, width), zero beyond both.
static void transpose(const float *x, int64_t stride, int64_t tokens, int64_t cols, int64_t padded, int64_t width,
                      float *to) {
    std::memset(to, 0, padded * width * sizeof(float));
    for (int64_t c0 = 0; c0 < cols; c0 += 16)
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t c = c0; c < std::min(cols, c0 + 16); ++c) to[c * width + t] = x[t * stride + c];
}

static void walk_tile(const Matrix &m, int width, const float *x, int64_t begin, int64_t end, int64_t tokens,
                      float *sums, float *out, int64_t stride) {
    if (width == LANES) walk<1>(m, x, begin, end, sums);
    else if (width == 2 * LANES) walk<2>(m, x, begin, end, sums);
    else walk<4>(m, x, begin, end, sums);
    const int64_t first = begin * GROUP, rows = std::min(end * GROUP, m.rows) - first;
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t r = 0; r < rows; ++r)
            out[t * stride + first + r] = sums[r * width + t] * (m.scale.empty() ? 1.0f : m.scale[first + r]);
}

constexpr int64_t TILE_TOKENS = 4 * LANES, CACHE = 512 << 10;
constexpr int64_t WALK_FROM = 2 * LANES; // tokens from which lanes are better spent on them than on columns

// What follows a product, on rows [first, last) of `tokens` tokens.
static void finish(const Product &p, int64_t from, int64_t tokens, int64_t first, int64_t last) {
    if (!p.bias && !p.softplus) return;
    for (int64_t t = from; t < from + tokens; ++t)
        for (int64_t r = first; r < last; r += LANES) {
            const int lanes = static_cast<int>(std::min<int64_t>(LANES, last - r));
            float *at = p.out + t * p.out_stride + r;
            vec y = load(at, lanes);
            if (p.bias) y += load(p.bias + r, lanes);
            store(at, p.softplus ? softplus(y) : y, lanes);
        }
}

#include "few_bits_impl.h"

// Rows of groups [begin, end) times `batch` inputs (batch, cols) -> out (batch, rows); both with a stride.
static void project(const Matrix &m, const float *x, int64_t x_stride, int64_t batch, int64_t begin, int64_t end,
                    float *out, int64_t stride) {
    if (begin >= end) return;
    if (m.form == Form::codes) {
        static thread_local CodeInputs own;
        CodeInputs *mine = &own;
        asm("" : "+r"(mine)); // as below
        prepare_codes(m, x, x_stride, batch, *mine);
        return project_codes(m, *mine, batch, begin, end, out, stride);
    }
    static thread_local Inputs own;
    Inputs *mine = &own;
    asm("" : "+r"(mine)); // else the compiler finds out whose they are, and asks for their address in every loop
    Inputs &in = *mine;
    prepare(m, x, x_stride, batch, in);
    if (m.form == Form::sparse) {
        if (m.value == Value::f32) project_groups<Value::f32, Form::sparse>(m, in, batch, begin, end, out, stride);
        else if (m.value == Value::bf16) project_groups<Value::bf16, Form::sparse>(m, in, batch, begin, end, out, stride);
        else project_groups<Value::i8, Form::sparse>(m, in, batch, begin, end, out, stride);
    } else {
        if (m.value == Value::f32) project_groups<Value::f32, Form::dense>(m, in, batch, begin, end, out, stride);
        else project_groups<Value::bf16, Form::dense>(m, in, batch, begin, end, out, stride);
    }
}

// Some tokens are multiplied as in decoding, many as tiles of tokens; the latter only by sparse matrices.
void product(const Product &p, int threads) {
    const Matrix &m = p.matrix;
    if (m.form == Form::codes) return product_codes(p, threads);
    const int64_t cost = p.length * m.nonzero / LANES;
    if (p.length < WALK_FROM || m.form != Form::sparse) {
        const int64_t units = std::min<int64_t>(m.groups, threads > 1 ? 4 * threads : 1);
        parallel_for(units, cost, threads, [&](int64_t unit) {
            const int64_t begin = m.groups * unit / units, end = m.groups * (unit + 1) / units;
            project(m, p.x, p.x_stride, p.length, begin, end, p.out, p.out_stride);
            finish(p, 0, p.length, begin * GROUP, std::min(m.rows, end * GROUP));
        });
        return;
    }
    const int64_t padded = m.blocks * BLOCK, tiles = (p.length + TILE_TOKENS - 1) / TILE_TOKENS;
    const int64_t chunks = (m.groups + CHUNK - 1) / CHUNK;
    // So many tiles at a time that their transposed inputs stay in the second-level cache.
    const int64_t together = std::max<int64_t>(1, CACHE / (padded * TILE_TOKENS * static_cast<int64_t>(sizeof(float))));
    Aligned<float> x;
    x.resize(std::min(tiles, together) * padded * TILE_TOKENS);
    const auto width = [&](int64_t tile) {
        const int64_t tokens = std::min(TILE_TOKENS, p.length - tile * TILE_TOKENS);
        return static_cast<int>(tokens > 2 * LANES ? 4 * LANES : tokens > LANES ? 2 * LANES : LANES);
    };
    for (int64_t from = 0; from < tiles; from += together) {
        const int64_t count = std::min(together, tiles - from);
        parallel_for(count, cost, threads, [&](int64_t i) {
            const int64_t t0 = (from + i) * TILE_TOKENS;
            transpose(p.x + t0 * p.x_stride, p.x_stride, std::min(TILE_TOKENS, p.length - t0), m.cols, padded,
                      width(from + i), x.data() + i * padded * TILE_TOKENS);
        });
        parallel_for(count * chunks, cost, threads, [&](int64_t unit) {
            alignas(64) float sums[CHUNK * GROUP * TILE_TOKENS];
            const int64_t i = unit % count, chunk = unit / count, t0 = (from + i) * TILE_TOKENS;
            const int64_t begin = chunk * CHUNK, end = std::min(m.groups, begin + CHUNK);
            const int64_t tokens = std::min(TILE_TOKENS, p.length - t0);
            walk_tile(m, width(from + i), x.data() + i * padded * TILE_TOKENS, begin, end, tokens, sums,
                      p.out + t0 * p.out_stride, p.out_stride);
            finish(p, t0, tokens, begin * GROUP, std::min(m.rows, end * GROUP));
        });
    }
}
