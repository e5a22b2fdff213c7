// Fuzzes the native side of the runtime: matrices from bytes, products and a decoder's step at every level this CPU has,
// against plain loops in double. Weights lie right before a page that must not be touched, inputs and outputs in heap
// blocks of their exact size. Not part of the package. From the repository root:
//
//   bash tools/fuzz_matrix.sh 180 1           builds with sanitizers and runs; seconds and seed: random inputs; one that
//                                             fails is left in fuzz_matrix.input
//   bash tools/fuzz_matrix.sh FILE...         replays inputs
//   bash tools/fuzz_matrix.sh --aarch64 180 1 the same cross-compiled, under qemu: levels portable and dotprod
//
// With clang++, -fsanitize=fuzzer and -DLIBFUZZER in place of main() it is a libFuzzer target. With
// -fsanitize=thread in place of the others it looks for races between the threads of a step.
#include "network.h"
#include "scan.h"

#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace sparsessm {
void Barrier::pause(int) { std::this_thread::yield(); } // native_runtime.cpp's, which needs Python
} // namespace sparsessm

using namespace sparsessm;

namespace {

constexpr int64_t SLACK = 256; // what kernels may read beyond the last value (matrix.cpp)

#define CHECK(condition, ...)                                                                                          \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            std::fprintf(stderr, "line %d: %s: ", __LINE__, #condition);                                               \
            std::fprintf(stderr, __VA_ARGS__);                                                                         \
            std::fprintf(stderr, "\n");                                                                                \
            std::abort();                                                                                              \
        }                                                                                                              \
    } while (0)

// Decisions come from the bytes, and from numbers seeded by them where there are no more.
class Draws {
  public:
    Draws(const uint8_t *data, size_t size) : data_(data), end_(data + size) {
        uint64_t seed = 1469598103934665603u;
        for (size_t i = 0; i < size; ++i) seed = (seed ^ data[i]) * 1099511628211u;
        random.seed(seed);
    }
    int below(int count) {
        const unsigned byte = data_ < end_ ? *data_++ : static_cast<unsigned>(random());
        return static_cast<int>(byte % static_cast<unsigned>(count));
    }
    template <typename T> T pick(std::initializer_list<T> of) { return of.begin()[below(static_cast<int>(of.size()))]; }
    float normal() { return static_cast<float>(static_cast<int>(random() % 2001) - 1000) / 500.0f; }

    std::mt19937 random;

  private:
    const uint8_t *data_, *end_;
};

