// The gated delta rule over time (Yang, Kautz & Hatamizadeh, arXiv 2412.06464, eq. 10), its backward and the squared norms
// of its states. Included by scan_impl.h's levels, in their namespace.
//
//   S = diag(a) S,  w = beta (v - S' k),  S += k w',  y = S' q      a = exp(g)
//
// Lanes are channels of a head's value: each column of S goes its own way, so a strip of columns that stays in the
// first-level cache is taken through all steps. A step is one pass over the strip: what it writes at once answers the next
// step's key and query, as y = S' a q + (k.q) w. Nothing is solved, so no bit depends on where time is cut.

constexpr int STRIP = 4; // vectors of a strip
struct Strip {
    vec at[STRIP];
    vec &operator[](int i) { return at[i]; }
    const vec &operator[](int i) const { return at[i]; }
};

// What a step brings for its keys: decays, k, q, and both times the decay.
struct Keyed {
    const Rule &r;
    int64_t b, h, group;
    std::vector<float> decay, k_after, q_after;
    const float *k = nullptr, *q = nullptr;
    float beta = 0, meeting = 0; // meeting: k.q

    Keyed(const Rule &rule, int64_t batch, int64_t head)
        : r(rule), b(batch), h(head), group(head / (rule.heads / rule.groups)), decay(rule.keys), k_after(rule.keys),
          q_after(rule.keys) {}

    void open(int64_t t) {
        const int64_t K = r.keys;
        k = r.k.at(b, t) + group * K, q = r.q.data ? r.q.at(b, t) + group * K : k;
        beta = r.beta.at(b, t)[h];
        if (r.by_channel) {
            const float *g = r.g.at(b, t) + h * K;
            for (int64_t n = 0; n < K; n += LANES) {
                const int lanes = static_cast<int>(std::min<int64_t>(LANES, K - n));
                store(decay.data() + n, exp2v(load(g + n, lanes) * splat(LOG2E)), lanes);
            }
        } else {
            std::fill(decay.begin(), decay.end(), std::exp(r.g.at(b, t)[h]));
        }
        vec both{};
        for (int64_t n = 0; n < K; n += LANES) {
            const int lanes = static_cast<int>(std::min<int64_t>(LANES, K - n));
            const vec a = load(decay.data() + n, lanes), by_k = load(k + n, lanes), by_q = load(q + n, lanes);
            store(k_after.data() + n, a * by_k, lanes), store(q_after.data() + n, a * by_q, lanes);
            both += by_k * by_q;
        }
        meeting = sum(both);
    }
};

// Columns [c0, c0 + STRIP * LANES) of one head of one sequence.
struct Columns {
    const Rule &r;
    int64_t b, h, c0;
    int lanes[STRIP]; // of each vector; those past the last channel stay zero

    Columns(const Rule &rule, int64_t batch, int64_t head, int64_t strip)
        : r(rule), b(batch), h(head), c0(strip * STRIP * LANES) {
        for (int i = 0; i < STRIP; ++i)
            lanes[i] = static_cast<int>(std::clamp<int64_t>(r.channels - c0 - i * LANES, 0, LANES));
    }

    void get(const float *head, Strip &to) const {
        for (int i = 0; i < STRIP; ++i) to[i] = lanes[i] ? load(head + c0 + i * LANES, lanes[i]) : vec{};
    }
    void put(float *head, const Strip &from) const {
        for (int i = 0; i < STRIP; ++i)
            if (lanes[i]) store(head + c0 + i * LANES, from[i], lanes[i]);
    }
    float *of(const Rows &rows, int64_t t) const { return rows.at(b, t) + h * r.channels; }
    int64_t state() const { return (b * r.heads + h) * r.keys * r.channels; } // where that of the head begins

    void start(const float *states, std::vector<vec> &to) const {
        for (int64_t n = 0; n < r.keys; ++n) {
            Strip row{};
            if (states) get(states + state() + n * r.channels, row);
            for (int i = 0; i < STRIP; ++i) to[n * STRIP + i] = row[i];
        }
    }
    void finish(const std::vector<vec> &from, float *states) const {
        for (int64_t n = 0; n < r.keys; ++n) {
            Strip row;
            for (int i = 0; i < STRIP; ++i) row[i] = from[n * STRIP + i];
            put(states + state() + n * r.channels, row);
        }
    }
};

