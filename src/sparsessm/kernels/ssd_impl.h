// The scan of Mamba-2 (state space duality; Dao & Gu, arXiv 2405.21060, section 6), where one decay a_t serves a head:
//
//   h_t = a_t h_{t-1} + delta_t u_t B_t^T      y_t = h_t C_t + D u_t      a_t = exp(delta_t A)
//
// Over a chunk of SPAN steps that is three products of small matrices, and a state is touched by two multiply-adds a
// step, not by two and the decay; it is read and written once a chunk:
//
//   y_t = through_t H C_t + sum_{s <= t} kept_ts (C_t . B_s) delta_s u_s      through_t = a_0 ... a_t
//   H'  = through_last H + sum_s kept_last,s delta_s u_s B_s^T                kept_ts = a_{s+1} ... a_t
//
// kept and through are products, not exponentials of differences of sums: a memoryless head's sum of -1e16 would
// swallow its neighbours. The lanes are a head's channels. Included by scan_impl.h's levels, in their namespace.

constexpr int SPAN = 16;
constexpr float FLUSH = 1e-30f; // a decay below is zero: what it would keep is denormal, and slow

constexpr int BROAD = LANES == 16 ? 4 : 2;             // vectors of channels that are computed together,
constexpr int TOGETHER = LANES == 16 ? 16 : 8;         // with so many sums in registers
constexpr int height(int broad) { return TOGETHER / broad > 8 ? 8 : TOGETHER / broad; }

// sum[r][v] += sum_k left[r][k * step] * right[k][v]. Rows of `left` have any distance.
template <int R, int V>
inline void multiply(vec (&sum)[R][V], const float *const (&left)[R], int64_t step, const float *right, int64_t width,
                     int64_t count) {
    for (int64_t k = 0; k < count; ++k) {
        vec x[V];
        for (int v = 0; v < V; ++v) x[v] = load(right + k * width + v * LANES);
        for (int r = 0; r < R; ++r) {
            const vec factor = splat(left[r][k * step]);
            for (int v = 0; v < V; ++v) sum[r][v] += factor * x[v];
        }
    }
}

// Rows lie a page or so apart, which the processor does not foresee.
template <int WRITE> inline void prefetch(const float *at) { __builtin_prefetch(at, WRITE, 3); }

// pairs[t][s] = C_t . B_s within a chunk, the same for all heads of a group.
inline void pair_up(const Dual &s, int64_t b, int64_t group, int64_t t0, float *pairs) {
    constexpr int V = SPAN / LANES, R = height(V);
    const int steps = static_cast<int>(std::min<int64_t>(SPAN, s.length - t0));
    std::vector<vec> turned(s.states * V, vec{});
    float *const across = reinterpret_cast<float *>(turned.data());
    for (int t = 0; t < steps; ++t) {
        const float *B = s.B.at(b, t0 + t) + group * s.states;
        for (int64_t n = 0; n < s.states; ++n) across[n * SPAN + t] = B[n];
    }
    for (int t = 0; t < steps; t += R) {
        const float *left[R];
        for (int r = 0; r < R; ++r) left[r] = s.C.at(b, t0 + std::min(t + r, steps - 1)) + group * s.states;
        vec sum[R][V] = {};
        multiply<R, V>(sum, left, 1, across, SPAN, s.states);
        for (int r = 0; r < R && t + r < steps; ++r) std::memcpy(pairs + (t + r) * SPAN, sum[r], sizeof sum[r]);
    }
}

// One head of one sequence on its way through time.
struct Head {
    const Dual &s;
    int64_t b, h, group, t0 = 0, N, padded; // a row of channels, in whole vectors; what is beyond stays zero
    int steps = 0;
    std::vector<vec> state, later;       // before the chunk, and after a step inside that is asked for
    std::vector<vec> fed, ending, out;   // (SPAN, padded): delta u, what of it a later step finds, y
    alignas(64) float kept[SPAN][SPAN], mixed[SPAN][SPAN] = {}, through[SPAN] = {}; // mixed: kept pairs

