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

// Of a query (width), times scale and log2(e), with the keys (width, KEPT) of a block; adds to `score`.
static void score_of(const float *query, const float *keys, int64_t width, vec *score) {
    for (int64_t c = 0; c < width; ++c) {
        const vec q = splat(query[c]);
        for (int v = 0; v < VECTORS; ++v) score[v] += q * load(keys + c * KEPT + v * LANES);
    }
}

// Scores of the first `count` tokens of a block weigh its values (width, KEPT); `sums` (width, LANES) go on, of which each
// lane has some of the tokens.
static void gather(const vec *score, const float *values, int64_t width, int64_t count, Seen &seen, float *sums) {
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
    vec weight[VECTORS], total{};
    for (int v = 0; v < VECTORS; ++v) total += weight[v] = exp2v(load(scores + v * LANES) - splat(most));
    seen.total += sum(total);
    for (int64_t c = 0; c < width; ++c) {
        vec own = load(sums + c * LANES);
        for (int v = 0; v < VECTORS; ++v) own += weight[v] * load(values + c * KEPT + v * LANES);
        store(sums + c * LANES, own, LANES);
    }
}

static void take_part(const Attention &a, const Part &part, Own &o) {
    const Step &s = o.s;
    const Network &net = s.net;
    Workspace &w = s.work;
    const int64_t P = a.width, H = a.heads, G = H / a.shared;
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
        float *keys = s.states[b] + net.state_size + at / KEPT * net.block + a.place + g * P * KEPT;
        float *values = keys + a.shared * P * KEPT;
        turn(own(k + b * a.shared * P, a.shared, g, a.k_norm), w.turned.data() + b * 2 * net.turns.size(), pairs, P, 1,
             room.data());
        for (int64_t c = 0; c < P; ++c) {
            keys[c * KEPT + at % KEPT] = room[c];
            values[c * KEPT + at % KEPT] = v[(b * a.shared + g) * P + c];
        }
    };
    // Queries [first, first + count), of one head of keys.
    const auto ask = [&](int64_t b, int64_t first, int64_t count) {
        const int64_t kept = tokens_of(net, s.states[b]) + 1, g = first / G;
        std::vector<Seen> seen(count);
        for (int64_t h = 0; h < count; ++h)
            turn(own(q + b * H * P, H, first + h, a.q_norm), w.turned.data() + b * 2 * net.turns.size(), pairs, P,
                 a.scale * LOG2E, queries + h * P);
        std::fill(sums, sums + count * P * LANES, 0.0f);
        const float *block = s.states[b] + net.state_size + a.place + g * P * KEPT;
        for (int64_t t = 0; t < kept; t += KEPT, block += net.block)
            for (int64_t h = 0; h < count; ++h) {
                vec score[VECTORS] = {};
                score_of(queries + h * P, block, P, score);
                gather(score, block + a.shared * P * KEPT, P, std::min<int64_t>(KEPT, kept - t), seen[h],
                       sums + h * P * LANES);
            }
        for (int64_t h = 0; h < count; ++h)
            for (int64_t c = 0; c < P; ++c)
                w.y[(b * H + first + h) * P + c] = sum(load(sums + (h * P + c) * LANES)) / seen[h].total;
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

// The same of latent attention: a thread takes heads, of all sequences.
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
        float *row = rows + b * (R + S), *to = block(b) + at / KEPT * net.block + at % KEPT;
        rms_norm(row, m.norm.data(), m.epsilon, R, row);
        for (int64_t c = 0; c < R + S; ++c) to[c * KEPT] = row[c];
    }
    if (low) {
        std::vector<float> normed(B * low); // each thread for itself, which saves a barrier
        for (int64_t b = 0; b < B; ++b) rms_norm(narrow + b * low, m.q_norm.data(), m.epsilon, low, normed.data() + b * low);
        o.share(part.share + 3, begin, end);
        linear(m.q, o, normed.data(), B, begin, end, q, H * (N + S));
    }
    o.wait();

    std::vector<float> room(B * R + R + S + R * LANES);
    float *met = room.data(), *query = met + B * R, *sums = query + R + S;
    for (int64_t h = H * o.thread / o.threads; h < H * (o.thread + 1) / o.threads; ++h) {
        project(*m.keys[h], q + h * (N + S), H * (N + S), B, 0, m.keys[h]->groups, met, R);
        for (int64_t b = 0; b < B; ++b) {
            const float *common = q + (b * H + h) * (N + S) + N;
            for (int64_t c = 0; c < R + S; ++c) query[c] = (c < R ? met[b * R + c] : common[c - R]) * (m.scale * LOG2E);
            std::fill(sums, sums + R * LANES, 0.0f);
            Seen seen;
            const float *kept = block(b);
            const int64_t tokens = tokens_of(net, s.states[b]) + 1;
            for (int64_t t = 0; t < tokens; t += KEPT, kept += net.block) {
                vec score[VECTORS] = {};
                score_of(query, kept, R + S, score);
                gather(score, kept, R, std::min<int64_t>(KEPT, tokens - t), seen, sums);
            }
            for (int64_t c = 0; c < R; ++c) met[b * R + c] = sum(load(sums + c * LANES)) / seen.total;
        }
        project(*m.values[h], met, R, B, 0, m.values[h]->groups, w.y.data() + h * P, H * P);
    }
    o.wait();

    o.share(part.share + 2, begin, end);
    scaled(m.o, o, w.y.data(), B, begin, end, o.added, net.width);
    o.give(part, m.o.bias, begin, end);
}
