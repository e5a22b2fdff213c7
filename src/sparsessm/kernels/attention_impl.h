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

// A query (width), times scale and log2(e), meets the first `count` keys of a block; `sum` (width, padded) goes on.
static void meet(const float *query, const float *keys, const float *values, int64_t width, int64_t count, Seen &seen,
                 float *sum) {
    constexpr int V = KEPT / LANES;
    vec score[V];
    for (int v = 0; v < V; ++v) score[v] = vec{};
    for (int64_t c = 0; c < width; ++c) {
        const vec q = splat(query[c]);
        for (int v = 0; v < V; ++v) score[v] += q * load(keys + c * KEPT + v * LANES);
    }
    alignas(64) float scores[KEPT];
    for (int v = 0; v < V; ++v) store(scores + v * LANES, score[v], LANES);
    float most = seen.most;
    for (int64_t t = 0; t < count; ++t) most = std::max(most, scores[t]);
    if (most > seen.most) {
        if (seen.total > 0) {
            const vec less = exp2v(splat(seen.most - most));
            seen.total *= less[0];
            for (int64_t c = 0; c < width; c += LANES) store(sum + c, load(sum + c) * less, LANES);
        }
        seen.most = most;
    }
    for (int v = 0; v < V; ++v) store(scores + v * LANES, exp2v(load(scores + v * LANES) - splat(most)), LANES);
    for (int64_t t = 0; t < count; ++t) {
        seen.total += scores[t];
        const vec by = splat(scores[t]);
        const float *value = values + t * width;
        int64_t c = 0;
        for (; c + LANES <= width; c += LANES) store(sum + c, load(sum + c) + by * load(value + c), LANES);
        if (c < width) store(sum + c, load(sum + c) + by * load(value + c, static_cast<int>(width - c)), LANES);
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
    std::vector<float> room(P + G * P + G * (P + LANES) + P);
    float *normed = room.data() + P + G * P + G * (P + LANES);
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
            values[at % KEPT * P + c] = v[(b * a.shared + g) * P + c];
        }
    };
    // Queries [first, first + count), of one head of keys.
    const auto ask = [&](int64_t b, int64_t first, int64_t count) {
        const int64_t kept = tokens_of(net, s.states[b]) + 1, g = first / G;
        float *queries = room.data() + P, *sums = queries + G * P;
        std::vector<Seen> seen(count);
        for (int64_t h = 0; h < count; ++h)
            turn(own(q + b * H * P, H, first + h, a.q_norm), w.turned.data() + b * 2 * net.turns.size(), pairs, P,
                 a.scale * LOG2E, queries + h * P);
        std::fill(sums, sums + count * (P + LANES), 0.0f);
        const float *block = s.states[b] + net.state_size + a.place + g * P * KEPT;
        for (int64_t t = 0; t < kept; t += KEPT, block += net.block)
            for (int64_t h = 0; h < count; ++h)
                meet(queries + h * P, block, block + a.shared * P * KEPT, P, std::min<int64_t>(KEPT, kept - t), seen[h],
                     sums + h * (P + LANES));
        for (int64_t h = 0; h < count; ++h)
            for (int64_t c = 0; c < P; ++c)
                w.y[(b * H + first + h) * P + c] = sums[h * (P + LANES) + c] / seen[h].total;
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