    Head(const Dual &s, int64_t b, int64_t h)
        : s(s), b(b), h(h), group(h / (s.heads / s.groups)), N(s.states),
          padded((s.channels + LANES - 1) / LANES * LANES), state(room(), vec{}), later(s.sampled ? room() : 0),
          fed(SPAN * padded / LANES, vec{}), ending(fed), out(fed) {
        const float *from = s.initial ? s.initial + offset() : nullptr;
        float *into = flat(state);
        if (from) move([=](int64_t at, int64_t place) { into[place] = from[at]; });
    }
    static float *flat(std::vector<vec> &of) { return reinterpret_cast<float *>(of.data()); }
    int64_t offset() const { return (b * s.heads + h) * s.channels * N; }
    // A state lies in panels of as many channels as are computed together, (N + 7, channels) each: `advance` fills whole
    // blocks of up to eight states.
    int64_t room() const { return (N + 7) * padded / LANES; }
    int64_t panel(int64_t c0) const { return (N + 7) * c0; }
    int lanes(int64_t c0) const { return static_cast<int>(std::min<int64_t>(LANES, s.channels - c0)); }

    template <typename Move> void move(const Move &element) { // calls element(p * N + n, its place in a panel)
        across([&](auto vectors, int64_t c0) {
            constexpr int64_t width = decltype(vectors)::value * LANES;
            for (int64_t p = c0; p < std::min(c0 + width, s.channels); ++p)
                for (int64_t n = 0; n < N; ++n) element(p * N + n, panel(c0) + n * width + p - c0);
        });
    }
    void write(std::vector<vec> &of, float *to) {
        const float *from = flat(of);
        move([=](int64_t at, int64_t place) { to[at] = from[place]; });
    }

    void open(int64_t time, const float *pairs) {
        constexpr int V = SPAN / LANES;
        t0 = time, steps = static_cast<int>(std::min<int64_t>(SPAN, s.length - t0));
        alignas(64) float delta[SPAN] = {}, decay[SPAN];
        for (int t = 0; t < steps; ++t) delta[t] = s.delta.at(b, t0 + t)[h];
        for (int v = 0; v < V; ++v) {
            const vec x = load(delta + v * LANES) * splat(s.A[h] * LOG2E);
            store(decay + v * LANES, exp2v(x), LANES);
        }
        ivec lane;
        for (int i = 0; i < LANES; ++i) lane[i] = i;
        vec row[V] = {};
        float all = 1.0f;
        for (int t = 0; t < steps; ++t) {
            all *= decay[t];
            through[t] = all = all < FLUSH ? 0.0f : all;
            for (int v = 0; v < V; ++v) {
                row[v] *= splat(decay[t]);
                row[v] = row[v] < splat(FLUSH) ? vec{} : row[v];
                row[v] = lane == t - v * LANES ? splat(1.0f) : row[v];
                store(kept[t] + v * LANES, row[v], LANES);
                store(mixed[t] + v * LANES, row[v] * load(pairs + t * SPAN + v * LANES), LANES);
            }
        }
        const int64_t width = padded, channels = s.channels, first = h * channels;
        const vec skip = splat(s.D ? s.D[h] : 0.0f);
        const int count = steps;
        float *in = flat(fed), *y = flat(out);
        for (int t = 0; t < count; ++t, in += width, y += width) {
            const float *from = s.u.at(b, t0 + t) + first;
            for (int64_t c0 = 0; c0 < channels; c0 += LANES) {
                const vec u = load(from + c0, lanes(c0));
                store(in + c0, splat(delta[t]) * u, LANES);
                store(y + c0, s.D ? skip * u : vec{}, LANES);
                prefetch<1>(s.y.at(b, t0 + t) + first + c0);
                if (t0 + SPAN + t < s.length) prefetch<0>(s.u.at(b, t0 + SPAN + t) + first + c0);
            }
        }
    }

    void close() {
        for (int t = 0; t < steps; ++t) {
            float *to = s.y.at(b, t0 + t) + h * s.channels;
            for (int64_t c0 = 0; c0 < s.channels; c0 += LANES)
                store(to + c0, load(flat(out) + t * padded + c0), lanes(c0));
        }
    }

