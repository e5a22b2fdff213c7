// sparsessm.kernels._native: the door from Python. Arrays come in through DLPack (float32, CPU, last stride 1); shapes
// are checked again here, because a wrong one would read out of bounds.
#include "native.h"
#ifdef SPARSESSM_ROUNDED
#include "rounded.h"
#endif

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <csignal>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <unistd.h>
#include <vector>

namespace nb = nanobind;

namespace sparsessm {

const Level &find(const std::string &name) {
    for (const Level *level : supported())
        if (name == level->name) return *level;
    throw std::invalid_argument("this CPU does not support the kernel level '" + name + "'");
}

} // namespace sparsessm

using namespace sparsessm;

namespace {

template <typename T, int DIMS> using Array = nb::ndarray<T, nb::ndim<DIMS>, nb::device::cpu>;
template <int DIMS> using Floats = Array<float, DIMS>;

template <typename A>
void expect(const char *name, const A &array, std::initializer_list<int64_t> shape, bool packed) {
    const int dims = static_cast<int>(shape.size());
    for (int d = 0; d < dims; ++d)
        if (static_cast<int64_t>(array.shape(d)) != shape.begin()[d])
            throw std::invalid_argument(std::string(name) + ": dimension " + std::to_string(d) + " is " +
                                        std::to_string(array.shape(d)) + ", expected " +
                                        std::to_string(shape.begin()[d]));
    int64_t stride = 1;
    for (int d = dims - 1; d >= 0; --d) {
        if (array.size() && (packed || d == dims - 1) && array.shape(d) > 1 && array.stride(d) != stride)
            throw std::invalid_argument(std::string(name) + ": dimension " + std::to_string(d) + " is not contiguous");
        stride *= static_cast<int64_t>(array.shape(d));
    }
}

Rows rows(const char *name, const Floats<3> &array, int64_t batch, int64_t length, int64_t last) {
    expect(name, array, {batch, length, last}, false);
    return {array.data(), array.stride(0), array.stride(1)};
}

template <typename A>
auto packed(const char *name, const std::optional<A> &array, std::initializer_list<int64_t> shape)
    -> decltype(array->data()) {
    if (!array) return nullptr;
    expect(name, *array, shape, true);
    return array->data();
}

Scan describe(const Floats<3> &u, const Floats<3> &delta, const Floats<2> &A, const Floats<3> &B, const Floats<3> &C,
              const Floats<1> &D, const std::optional<Floats<3>> &z, const std::optional<Floats<3>> &initial) {
    Scan s{};
    s.batch = u.shape(0), s.length = u.shape(1), s.channels = u.shape(2), s.states = A.shape(1);
    s.u = rows("u", u, s.batch, s.length, s.channels);
    s.delta = rows("delta", delta, s.batch, s.length, s.channels);
    s.B = rows("B", B, s.batch, s.length, s.states);
    s.C = rows("C", C, s.batch, s.length, s.states);
    if (z) s.z = rows("z", *z, s.batch, s.length, s.channels);
    expect("A", A, {s.channels, s.states}, true);
    expect("D", D, {s.channels}, true);
    s.A = A.data(), s.D = D.data();
    s.initial = packed("initial_state", initial, {s.batch, s.channels, s.states});
    return s;
}

void selective_scan(const std::string &level, int threads, Floats<3> u, Floats<3> delta, Floats<2> A, Floats<3> B,
                    Floats<3> C, Floats<1> D, std::optional<Floats<3>> z, std::optional<Floats<3>> initial, Floats<3> y,
                    Floats<3> last) {
    Scan s = describe(u, delta, A, B, C, D, z, initial);
    s.y = rows("y", y, s.batch, s.length, s.channels);
    expect("last_state", last, {s.batch, s.channels, s.states}, true);
    s.last = last.data();
    const Level &kernels = find(level);
    nb::gil_scoped_release release;
    kernels.scan(s, bounded(threads));
}

void selective_scan_stats(const std::string &level, int threads, Floats<3> u, Floats<3> delta, Floats<2> A, Floats<3> B,
                          Floats<3> C, Floats<1> D, std::optional<Floats<3>> z, std::optional<Floats<3>> initial,
                          Floats<3> y, Floats<3> last, bool unit, std::optional<Floats<3>> removed_initial,
                          std::optional<Floats<3>> removed_last, std::optional<Floats<3>> energy,
                          std::optional<Floats<3>> decay, std::optional<Array<double, 3>> gram,
                          std::optional<Array<double, 2>> diagonal, std::optional<Array<double, 2>> cross,
                          std::optional<Array<double, 1>> power) {
    Scan s = describe(u, delta, A, B, C, D, z, initial);
    s.y = rows("y", y, s.batch, s.length, s.channels);
    expect("last_state", last, {s.batch, s.channels, s.states}, true);
    s.last = last.data();
    Stats o{};
    o.unit = unit;
    o.removed_initial = packed("removed_state", removed_initial, {s.batch, s.channels, s.states});
    o.removed_last = packed("removed_last", removed_last, {s.batch, s.channels, s.states});
    o.energy = packed("energy", energy, {s.length, s.states, s.channels});
    o.decay = packed("decay", decay, {s.length, s.states, s.channels});
    o.gram = packed("gram", gram, {s.channels, s.states, s.states});
    o.diagonal = packed("diagonal", diagonal, {s.channels, s.states});
    o.cross = packed("cross", cross, {s.channels, s.states});
    o.power = packed("power", power, {s.channels});
    if ((o.gram || o.diagonal) && (!o.cross || !o.power || (unit && !o.removed_last)))
        throw std::invalid_argument("error statistics need cross, power and, for 'unit', removed_last");
    if (!o.energy != !o.decay) throw std::invalid_argument("energy and decay come together");
    const Level &kernels = find(level);
    nb::gil_scoped_release release;
    kernels.stats(s, o, bounded(threads));
}

void selective_scan_backward(const std::string &level, int threads, Floats<3> dy, Floats<3> u, Floats<3> delta,
                             Floats<2> A, Floats<3> B, Floats<3> C, Floats<1> D, std::optional<Floats<3>> z,
                             std::optional<Floats<3>> initial, Floats<3> du, Floats<3> ddelta, Floats<3> dA,
                             Floats<4> dB, Floats<4> dC, Floats<2> dD, std::optional<Floats<3>> dz) {
    Scan s = describe(u, delta, A, B, C, D, z, initial);
    Backward g{};
    g.groups = dB.shape(0);
    g.dy = rows("dy", dy, s.batch, s.length, s.channels);
    g.du = rows("du", du, s.batch, s.length, s.channels);
    g.ddelta = rows("ddelta", ddelta, s.batch, s.length, s.channels);
    if (z.has_value() != dz.has_value()) throw std::invalid_argument("dz comes with z");
    if (dz) g.dz = rows("dz", *dz, s.batch, s.length, s.channels);
    expect("dA", dA, {s.batch, s.channels, s.states}, true);
    expect("dB", dB, {g.groups, s.batch, s.length, s.states}, true);
    expect("dC", dC, {g.groups, s.batch, s.length, s.states}, true);
    expect("dD", dD, {s.batch, s.channels}, true);
    g.dA = dA.data(), g.dB = dB.data(), g.dC = dC.data(), g.dD = dD.data();
    const Level &kernels = find(level);
    nb::gil_scoped_release release;
    kernels.backward(s, g, bounded(threads));
}

void causal_conv1d(const std::string &level, int threads, Floats<3> x, Floats<2> weight, std::optional<Floats<1>> bias,
                   std::optional<Floats<3>> before, bool silu, Floats<3> y) {
    Conv c{};
    c.batch = x.shape(0), c.length = x.shape(1), c.channels = x.shape(2), c.width = weight.shape(1);
    if (c.width < 1) throw std::invalid_argument("weight: dimension 1 is 0, expected at least 1");
    c.x = rows("x", x, c.batch, c.length, c.channels);
    c.y = rows("y", y, c.batch, c.length, c.channels);
    if (before) c.before = rows("before", *before, c.batch, c.width - 1, c.channels);
    expect("weight", weight, {c.channels, c.width}, true);
    c.weight = weight.data();
    c.bias = packed("bias", bias, {c.channels});
    c.silu = silu;
    const Level &kernels = find(level);
    nb::gil_scoped_release release;
    kernels.conv(c, bounded(threads));
}

void ssd_scan(const std::string &level, int threads, Floats<3> u, Floats<3> delta, Floats<1> A, Floats<3> B, Floats<3> C,
              int64_t groups, std::optional<Floats<1>> D, std::optional<Floats<4>> initial, Floats<3> y, Floats<4> last,
              std::optional<Floats<5>> sampled, int64_t every) {
    Dual s{};
    s.batch = u.shape(0), s.length = u.shape(1), s.heads = A.shape(0), s.groups = groups, s.every = every;
    if (s.heads < 1 || groups < 1 || u.shape(2) % s.heads || s.heads % groups || B.shape(2) % groups || !B.shape(2))
        throw std::invalid_argument("u is not made of whole heads, heads of whole groups or B of states for each group");
    s.channels = u.shape(2) / s.heads, s.states = B.shape(2) / groups;
    s.u = rows("u", u, s.batch, s.length, s.heads * s.channels);
    s.delta = rows("delta", delta, s.batch, s.length, s.heads);
    s.B = rows("B", B, s.batch, s.length, groups * s.states);
    s.C = rows("C", C, s.batch, s.length, groups * s.states);
    s.y = rows("y", y, s.batch, s.length, s.heads * s.channels);
    expect("A", A, {s.heads}, true);
    s.A = A.data();
    s.D = packed("D", D, {s.heads});
    s.initial = packed("initial_state", initial, {s.batch, s.heads, s.channels, s.states});
    expect("last_state", last, {s.batch, s.heads, s.channels, s.states}, true);
    s.last = last.data();
    if (sampled && every < 1) throw std::invalid_argument("every is " + std::to_string(every) + ", expected at least 1");
    if (sampled) s.sampled = packed("states", sampled, {s.batch, s.length / every, s.heads, s.channels, s.states});
    const Level &kernels = find(level);
    nb::gil_scoped_release release;
    kernels.dual(s, bounded(threads));
}

Rule describe_rule(const std::optional<Floats<3>> &q, const Floats<3> &k, const Floats<3> &v, const Floats<3> &g,
                   const Floats<3> &beta, int64_t groups, const std::optional<Floats<4>> &initial) {
    Rule r{};
    r.batch = v.shape(0), r.length = v.shape(1), r.heads = beta.shape(2), r.groups = groups;
    if (r.heads < 1 || groups < 1 || v.shape(2) % r.heads || r.heads % groups || k.shape(2) % groups || !k.shape(2))
        throw std::invalid_argument("v is not made of whole heads, heads of whole groups or k of keys for each group");
    r.channels = v.shape(2) / r.heads, r.keys = k.shape(2) / groups;
    r.by_channel = static_cast<int64_t>(g.shape(2)) != r.heads;
    if (q) r.q = rows("q", *q, r.batch, r.length, groups * r.keys);
    r.k = rows("k", k, r.batch, r.length, groups * r.keys);
    r.v = rows("v", v, r.batch, r.length, r.heads * r.channels);
    r.g = rows("g", g, r.batch, r.length, r.by_channel ? r.heads * r.keys : r.heads);
    r.beta = rows("beta", beta, r.batch, r.length, r.heads);
    r.initial = packed("initial_state", initial, {r.batch, r.heads, r.keys, r.channels});
    return r;
}

void gated_delta(const std::string &level, int threads, std::optional<Floats<3>> q, Floats<3> k, Floats<3> v,
                 Floats<3> g, Floats<3> beta, int64_t groups, std::optional<Floats<4>> initial,
                 std::optional<Floats<3>> y, Floats<4> last, std::optional<Floats<3>> squares) {
    Rule r = describe_rule(q, k, v, g, beta, groups, initial);
    if (!squares == !y || !q != !y) throw std::invalid_argument("q and y come together, or squares without them");
    if (y) r.y = rows("y", *y, r.batch, r.length, r.heads * r.channels);
    r.squares = packed("squares", squares, {r.batch, r.heads, r.length});
    expect("last_state", last, {r.batch, r.heads, r.keys, r.channels}, true);
    r.last = last.data();
    const Level &kernels = find(level);
    nb::gil_scoped_release release;
    kernels.rule(r, bounded(threads));
}

void gated_delta_backward(const std::string &level, int threads, Floats<3> dy, std::optional<Floats<4>> dlast,
                          Floats<3> q, Floats<3> k, Floats<3> v, Floats<3> g, Floats<3> beta, int64_t groups,
                          std::optional<Floats<4>> initial, Floats<3> dq, Floats<3> dk, Floats<3> dv, Floats<3> dg,
                          Floats<3> dbeta, Floats<4> dinitial) {
    const Rule r = describe_rule(q, k, v, g, beta, groups, initial);
    RuleBackward b{};
    const int64_t steps = r.by_channel ? r.heads * r.keys : r.heads;
    b.dy = rows("dy", dy, r.batch, r.length, r.heads * r.channels);
    b.dq = rows("dq", dq, r.batch, r.length, r.heads * r.keys);
    b.dk = rows("dk", dk, r.batch, r.length, r.heads * r.keys);
    b.dv = rows("dv", dv, r.batch, r.length, r.heads * r.channels);
    b.dg = rows("dg", dg, r.batch, r.length, steps);
    b.dbeta = rows("dbeta", dbeta, r.batch, r.length, r.heads);
    b.dlast = packed("dlast", dlast, {r.batch, r.heads, r.keys, r.channels});
    expect("dinitial", dinitial, {r.batch, r.heads, r.keys, r.channels}, true);
    b.dinitial = dinitial.data();
    const Level &kernels = find(level);
    nb::gil_scoped_release release;
    kernels.rule_backward(r, b, bounded(threads));
}

#ifdef SPARSESSM_ROUNDED

using Numbers = nb::ndarray<uint16_t, nb::ndim<1>, nb::device::cpu>;

rounded::Matrix matrix(const char *name, const Floats<2> &array, int64_t rows, int64_t width) {
    expect(name, array, {rows, width}, false);
    return {array.data(), rows, width, array.stride(0)};
}

void round_matrix(int threads, Floats<2> weight, bool turned, Numbers packed) {
    const int64_t rows = weight.shape(0), width = weight.shape(1);
    const int64_t size = turned ? rounded::packed_size(width, rows) : rounded::packed_size(rows, width);
    expect("packed", packed, {size}, true);
    const auto from = matrix("weight", weight, rows, width);
    nb::gil_scoped_release release;
    rounded::pack(from, turned, packed.data(), bounded(threads));
}

void rounded_linear(const std::string &unit, int threads, Floats<2> x, Numbers packed, std::optional<Floats<1>> bias,
                    Floats<2> y) {
    const int64_t rows = x.shape(0), width = x.shape(1), out = y.shape(1);
    expect("packed", packed, {rounded::packed_size(out, width)}, true);
    expect("y", y, {rows, out}, true);
    const auto from = matrix("x", x, rows, width);
    if (bias) expect("bias", *bias, {out}, true);
    const float *shift = bias ? bias->data() : nullptr;
    nb::gil_scoped_release release;
    rounded::linear(unit, from, packed.data(), out, shift, y.data(), bounded(threads));
}

bool add_rounded_moments(const std::string &unit, int threads, Floats<2> left, Floats<2> right,
                         Array<double, 2> total) {
    const int64_t rows = left.shape(0), tall = left.shape(1), wide = right.shape(1);
    expect("total", total, {tall, wide}, true);
    const auto first = matrix("left", left, rows, tall), second = matrix("right", right, rows, wide);
    nb::gil_scoped_release release;
    return rounded::add_moments(unit, first, second, total.data(), bounded(threads));
}

void bind_rounded(nb::module_ &m) {
    const auto array = [](const char *name) { return nb::arg(name).noconvert(); };
    m.def("rounded_units", &rounded::units);
    m.def("packed_size", &rounded::packed_size, nb::arg("rows"), nb::arg("width"));
    m.def("round_matrix", &round_matrix, nb::arg("threads"), array("weight"), nb::arg("turned"),
          array("packed"));
    m.def("rounded_linear", &rounded_linear, nb::arg("unit"), nb::arg("threads"), array("x"), array("packed"),
          nb::arg("bias").noconvert().none(), array("y"));
    m.def("add_rounded_moments", &add_rounded_moments, nb::arg("unit"), nb::arg("threads"), array("left"),
          array("right"), array("total"));
}

#else

void bind_rounded(nb::module_ &m) {
    m.def("rounded_units", [] { return std::vector<std::string>(); });
}

#endif

char abort_line[512];
size_t abort_size;

void at_abort(int) { // only what a signal's handler may call
    if (write(2, abort_line, abort_size) < 0) _exit(1);
    _exit(1);
}

// A library that aborts (Rust does where there is no memory) ends the process with this line and exit code 1. Only for a
// program: what is unfinished on the disk is left to whoever writes there next.
void end_on_abort(const std::string &line) {
    abort_size = std::min(line.size(), sizeof abort_line);
    std::memcpy(abort_line, line.data(), abort_size);
    std::signal(SIGABRT, at_abort);
}

} // namespace