// Bytes that end where a page begins that nobody may touch.
class Guarded {
  public:
    Guarded(const void *from, int64_t bytes) {
        const int64_t page = sysconf(_SC_PAGESIZE), body = (bytes + page - 1) / page * page;
        size_ = body + page;
        base_ = static_cast<uint8_t *>(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        CHECK(base_ != MAP_FAILED, "no memory");
        mprotect(base_ + body, page, PROT_NONE);
        data = base_ + body - bytes;
        if (bytes) std::memcpy(data, from, bytes);
    }
    Guarded(const Guarded &) = delete;
    ~Guarded() { munmap(base_, size_); }
    uint8_t *data;

  private:
    uint8_t *base_;
    int64_t size_;
};

struct Weights { // what is stored, row by row, and what it stands for
    int64_t rows, cols;
    Value value;
    std::vector<uint8_t> mask, values;
    std::vector<float> scale;
    std::vector<double> dense;
    int64_t nonzero = 0;
};

// Appends a random value to `to`; returns it.
double append(Draws &s, Value value, std::vector<uint8_t> &to) {
    if (value == Value::i8) {
        const auto number = static_cast<int8_t>(static_cast<int>(s.random() % 256) - 128);
        to.push_back(static_cast<uint8_t>(number));
        return number;
    }
    const float number = s.normal();
    uint32_t bits;
    std::memcpy(&bits, &number, 4);
    if (value == Value::bf16) bits &= 0xffff0000;
    for (int byte = value == Value::bf16 ? 2 : 0; byte < 4; ++byte) to.push_back(static_cast<uint8_t>(bits >> (8 * byte)));
    float rounded;
    std::memcpy(&rounded, &bits, 4);
    return rounded;
}

Weights weights(Draws &s, bool sparse) {
    Weights w;
    const bool large = s.below(40) == 39; // enough work for threads
    w.rows = large ? 150 + s.below(100) : 1 + s.below(12);
    w.cols = large ? 400 + s.below(200) : s.pick<int64_t>({1, 2, 3, 7, 8, 16, 31, 63, 64, 65, 127, 128, 130, 200, 769});
    w.value = s.pick<Value>({Value::f32, Value::bf16, Value::i8});
    const int density = sparse ? s.pick<int>({0, 5, 128, 250, 256}) : 256;
    w.mask.assign(w.rows * ((w.cols + 7) / 8), 0), w.dense.assign(w.rows * w.cols, 0.0);
    for (int64_t r = 0; r < w.rows; ++r) {
        if (w.value == Value::i8) w.scale.push_back(std::fabs(s.normal()));
        for (int64_t c = 0; c < w.cols; ++c) {
            if (static_cast<int>(s.random() % 256) >= density) continue;
            w.mask[r * ((w.cols + 7) / 8) + c / 8] |= static_cast<uint8_t>(1 << (c % 8));
            w.dense[r * w.cols + c] = append(s, w.value, w.values) * (w.scale.empty() ? 1.0 : w.scale[r]);
            ++w.nonzero;
        }
    }
    return w;
}

// A copy whose values are followed by nothing but what kernels may read. `keep` owns them.
Matrix exposed(const Matrix &m, std::vector<std::unique_ptr<Guarded>> &keep) {
    Matrix out = m;
    if (m.form == Form::codes) {
        keep.push_back(std::make_unique<Guarded>(m.values, m.offsets.back()));
        out.values = keep.back()->data;
    } else if (m.form == Form::sparse) {
        keep.push_back(std::make_unique<Guarded>(m.values, m.nonzero * size_of(m.value) + SLACK));
        out.values = keep.back()->data;
        keep.push_back(std::make_unique<Guarded>(m.masks, m.groups * m.blocks * GROUP * 8));
        out.masks = reinterpret_cast<const uint64_t *>(keep.back()->data);
    } else {
        keep.push_back(std::make_unique<Guarded>(m.values, m.rows * m.cols * size_of(m.value)));
        out.values = keep.back()->data;
    }
    return out;
}

void round_to_bytes(float *x, int64_t count) { // as kernels/matrix.py
    for (int64_t from = 0; from < count; from += BLOCK) {
        const int64_t to = std::min(count, from + BLOCK);
        float most = 0;
        for (int64_t i = from; i < to; ++i) most = std::max(most, std::fabs(x[i]));
        const float inverse = most > 1e-30f ? 127.0f / most : 0.0f;
        for (int64_t i = from; i < to; ++i) x[i] = std::nearbyint(x[i] * inverse) * (most / 127.0f);
    }
}

// The same of inputs (m.cols) as codes meet them: in the order in which their columns lie, times powers of two.
void round_for(const Matrix &m, float *x) {
    if (m.value != Value::i8) return;
    if (m.form != Form::codes) return round_to_bytes(x, m.cols);
    std::vector<float> lies(m.cols);
    const auto factor = [&](int64_t i) { return m.columns.empty() ? 1.0f : m.columns[i]; };
    for (int64_t i = 0; i < m.cols; ++i) lies[i] = x[m.input(i)] * factor(i);
    round_to_bytes(lies.data(), m.cols);
    for (int64_t i = 0; i < m.cols; ++i) x[m.input(i)] = lies[i] / factor(i);
}

// What the numbers that bytes are above may add to a row, times the inputs of a column.
double above(const Matrix &m, int64_t row, int64_t column) {
    if (m.value != Value::i8) return 0;
    if (m.form != Form::codes) return 128.0 * m.scale[row];
    double most = 0;
    for (int64_t lies = row / BAND * BAND; lies < std::min(m.rows, row / BAND * BAND + BAND); ++lies)
        if (m.place[lies] == row % BAND)
            most = m.scale_columns ? m.scales_of(lies / STRIP, column)[lies % STRIP] : m.scale[lies];
    for (int64_t i = 0; i < m.cols && !m.columns.empty(); ++i)
        if (m.input(i) == column) return 128.0 * most * m.columns[i];
    return 128.0 * most;
}

const char *form_of(const Matrix &m) {
    return m.form == Form::sparse ? "packed" : m.form == Form::dense ? "dense" : "codes";
}

bool same(const std::vector<float> &a, const std::vector<float> &b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

void products(Draws &s, const Matrix &m, const std::vector<double> &dense) {
    const int64_t length = s.pick<int64_t>({1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 65, 130});
    const int64_t x_stride = m.cols + s.pick<int64_t>({0, 0, 3}), stride = m.rows + s.pick<int64_t>({0, 0, 5});
    const bool with_bias = s.below(2), softplus = s.below(3) == 0;
    std::vector<float> bias(with_bias ? m.rows : 0);
    for (float &b : bias) b = s.normal();
    const auto inputs = (length - 1) * x_stride + m.cols, outputs = (length - 1) * stride + m.rows;
    std::vector<float> x(inputs);
    for (float &value : x) value = s.normal();
    if (s.below(8) == 0) std::fill(x.begin(), x.begin() + m.cols, s.pick<float>({0.0f, 1e-40f, 1e-30f, -1e-44f}));
    for (int64_t t = 0; t < length; ++t) round_for(m, &x[t * x_stride]);
    std::vector<double> own_room(m.rows * m.cols);
    for (int64_t i = 0; i < m.rows * m.cols; ++i) own_room[i] = above(m, i / m.cols, i % m.cols);
    const int64_t sick = s.below(4) == 0 ? s.below(static_cast<int>(std::min<int64_t>(255, length))) : -1;
    const int64_t column = s.below(static_cast<int>(std::min<int64_t>(255, m.cols)));
    for (const Level *level : supported()) {
        const auto run = [&](const std::vector<float> &from, int64_t tokens, int threads) {
            std::vector<float> out((tokens - 1) * stride + m.rows, 77.0f);
            level->product(Product{m, from.data(), with_bias ? bias.data() : nullptr, out.data(), tokens, x_stride, stride,
                                   softplus}, threads);
            return out;
        };
        const std::vector<float> out = run(x, length, 1);
        CHECK(static_cast<int64_t>(out.size()) == outputs, "%zu", out.size());
        for (int64_t t = 0; t < length; ++t)
            for (int64_t r = 0; r < stride && t * stride + r < outputs; ++r) {
                const float found = out[t * stride + r];
                if (r >= m.rows) {
                    CHECK(found == 77.0f, "%s wrote between rows", level->name);
                    continue;
                }
                double sum = with_bias ? bias[r] : 0.0, room = std::fabs(sum) + 1e-30;
                for (int64_t c = 0; c < m.cols; ++c) {
                    const double part = dense[r * m.cols + c] * x[t * x_stride + c];
                    sum += part, room += std::fabs(part);
                    room += own_room[r * m.cols + c] * std::fabs(x[t * x_stride + c]);
                }
                if (softplus) sum = std::log1p(std::exp(-std::fabs(sum))) + std::max(sum, 0.0), room += 1;
                CHECK(std::fabs(found - sum) <= 4e-6 * room, "%s %s value %d, %ld x %ld, token %ld of %ld, row %ld: %g not %g",
                      level->name, form_of(m), static_cast<int>(m.value), static_cast<long>(m.rows),
                      static_cast<long>(m.cols), static_cast<long>(t), static_cast<long>(length), static_cast<long>(r),
                      static_cast<double>(found), sum);
            }
        CHECK(same(run(x, length, 3), out), "%s: threads change a bit", level->name);
        if (length < 8 || m.form == Form::codes) // WALK_FROM of the narrowest level
            for (int64_t t = 0; t < length; ++t) {
                const std::vector<float> own(x.begin() + t * x_stride, x.begin() + t * x_stride + m.cols);
                const std::vector<float> alone = run(own, 1, 1);
                CHECK(std::memcmp(alone.data(), &out[t * stride], m.rows * sizeof(float)) == 0,
                      "%s %s value %d, %ld columns: token %ld of %ld is another alone", level->name,
                      form_of(m), static_cast<int>(m.value), static_cast<long>(m.cols),
                      static_cast<long>(t), static_cast<long>(length));
            }
        if (sick < 0) continue;
        std::vector<float> poisoned = x;
        const float inf = std::numeric_limits<float>::infinity();
        poisoned[sick * x_stride + column] = s.below(2) ? inf : std::nanf("");
        const std::vector<float> ill = run(poisoned, length, 1);
        for (int64_t t = 0; t < length; ++t)
            for (int64_t r = 0; r < m.rows; ++r)
                if (t != sick) {
                    CHECK(std::memcmp(&ill[t * stride + r], &out[t * stride + r], 4) == 0, "%s: token %ld hurts %ld",
                          level->name, static_cast<long>(sick), static_cast<long>(t));
                } else if (dense[r * m.cols + column] != 0.0 && !softplus) {
                    CHECK(!std::isfinite(ill[t * stride + r]), "%s %s value %d: an input that is no number is lost",
                          level->name, form_of(m), static_cast<int>(m.value));
                }
    }
}

// Integers: few bits in most rows, and some that are beyond them.
struct Integers {
    std::vector<int16_t> codes;
    std::vector<float> scale, columns;
    std::vector<double> dense;
    int64_t group = 0;
};

Integers integers(Draws &s, int64_t rows, int64_t cols) {
    Integers found;
    found.group = s.pick<int64_t>({0, 0, 32, 64, 96});
    const int64_t groups = found.group ? (cols + found.group - 1) / found.group : 1;
    for (int64_t i = 0; i < rows * groups; ++i) found.scale.push_back(std::fabs(s.normal()) + 0.01f);
    const bool odd = s.below(4) == 0, huge = s.below(16) == 0;
    if (s.below(2))
        for (int64_t c = 0; c < cols; ++c) found.columns.push_back(std::ldexp(1.0f, static_cast<int>(s.random() % 7) - 3));
    for (int64_t r = 0; r < rows; ++r) {
        const int most = s.pick<int>({0, 1, 1, 2, 3, 5, 9, 20, 70, 200, 32767});
        for (int64_t c = 0; c < cols; ++c) {
            int code = huge ? 300 + static_cast<int>(s.random() % 9) : static_cast<int>(s.random() % (2 * most + 1)) - most;
            if (s.random() % 64 == 0) code = static_cast<int>(s.random() % 65536) - 32768;
            if (odd) code |= 1;
            found.codes.push_back(static_cast<int16_t>(code));
            const float scale = found.scale[r * groups + (found.group ? c / found.group : 0)];
            found.dense.push_back(static_cast<double>(static_cast<float>(code) * scale) *
                                  (found.columns.empty() ? 1.0f : found.columns[c]));
        }
    }
    return found;
}

Matrix whole(int64_t rows, int64_t cols, Value value, const uint8_t *values, const float *scale) {
    if (value != Value::i8) return dense_matrix(rows, cols, value, values);
    return bytes_matrix(rows, cols, reinterpret_cast<const int8_t *>(values), scale, 2);
}

Matrix of(const Integers &w, int64_t rows, int64_t cols, const std::vector<int64_t> &order = {}) {
    return codes_matrix({rows, cols, w.codes.data(), nullptr, w.scale.data(), w.columns.empty() ? nullptr : w.columns.data(),
                         order.empty() ? nullptr : order.data(), static_cast<int64_t>(order.size()), true, w.group}, 2);
}

template <typename CheckRows> void codes(Draws &s, std::vector<std::unique_ptr<Guarded>> &keep, const CheckRows &check) {
    const int64_t rows = 1 + s.below(250), cols = s.pick<int64_t>({1, 2, 3, 16, 31, 63, 64, 65, 127, 128, 130, 200, 769});
    const Integers w = integers(s, rows, cols);
    std::vector<int64_t> order(s.below(2) ? 1 + s.below(40) : 0);
    for (int64_t &row : order) row = static_cast<int64_t>(s.random() % rows);
    const bool valid = order.empty() || s.below(8);
    if (!valid) order[s.random() % order.size()] = s.pick<int64_t>({-1, rows, INT64_MIN, INT64_MAX});
    std::vector<double> dense = order.empty() ? w.dense : std::vector<double>();
    try {
        const Matrix m = exposed(of(w, rows, cols, order), keep);
        CHECK(valid, "it took a row that is not there");
        for (int64_t row : order) dense.insert(dense.end(), w.dense.begin() + row * cols, w.dense.begin() + (row + 1) * cols);
        check(m, dense);
        products(s, m, dense);
    } catch (const std::invalid_argument &error) {
        CHECK(!valid, "%s", error.what());
    }
}

void matrices(Draws &s) {
    const int kind = s.below(5);
    const bool sparse = kind > 1;
    std::vector<std::unique_ptr<Guarded>> keep;
    const auto hold = [&](const void *from, int64_t bytes) {
        keep.push_back(std::make_unique<Guarded>(from, bytes));
        return keep.back()->data;
    };
    const auto check_rows = [&](const Matrix &m, const std::vector<double> &dense) {
        for (int64_t r = 0; r < m.rows; ++r) {
            std::vector<float> out(m.cols);
            m.row(r, out.data());
            for (int64_t c = 0; c < m.cols; ++c)
                CHECK(out[c] == static_cast<float>(dense[r * m.cols + c]), "row %ld column %ld", static_cast<long>(r),
                      static_cast<long>(c));
        }
        for (int threads : {1, 2, 3, 7, 64}) {
            const auto bounds = m.shares(threads);
            CHECK(bounds.front() == 0 && bounds.back() == m.groups, "shares");
            for (int t = 0; t < threads; ++t) CHECK(bounds[t] <= bounds[t + 1], "shares");
        }
        CHECK(m.bytes() >= 0, "bytes");
    };
    if (kind == 0) return codes(s, keep, check_rows);
    Weights w = weights(s, sparse);
    const auto *scale = w.scale.empty() ? nullptr : reinterpret_cast<float *>(hold(w.scale.data(), w.rows * 4));
    if (!sparse) {
        const Matrix m = exposed(whole(w.rows, w.cols, w.value, hold(w.values.data(), w.values.size()), scale), keep);
        check_rows(m, w.dense);
        products(s, m, w.dense);
        return;
    }
    bool valid = true;
    const int fault = s.below(8); // most are sound
    if (fault == 1) w.nonzero += s.pick<int64_t>({-1, 1, 7}), valid = false;
    if (fault == 2) {
        const int64_t byte = s.random() % w.mask.size(), bit = s.random() % 8;
        w.mask[byte] ^= static_cast<uint8_t>(1 << bit), valid = false;
    }
    if (w.nonzero < 0) w.nonzero = 0, valid = w.values.empty() && fault != 2;
    w.values.resize(w.nonzero * size_of(w.value));
    Packed p{w.rows, w.cols, hold(w.mask.data(), w.mask.size()), hold(w.values.data(), w.values.size()), w.nonzero,
             w.value, scale, nullptr, 0};
    std::vector<int64_t> order;
    std::vector<double> dense = w.dense;
    if (s.below(2)) {
        order.resize(s.below(4) == 0 ? 0 : 1 + s.below(20));
        for (int64_t &row : order) row = static_cast<int64_t>(s.random() % w.rows);
        if (fault == 3 && !order.empty())
            order[s.random() % order.size()] = s.pick<int64_t>({-1, w.rows, INT64_MIN, INT64_MAX, w.rows + 100}), valid = false;
        valid = valid && !order.empty();
        p.order = reinterpret_cast<int64_t *>(hold(order.data(), order.size() * 8)), p.ordered = order.size();
        if (valid) {
            dense.clear();
            for (int64_t row : order)
                dense.insert(dense.end(), w.dense.begin() + row * w.cols, w.dense.begin() + (row + 1) * w.cols);
        }
    }
    try {
        const Matrix m = exposed(sparse_matrix(p), keep);
        CHECK(valid, "it took a matrix that does not fit itself, fault %d", fault);
        check_rows(m, dense);
        products(s, m, dense);
    } catch (const std::invalid_argument &error) {
        CHECK(!valid, "%s", error.what());
    }
}

std::shared_ptr<const Matrix> random_matrix(Draws &s, int64_t rows, int64_t cols,
                                            std::vector<std::unique_ptr<Guarded>> &keep) {
    if (s.below(3) == 0) {
        Integers w = integers(s, rows, cols);
        for (float &scale : w.scale) scale *= 1e-5f;
        return std::make_shared<Matrix>(exposed(of(w, rows, cols), keep));
    }
    const Value value = s.pick<Value>({Value::f32, Value::bf16, Value::i8});
    const bool sparse = s.below(2);
    std::vector<uint8_t> mask(rows * ((cols + 7) / 8)), values;
    int64_t nonzero = 0;
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < cols; ++c) {
            if (sparse && s.random() % 2) continue;
            mask[r * ((cols + 7) / 8) + c / 8] |= static_cast<uint8_t>(1 << (c % 8));
            append(s, value, values), ++nonzero;
        }
    const std::vector<float> ones(value == Value::i8 ? rows : 0, 0.01f);
    const float *scale = ones.empty() ? nullptr : ones.data();
    if (!sparse) return std::make_shared<Matrix>(exposed(whole(rows, cols, value, values.data(), scale), keep));
    return std::make_shared<Matrix>(
        exposed(sparse_matrix({rows, cols, mask.data(), values.data(), nonzero, value, scale, nullptr, 0}), keep));
}

// Attention, MLPs, experts and plain matrices behind the mixers.
template <typename Numbers>
void others(Draws &s, Network &net, std::vector<std::unique_ptr<Guarded>> &keep, const Numbers &numbers) {
    const int64_t d = net.width;
    const auto linear = [&](int64_t rows, int64_t cols) {
        Linear l;
        l.matrix = random_matrix(s, rows, cols, keep);
        if (s.below(2)) l.bias = numbers(rows);
        if (s.below(3) == 0) l.scale = 0.5f;
        if (s.below(4) == 0) {
            const int64_t rank = 1 + s.below(6);
            l.narrow = random_matrix(s, rank, cols, keep), l.wide = random_matrix(s, rows, rank, keep);
        }
        return l;
    };
    const auto mlp = [&](int64_t inner, bool gated, int64_t reads, int64_t gives) {
        Mlp m;
        m.up = linear(inner, reads), m.down = linear(gives, inner);
        if (gated) m.gate = linear(inner, reads);
        if (s.below(4) == 0) m.share = linear(1, reads);
        m.curve = s.pick<Curve>({Curve::silu, Curve::gelu, Curve::relu2});
        return m;
    };
    const int64_t width = s.pick<int64_t>({1, 2, 5, 16, 20, 40});
    net.turns = numbers(s.below(static_cast<int>(width / 2 + 1))), net.int8 = s.below(2);
    bool side = false;
    int64_t reads = 0;
    for (int count = s.below(4); count > 0; --count) {
        Part part;
        part.source = s.pick<Source>({Source::before, Source::stream, Source::both, Source::side, Source::sum});
        if ((part.source == Source::before && !reads) || (part.source >= Source::side && !side)) part.source = Source::stream;
        if (part.source != Source::before) {
            reads = part.source == Source::both ? 2 * d : d;
            if (s.below(3)) part.norm = numbers(reads);
        }
        part.beside = s.below(3) == 0, part.scale = 0.5f;
        if (!part.beside && s.below(4) == 0) part.after = numbers(d);
        side = side || part.beside;
        const int kind = s.below(6);
        if (kind == 0) {
            Attention a;
            a.shared = 1 + s.below(3), a.heads = a.shared * (1 + s.below(3)), a.width = width, a.scale = 0.3f;
            a.q = linear(a.heads * width, reads), a.k = linear(a.shared * width, reads);
            a.v = linear(a.shared * width, reads), a.o = linear(d, a.heads * width);
            if (s.below(2)) a.gate = linear(a.heads * width, reads);
            a.norm_whole = s.below(2);
            if (s.below(2)) a.q_norm = numbers((a.norm_whole ? a.heads : 1) * width);
            if (s.below(2)) a.k_norm = numbers((a.norm_whole ? a.shared : 1) * width);
            a.rotary = s.below(2), a.place = net.block, net.block += a.floats(net.int8);
            part.what = std::move(a);
        } else if (kind == 1) {
            part.what = mlp(1 + s.below(70), s.below(2), reads, d);
        } else if (kind == 2) {
            Experts e;
            const int64_t groups = 1 + s.below(3), many = groups * (1 + s.below(3)), inner = 1 + s.below(40);
            const bool gated = s.below(2), latent = s.below(2);
            const int64_t within = latent ? 1 + s.below(20) : reads;
            if (latent) e.before = linear(within, reads), e.behind = linear(d, within);
            for (int64_t i = 0; i < many; ++i) e.each.push_back(mlp(inner, gated, within, latent ? within : d));
            e.router = linear(many, reads), e.favour = numbers(many);
            e.choice = s.pick<Choice>({Choice::softmax, Choice::softmax_of_chosen, Choice::sigmoid});
            e.groups = groups, e.chosen_groups = 1 + s.below(static_cast<int>(groups));
            e.chosen = 1 + s.below(static_cast<int>(many / groups * e.chosen_groups)), e.normalised = s.below(2);
            if (latent || reads == d) part.what = std::move(e);
            else part.what = linear(d, reads); // what experts read and give has one width
        } else if (kind == 3 && reads == d) {
            Delta m;
            m.groups = 1 + s.below(3), m.heads = m.groups * (1 + s.below(3)), m.keys = 1 + s.below(20);
            m.channels = s.pick<int64_t>({1, 3, 8, 16, 17, 40, 64, 70, 131}), m.taps = 1 + s.below(4);
            const int64_t of_keys = m.groups * m.keys, of_values = m.heads * m.channels;
            m.mixed_rows = 2 * of_keys + of_values;
            std::vector<int64_t> apart{m.mixed_rows};
            if (s.below(2)) apart = {of_keys, of_keys, of_values};
            for (const int64_t count : apart) m.mixed.push_back(random_matrix(s, count, d, keep));
            const auto narrowed = [&](int64_t rows) {
                Narrowed n;
                if (s.below(2)) n.narrow = random_matrix(s, 1 + s.below(20), d, keep);
                n.matrix = random_matrix(s, rows, n.narrow ? n.low() : d, keep);
                return n;
            };
            m.by_channel = s.below(2), m.sigmoid = s.below(2);
            m.gate = narrowed(of_values), m.step = narrowed(m.heads * (m.by_channel ? m.keys : 1));
            m.out = linear(d, of_values), m.beta = random_matrix(s, m.heads, d, keep);
            m.conv = numbers(m.taps * m.mixed_rows), m.norm = numbers(m.channels);
            m.dt_bias = numbers(m.step.matrix->rows);
            m.A.assign(m.heads, -0.5f), m.epsilon = net.epsilon, m.most = s.below(2) ? 1.0f : 2.0f;
            for (int64_t h = 0; h < m.heads; ++h) m.places.push_back(s.below(4) ? m.kept++ : -1);
            m.conv_state = net.state_size, m.rule_state = m.conv_state + (m.taps - 1) * m.mixed_rows;
            net.state_size = m.rule_state + m.kept * m.keys * m.channels;
            part.what = std::move(m);
        } else if (kind == 4) {
            Latent m;
            m.heads = 1 + s.below(5), m.rank = s.pick<int64_t>({1, 3, 16, 40, 70}), m.common = 1 + s.below(9);
            m.own = 1 + s.below(20), m.width = 1 + s.below(40), m.scale = 0.3f, m.epsilon = net.epsilon;
            m.row = linear(m.rank + m.common, reads), m.o = linear(d, m.heads * m.width);
            m.norm = numbers(m.rank);
            int64_t low = reads;
            if (s.below(2)) low = 1 + s.below(20), m.narrow = linear(low, reads), m.q_norm = numbers(low);
            m.q = linear(m.heads * (m.own + m.common), low);
            for (int64_t h = 0; h < m.heads; ++h) {
                m.keys.push_back(random_matrix(s, m.rank, m.own, keep));
                m.values.push_back(random_matrix(s, m.width, m.rank, keep));
            }
            m.place = net.block, net.block += m.floats(net.int8);
            part.what = std::move(m);
        } else {
            part.what = linear(d, reads);
        }
        net.parts.push_back(std::move(part));
    }
    if (net.block) ++net.state_size;
}

// A whole step: bounds, the same bits for every team and every batch.
void steps(Draws &s) {
    std::vector<std::unique_ptr<Guarded>> keep;
    const auto numbers = [&](int64_t count) {
        std::vector<float> out(count);
        for (float &value : out) value = 0.5f * s.normal();
        return out;
    };
    Network net{};
    net.width = 1 + s.below(80), net.channels = 1 + s.below(70), net.states = s.pick<int64_t>({1, 3, 8, 16, 17, 33});
    net.rank = 1 + s.below(5), net.taps = 1 + s.below(4), net.vocabulary = 1 + s.below(20), net.epsilon = 1e-5f;
    const bool dual = s.below(2); // Mamba-2
    Heads shape{};
    if (dual) {
        shape.groups = 1 + s.below(3), shape.count = shape.groups * (1 + s.below(7));
        net.channels = shape.count * s.pick<int64_t>({1, 3, 8, 17, 40, 64, 70, 131}), net.rank = 0;
        shape.least = 0.001f, shape.most = s.below(2) ? 0.3f : std::numeric_limits<float>::infinity();
    } else if (s.below(3) == 0) {
        net.mixer_epsilon = 1e-6f; // FalconMamba
    }
    for (int layers = s.below(3); dual && layers > 0; --layers) {
        Part part;
        Mamba l;
        auto m = std::make_shared<Heads>(shape);
        const int64_t inner = net.channels, mixed = inner + 2 * m->groups * net.states;
        const int64_t room = (m->count + SCAN_LANES - 1) / SCAN_LANES * SCAN_LANES;
        l.in_x = random_matrix(s, mixed, net.width, keep), l.in_z = random_matrix(s, inner, net.width, keep);
        m->in_dt = random_matrix(s, m->count, net.width, keep), l.out_proj = random_matrix(s, net.width, inner, keep);
        part.norm = numbers(net.width), l.conv = numbers(net.taps * mixed);
        if (s.below(3)) m->norm = numbers(inner), m->epsilon = net.epsilon, m->gate_first = s.below(2);
        if (s.below(2)) l.in_scale = 0.5f, l.gate_scale = 0.25f, m->step_scale = 0.125f, part.scale = 2;
        if (s.below(2)) l.conv_bias = numbers(mixed);
        if (s.below(2)) l.in_bias = numbers(mixed + inner), l.out_bias = numbers(net.width);
        m->dt_bias = numbers(room), m->skip = numbers(room);
        for (int64_t h = 0; h < room; ++h) m->A.push_back(s.below(8) ? -std::fabs(s.normal()) : -4.6e16f);
        for (int64_t h = 0; h < m->count; ++h) (s.below(3) ? m->kept : m->memoryless).push_back(h);
        l.channels = inner, l.conv_state = net.state_size, l.scan_state = l.conv_state + (net.taps - 1) * mixed;
        net.state_size = l.scan_state + static_cast<int64_t>(m->kept.size()) * inner / m->count * net.states;
        l.heads = std::move(m);
        part.what = std::move(l);
        net.parts.push_back(std::move(part));
    }
    const int64_t D = net.channels, padded = (D + SCAN_LANES - 1) / SCAN_LANES * SCAN_LANES;
    for (int layers = s.below(3); !dual && layers > 0; --layers) {
        Part part;
        Mamba l;
        l.in_x = random_matrix(s, D, net.width, keep), l.in_z = random_matrix(s, D, net.width, keep);
        l.x_proj = random_matrix(s, net.rank + 2 * net.states, D, keep);
        l.dt_proj = random_matrix(s, D, net.rank, keep), l.out_proj = random_matrix(s, net.width, D, keep);
        part.norm = numbers(net.width), l.conv = numbers(net.taps * D);
        if (net.mixer_epsilon > 0 && s.below(2)) l.readings = numbers(net.rank + 2 * net.states);
        if (s.below(2)) l.conv_bias = numbers(D);
        if (s.below(2)) l.in_bias = numbers(2 * D), l.out_bias = numbers(net.width);
        l.dt_bias = numbers(padded), l.skip = numbers(padded);
        const bool natural = s.below(2); // else the other way round
        for (int64_t c = 0; c < padded; ++c)
            l.channel.push_back(c < D ? static_cast<int32_t>(natural ? c : D - 1 - c) : -1);
        int64_t entries = 0;
        for (int64_t g = 0; g < padded / SCAN_LANES; ++g) {
            const auto slots = static_cast<int32_t>(s.below(static_cast<int>(net.states + 1)));
            const bool ordered = s.below(2);
            l.groups.push_back({entries, entries, slots, slots == 0 || (ordered && slots == net.states),
                                natural && (g + 1) * SCAN_LANES <= D});
            for (int32_t k = 0; k < slots; ++k)
                for (int lane = 0; lane < SCAN_LANES; ++lane)
                    l.index.push_back(static_cast<uint8_t>(l.groups.back().ordered ? k : (k + lane) % net.states));
            entries += int64_t{slots} * SCAN_LANES;
        }
        for (int64_t i = 0; i < entries; ++i) l.A.push_back(s.below(8) ? -std::fabs(s.normal()) : -4.6e16f);
        l.index.resize(entries + SCAN_LANES);
        l.channels = D, l.conv_state = net.state_size, l.scan_state = l.conv_state + (net.taps - 1) * D;
        net.state_size = l.scan_state + entries;
        part.what = std::move(l);
        net.parts.push_back(std::move(part));
    }
    others(s, net, keep, numbers);
    size_t share = 0;
    for (Part &part : net.parts) part.share = share, share += shares_of(part);
    net.norm = numbers(net.width);
    net.embedding = random_matrix(s, net.vocabulary, net.width, keep);
    net.head = random_matrix(s, net.vocabulary, net.width, keep);
    const int64_t batch = 1 + s.below(6);
    for (const Level *level : supported()) {
        const auto run = [&](const std::vector<int64_t> &tokens, std::vector<float> &state, int threads) {
            const auto count = static_cast<int64_t>(tokens.size()), size = static_cast<int64_t>(state.size()) / count;
            std::vector<float> logits(count * net.vocabulary);
            std::vector<std::unique_ptr<Guarded>> rows; // each ends where its memory does
            std::vector<float *> states;
            for (int64_t b = 0; b < count; ++b) {
                rows.push_back(std::make_unique<Guarded>(state.data() + b * size, size * 4));
                states.push_back(reinterpret_cast<float *>(rows.back()->data));
            }
            Workspace w;
            make_room(net, count, w);
            Barrier barrier;
            const auto shares = shares_of(net, threads);
            Step step{net, tokens.data(), states.data(), logits.data(), count, w, barrier, shares};
            std::vector<std::thread> team;
            for (int t = 1; t < threads; ++t) team.emplace_back([&, t] { level->step(step, t, threads); });
            level->step(step, 0, threads);
            for (auto &thread : team) thread.join();
            for (int64_t b = 0; b < count; ++b) std::copy(states[b], states[b] + size, state.begin() + b * size);
            return logits;
        };
        const int64_t size = net.state_size + 2 * net.block;
        std::vector<float> one(batch * size);
        for (int64_t b = 0; b < batch && net.block; ++b) { // some rows are about to begin another block
            one[b * size + net.state_size - 1] = s.pick<float>({0, 5, KEPT - 2, KEPT - 1, KEPT});
            for (int64_t i = net.state_size; i < size; ++i) one[b * size + i] = s.normal();
        }
        std::vector<float> many = one, alone = one;
        for (int turn = 0; turn < 3; ++turn) {
            std::vector<int64_t> tokens(batch);
            for (int64_t &token : tokens) token = s.below(static_cast<int>(net.vocabulary));
            const std::vector<float> logits = run(tokens, one, 1);
            for (float value : logits) CHECK(std::isfinite(value), "%s", level->name);
            CHECK(same(run(tokens, many, 2 + turn), logits), "%s: threads change a logit", level->name);
            CHECK(same(one, many), "%s: threads change a state", level->name);
            for (int64_t b = 0; b < batch; ++b) {
                std::vector<float> state(alone.begin() + b * size, alone.begin() + (b + 1) * size);
                const std::vector<float> own = run({tokens[b]}, state, 1);
                CHECK(std::memcmp(own.data(), &logits[b * net.vocabulary], own.size() * 4) == 0,
                      "%s: a sequence of %ld is another alone", level->name, static_cast<long>(batch));
                std::copy(state.begin(), state.end(), alone.begin() + b * size);
            }
            CHECK(same(one, alone), "%s: a state is another alone", level->name);
        }
    }
}

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    Draws source(data, size);
    if (source.below(6)) matrices(source);
    else steps(source);
    return 0;
}

