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


// What a thread has of its own in a step.
struct Own {
    const Step &s;
    int thread, threads;
    float *x, *added, *inner; // (batch, what the part reads), (batch, d_model), (batch, ...): room of a mixer
    int64_t width = 0;        // of x
    std::vector<float> low, beyond;

    void wait() const { s.barrier.wait(threads); }

    void share(size_t which, int64_t &begin, int64_t &end) const {
        begin = s.shares[which][thread], end = s.shares[which][thread + 1];
    }

    // Rows of groups [begin, end) of `added` and a bias, to where the part gives them.
    void give(const Part &part, const std::vector<float> &bias, int64_t begin, int64_t end) const {
        const int64_t d = s.net.width;
        for (int64_t b = 0; b < s.batch; ++b)
            for (int64_t i = begin * GROUP; i < std::min(d, end * GROUP); ++i) {
                const float value = added[b * d + i] + (bias.empty() ? 0.0f : bias[i]);
                if (!part.after.empty()) s.work.given[b * d + i] = value;
                else if (part.beside) s.work.side[b * d + i] = value * part.scale;
                else s.work.hidden[b * d + i] += value * part.scale;
            }
    }
};

static inline int64_t whole_groups(int64_t channels) { return (channels + SCAN_LANES - 1) / SCAN_LANES * SCAN_LANES; }

// x *= silu(z), in place
static void gate(float *x, const float *z, int64_t count) {
    for (int64_t c = 0; c < count; c += LANES) {
        const int lanes = static_cast<int>(std::min<int64_t>(LANES, count - c));
        const vec by = load(z + c, lanes);
        store(x + c, load(x + c, lanes) * by * sigmoid(by), lanes);
    }
}

// Rows of groups [begin, end) of a product, scaled, with adapter; without the bias.
static void scaled(const Linear &l, Own &o, const float *x, int64_t batch, int64_t begin, int64_t end, float *out,
                   int64_t stride) {
    const Matrix &m = *l.matrix;
    project(m, x, m.cols, batch, begin, end, out, stride);
    const int64_t r0 = begin * GROUP, r1 = std::min(m.rows, end * GROUP);
    if (r0 >= r1) return;
    if (l.scale != 1)
        for (int64_t b = 0; b < batch; ++b)
            for (int64_t r = r0; r < r1; ++r) out[b * stride + r] *= l.scale;
    if (!l.narrow) return;
    const int64_t rank = l.narrow->rows; // few: each thread computes all of them, which saves a barrier
    o.low.resize(batch * rank), o.beyond.resize(batch * m.rows);
    project(*l.narrow, x, m.cols, batch, 0, l.narrow->groups, o.low.data(), rank);
    project(*l.wide, o.low.data(), rank, batch, begin, end, o.beyond.data(), m.rows);
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t r = r0; r < r1; ++r) out[b * stride + r] += o.beyond[b * m.rows + r];
}

static void linear(const Linear &l, Own &o, const float *x, int64_t batch, int64_t begin, int64_t end, float *out,
                   int64_t stride) {
    scaled(l, o, x, batch, begin, end, out, stride);
    if (l.bias.empty()) return;
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t r = begin * GROUP; r < std::min(l.matrix->rows, end * GROUP); ++r) out[b * stride + r] += l.bias[r];
}

// Whose keys and values a state holds.
static int64_t tokens_of(const Network &net, const float *state) {
    return static_cast<int64_t>(state[net.state_size - 1]);
}

#include "mamba_impl.h"
#include "delta_impl.h"
#include "attention_impl.h"
#include "mlp_impl.h"

// What a part reads, normalised, or not where it has no norm.
static void read(const Part &part, Own &o) {
    if (part.source == Source::before) return;
    const Step &s = o.s;
    const int64_t d = s.net.width;
    o.width = part.source == Source::both ? 2 * d : d;
    for (int64_t b = 0; b < s.batch; ++b) {
        const float *stream = s.work.hidden.data() + b * d, *from = stream;
        float *to = o.x + b * o.width;
        if (part.source == Source::side) from = s.work.side.data() + b * d;
        if (part.source == Source::both) {
            std::copy(stream, stream + d, to);
            std::copy(s.work.embedded.data() + b * d, s.work.embedded.data() + (b + 1) * d, to + d);
            from = to;
        }
        if (part.source == Source::sum) {
            for (int64_t i = 0; i < d; ++i) to[i] = stream[i] + s.work.side[b * d + i];
            from = to;
        }
        if (!part.norm.empty()) rms_norm(from, part.norm.data(), s.net.epsilon, o.width, to);
        else if (from != to) std::copy(from, from + d, to);
    }
}

// What a part gave goes to the stream through a norm, each thread some of it.
static void add_normed(const Part &part, const Own &o) {
    const Step &s = o.s;
    const int64_t d = s.net.width;
    for (int64_t b = 0; b < s.batch; ++b) {
        const float *given = s.work.given.data() + b * d;
        const float unit = unit_of(given, s.net.epsilon, d);
        for (int64_t i = d * o.thread / o.threads; i < d * (o.thread + 1) / o.threads; ++i)
            s.work.hidden[b * d + i] += part.after[i] * (given[i] * unit) * part.scale;
    }
}

// What is looked up of the next tokens, and by what their queries and keys are turned.
static void look_up(const Step &s) {
    const Network &net = s.net;
    Workspace &w = s.work;
    const int64_t d = net.width, pairs = static_cast<int64_t>(net.turns.size());
    for (int64_t b = 0; b < s.batch; ++b) {
        float *to = w.hidden.data() + b * d;
        net.embedding->row(s.tokens[b], to);
        if (net.embedding_scale != 1)
            for (int64_t i = 0; i < d; ++i) to[i] *= net.embedding_scale;
        if (!w.embedded.empty()) std::copy(to, to + d, w.embedded.data() + b * d);
        float *turned = w.turned.data() + b * 2 * pairs;
        const float at = pairs && net.block ? static_cast<float>(tokens_of(net, s.states[b])) : 0;
        for (int64_t i = 0; i < pairs; ++i) {
            const float angle = at * net.turns[i];
            turned[i] = std::cos(angle) * net.turned, turned[pairs + i] = std::sin(angle) * net.turned;
        }
    }
}

void step(const Step &s, int thread, int threads) {
    const Network &net = s.net;
    const int64_t d = net.width, N = net.states, R = net.rank, V = net.vocabulary;
    Workspace &w = s.work;
    const int64_t reads = w.embedded.empty() ? d : 2 * d;
    const int64_t mixing = whole_groups(net.channels) + (net.mixer_epsilon >= 0 ? R + 2 * N : 0);
    std::vector<float> own(s.batch * (reads + d + mixing));
    float *x = own.data(), *added = x + s.batch * reads;
    Own o{s, thread, threads, x, added, added + s.batch * d, d, {}, {}};
    if (thread == 0) look_up(s);
    o.wait();
    for (const Part &part : net.parts) {
        read(part, o);
        std::visit([&](const auto &what) { take_part(what, part, o); }, part.what);
        o.wait();
        if (part.after.empty()) continue;
        add_normed(part, o);
        o.wait();
    }
    if (thread == 0 && net.block)
        for (int64_t b = 0; b < s.batch; ++b) s.states[b][net.state_size - 1] += 1;
    for (int64_t b = 0; b < s.batch; ++b)
        rms_norm(w.hidden.data() + b * d, net.norm.data(), net.epsilon, d, x + b * d);
    int64_t begin, end;
    o.share(s.shares.size() - 1, begin, end);
    project(*net.head, x, d, s.batch, begin, end, s.logits, V);
}
