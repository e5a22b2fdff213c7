// The Mamba mixers of a step: convolution, recurrence and out_proj of one token for each sequence. Included by
// step_impl.h.

// table[index[lane]]; the table is padded to SCAN_LANES entries.
static inline vec pick(const float *table, const uint8_t *index, int64_t states) {
#if defined(__AVX512F__)
    const __m512i at = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(index)));
    if (states <= 16) return vec(_mm512_permutexvar_ps(at, _mm512_loadu_ps(table)));
    return vec(_mm512_i32gather_ps(at, table, 4));
#elif LANES == 8
    (void)states;
    return vec(_mm256_i32gather_ps(table, _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(index))), 4));
#else
    (void)states;
    vec out;
    for (int lane = 0; lane < LANES; ++lane) out[lane] = table[index[lane]];
    return out;
#endif
}

// The values of a group's channels, wherever they lie, and back.
static inline vec take(const float *from, const int32_t *channel, bool consecutive, int lanes) {
    if (consecutive) return load(from + channel[0]);
#if defined(__AVX512F__)
    if (lanes == LANES) return vec(_mm512_i32gather_ps(_mm512_loadu_si512(channel), from, 4));
#elif LANES == 8
    if (lanes == LANES)
        return vec(_mm256_i32gather_ps(from, _mm256_loadu_si256(reinterpret_cast<const __m256i *>(channel)), 4));
#endif
    vec out{};
    for (int lane = 0; lane < lanes; ++lane) out[lane] = from[channel[lane]];
    return out;
}

static inline void put(float *to, const int32_t *channel, bool consecutive, int lanes, vec value) {
    if (consecutive) {
        store(to + channel[0], value, LANES);
        return;
    }
    float out[LANES];
    store(out, value, LANES);
    for (int lane = 0; lane < lanes; ++lane) to[channel[lane]] = out[lane];
}

// The convolution's window of channels [begin, end) of M moves on by x; u = silu(conv). `weights` (past + 1, M), `bias`
// (M) or null, `state` (past, M). x and u may be the same.
static void convolve(const std::vector<float> &weights, const float *bias, int64_t M, int64_t past, float *state,
                     int64_t begin, int64_t end, const float *x, float *u) {
    for (int64_t c = begin; c < end; c += LANES) {
        const int lanes = static_cast<int>(std::min<int64_t>(LANES, end - c));
        const vec now = load(x + c, lanes);
        vec y = load(weights.data() + past * M + c, lanes) * now;
        if (bias) y += load(bias + c, lanes);
        for (int64_t k = 0; k < past; ++k) {
            const vec then = load(state + k * M + c, lanes);
            y += load(weights.data() + k * M + c, lanes) * then;
            if (k) store(state + (k - 1) * M + c, then, lanes);
        }
        if (past) store(state + (past - 1) * M + c, now, lanes);
        store(u + c, y * sigmoid(y), lanes);
    }
}

// The recurrence of one group, from the step size before softplus to the gated output.
static void recur(const Mamba &layer, const Network &net, int64_t g, const float *delta_raw, const float *u,
                  const float *z, const float *B, const float *C, const float *BC, float total, float *state, float *y) {
    const ScanGroup &group = layer.groups[g];
    for (int part = 0; part < SCAN_LANES; part += LANES) {
        const int64_t first = g * SCAN_LANES + part;
        const int lanes = static_cast<int>(std::min<int64_t>(LANES, layer.channels - first));
        if (lanes <= 0) return;
        const int32_t *channel = layer.channel.data() + first;
        const vec own = take(u, channel, group.consecutive, lanes), gate = take(z, channel, group.consecutive, lanes);
        const vec raw = load(delta_raw + first, lanes);
        const vec delta = softplus(raw + load(layer.dt_bias.data() + first)), du = delta * own;
        vec out = load(layer.skip.data() + first) * own, kept{};
        float *h = state + group.state + part;
        const float *A = layer.A.data() + group.entries + part;
        const uint8_t *index = layer.index.data() + group.entries + part;
        for (int32_t k = 0; k < group.slots; ++k, h += SCAN_LANES, A += SCAN_LANES, index += SCAN_LANES) {
            const vec b = group.ordered ? splat(B[k]) : pick(B, index, net.states);
            const vec c = group.ordered ? splat(C[k]) : pick(C, index, net.states);
            const vec now = exp2v(delta * load(A)) * load(h) + du * b;
            store(h, now, LANES);
            out += c * now;
            if (!group.ordered) kept += pick(BC, index, net.states);
        }
        // What keeps no state answers at once: C_n B_n du, for all states that have no slot.
        if (group.slots < net.states) out += du * (splat(total) - kept);
        out = out * gate * sigmoid(gate);
        put(y, channel, group.consecutive, lanes, out);
    }
}

#include "heads_impl.h"