// S, first decayed and with k w' added if `made` is given, and what it answers to the step `next`: S' a k, and S' a q or,
// with SQUARES, the sums of its squares.
template <bool SQUARES>
static void pass(const Keyed *made, const Strip &w, const Keyed &next, vec *state, int64_t keys, Strip &answer,
                 Strip &read) {
    const Strip own = w; // in registers
    vec by_key[STRIP] = {}, by_query[STRIP] = {};
    const float *const k_after = next.k_after.data(), *const q_after = next.q_after.data();
    const float *const decay = made ? made->decay.data() : nullptr, *const k = made ? made->k : nullptr;
    for (int64_t n = 0; n < keys; ++n, state += STRIP) {
        const vec a = made ? splat(decay[n]) : vec{}, by_k = made ? splat(k[n]) : vec{};
        const vec asked = splat(k_after[n]), wanted = splat(q_after[n]);
        for (int i = 0; i < STRIP; ++i) {
            vec s = state[i];
            if (made) state[i] = s = a * s + by_k * own[i];
            by_key[i] += asked * s;
            by_query[i] += SQUARES ? s * s : wanted * s;
        }
    }
    for (int i = 0; i < STRIP; ++i) answer[i] = by_key[i], read[i] = by_query[i];
}

template <bool SQUARES> static void through(const Rule &r, const Columns &columns, float *squares) {
    std::vector<vec> state(r.keys * STRIP);
    columns.start(r.initial, state);
    Keyed one(r, columns.b, columns.h), other(r, columns.b, columns.h);
    Keyed *now = &one, *next = &other;
    Strip answer, read, w{};
    if (r.length) now->open(0), pass<SQUARES>(nullptr, w, *now, state.data(), r.keys, answer, read);
    for (int64_t t = 0; t < r.length; ++t) {
        Strip v, y;
        columns.get(columns.of(r.v, t), v);
        float total = 0;
        for (int i = 0; i < STRIP; ++i) {
            w[i] = splat(now->beta) * (v[i] - answer[i]);
            if (SQUARES) total += sum(read[i]);
            else y[i] = read[i] + splat(now->meeting) * w[i];
        }
        if (SQUARES) squares[t] += total;
        else columns.put(columns.of(r.y, t), y);
        if (t + 1 < r.length) next->open(t + 1); // else nobody asks: the same code, as its rounding must be the same
        pass<SQUARES>(now, w, *next, state.data(), r.keys, answer, read);
        std::swap(now, next);
    }
    columns.finish(state, r.last);
}

static int64_t strips_of(const Rule &r) { return (r.channels + STRIP * LANES - 1) / (STRIP * LANES); }

void rule(const Rule &r, int threads) {
    const int64_t strips = strips_of(r), heads = r.batch * r.heads;
    if (r.squares) // strips of a head one after the other: they share its sums
        return parallel_for(heads, r.updates(), threads, [&](int64_t head) {
            for (int64_t strip = 0; strip < strips; ++strip)
                through<true>(r, Columns(r, head / r.heads, head % r.heads, strip), r.squares + head * r.length);
        });
    parallel_for(heads * strips, r.updates(), threads, [&](int64_t unit) {
        const int64_t head = unit / strips;
        through<false>(r, Columns(r, head / r.heads, head % r.heads, unit % strips), nullptr);
    });
}

// The sums over lanes of `count` vectors are added to `to`.
static void add_sums(const vec *from, int64_t count, float *to) {
    typedef float quarter __attribute__((vector_size(16)));
    constexpr int PARTS = LANES / 4, AT_ONCE = 16;
    for (int64_t n0 = 0; n0 < count; n0 += AT_ONCE) {
        float few[AT_ONCE][4];
        const int64_t many = std::min<int64_t>(AT_ONCE, count - n0);
        for (int64_t n = 0; n < many; ++n) {
            quarter parts[PARTS];
            std::memcpy(parts, from + n0 + n, sizeof(vec));
            for (int i = 1; i < PARTS; ++i) parts[0] += parts[i];
            std::memcpy(few[n], parts, sizeof(quarter));
        }
        for (int64_t n = 0; n < many; ++n) to[n0 + n] += (few[n][0] + few[n][1]) + (few[n][2] + few[n][3]);
    }
}

// Backward of one strip. Of the states only every BLOCK-th is kept; those between are made again.
struct Back {
    static constexpr int64_t BLOCK = 16;
    const Rule &r;
    const RuleBackward &g;
    const Columns &columns;
    std::vector<Keyed> steps;          // of a block
    std::vector<vec> begins, states;   // at the beginning of each block; before each step of one
    std::vector<vec> dstate, dq, dk, dg; // dg: by channel of a key
    std::vector<Strip> off;            // what a step corrects: v - S' a k

    Back(const Rule &rule, const RuleBackward &grads, const Columns &of)
        : r(rule), g(grads), columns(of), steps(std::min(BLOCK, rule.length), Keyed(rule, of.b, of.h)),
          begins((rule.length + BLOCK - 1) / BLOCK * rule.keys * STRIP),
          states(steps.size() * rule.keys * STRIP), dstate(rule.keys * STRIP), dq(rule.keys), dk(rule.keys),
          dg(rule.by_channel ? rule.keys : 0), off(steps.size()) {}

    int64_t size() const { return r.keys * STRIP; }

