// The gated delta rule for one token (Yang, Kautz & Hatamizadeh, arXiv 2412.06464). Lanes are the channels of a head's
// value, its state lies as (K, P). Included by step_impl.h.
//
//   S = a S,  w = beta (v - S' k),  S += k w',  y = S' q      a = exp(A softplus(step))
//
// S is read twice and written once: the first pass gives a S' k and a S' q at once, as y = a S' q + (k.q) w.

// One over the length, of queries and keys.
static float length_of(const float *x, int64_t count) {
    float squares = 0;
    for (int64_t i = 0; i < count; ++i) squares += x[i] * x[i];
    return 1.0f / std::sqrt(squares + 1e-6f);
}

struct RuleStep {
    const float *q, *k; // (K), of length one, q scaled
    int64_t keys, channels;
    float decay, beta, meeting; // meeting: k.q
    const float *v;             // (P)
    float *state, *y;           // (K, P) or null where nothing is kept, (P)

    template <int V, typename Lanes> void channels_from(int64_t c, const Lanes &lanes) const {
        vec answer[V], read[V], w[V];
        for (int i = 0; i < V; ++i) answer[i] = read[i] = vec{};
        if (state) {
            const float *at = state + c;
            for (int64_t n = 0; n < keys; ++n, at += channels) {
                const vec by_k = splat(k[n]), by_q = splat(q[n]);
                for (int i = 0; i < V; ++i) {
                    const vec s = lanes.get(at + i * LANES);
                    answer[i] += by_k * s, read[i] += by_q * s;
                }
            }
        }
        const vec a = splat(decay);
        for (int i = 0; i < V; ++i) {
            w[i] = splat(beta) * (lanes.get(v + c + i * LANES) - a * answer[i]);
            lanes.put(y + c + i * LANES, a * read[i] + splat(meeting) * w[i]);
        }
        if (!state) return;
        float *at = state + c;
        for (int64_t n = 0; n < keys; ++n, at += channels) {
            const vec by_k = splat(k[n]);
            for (int i = 0; i < V; ++i)
                lanes.put(at + i * LANES, a * lanes.get(at + i * LANES) + by_k * w[i]);
        }
    }

    void run() const {
        int64_t c = 0;
        for (; c + 4 * LANES <= channels; c += 4 * LANES) channels_from<4>(c, Whole{});
        if (c + 2 * LANES <= channels) channels_from<2>(c, Whole{}), c += 2 * LANES;
        if (c + LANES <= channels) channels_from<1>(c, Whole{}), c += LANES;
        if (c < channels) channels_from<1>(c, Some(channels - c));
    }
};

static float soft_plus(float x) { return x > 20 ? x : std::log1p(std::exp(x)); }

// One head of one sequence, norm and gate included.
static void turn_rule(const Delta &m, int64_t h, int64_t place, const float *mixed, const float *z, float step,
                      float beta, float *states, float *room, float *y) {
    const int64_t K = m.keys, P = m.channels, g = h / (m.heads / m.groups);
    const float *own_q = mixed + g * K, *own_k = mixed + (m.groups + g) * K;
    float *q = room, *k = room + K;
    const float by_q = length_of(own_q, K) / std::sqrt(static_cast<float>(K)), by_k = length_of(own_k, K);
    RuleStep rule;
    rule.meeting = 0;
    for (int64_t n = 0; n < K; ++n) {
        q[n] = own_q[n] * by_q, k[n] = own_k[n] * by_k;
        rule.meeting += q[n] * k[n];
    }
    rule.q = q, rule.k = k, rule.keys = K, rule.channels = P;
    rule.decay = std::exp(m.A[h] * soft_plus(step + m.dt_bias[h]));
    rule.beta = m.most / (1.0f + std::exp(-beta));
    rule.v = mixed + 2 * m.groups * K + h * P, rule.y = y;
    rule.state = place < 0 ? nullptr : states + place * K * P;
    rule.run();
    rms_norm(rule.y, m.norm.data(), m.epsilon, P, rule.y);
    gate(rule.y, z, P);
}

static void take_part(const Delta &m, const Part &part, Own &o) {
    const Step &s = o.s;
    Workspace &w = s.work;
    const int64_t d = s.net.width, M = m.mixed_rows, H = m.heads, P = m.channels, D = H * P;
    int64_t begin, end, first = 0;
    size_t share = part.share;
    for (const auto &matrix : m.mixed) {
        o.share(share++, begin, end);
        const int64_t c0 = first + begin * GROUP, c1 = first + std::min(matrix->rows, end * GROUP);
        project(*matrix, o.x, d, s.batch, begin, end, w.u.data() + first, M);
        for (int64_t b = 0; b < s.batch && c0 < c1; ++b)
            convolve(m.conv, nullptr, M, m.taps - 1, s.states[b] + m.conv_state, c0, c1, w.u.data() + b * M,
                     w.u.data() + b * M);
        first += matrix->rows;
    }
    o.share(share++, begin, end);
    project(*m.gate, o.x, d, s.batch, begin, end, w.z.data(), D);
    float *steps = w.dbc.data(), *betas = steps + s.batch * H;
    o.share(share++, begin, end);
    project(*m.step, o.x, d, s.batch, begin, end, steps, H);
    o.share(share++, begin, end);
    project(*m.beta, o.x, d, s.batch, begin, end, betas, H);
    o.wait();

    std::vector<float> room(2 * m.keys);
    const int64_t units = s.batch * H;
    for (int64_t unit = units * o.thread / o.threads; unit < units * (o.thread + 1) / o.threads; ++unit) {
        const int64_t b = unit / H, h = unit % H;
        turn_rule(m, h, m.places[h], w.u.data() + b * M, w.z.data() + b * D + h * P, steps[b * H + h], betas[b * H + h],
                  s.states[b] + m.rule_state, room.data(), w.y.data() + b * D + h * P);
    }
    o.wait();

    o.share(share, begin, end);
    scaled(m.out, o, w.y.data(), s.batch, begin, end, o.added, d);
    o.give(part, m.out.bias, begin, end);
}
