// Attention of a step: the keys and values of one token for each sequence go behind those that are kept, and its
// queries meet all of them. Included by step_impl.h.

// The first channels of a head in pairs (c, c + pairs), turned by the position; the others as they are.
static void turn(const float *x, const float *turned, int64_t pairs, int64_t width, float scale, float *out) {
    for (int64_t c = 0; c < pairs; ++c) {
        const float first = x[c], second = x[c + pairs], cosine = turned[c], sine = turned[pairs + c];
        out[c] = (first * cosine - second * sine) * scale;
        out[c + pairs] = (second * cosine + first * sine) * scale;
    }
    for (int64_t c = 2 * pairs; c < width; ++c) out[c] = x[c] * scale;
}

// What a head of queries has seen so far: the largest score, and sums with it taken out.
struct Seen {
    float most = -INFINITY, total = 0;
};

constexpr int VECTORS = KEPT / LANES; // of a channel in a block

// Puts a token's (width) numbers at its place among the KEPT of a block, as they are or as bytes.
static void put(const float *x, int64_t width, int64_t at, bool int8, float *to) {
    if (!int8) {
        for (int64_t c = 0; c < width; ++c) to[c * KEPT + at] = x[c];
        return;
    }
    float most = 0, ill = 0;
    for (int64_t c = 0; c < width; ++c) most = std::max(most, std::fabs(x[c])), ill += x[c] * 0.0f;
    const bool sane = ill == 0; // else the scale says that the token is none
    const float inverse = sane && most > 1e-30f ? 127.0f / most : 0.0f;
    const int64_t shift = at / KEPT_WORDS * 8;
    for (int64_t c = 0; c < width; ++c) {
        const auto code = static_cast<uint32_t>(sane ? static_cast<int32_t>(std::nearbyint(x[c] * inverse)) : 0);
        uint32_t word;
        float *own = to + c * KEPT_WORDS + at % KEPT_WORDS;
        std::memcpy(&word, own, 4);
        word = (word << 1 | word >> 31) ^ NO_EXPONENT;
        word = (word & ~(0xffu << shift)) | (code & 0xff) << shift;
        word ^= NO_EXPONENT, word = word >> 1 | word << 31;
        std::memcpy(own, &word, 4);
    }
    to[width * KEPT_WORDS + at] = sane ? most / 127.0f : NAN;
}

// What KEPT tokens have in channel c.
template <bool INT8> static inline void get(const float *kept, int64_t c, vec *out) {
    if constexpr (!INT8) {
        for (int v = 0; v < VECTORS; ++v) out[v] = load(kept + c * KEPT + v * LANES);
        return;
    }
    constexpr int WORDS = KEPT_WORDS / LANES;
    for (int i = 0; i < WORDS; ++i) {
        ivec word;
        std::memcpy(&word, kept + c * KEPT_WORDS + i * LANES, sizeof word);
        word = ((word << 1) | ((word >> 31) & 1)) ^ static_cast<int32_t>(NO_EXPONENT);
        out[i] = __builtin_convertvector((word << 24) >> 24, vec);
        out[WORDS + i] = __builtin_convertvector((word << 16) >> 24, vec);
        out[2 * WORDS + i] = __builtin_convertvector((word << 8) >> 24, vec);
        out[3 * WORDS + i] = __builtin_convertvector(word >> 24, vec);
    }
}

// Queries that meet a block together: what is kept is read, and made floats of, once for all of them.
constexpr int MOST_QUERIES = LANES == 16 ? 4 : 2;

// Of Q queries (width), `apart` from each other, times scale and log2(e), with the keys of a block; adds to `score`.
template <bool INT8, int Q>
static void score_of(const float *queries, int64_t apart, const float *keys, int64_t width, vec (*score)[VECTORS]) {
    vec own[Q][VECTORS] = {}, key[VECTORS];
    for (int64_t c = 0; c < width; ++c) {
        get<INT8>(keys, c, key);
        for (int h = 0; h < Q; ++h) {
            const vec q = splat(queries[h * apart + c]);
            for (int v = 0; v < VECTORS; ++v) own[h][v] += q * key[v];
        }
    }
    for (int h = 0; h < Q; ++h)
        for (int v = 0; v < VECTORS; ++v)
            score[h][v] += INT8 ? own[h][v] * load(keys + width * KEPT_WORDS + v * LANES) : own[h][v];
}

