// MLPs, experts and plain matrices of a step. Included by step_impl.h.

static void take_part(const Linear &l, const Part &part, Own &o) {
    int64_t begin, end;
    o.share(part.share, begin, end);
    o.wait(); // it may replace what others still read
    scaled(l, o, o.x, o.s.batch, begin, end, o.added, o.s.net.width);
    o.give(part, l.bias, begin, end);
}

static void bend(Curve curve, float *x, int64_t count) {
    if (curve == Curve::gelu) {
        for (int64_t i = 0; i < count; ++i) x[i] = 0.5f * x[i] * (1.0f + std::erf(x[i] * 0.70710678118654752f));
        return;
    }
    for (int64_t c = 0; c < count; c += LANES) {
        const int lanes = static_cast<int>(std::min<int64_t>(LANES, count - c));
        const vec own = load(x + c, lanes), above = own > splat(0.0f) ? own : vec{};
        store(x + c, curve == Curve::silu ? own * sigmoid(own) : above * above, lanes);
    }
}

// Rows of groups [begin, end) of what goes into `down`: (batch, rows of up); `room` is as large.
static void widen(const Mlp &m, Own &o, const float *x, int64_t batch, int64_t begin, int64_t end, float *out, float *room) {
    const int64_t rows = m.up.matrix->rows, r0 = begin * GROUP, r1 = std::min(rows, end * GROUP);
    if (r0 >= r1) return;
    linear(m.gate.matrix ? m.gate : m.up, o, x, batch, begin, end, out, rows);
    if (m.gate.matrix) linear(m.up, o, x, batch, begin, end, room, rows);
    for (int64_t b = 0; b < batch; ++b) {
        bend(m.curve, out + b * rows + r0, r1 - r0);
        if (m.gate.matrix)
            for (int64_t r = r0; r < r1; ++r) out[b * rows + r] *= room[b * rows + r];
    }
}

static void take_part(const Mlp &m, const Part &part, Own &o) {
    const Step &s = o.s;
    int64_t begin, end;
    o.share(part.share, begin, end);
    widen(m, o, o.x, s.batch, begin, end, s.work.u.data(), s.work.z.data());
    o.wait();

    o.share(part.share + 1, begin, end);
    const int64_t d = s.net.width;
    if (!m.share.matrix) {
        scaled(m.down, o, s.work.u.data(), s.batch, begin, end, o.added, d);
        o.give(part, m.down.bias, begin, end);
        return;
    }
    linear(m.down, o, s.work.u.data(), s.batch, begin, end, o.added, d);
    std::vector<float> share(s.batch * GROUP); // each thread computes it, which saves a barrier
    linear(m.share, o, o.x, s.batch, 0, m.share.matrix->groups, share.data(), 1);
    for (int64_t b = 0; b < s.batch; ++b)
        for (int64_t r = begin * GROUP; r < std::min(d, end * GROUP); ++r)
            o.added[b * d + r] /= 1.0f + std::exp(-share[b]);
    o.give(part, {}, begin, end);
}

// The `count` largest of `scores`, the first of equals; what was chosen becomes minus infinity.
static void choose(float *scores, int64_t many, int64_t count, int64_t *chosen) {
    for (int64_t k = 0; k < count; ++k) {
        int64_t best = 0;
        for (int64_t i = 1; i < many; ++i)
            if (scores[i] > scores[best]) best = i;
        chosen[k] = best, scores[best] = -INFINITY;
    }
}

static void softmax(float *x, int64_t count) {
    const float most = *std::max_element(x, x + count);
    float total = 0;
    for (int64_t i = 0; i < count; ++i) total += x[i] = std::exp(x[i] - most);
    for (int64_t i = 0; i < count; ++i) x[i] /= total;
}

