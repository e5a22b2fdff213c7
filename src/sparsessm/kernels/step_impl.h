// One token through the whole network for each sequence of a batch: what every thread does, with a barrier between
// phases. Included by scan_impl.h's levels, in their namespace.

// One over the root mean square.
static float unit_of(const float *x, float epsilon, int64_t count) {
    vec squares{};
    float rest = 0;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) squares += load(x + i) * load(x + i);
    for (; i < count; ++i) rest += x[i] * x[i];
    return 1.0f / std::sqrt((sum(squares) + rest) / static_cast<float>(count) + epsilon);
}

static void rms_norm(const float *x, const float *weight, float epsilon, int64_t count, float *out) {
    const float unit = unit_of(x, epsilon, count);
    for (int64_t i = 0; i < count; ++i) out[i] = weight[i] * (x[i] * unit);
}

static void rms_norm(const float *x, float epsilon, int64_t count, float *out) {
    const float unit = unit_of(x, epsilon, count);
    for (int64_t i = 0; i < count; ++i) out[i] = x[i] * unit;
}

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

// The convolution's window of channels [begin, end) moves on by x; u = silu(conv). x and u may be the same.
static void convolve(const Layer &layer, const Network &net, float *state, int64_t begin, int64_t end, const float *x,
                     float *u) {
    const int64_t D = layer.in_x->rows, past = net.taps - 1;
    for (int64_t c = begin; c < end; c += LANES) {
        const int lanes = static_cast<int>(std::min<int64_t>(LANES, end - c));
        const vec now = load(x + c, lanes);
        vec y = load(layer.conv.data() + past * D + c, lanes) * now;
        if (!layer.conv_bias.empty()) y += load(layer.conv_bias.data() + c, lanes);
        for (int64_t k = 0; k < past; ++k) {
            const vec then = load(state + k * D + c, lanes);
            y += load(layer.conv.data() + k * D + c, lanes) * then;
            if (k) store(state + (k - 1) * D + c, then, lanes);
        }
        if (past) store(state + (past - 1) * D + c, now, lanes);
        store(u + c, y * sigmoid(y), lanes);
    }
}