// Scores of the first `count` tokens of a block become what their values weigh; `sums` (width, LANES) are of those before.
static void weigh(vec *score, int64_t width, int64_t count, Seen &seen, float *sums) {
    alignas(64) float scores[KEPT];
    for (int v = 0; v < VECTORS; ++v) store(scores + v * LANES, score[v], LANES);
    const float most = std::max(seen.most, *std::max_element(scores, scores + count));
    if (most > seen.most && seen.total > 0) {
        const vec less = exp2v(splat(seen.most - most));
        seen.total *= less[0];
        for (int64_t c = 0; c < width * LANES; c += LANES) store(sums + c, load(sums + c) * less, LANES);
    }
    seen.most = most;
    std::fill(scores + count, scores + KEPT, -INFINITY);
    vec total{};
    for (int v = 0; v < VECTORS; ++v) total += score[v] = exp2v(load(scores + v * LANES) - splat(most));
    seen.total += sum(total);
}

// The values of a block, weighed, go to the `sums` of Q queries, each (width, LANES), of which each lane has some of the
// tokens.
template <bool INT8, int Q>
static void gather(const vec (*weight)[VECTORS], const float *values, int64_t width, float *sums) {
    vec by[Q][VECTORS], value[VECTORS];
    for (int h = 0; h < Q; ++h)
        for (int v = 0; v < VECTORS; ++v)
            by[h][v] = INT8 ? weight[h][v] * load(values + width * KEPT_WORDS + v * LANES) : weight[h][v];
    for (int64_t c = 0; c < width; ++c) {
        get<INT8>(values, c, value);
        for (int h = 0; h < Q; ++h) {
            float *at = sums + (h * width + c) * LANES;
            vec own = load(at);
            for (int v = 0; v < VECTORS; ++v) own += by[h][v] * value[v];
            store(at, own, LANES);
        }
    }
}

// What some queries meet: the keys of a head in up to two pieces, one behind the other, and `values` floats behind their
// beginning the values; of all tokens of a sequence, in blocks `apart` floats from each other.
struct Meeting {
    int64_t first, second, values, width; // channels of the pieces and of the values
    int64_t tokens, apart;
    const float *block;

    // Q queries (Q, first + second) meet the block at `at`, which has `count` tokens.
    template <bool INT8, int Q>
    void meet(const float *queries, const float *at, int64_t count, Seen *seen, float *sums) const {
        vec score[Q][VECTORS] = {};
        score_of<INT8, Q>(queries, first + second, at, first, score);
        if (second) score_of<INT8, Q>(queries + first, first + second, at + kept_floats(first, INT8), second, score);
        for (int h = 0; h < Q; ++h) weigh(score[h], width, count, seen[h], sums + h * width * LANES);
        gather<INT8, Q>(score, at + values, width, sums);
    }

    // Queries (count, first + second) -> what they gather, (count, width) with a stride; sums: (count, width, LANES). All
    // of them meet a block before the next one is read.
    template <bool INT8> void run(const float *queries, int64_t count, float *sums, float *out, int64_t stride) const {
        std::fill(sums, sums + count * width * LANES, 0.0f);
        std::vector<Seen> seen(count);
        const float *at = block;
        for (int64_t t = 0; t < tokens; t += KEPT, at += apart) {
            const int64_t here = std::min<int64_t>(KEPT, tokens - t);
            int64_t h = 0;
            for (; h + MOST_QUERIES <= count; h += MOST_QUERIES)
                meet<INT8, MOST_QUERIES>(queries + h * (first + second), at, here, &seen[h], sums + h * width * LANES);
            for (; h < count; ++h)
                meet<INT8, 1>(queries + h * (first + second), at, here, &seen[h], sums + h * width * LANES);
        }
        for (int64_t h = 0; h < count; ++h)
            for (int64_t c = 0; c < width; ++c)
                out[h * stride + c] = sum(load(sums + (h * width + c) * LANES)) / seen[h].total;
    }