#ifndef LIBFUZZER
int main(int count, char **words) {
    const auto usage = [&] {
        std::fprintf(stderr, "%s SECONDS SEED | FILE...\n", words[0]);
        return 2;
    };
    if (count < 2) return usage();
    if (std::ifstream(words[1])) {
        for (int i = 1; i < count; ++i) {
            std::ifstream file(words[i], std::ios::binary);
            const std::string all{std::istreambuf_iterator<char>(file), {}};
            std::printf("%s\n", words[i]);
            LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t *>(all.data()), all.size());
        }
        return 0;
    }
    if (count != 3) return usage();
    std::mt19937 random(static_cast<unsigned>(std::atoi(words[2])));
    const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(std::atoi(words[1]));
    long runs = 0;
    for (; std::chrono::steady_clock::now() < until; ++runs) {
        std::vector<uint8_t> input(random() % 48);
        for (uint8_t &byte : input) byte = static_cast<uint8_t>(random());
        std::ofstream("fuzz_matrix.input", std::ios::binary)
            .write(reinterpret_cast<const char *>(input.data()), static_cast<std::streamsize>(input.size()));
        LLVMFuzzerTestOneInput(input.data(), input.size());
    }
    std::printf("%ld inputs\n", runs);
    return 0;
}
#endif