// The recurrence of one group, from the step size before softplus to the gated output.
static void recur(const Layer &layer, const Network &net, int64_t g, const float *delta_raw, const float *u,
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

void step(const Step &s, int thread, int threads) {
    const Network &net = s.net;
    const int64_t d = net.width, N = net.states, R = net.rank, V = net.vocabulary;
    const auto whole = [](int64_t channels) { return (channels + SCAN_LANES - 1) / SCAN_LANES * SCAN_LANES; };
    const int64_t widest = whole(net.channels); // of any layer
    Workspace &w = s.work;
    const bool normalised = net.mixer_epsilon >= 0;
    std::vector<float> own(s.batch * (d + widest + (normalised ? R + 2 * N : 0))); // this thread's
    float *normed = own.data(), *inner = normed + s.batch * d, *readings = inner + s.batch * widest;
    std::vector<float> padded_states(3 * (N + SCAN_LANES));
    float *B = padded_states.data(), *C = B + N + SCAN_LANES, *BC = C + N + SCAN_LANES;
    if (thread == 0)
        for (int64_t b = 0; b < s.batch; ++b) net.embedding->row(s.tokens[b], w.hidden.data() + b * d);
    s.barrier.wait(threads);
    const auto share = [&](size_t which, int64_t &begin, int64_t &end) {
        begin = s.shares[which][thread], end = s.shares[which][thread + 1];
    };
    int64_t begin, end;
    for (size_t l = 0; l < net.layers.size(); ++l) {
        const Layer &layer = net.layers[l];
        const Heads *heads = layer.heads.get();
        const int64_t M = layer.in_x->rows; // channels of the convolution
        const int64_t D = layer.channels, padded = whole(D);
        for (int64_t b = 0; b < s.batch; ++b)
            rms_norm(w.hidden.data() + b * d, layer.norm.data(), net.epsilon, d, normed + b * d);
        share(4 * l, begin, end);
        project(*layer.in_x, normed, d, s.batch, begin, end, w.u.data(), M);
        const int64_t c0 = begin * GROUP, c1 = std::min(M, end * GROUP);
        for (int64_t b = 0; b < s.batch && c0 < c1; ++b) {
            float *u = w.u.data() + b * M;
            if (!layer.in_bias.empty())
                for (int64_t c = c0; c < c1; ++c) u[c] += layer.in_bias[c];
            convolve(layer, net, s.state + b * net.state_size + layer.conv_state, c0, c1, u, u);
        }
        share(4 * l + 1, begin, end);
        project(*layer.in_z, normed, d, s.batch, begin, end, w.z.data(), D);
        if (!layer.in_bias.empty())
            for (int64_t b = 0; b < s.batch; ++b)
                for (int64_t c = begin * GROUP; c < std::min(D, end * GROUP); ++c)
                    w.z[b * D + c] += layer.in_bias[M + c];
        share(4 * l + 2, begin, end);
        if (heads) project(*heads->in_dt, normed, d, s.batch, begin, end, w.dbc.data(), heads->count);
        s.barrier.wait(threads);

        if (heads) {
            for (int64_t b = 0; b < s.batch; ++b)
                turn_heads(*heads, net, thread, threads, w.dbc.data() + b * heads->count, w.u.data() + b * M,
                           w.z.data() + b * D, s.state + b * net.state_size + layer.scan_state, w.y.data() + b * D);
        } else {
            project(*layer.x_proj, w.u.data(), D, s.batch, begin, end, w.dbc.data(), R + 2 * N);
            s.barrier.wait(threads);

            const float *from = w.dbc.data();
            if (normalised) { // every thread needs all of B and C, and normalising them costs less than to wait for it
                for (int64_t b = 0; b < s.batch; ++b) {
                    const float *raw = w.dbc.data() + b * (R + 2 * N);
                    float *to = readings + b * (R + 2 * N);
                    rms_norm(raw, net.mixer_epsilon, R, to);
                    rms_norm(raw + R, net.mixer_epsilon, N, to + R);
                    rms_norm(raw + R + N, net.mixer_epsilon, N, to + R + N);
                }
                from = readings;
            }
            // Whole scan groups, of SCAN_LANES / GROUP groups of dt_proj's sorted rows each, and of those what must stay
            // together.
            constexpr int64_t WITHIN = SCAN_LANES / GROUP;
            const int64_t groups = static_cast<int64_t>(layer.groups.size()),
                          together = (layer.dt_proj->together() + WITHIN - 1) / WITHIN,
                          units = (groups + together - 1) / together,
                          g0 = std::min(groups, units * thread / threads * together),
                          g1 = std::min(groups, units * (thread + 1) / threads * together);
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
                          s.state + b * net.state_size + layer.scan_state, w.y.data() + b * D);
            }
        }
        s.barrier.wait(threads);

        share(4 * l + 3, begin, end);
        if (begin < end) { // what it adds to the residual stream goes through `normed`, which is free now
            const float *y = w.y.data();
            if (heads) { // a group's norm needs all of its channels: each thread sums them, which saves a barrier
                for (int64_t b = 0; b < s.batch; ++b) {
                    const int64_t size = D / heads->groups;
                    for (int64_t c = 0; c < D; c += size)
                        rms_norm(y + b * D + c, heads->norm.data() + c, net.epsilon, size, inner + b * D + c);
                }
                y = inner;
            }
            project(*layer.out_proj, y, D, s.batch, begin, end, normed, d);
            for (int64_t b = 0; b < s.batch; ++b)
                for (int64_t i = begin * GROUP; i < std::min(d, end * GROUP); ++i)
                    w.hidden[b * d + i] += normed[b * d + i] + (layer.out_bias.empty() ? 0.0f : layer.out_bias[i]);
        }
        s.barrier.wait(threads);
    }
    for (int64_t b = 0; b < s.batch; ++b)
        rms_norm(w.hidden.data() + b * d, net.norm.data(), net.epsilon, d, normed + b * d);
    share(4 * net.layers.size(), begin, end);
    project(*net.head, normed, d, s.batch, begin, end, s.logits, V);
}