    void run(bool int8, const float *queries, int64_t count, float *sums, float *out, int64_t stride) const {
        if (int8) run<true>(queries, count, sums, out, stride);
        else run<false>(queries, count, sums, out, stride);
    }
};

static void take_part(const Attention &a, const Part &part, Own &o) {
    const Step &s = o.s;
    const Network &net = s.net;
    Workspace &w = s.work;
    const int64_t P = a.width, H = a.heads, G = H / a.shared, head = kept_floats(P, net.int8);
    const int64_t pairs = a.rotary ? static_cast<int64_t>(net.turns.size()) : 0;
    float *q = w.u.data(), *k = w.z.data(), *v = k + s.batch * a.shared * P;
    int64_t begin, end;
    o.share(part.share, begin, end);
    linear(a.q, o, o.x, s.batch, begin, end, q, H * P);
    o.share(part.share + 1, begin, end);
    linear(a.k, o, o.x, s.batch, begin, end, k, a.shared * P);
    o.share(part.share + 2, begin, end);
    linear(a.v, o, o.x, s.batch, begin, end, v, a.shared * P);
    float *gates = q + s.batch * H * P;
    if (a.gate.matrix) {
        o.share(part.share + 4, begin, end);
        linear(a.gate, o, o.x, s.batch, begin, end, gates, H * P);
    }
    o.wait();

    // A thread takes heads of keys with all their queries, or where these are too few some of the queries.
    const int64_t pairs_of_heads = s.batch * a.shared;
    const auto each = [&](int64_t units, auto &&run) {
        for (int64_t unit = units * o.thread / o.threads; unit < units * (o.thread + 1) / o.threads; ++unit) run(unit);
    };
    std::vector<float> room(2 * P + G * P + G * P * LANES);
    float *normed = room.data() + P, *queries = normed + P, *sums = queries + G * P;
    // A head of `all` heads of a sequence, normalised where there is a norm.
    const auto own = [&](const float *all, int64_t count, int64_t head, const std::vector<float> &norm) {
        const float *x = all + head * P;
        if (norm.empty()) return x;
        const float unit = a.norm_whole ? unit_of(all, net.epsilon, count * P) : unit_of(x, net.epsilon, P);
        const float *weight = norm.data() + (a.norm_whole ? head * P : 0);
        for (int64_t c = 0; c < P; ++c) normed[c] = weight[c] * (x[c] * unit);
        return static_cast<const float *>(normed);
    };
    const auto keep = [&](int64_t unit) { // of the token: its keys and values
        const int64_t b = unit / a.shared, g = unit % a.shared, at = tokens_of(net, s.states[b]);
        float *keys = s.states[b] + net.state_size + at / KEPT * net.block + a.place + g * head;
        turn(own(k + b * a.shared * P, a.shared, g, a.k_norm), w.turned.data() + b * 2 * net.turns.size(), pairs, P, 1,
             room.data());
        put(room.data(), P, at % KEPT, net.int8, keys);
        put(v + (b * a.shared + g) * P, P, at % KEPT, net.int8, keys + a.shared * head);
    };
    // Queries [first, first + count), of one head of keys.
    const auto ask = [&](int64_t b, int64_t first, int64_t count) {
        for (int64_t h = 0; h < count; ++h)
            turn(own(q + b * H * P, H, first + h, a.q_norm), w.turned.data() + b * 2 * net.turns.size(), pairs, P,
                 a.scale * LOG2E, queries + h * P);
        const Meeting meeting{P, 0, a.shared * head, P, tokens_of(net, s.states[b]) + 1, net.block,
                              s.states[b] + net.state_size + a.place + first / G * head};
        meeting.run(net.int8, queries, count, sums, w.y.data() + (b * H + first) * P, P);
        if (!a.gate.matrix) return;
        for (int64_t i = (b * H + first) * P; i < (b * H + first + count) * P; ++i) w.y[i] /= 1.0f + std::exp(-gates[i]);
    };
    if (pairs_of_heads < o.threads && G > 1) {
        each(pairs_of_heads, keep);
        o.wait();
        each(s.batch * H, [&](int64_t unit) { ask(unit / H, unit % H, 1); });
    } else {
        each(pairs_of_heads, [&](int64_t unit) {
            keep(unit);
            ask(unit / a.shared, unit % a.shared * G, G);
        });
    }
    o.wait();

    o.share(part.share + 3, begin, end);
    scaled(a.o, o, w.y.data(), s.batch, begin, end, o.added, net.width);
    o.give(part, a.o.bias, begin, end);
}