NB_MODULE(_native, m) {
    // Never converted: a converted copy of an output array would swallow the result.
    const auto array = [](const char *name) { return nb::arg(name).noconvert(); };
    const auto maybe = [](const char *name) { return nb::arg(name).noconvert().none(); };
    m.def("levels", [] {
        std::vector<std::string> names;
        for (const Level *level : supported()) names.push_back(level->name);
        return names;
    });
    m.def("end_on_abort", &end_on_abort, nb::arg("line"));
    m.def("selective_scan", &selective_scan, nb::arg("level"), nb::arg("threads"), array("u"), array("delta"),
          array("A"), array("B"), array("C"), array("D"), maybe("z"), maybe("initial_state"), array("y"),
          array("last_state"));
    m.def("selective_scan_stats", &selective_scan_stats, nb::arg("level"), nb::arg("threads"), array("u"),
          array("delta"), array("A"), array("B"), array("C"), array("D"), maybe("z"), maybe("initial_state"),
          array("y"), array("last_state"), nb::arg("unit"), maybe("removed_state"), maybe("removed_last"),
          maybe("energy"), maybe("decay"), maybe("gram"), maybe("diagonal"), maybe("cross"), maybe("power"));
    m.def("selective_scan_backward", &selective_scan_backward, nb::arg("level"), nb::arg("threads"), array("dy"),
          array("u"), array("delta"), array("A"), array("B"), array("C"), array("D"), maybe("z"),
          maybe("initial_state"), array("du"), array("ddelta"), array("dA"), array("dB"), array("dC"), array("dD"),
          maybe("dz"));
    bind_runtime(m);
    bind_rounded(m);
    bind_entropy(m);
    m.def("causal_conv1d", &causal_conv1d, nb::arg("level"), nb::arg("threads"), array("x"), array("weight"),
          maybe("bias"), maybe("before"), nb::arg("silu"), array("y"));
    m.def("ssd_scan", &ssd_scan, nb::arg("level"), nb::arg("threads"), array("u"), array("delta"), array("A"),
          array("B"), array("C"), nb::arg("groups"), maybe("D"), maybe("initial_state"), array("y"),
          array("last_state"), maybe("states"), nb::arg("every"));
    m.def("gated_delta", &gated_delta, nb::arg("level"), nb::arg("threads"), maybe("q"), array("k"), array("v"),
          array("g"), array("beta"), nb::arg("groups"), maybe("initial_state"), maybe("y"), array("last_state"),
          maybe("squares"));
    m.def("gated_delta_backward", &gated_delta_backward, nb::arg("level"), nb::arg("threads"), array("dy"),
          maybe("dlast"), array("q"), array("k"), array("v"), array("g"), array("beta"), nb::arg("groups"),
          maybe("initial_state"), array("dq"), array("dk"), array("dv"), array("dg"), array("dbeta"),
          array("dinitial"));
}