// Which experts a token goes to, and what their outputs count, as the stock routers say it.
static void route(const Experts &m, const float *logits, int64_t *chosen, float *weights) {
    const auto many = static_cast<int64_t>(m.each.size());
    std::vector<float> scores(logits, logits + many), left;
    if (m.choice == Choice::softmax) softmax(scores.data(), many);
    if (m.choice == Choice::sigmoid)
        for (float &score : scores) score = 1.0f / (1.0f + std::exp(-score));
    left = scores;
    if (m.choice == Choice::sigmoid) {
        for (int64_t e = 0; e < many; ++e) left[e] += m.favour[e];
        const int64_t size = many / m.groups;
        std::vector<float> best(m.groups), part;
        std::vector<int64_t> order(std::max<int64_t>(2, m.groups));
        for (int64_t g = 0; g < m.groups; ++g) { // the sum of a group's two best
            part.assign(left.begin() + g * size, left.begin() + (g + 1) * size);
            choose(part.data(), size, std::min<int64_t>(2, size), order.data());
            for (int64_t k = 0; k < std::min<int64_t>(2, size); ++k) best[g] += left[g * size + order[k]];
        }
        choose(best.data(), m.groups, m.groups, order.data());
        for (int64_t k = m.chosen_groups; k < m.groups; ++k)
            std::fill_n(left.begin() + order[k] * size, size, -INFINITY);
    }
    choose(left.data(), many, m.chosen, chosen);
    for (int64_t k = 0; k < m.chosen; ++k) weights[k] = scores[chosen[k]];
    if (m.choice == Choice::softmax_of_chosen) softmax(weights, m.chosen);
    if (m.choice != Choice::sigmoid) return;
    float total = 1e-20f;
    for (int64_t k = 0; k < m.chosen; ++k) total += weights[k];
    for (int64_t k = 0; k < m.chosen; ++k) weights[k] = (m.normalised ? weights[k] / total : weights[k]) * m.factor;
}

// A token that goes to an expert, and what that gives counts.
struct Sent {
    int64_t expert, row;
    float weight;
};

static void take_part(const Experts &m, const Part &part, Own &o) {
    const Step &s = o.s;
    Workspace &w = s.work;
    const auto many = static_cast<int64_t>(m.each.size());
    const int64_t inner = m.each[0].up.matrix->rows, outer = m.each[0].up.matrix->cols, K = m.chosen;
    int64_t begin, end;
    o.share(part.share, begin, end);
    linear(m.router, o, o.x, s.batch, begin, end, w.dbc.data(), many);
    const float *x = o.x;
    if (m.before.matrix) {
        o.share(part.share + 3, begin, end);
        linear(m.before, o, o.x, s.batch, begin, end, w.y.data(), outer);
        x = w.y.data();
    }
    o.wait();

    // Tokens by their experts, which lie in ascending order: an expert's weights are read once for all its tokens, and
    // what a token's experts give is added in the same order whoever else is there.
    std::vector<Sent> sent;
    std::vector<int64_t> chosen(K);
    std::vector<float> weights(K);
    for (int64_t b = 0; b < s.batch; ++b) {
        route(m, w.dbc.data() + b * many, chosen.data(), weights.data());
        for (int64_t k = 0; k < K; ++k) sent.push_back({chosen[k], b, weights[k]});
    }
    std::stable_sort(sent.begin(), sent.end(), [](const Sent &l, const Sent &r) { return l.expert < r.expert; });
    const auto each = [&](const auto &take) { // (expert, where its tokens begin, how many there are)
        for (size_t first = 0, last; first < sent.size(); first = last) {
            for (last = first; last < sent.size() && sent[last].expert == sent[first].expert;) ++last;
            take(m.each[sent[first].expert], static_cast<int64_t>(first), static_cast<int64_t>(last - first));
        }
    };
    std::vector<float> room; // (tokens, outer): of an expert what goes in, then what comes out
    o.share(part.share + 1, begin, end);
    if (begin < end)
        each([&](const Mlp &expert, int64_t first, int64_t count) {
            const float *reads = x + sent[first].row * outer;
            if (count > 1) {
                room.resize(count * outer);
                for (int64_t i = 0; i < count; ++i)
                    std::copy_n(x + sent[first + i].row * outer, outer, room.data() + i * outer);
                reads = room.data();
            }
            widen(expert, o, reads, count, begin, end, w.u.data() + first * inner, w.z.data() + first * inner);
        });
    o.wait();

    o.share(part.share + 2, begin, end); // of all experts the same rows, which are then one thread's
    const int64_t r0 = begin * GROUP, r1 = std::min(outer, end * GROUP);
    float *sums = m.behind.matrix ? w.y.data() : o.added;
    if (r0 < r1) {
        for (int64_t b = 0; b < s.batch; ++b) std::fill(sums + b * outer + r0, sums + b * outer + r1, 0.0f);
        each([&](const Mlp &expert, int64_t first, int64_t count) {
            room.resize(count * outer);
            linear(expert.down, o, w.u.data() + first * inner, count, begin, end, room.data(), outer);
            for (int64_t i = 0; i < count; ++i)
                for (int64_t r = r0; r < r1; ++r)
                    sums[sent[first + i].row * outer + r] += sent[first + i].weight * room[i * outer + r];
        });
    }
    if (m.behind.matrix) {
        o.wait();
        o.share(part.share + 4, begin, end);
        scaled(m.behind, o, w.y.data(), s.batch, begin, end, o.added, s.net.width);
    }
    o.give(part, m.behind.bias, begin, end);
}