// The part of a thread in a mixer; w.u, w.z and w.dbc hold what goes into the scan, w.y what comes out of it.
static void take_part(const Mamba &layer, const Part &part, Own &o) {
    const Step &s = o.s;
    const Network &net = s.net;
    Workspace &w = s.work;
    const int64_t d = net.width, N = net.states, R = net.rank;
    const bool normalised = net.mixer_epsilon >= 0;
    const int64_t padded = whole_groups(layer.channels);
    float *inner = o.inner, *readings = inner + s.batch * whole_groups(net.channels);
    std::vector<float> padded_states(3 * (N + SCAN_LANES));
    float *B = padded_states.data(), *C = B + N + SCAN_LANES, *BC = C + N + SCAN_LANES;
    const Heads *heads = layer.heads.get();
    const int64_t M = layer.in_x->rows; // channels of the convolution
    const int64_t D = layer.channels;
    int64_t begin, end;
    o.share(part.share, begin, end);
    project(*layer.in_x, o.x, d, s.batch, begin, end, w.u.data(), M);
    const int64_t c0 = begin * GROUP, c1 = std::min(M, end * GROUP);
    for (int64_t b = 0; b < s.batch && c0 < c1; ++b) {
        float *u = w.u.data() + b * M;
        if (layer.in_scale != 1)
            for (int64_t c = c0; c < c1; ++c) u[c] *= layer.in_scale;
        if (!layer.in_bias.empty())
            for (int64_t c = c0; c < c1; ++c) u[c] += layer.in_bias[c];
        convolve(layer.conv, layer.conv_bias.empty() ? nullptr : layer.conv_bias.data(), M, net.taps - 1,
                 s.states[b] + layer.conv_state, c0, c1, u, u);
    }
    o.share(part.share + 1, begin, end);
    project(*layer.in_z, o.x, d, s.batch, begin, end, w.z.data(), D);
    if (layer.gate_scale != 1)
        for (int64_t b = 0; b < s.batch; ++b)
            for (int64_t c = begin * GROUP; c < std::min(D, end * GROUP); ++c) w.z[b * D + c] *= layer.gate_scale;
    if (!layer.in_bias.empty())
        for (int64_t b = 0; b < s.batch; ++b)
            for (int64_t c = begin * GROUP; c < std::min(D, end * GROUP); ++c) w.z[b * D + c] += layer.in_bias[M + c];
    o.share(part.share + 2, begin, end);
    if (heads) project(*heads->in_dt, o.x, d, s.batch, begin, end, w.dbc.data(), heads->count);
    o.wait();

    if (heads) {
        for (int64_t b = 0; b < s.batch; ++b)
            turn_heads(*heads, net, layer.channels, o.thread, o.threads, w.dbc.data() + b * heads->count,
                       w.u.data() + b * M, w.z.data() + b * D, s.states[b] + layer.scan_state, w.y.data() + b * D);
    } else {
        project(*layer.x_proj, w.u.data(), D, s.batch, begin, end, w.dbc.data(), R + 2 * N);
        o.wait();

        const float *from = w.dbc.data();
        if (normalised) { // every thread needs all of B and C, and normalising them costs less than to wait for it
            for (int64_t b = 0; b < s.batch; ++b) {
                const float *raw = w.dbc.data() + b * (R + 2 * N);
                float *to = readings + b * (R + 2 * N);
                rms_norm(raw, net.mixer_epsilon, R, to);
                rms_norm(raw + R, net.mixer_epsilon, N, to + R);
                rms_norm(raw + R + N, net.mixer_epsilon, N, to + R + N);
                if (!layer.readings.empty())
                    for (int64_t i = 0; i < R + 2 * N; ++i) to[i] *= layer.readings[i];
            }
            from = readings;
        }
        // Whole scan groups, of SCAN_LANES / GROUP groups of dt_proj's sorted rows each, and of those what must stay
        // together.
        constexpr int64_t WITHIN = SCAN_LANES / GROUP;
        const int64_t groups = static_cast<int64_t>(layer.groups.size()),
                      together = (layer.dt_proj->together() + WITHIN - 1) / WITHIN,
                      units = (groups + together - 1) / together,
                      g0 = std::min(groups, units * o.thread / o.threads * together),
                      g1 = std::min(groups, units * (o.thread + 1) / o.threads * together);
        project(*layer.dt_proj, from, R + 2 * N, s.batch, std::min(g0 * WITHIN, layer.dt_proj->groups),
                std::min(g1 * WITHIN, layer.dt_proj->groups), inner, padded);
        for (int64_t b = 0; b < s.batch; ++b) {
            const float *dbc = from + b * (R + 2 * N);
            float total = 0;
            for (int64_t n = 0; n < N; ++n) {
                B[n] = dbc[R + n], C[n] = dbc[R + N + n], BC[n] = B[n] * C[n];
                total += BC[n];
            }
            for (int64_t g = g0; g < g1; ++g)
                recur(layer, net, g, inner + b * padded, w.u.data() + b * D, w.z.data() + b * D, B, C, BC, total,
                      s.states[b] + layer.scan_state, w.y.data() + b * D);
        }
    }
    o.wait();

    o.share(part.share + 3, begin, end);
    if (begin >= end) return;
    const float *y = w.y.data();
    if (heads && !heads->norm.empty()) {
        // A group's norm needs all of its channels: each thread sums them, which saves a barrier.
        for (int64_t b = 0; b < s.batch; ++b) {
            const int64_t size = D / heads->groups;
            for (int64_t c = 0; c < D; c += size)
                rms_norm(y + b * D + c, heads->norm.data() + c, heads->epsilon, size, inner + b * D + c);
            if (!heads->gate_first) gate(inner + b * D, w.z.data() + b * D, D);
        }
        y = inner;
    }
    project(*layer.out_proj, y, D, s.batch, begin, end, o.added, d);
    o.give(part, layer.out_bias, begin, end);
}