// The same of latent attention: a thread takes heads, of all sequences. Some of them go together, so that what is kept is
// not read for each.
constexpr int64_t HEADS_TOGETHER = 8;
static void take_part(const Latent &m, const Part &part, Own &o) {
    const Step &s = o.s;
    const Network &net = s.net;
    Workspace &w = s.work;
    const int64_t H = m.heads, R = m.rank, S = m.common, N = m.own, P = m.width, B = s.batch;
    const int64_t low = m.narrow.matrix ? m.narrow.matrix->rows : 0;
    float *q = w.u.data(), *rows = w.z.data(), *narrow = rows + B * (R + S);
    const auto block = [&](int64_t b) { return s.states[b] + net.state_size + m.place; };
    int64_t begin, end;
    o.share(part.share, begin, end);
    linear(m.row, o, o.x, B, begin, end, rows, R + S);
    o.share(part.share + 1, begin, end);
    linear(low ? m.narrow : m.q, o, o.x, B, begin, end, low ? narrow : q, low ? low : H * (N + S));
    o.wait();

    for (int64_t b = B * o.thread / o.threads; b < B * (o.thread + 1) / o.threads; ++b) { // what the token leaves
        const int64_t at = tokens_of(net, s.states[b]);
        float *row = rows + b * (R + S), *to = block(b) + at / KEPT * net.block;
        rms_norm(row, m.norm.data(), m.epsilon, R, row);
        put(row, R, at % KEPT, net.int8, to);
        put(row + R, S, at % KEPT, net.int8, to + kept_floats(R, net.int8));
    }
    if (low) {
        std::vector<float> normed(B * low); // each thread for itself, which saves a barrier
        for (int64_t b = 0; b < B; ++b) rms_norm(narrow + b * low, m.q_norm.data(), m.epsilon, low, normed.data() + b * low);
        o.share(part.share + 3, begin, end);
        linear(m.q, o, normed.data(), B, begin, end, q, H * (N + S));
    }
    o.wait();

    const int64_t last = H * (o.thread + 1) / o.threads, many = std::min(H, HEADS_TOGETHER);
    std::vector<float> room(many * (B * R + R + S + R * LANES));
    float *met = room.data(), *queries = met + many * B * R, *sums = queries + many * (R + S); // met: (head, B, R)
    for (int64_t h = H * o.thread / o.threads; h < last; h += many) {
        const int64_t count = std::min(many, last - h);
        for (int64_t i = 0; i < count; ++i)
            project(*m.keys[h + i], q + (h + i) * (N + S), H * (N + S), B, 0, m.keys[h + i]->groups, met + i * B * R, R);
        for (int64_t b = 0; b < B; ++b) {
            for (int64_t i = 0; i < count; ++i) {
                const float *through = met + (i * B + b) * R, *common = q + (b * H + h + i) * (N + S) + N;
                float *query = queries + i * (R + S);
                for (int64_t c = 0; c < R; ++c) query[c] = through[c] * (m.scale * LOG2E);
                for (int64_t c = 0; c < S; ++c) query[R + c] = common[c] * (m.scale * LOG2E);
            }
            const Meeting meeting{R, S, 0, R, tokens_of(net, s.states[b]) + 1, net.block, block(b)};
            meeting.run(net.int8, queries, count, sums, met + b * R, B * R);
        }
        for (int64_t i = 0; i < count; ++i)
            project(*m.values[h + i], met + i * B * R, R, B, 0, m.values[h + i]->groups, w.y.data() + (h + i) * P, H * P);
    }
    o.wait();

    o.share(part.share + 2, begin, end);
    scaled(m.o, o, w.y.data(), B, begin, end, o.added, net.width);
    o.give(part, m.o.bias, begin, end);
}
