// The recurrence of Mamba-2 for one token. Lanes are a head's channels and its states lie as (N, P): decay, B_n and C_n
// are one number for all lanes, and nothing is summed across lanes. Included by mamba_impl.h.
//
//   h_n = a h_n + delta u B_n      y = (sum_n C_n h_n + D u) silu(z)      a = exp(delta A)

// How a vector of channels is read and written: the whole of it, or so many lanes, the others zero.
struct Whole {
    vec get(const float *from) const { return load(from); }
    void put(float *to, vec value) const { store(to, value, LANES); }
};

struct Some {
#if defined(__AVX512F__)
    __mmask16 here;
    explicit Some(int64_t lanes) : here(static_cast<__mmask16>((1u << lanes) - 1)) {}
    vec get(const float *from) const { return vec(_mm512_maskz_loadu_ps(here, from)); }
    void put(float *to, vec value) const { _mm512_mask_storeu_ps(to, here, __m512(value)); }
#elif LANES == 8
    __m256i here;
    explicit Some(int64_t lanes)
        : here(_mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(lanes)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7))) {}
    vec get(const float *from) const { return vec(_mm256_maskload_ps(from, here)); }
    void put(float *to, vec value) const { _mm256_maskstore_ps(to, here, __m256(value)); }
#else
    int lanes;
    explicit Some(int64_t lanes) : lanes(static_cast<int>(lanes)) {}
    vec get(const float *from) const { return load(from, lanes); }
    void put(float *to, vec value) const { store(to, value, lanes); }
#endif
};

// One head of one sequence; B and C are those of its group. h is null where it keeps no state: what it answers with then
// is C.B du.
struct HeadStep {
    const float *B, *C;
    int64_t states, channels; // N, P
    float delta, decay, skip, meeting;
    bool gated;
    const float *u, *z; // (P)
    float *h, *y;       // (N, P), (P)

    // V vectors of channels from c on. A channel's sums are the same in every V, so no bit depends on who computes it.
    template <int V, typename Lanes> void channels_from(int64_t c, const Lanes &lanes) const {
        vec du[V], out[V];
        for (int v = 0; v < V; ++v) {
            const vec own = lanes.get(u + c + v * LANES);
            du[v] = splat(delta) * own, out[v] = splat(skip) * own;
        }
        if (h) {
            const vec a = splat(decay);
            float *at = h + c;
            for (int64_t n = 0; n < states; ++n, at += channels) {
                const vec b = splat(B[n]), c_n = splat(C[n]);
                for (int v = 0; v < V; ++v) {
                    const vec now = a * lanes.get(at + v * LANES) + du[v] * b;
                    lanes.put(at + v * LANES, now);
                    out[v] += c_n * now;
                }
            }
        } else {
            for (int v = 0; v < V; ++v) out[v] += du[v] * splat(meeting);
        }
        for (int v = 0; v < V; ++v) {
            if (!gated) {
                lanes.put(y + c + v * LANES, out[v]);
                continue;
            }
            const vec gate = lanes.get(z + c + v * LANES);
            lanes.put(y + c + v * LANES, out[v] * gate * sigmoid(gate));
        }
    }

    void run(int64_t begin, int64_t end) const { // channels; `begin` is a multiple of LANES
        int64_t c = begin;
        for (; c + 4 * LANES <= end; c += 4 * LANES) channels_from<4>(c, Whole{});
        if (c + 2 * LANES <= end) channels_from<2>(c, Whole{}), c += 2 * LANES;
        if (c + LANES <= end) channels_from<1>(c, Whole{}), c += LANES;
        if (c < end) channels_from<1>(c, Some(end - c));
    }
};

// from (N) -> to (padded directions), through a projection (N, padded directions).
static void project_states(const float *projection, const float *from, int64_t states, int64_t wide, float *to) {
    for (int64_t k = 0; k < wide; k += LANES) {
        vec sum{};
        for (int64_t n = 0; n < states; ++n) sum += splat(from[n]) * load(projection + n * wide + k);
        store(to + k, sum, LANES);
    }
}

// This thread's share of the heads of one sequence: raw step sizes, the convolution's output (u, B, C) and the gate ->
// y, gated. Heads with a state and heads without are shared out apart, as the latter cost next to nothing.
static void turn_heads(const Heads &m, const Network &net, int64_t channels, int thread, int threads, const float *raw,
                       const float *mixed, const float *z, float *state, float *y) {
    const int64_t N = net.states, R = m.directions, P = channels / m.count;
    const int64_t padded = (m.count + LANES - 1) / LANES * LANES;
    const int64_t wide = m.B_projection.empty() ? 0 : (R + SCAN_LANES - 1) / SCAN_LANES * SCAN_LANES;
    std::vector<float> room(2 * padded + 2 * m.groups * wide);
    float *delta = room.data(), *decay = delta + padded;
    // B of every group, then C: as the convolution gave them, or projected, which every thread does for itself.
    const float *B = mixed + channels, *C = B + m.groups * N;
    const int64_t apart = wide ? wide : N;
    if (wide) {
        float *projected = decay + padded;
        for (int64_t g = 0; g < m.groups; ++g) {
            project_states(m.B_projection.data() + g * N * wide, B + g * N, N, wide, projected + g * wide);
            project_states(m.C_projection.data() + g * N * wide, C + g * N, N, wide, projected + (m.groups + g) * wide);
        }
        B = projected, C = B + m.groups * wide;
    }
    for (int64_t h = 0; h < m.count; h += LANES) {
        vec size = softplus(load(raw + h, static_cast<int>(std::min<int64_t>(LANES, m.count - h))) * splat(m.step_scale) +
                            load(m.dt_bias.data() + h));
        size = size < splat(m.least) ? splat(m.least) : size;
        size = size > splat(m.most) ? splat(m.most) : size;
        store(delta + h, size, LANES), store(decay + h, exp2v(size * load(m.A.data() + h)), LANES);
    }
    // Where heads would leave threads without work, vectors of channels are shared out instead.
    const auto kept = static_cast<int64_t>(m.kept.size());
    const bool cut = kept % threads != 0 && kept < 4 * threads;
    const int64_t width = cut ? LANES : P, parts = (P + width - 1) / width;
    for (const auto *list : {&m.kept, &m.memoryless}) {
        const int64_t units = static_cast<int64_t>(list->size()) * parts;
        for (int64_t unit = units * thread / threads; unit < units * (thread + 1) / threads; ++unit) {
            const int64_t h = (*list)[unit / parts], begin = unit % parts * width;
            HeadStep head;
            const int64_t group = h / (m.count / m.groups);
            head.B = B + group * apart, head.C = C + group * apart;
            head.states = R, head.channels = P, head.delta = delta[h], head.decay = decay[h], head.skip = m.skip[h];
            head.gated = m.gate_first;
            head.u = mixed + h * P, head.z = z + h * P, head.y = y + h * P;
            head.h = list == &m.kept ? state + unit / parts * R * P : nullptr;
            head.meeting = 0;
            if (!head.h)
                for (int64_t n = 0; n < R; ++n) head.meeting += head.B[n] * head.C[n];
            head.run(begin, std::min(P, begin + width));
        }
    }
}
