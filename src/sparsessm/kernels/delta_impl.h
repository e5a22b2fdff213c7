// The gated delta rule for one token (Yang, Kautz & Hatamizadeh, arXiv 2412.06464). Lanes are the channels of a head's
// value, its state lies as (K, P). Included by step_impl.h.
//
//   S = diag(a) S,  w = beta (v - S' k),  S += k w',  y = S' q      a = exp(A softplus(step))
//
// S is read twice and written once: the first pass gives S' a k and S' a q at once, as y = S' a q + (k.q) w.

// One over the length, of queries and keys.
static float length_of(const float *x, int64_t count) {
    float squares = 0;
    for (int64_t i = 0; i < count; ++i) squares += x[i] * x[i];
    return 1.0f / std::sqrt(squares + 1e-6f);
}

struct RuleStep {
    const float *k, *decay;           // (K), k of length one
    const float *q_after, *k_after;   // (K): q, of length one and scaled, and k, each times the decay
    int64_t keys, channels;
    float beta, meeting; // meeting: k.q
    const float *v;             // (P)
    float *state, *y;           // (K, P) or null where nothing is kept, (P)

    template <int V, typename Lanes> void channels_from(int64_t c, const Lanes &lanes) const {
        vec answer[V], read[V], w[V];
        for (int i = 0; i < V; ++i) answer[i] = read[i] = vec{};
        if (state) {
            const float *at = state + c;
            for (int64_t n = 0; n < keys; ++n, at += channels) {
                const vec by_k = splat(k_after[n]), by_q = splat(q_after[n]);
                for (int i = 0; i < V; ++i) {
                    const vec s = lanes.get(at + i * LANES);
                    answer[i] += by_k * s, read[i] += by_q * s;
                }
            }
        }
        for (int i = 0; i < V; ++i) {
            w[i] = splat(beta) * (lanes.get(v + c + i * LANES) - answer[i]);
            lanes.put(y + c + i * LANES, read[i] + splat(meeting) * w[i]);
        }
        if (!state) return;
        float *at = state + c;
        for (int64_t n = 0; n < keys; ++n, at += channels) {
            const vec by_k = splat(k[n]), a = splat(decay[n]);
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

// The decays of a head's channels, one for all of them or each its own: (K).
static void decays_of(const Delta &m, int64_t h, const float *steps, float *decay) {
    if (!m.by_channel) {
        std::fill(decay, decay + m.keys, std::exp(m.A[h] * soft_plus(steps[h] + m.dt_bias[h])));
        return;
    }
    const float *step = steps + h * m.keys, *bias = m.dt_bias.data() + h * m.keys;
    for (int64_t n = 0; n < m.keys; n += LANES) {
        const int lanes = static_cast<int>(std::min<int64_t>(LANES, m.keys - n));
        store(decay + n, exp2v(splat(m.A[h] * LOG2E) * softplus(load(step + n, lanes) + load(bias + n, lanes))), lanes);
    }
}

// One head of one sequence, norm and gate included; steps are of all heads, room is (5 K).
static void turn_rule(const Delta &m, int64_t h, int64_t place, const float *mixed, const float *z, const float *steps,
                      float beta, float *states, float *room, float *y) {
    const int64_t K = m.keys, P = m.channels, g = h / (m.heads / m.groups);
    const float *own_q = mixed + g * K, *own_k = mixed + (m.groups + g) * K;
    float *q = room, *k = q + K, *decay = k + K, *q_after = decay + K, *k_after = q_after + K;
    const float by_q = length_of(own_q, K) / std::sqrt(static_cast<float>(K)), by_k = length_of(own_k, K);
    RuleStep rule;
    rule.meeting = 0;
    decays_of(m, h, steps, decay);
    for (int64_t n = 0; n < K; ++n) {
        q[n] = own_q[n] * by_q, k[n] = own_k[n] * by_k;
        q_after[n] = q[n] * decay[n], k_after[n] = k[n] * decay[n];
        rule.meeting += q[n] * k[n];
    }
    rule.k = k, rule.decay = decay, rule.q_after = q_after, rule.k_after = k_after, rule.keys = K, rule.channels = P;
    rule.beta = m.most / (1.0f + std::exp(-beta));
    rule.v = mixed + 2 * m.groups * K + h * P, rule.y = y;
    rule.state = place < 0 ? nullptr : states + place * K * P;
    rule.run();
    rms_norm(rule.y, m.norm.data(), m.epsilon, P, rule.y);
    if (!m.sigmoid) return gate(rule.y, z, P);
    for (int64_t c = 0; c < P; c += LANES) {
        const int lanes = static_cast<int>(std::min<int64_t>(LANES, P - c));
        store(rule.y + c, load(rule.y + c, lanes) * sigmoid(load(z + c, lanes)), lanes);
    }
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
    const int64_t of_steps = m.step.matrix->rows;
    float *steps = w.dbc.data(), *betas = steps + s.batch * of_steps, *low = betas + s.batch * H;
    float *low_step = low + s.batch * m.gate.low();
    const auto enter = [&](const Narrowed &n, float *room, float *out) {
        const Matrix &reads = n.narrow ? *n.narrow : *n.matrix;
        o.share(share++, begin, end);
        project(reads, o.x, d, s.batch, begin, end, n.narrow ? room : out, reads.rows);
    };
    const auto widen = [&](const Narrowed &n, const float *room, float *out) {
        if (!n.narrow) return;
        o.share(share++, begin, end);
        project(*n.matrix, room, n.low(), s.batch, begin, end, out, n.matrix->rows);
    };
    enter(m.gate, low, w.z.data()), enter(m.step, low_step, steps);
    o.share(share++, begin, end);
    project(*m.beta, o.x, d, s.batch, begin, end, betas, H);
    const size_t out_share = share++;
    o.wait();
    widen(m.gate, low, w.z.data()), widen(m.step, low_step, steps);
    if (m.gate.narrow || m.step.narrow) o.wait();

    std::vector<float> room(5 * m.keys);
    const int64_t units = s.batch * H;
    for (int64_t unit = units * o.thread / o.threads; unit < units * (o.thread + 1) / o.threads; ++unit) {
        const int64_t b = unit / H, h = unit % H;
        turn_rule(m, h, m.places[h], w.u.data() + b * M, w.z.data() + b * D + h * P, steps + b * of_steps,
                  betas[b * H + h], s.states[b] + m.rule_state, room.data(), w.y.data() + b * D + h * P);
    }
    o.wait();

    o.share(out_share, begin, end);
    scaled(m.out, o, w.y.data(), s.batch, begin, end, o.added, d);
    o.give(part, m.out.bias, begin, end);
}