    // Step t from `state` to `after`, which may be the same, or null where only `missed` is asked for.
    void forward(int64_t t, Keyed &step, const vec *state, vec *after, Strip &missed) const {
        Strip v, w;
        step.open(t);
        columns.get(columns.of(r.v, t), v);
        vec answer[STRIP] = {};
        for (int64_t n = 0; n < r.keys; ++n)
            for (int i = 0; i < STRIP; ++i) answer[i] += splat(step.k_after[n]) * state[n * STRIP + i];
        for (int i = 0; i < STRIP; ++i) missed[i] = v[i] - answer[i], w[i] = splat(step.beta) * missed[i];
        for (int64_t n = 0; n < r.keys && after; ++n)
            for (int i = 0; i < STRIP; ++i)
                after[n * STRIP + i] = splat(step.decay[n]) * state[n * STRIP + i] + splat(step.k[n]) * w[i];
    }

    template <bool CHANNELS> void back(int64_t t, const Keyed &step, const vec *state, const Strip &missed) {
        Strip dy, w, dw{}, dv;
        columns.get(columns.of(g.dy, t), dy);
        const int64_t keys = r.keys; // copies: a store may change a member
        const float *const by_q = step.q, *const by_k = step.k, *const decay = step.decay.data();
        vec *const d = dstate.data(), *const to_q = dq.data(), *const to_k = dk.data(), *const to_g = dg.data();
        for (int64_t n = 0; n < keys; ++n) {
            const vec q = splat(by_q[n]), k = splat(by_k[n]);
            for (int i = 0; i < STRIP; ++i) {
                const vec changed = d[n * STRIP + i] + q * dy[i];
                dw[i] += k * changed;
                d[n * STRIP + i] = changed;
            }
        }
        float dbeta = 0, written = 0; // written: w.dy
        for (int i = 0; i < STRIP; ++i) {
            w[i] = splat(step.beta) * missed[i], dv[i] = splat(step.beta) * dw[i];
            dbeta += sum(dw[i] * missed[i]), written += sum(w[i] * dy[i]);
        }
        columns.put(columns.of(g.dv, t), dv);
        g.dbeta.at(columns.b, t)[columns.h] += dbeta;
        vec all{};
        for (int64_t n = 0; n < keys; ++n) {
            const vec a = splat(decay[n]), k = splat(by_k[n]);
            vec of_q{}, of_k{}, of_g{};
            for (int i = 0; i < STRIP; ++i) {
                const vec s = a * state[n * STRIP + i], behind = d[n * STRIP + i], before = behind - k * dv[i];
                of_q += s * dy[i];
                of_k += behind * w[i] - s * dv[i];
                of_g += s * before;
                d[n * STRIP + i] = a * before;
            }
            to_q[n] = of_q, to_k[n] = of_k;
            if (CHANNELS) to_g[n] = of_g;
            else all += of_g;
        }
        float *const q = g.dq.at(columns.b, t) + columns.h * r.keys, *const k = g.dk.at(columns.b, t) + columns.h * r.keys;
        for (int64_t n = 0; n < keys; ++n) q[n] += by_k[n] * written;
        add_sums(to_q, keys, q), add_sums(to_k, keys, k);
        if (CHANNELS) add_sums(to_g, keys, g.dg.at(columns.b, t) + columns.h * r.keys);
        else g.dg.at(columns.b, t)[columns.h] += sum(all);
    }

    void run() {
        const int64_t blocks = (r.length + BLOCK - 1) / BLOCK;
        columns.start(g.dlast, dstate);
        std::vector<vec> state(size());
        columns.start(r.initial, state);
        Strip missed;
        for (int64_t block = 0; block < blocks; ++block) {
            std::copy(state.begin(), state.end(), begins.begin() + block * size());
            if (block + 1 == blocks) break;
            for (int64_t t = block * BLOCK; t < (block + 1) * BLOCK; ++t)
                forward(t, steps[0], state.data(), state.data(), missed);
        }
        for (int64_t block = blocks - 1; block >= 0; --block) {
            const int64_t first = block * BLOCK, count = std::min(BLOCK, r.length - first);
            std::copy_n(begins.begin() + block * size(), size(), states.begin());
            for (int64_t i = 0; i < count; ++i) {
                vec *const from = states.data() + i * size();
                forward(first + i, steps[i], from, i + 1 < count ? from + size() : nullptr, off[i]);
            }
            for (int64_t i = count - 1; i >= 0; --i) {
                const vec *const from = states.data() + i * size();
                if (r.by_channel) back<true>(first + i, steps[i], from, off[i]);
                else back<false>(first + i, steps[i], from, off[i]);
            }
        }
        columns.finish(dstate, g.dinitial);
    }
};

void rule_backward(const Rule &r, const RuleBackward &g, int threads) {
    parallel_for(r.batch * r.heads, r.updates(), threads, [&](int64_t head) {
        for (int64_t strip = 0; strip < strips_of(r); ++strip) { // one after the other: they share the keys' gradients
            const Columns columns(r, head / r.heads, head % r.heads, strip);
            Back(r, g, columns).run();
        }
    });
}