    // y of the chunk, for V vectors of channels from c0 on.
    template <int V> void read(int64_t c0) {
        constexpr int R = height(V);
        const int64_t width = padded, first = group * N; // copies: a store through memcpy may change a member
        const int count = steps;
        const float *const before = flat(state) + panel(c0), *const in = flat(fed) + c0;
        float *to = flat(out) + c0;
        for (int t = 0; t < count; t += R, to += R * width) {
            const float *C[R], *mix[R];
            for (int r = 0; r < R; ++r) { // rows past the end repeat the last and are thrown away
                C[r] = s.C.at(b, t0 + std::min(t + r, count - 1)) + first;
                mix[r] = mixed[t + r];
            }
            vec y[R][V];
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < V; ++v) y[r][v] = vec{};
            multiply<R, V>(y, C, 1, before, V * LANES, N);
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < V; ++v) y[r][v] *= splat(through[t + r]);
            multiply<R, V>(y, mix, 1, in, width, t);
            for (int r = 0; r < R; ++r) // of the diagonal only what is past: a later NaN must not show
                for (int k = 0; k < R; ++k)
                    if (k <= r)
                        for (int v = 0; v < V; ++v)
                            y[r][v] += splat(mix[r][t + k]) * load(in + (t + k) * width + v * LANES);
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < V; ++v) {
                    float *const at = to + r * width + v * LANES;
                    store(at, load(at) + y[r][v], LANES);
                }
        }
    }

    // The state after step t of the chunk.
    template <int V> void advance(int64_t c0, int t, std::vector<vec> &to) {
        constexpr int R = height(V);
        const int64_t width = padded, states = N, stride = s.B.time;
        const float *const in = flat(ending) + c0, *const B = s.B.at(b, t0) + group * states;
        const float *from = flat(state) + panel(c0);
        float *into = flat(to) + panel(c0);
        const vec decay = splat(through[t]);
        for (int64_t n = 0; n < states; n += R, from += R * V * LANES, into += R * V * LANES) {
            const float *left[R];
            for (int r = 0; r < R; ++r) left[r] = B + std::min(n + r, states - 1);
            vec sum[R][V];
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < V; ++v) sum[r][v] = decay * load(from + (r * V + v) * LANES);
            multiply<R, V>(sum, left, stride, in, width, t + 1);
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < V; ++v) store(into + (r * V + v) * LANES, sum[r][v], LANES);
        }
    }

    // Calls work(number of vectors, first channel) for as many vectors at once as there are.
    template <typename Work> void across(const Work &work) {
        int64_t c0 = 0;
        if constexpr (BROAD == 4)
            for (; c0 + 4 * LANES <= padded; c0 += 4 * LANES) work(std::integral_constant<int, 4>{}, c0);
        for (; c0 + 2 * LANES <= padded; c0 += 2 * LANES) work(std::integral_constant<int, 2>{}, c0);
        for (; c0 < padded; c0 += LANES) work(std::integral_constant<int, 1>{}, c0);
    }

    void weigh(int t) { // what step t finds of the steps before
        for (int k = 0; k <= t; ++k)
            for (int64_t c0 = 0; c0 < padded; c0 += LANES)
                store(flat(ending) + k * padded + c0, splat(kept[t][k]) * load(flat(fed) + k * padded + c0), LANES);
    }

    void chunk(int64_t time, const float *pairs) {
        open(time, pairs);
        for (int t = 0; s.sampled && t < steps; ++t)
            if ((time + t + 1) % s.every == 0) {
                weigh(t);
                across([&](auto vectors, int64_t c0) { advance<decltype(vectors)::value>(c0, t, later); });
                const int64_t k = (time + t) / s.every, samples = s.length / s.every;
                write(later, s.sampled + offset() + (b * (samples - 1) + k) * s.heads * s.channels * N);
            }
        weigh(steps - 1);
        across([&](auto vectors, int64_t c0) {
            read<decltype(vectors)::value>(c0);
            advance<decltype(vectors)::value>(c0, steps - 1, state);
        });
        close();
    }

    void run(const float *pairs) {
        for (int64_t time = 0; time < s.length; time += SPAN, pairs += SPAN * SPAN) chunk(time, pairs);
        write(state, s.last + offset());
    }
};

void dual(const Dual &s, int threads) {
    const int64_t chunks = (s.length + SPAN - 1) / SPAN, size = chunks * SPAN * SPAN, all = s.batch * s.groups;
    const std::unique_ptr<float[]> pairs(new float[all * size]);
    parallel_for(all * chunks, all * s.length * SPAN * s.states, threads, [&](int64_t unit) {
        const int64_t chunk = unit % chunks, each = unit / chunks;
        pair_up(s, each / s.groups, each % s.groups, chunk * SPAN, &pairs[unit * SPAN * SPAN]);
    });
    parallel_for(s.batch * s.heads, s.updates(), threads, [&](int64_t unit) {
        Head head(s, unit / s.heads, unit % s.heads);
        head.run(&pairs[(head.b * s.groups + head.group) * size]);
    });
}
