// sparsessm.kernels._native, second half: the matrices and the decoder of the runtime.
#include "checksum.h"
#include "native.h"
#include "runtime.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <exception>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <thread>
#if defined(__linux__)
#include <dlfcn.h>
#include <sched.h>
#endif

namespace nb = nanobind;

namespace sparsessm {

void Barrier::pause(int spins) {
    if (spins < 2000) {
#if defined(SPARSESSM_X86)
        __builtin_ia32_pause();
#elif defined(SPARSESSM_ARM)
        asm volatile("yield");
#endif
    } else {
        std::this_thread::yield(); // another program has the core of whoever we wait for
    }
}

namespace {

template <typename T, int DIMS> using Array = nb::ndarray<T, nb::ndim<DIMS>, nb::device::cpu, nb::c_contig>;
using Raw = nb::ndarray<nb::device::cpu, nb::c_contig>;

[[noreturn]] void refuse(const std::string &what) { throw std::invalid_argument(what); }

Value value_of(const Raw &values) {
    const auto type = values.dtype();
    if (type == nb::dtype<float>()) return Value::f32;
    if (type == nb::dtype<int8_t>()) return Value::i8;
    // bfloat16 comes in as int16: NumPy, through which tensors without a DLPack type would go, has no name for it.
    if (type == nb::dtype<int16_t>()) return Value::bf16;
    refuse("values must be float32, int16 (the bits of bfloat16) or int8");
}

const float *scales(const std::optional<Array<const float, 1>> &scale, Value value, size_t rows) {
    if ((value == Value::i8) != scale.has_value()) refuse("int8 values come with one scale a row, others without");
    if (!scale) return nullptr;
    if (scale->shape(0) != rows) refuse("there are not as many scales as rows");
    return scale->data();
}

std::shared_ptr<Matrix> sparse(Array<const uint8_t, 2> mask, int64_t cols, Raw values,
                             std::optional<Array<const float, 1>> scale, std::optional<Array<const int64_t, 1>> order) {
    if (values.ndim() != 1) refuse("values must have one dimension");
    if (cols < 1 || static_cast<int64_t>(mask.shape(1)) != cols / 8 + (cols % 8 != 0))
        refuse("the mask has " + std::to_string(mask.shape(1)) + " bytes a row, which do not fit " + std::to_string(cols) +
               " columns");
    Packed p{};
    p.rows = mask.shape(0), p.cols = cols, p.mask = mask.data();
    p.values = static_cast<const uint8_t *>(values.data()), p.nonzero = values.shape(0), p.value = value_of(values);
    p.scale = scales(scale, p.value, mask.shape(0));
    if (order && order->shape(0) == 0) refuse("no rows chosen"); // and its data may be null, which means all
    if (order) p.order = order->data(), p.ordered = order->shape(0);
    nb::gil_scoped_release release;
    return std::make_shared<Matrix>(sparse_matrix(p));
}

std::shared_ptr<Matrix> dense(int threads, Raw values, std::optional<Array<const float, 1>> scale) {
    if (values.ndim() != 2) refuse("values must have two dimensions");
    const Value value = value_of(values);
    const float *scale_of = scales(scale, value, values.shape(0));
    nb::gil_scoped_release release;
    const auto rows = static_cast<int64_t>(values.shape(0)), cols = static_cast<int64_t>(values.shape(1));
    if (value == Value::i8)
        return std::make_shared<Matrix>(
            bytes_matrix(rows, cols, static_cast<const int8_t *>(values.data()), scale_of, bounded(threads)));
    return std::make_shared<Matrix>(dense_matrix(rows, cols, value, static_cast<const uint8_t *>(values.data())));
}

std::shared_ptr<Matrix> codes(int threads, Array<const int16_t, 2> codes, Array<const float, 2> scale, int64_t group,
                              std::optional<Array<const float, 1>> columns, std::optional<Array<const int64_t, 1>> order) {
    Codes c{};
    c.sorted = true, c.scale_columns = group;
    c.rows = codes.shape(0), c.cols = codes.shape(1), c.codes = codes.data(), c.scale = scale.data();
    if (static_cast<int64_t>(scale.shape(0)) != c.rows) refuse("there are not as many scales as rows");
    if (group < 0) refuse("a scale is for " + std::to_string(group) + " columns");
    const int64_t groups = group ? c.cols / group + (c.cols % group != 0) : 1;
    if (static_cast<int64_t>(scale.shape(1)) != groups)
        refuse("a row has " + std::to_string(scale.shape(1)) + " scales, expected " + std::to_string(groups));
    if (columns && static_cast<int64_t>(columns->shape(0)) != c.cols) refuse("there are not as many factors as columns");
    if (columns) c.columns = columns->data();
    if (order && order->shape(0) == 0) refuse("no rows chosen");
    if (order) c.order = order->data(), c.ordered = order->shape(0);
    nb::gil_scoped_release release;
    return std::make_shared<Matrix>(codes_matrix(c, bounded(threads)));
}

// The values of a dense matrix as torch sees them; they live as long as the matrix.
template <typename T> nb::object view(nb::handle self, const Matrix &m) {
    const size_t shape[2] = {static_cast<size_t>(m.rows), static_cast<size_t>(m.cols)};
    return nb::cast(nb::ndarray<nb::pytorch, T>(const_cast<uint8_t *>(m.values), 2, shape, self));
}

struct Decoder {
    Network net{};
    Workspace work;
    Barrier barrier;
    std::vector<std::vector<int64_t>> shares;
    int shared_by = 0;
    std::mutex busy; // one step at a time: the workspace is shared

    void share(int threads) {
        if (threads == shared_by) return;
        shared_by = 0, shares.clear(); // in this order: what follows may fail
        for (const Layer &layer : net.layers)
            for (const auto &m : {layer.in_x, layer.in_z, layer.heads ? layer.heads->in_dt : layer.x_proj, layer.out_proj})
                shares.push_back(m->shares(threads));
        shares.push_back(net.head->shares(threads));
        shared_by = threads;
    }
};

std::vector<float> floats(const nb::dict &from, const char *name, int64_t count, bool optional = false) {
    nb::object value = from.contains(name) ? from[name] : nb::none();
    if (value.is_none()) {
        if (optional) return {};
        refuse(std::string(name) + " is missing");
    }
    const auto array = nb::cast<Array<const float, 1>>(value);
    if (static_cast<int64_t>(array.shape(0)) != count)
        refuse(std::string(name) + " has " + std::to_string(array.shape(0)) + " values, expected " + std::to_string(count));
    return {array.data(), array.data() + count};
}

std::shared_ptr<const Matrix> matrix(const nb::dict &from, const char *name) {
    if (!from.contains(name) || from[name].is_none()) refuse(std::string(name) + " is missing");
    return nb::cast<std::shared_ptr<Matrix>>(from[name]);
}

std::shared_ptr<const Matrix> matrix(const nb::dict &from, const char *name, int64_t rows, int64_t cols) {
    const auto m = matrix(from, name);
    if (m->rows != rows || m->cols != cols)
        refuse(std::string(name) + " is (" + std::to_string(m->rows) + ", " + std::to_string(m->cols) + "), expected (" +
               std::to_string(rows) + ", " + std::to_string(cols) + ")");
    return m;
}

// What every layer has; D channels go through the scan and `mixed` through the convolution.
Layer outer(const nb::dict &from, const Network &net, int64_t D, int64_t mixed) {
    const int64_t d = net.width;
    Layer l;
    l.channels = D;
    l.in_x = matrix(from, "in_x", mixed, d), l.in_z = matrix(from, "in_z", D, d);
    l.out_proj = matrix(from, "out_proj", d, D);
    l.norm = floats(from, "norm", d), l.conv = floats(from, "conv", net.taps * mixed);
    l.conv_bias = floats(from, "conv_bias", mixed, true);
    l.in_bias = floats(from, "in_bias", mixed + D, true), l.out_bias = floats(from, "out_bias", d, true);
    return l;
}

// A layer of Mamba-2, `shape` gives the sizes of its heads; what it says of them holds for all layers.
Layer dual_layer(const nb::dict &from, const Network &net, const Heads &shape) {
    auto made = std::make_shared<Heads>(shape);
    Heads &m = *made;
    Layer l = outer(from, net, net.channels, net.channels + 2 * m.groups * net.states);
    const int64_t padded = (m.count + SCAN_LANES - 1) / SCAN_LANES * SCAN_LANES; // enough for every level's lanes
    m.in_dt = matrix(from, "in_dt", m.count, net.width);
    m.dt_bias = floats(from, "dt_bias", padded), m.A = floats(from, "A", padded), m.skip = floats(from, "skip", padded);
    m.norm = floats(from, "gated_norm", net.channels);
    if (!from.contains("keeps")) refuse("keeps is missing");
    const auto keeps = nb::cast<Array<const uint8_t, 1>>(from["keeps"]);
    if (static_cast<int64_t>(keeps.shape(0)) != m.count) refuse("keeps does not have one entry a head");
    m.directions = net.states;
    if (from.contains("B_projection") && !from.contains("directions")) refuse("directions is missing");
    if (from.contains("directions")) {
        m.directions = nb::cast<int64_t>(from["directions"]);
        if (m.directions < 1 || m.directions > net.states) refuse("directions must be between 1 and the number of states");
        const int64_t wide = (m.directions + SCAN_LANES - 1) / SCAN_LANES * SCAN_LANES;
        m.B_projection = floats(from, "B_projection", m.groups * net.states * wide);
        m.C_projection = floats(from, "C_projection", m.groups * net.states * wide);
    }
    for (int64_t h = 0; h < m.count; ++h) (keeps.data()[h] ? m.kept : m.memoryless).push_back(h);
    l.heads = std::move(made);
    return l;
}

Layer layer(const nb::dict &from, const Network &net) {
    const int64_t D = matrix(from, "in_z")->rows; // all else is checked against it
    if (D > (int64_t{1} << 31)) refuse("in_z has a number of channels that is out of range");
    const int64_t padded = (D + SCAN_LANES - 1) / SCAN_LANES * SCAN_LANES;
    Layer l = outer(from, net, D, D);
    l.x_proj = matrix(from, "x_proj", net.rank + 2 * net.states, D);
    l.dt_proj = matrix(from, "dt_proj", D, net.rank);
    l.dt_bias = floats(from, "dt_bias", padded), l.skip = floats(from, "skip", padded);
    for (const char *name : {"channel", "slots", "index"})
        if (!from.contains(name)) refuse(std::string(name) + " is missing");
    const auto channel = nb::cast<Array<const int32_t, 1>>(from["channel"]);
    if (static_cast<int64_t>(channel.shape(0)) != padded) refuse("channel does not have one entry a padded channel");
    std::vector<bool> seen(D, false);
    for (int64_t i = 0; i < padded; ++i) {
        const int32_t c = channel.data()[i];
        if (i < D ? (c < 0 || c >= D || seen[c]) : c != -1) refuse("channel is not an order of the channels");
        if (i < D) seen[c] = true;
        l.channel.push_back(c);
    }
    const auto slots = nb::cast<std::vector<int64_t>>(from["slots"]);
    if (static_cast<int64_t>(slots.size()) != padded / SCAN_LANES) refuse("slots does not have one entry a group");
    int64_t entries = 0;
    for (const int64_t count : slots) {
        if (count < 0 || count > net.states) refuse("a group has more slots than there are states");
        const int32_t *own = l.channel.data() + l.groups.size() * SCAN_LANES;
        bool consecutive = true;
        for (int lane = 0; lane < SCAN_LANES; ++lane) consecutive = consecutive && own[lane] == own[0] + lane;
        l.groups.push_back({entries, entries, static_cast<int32_t>(count), true, consecutive});
        entries += count * SCAN_LANES;
    }
    l.A = floats(from, "A", entries);
    const auto index = nb::cast<Array<const uint8_t, 1>>(from["index"]);
    if (static_cast<int64_t>(index.shape(0)) != entries) refuse("index does not have as many entries as A");
    l.index.assign(index.data(), index.data() + entries);
    for (const uint8_t n : l.index)
        if (n >= net.states) refuse("index names a state that does not exist");
    for (ScanGroup &group : l.groups) {
        group.ordered = group.slots == net.states || group.slots == 0;
        for (int64_t i = 0; i < int64_t{group.slots} * SCAN_LANES; ++i)
            group.ordered = group.ordered && l.index[group.entries + i] == i / SCAN_LANES;
    }
    l.index.resize(entries + SCAN_LANES);
    return l;
}

std::shared_ptr<Decoder> decoder(const nb::dict &sizes, const std::vector<nb::dict> &layers, const nb::dict &rest) {
    auto made = std::make_shared<Decoder>();
    Network &net = made->net;
    const auto size = [&](const char *name) {
        const auto value = nb::cast<int64_t>(sizes[name]);
        if (value < 1 || value > (int64_t{1} << 31)) refuse(std::string(name) + " is out of range");
        return value;
    };
    net.width = size("width"), net.states = size("states");
    net.taps = size("taps"), net.vocabulary = size("vocabulary");
    net.epsilon = nb::cast<float>(sizes["epsilon"]);
    Heads shape{};
    if (sizes.contains("heads")) { // Mamba-2
        net.channels = size("channels");
        shape.count = size("heads"), shape.groups = size("groups");
        shape.least = nb::cast<float>(sizes["least"]), shape.most = nb::cast<float>(sizes["most"]);
        if (net.channels % shape.count || shape.count % shape.groups)
            refuse("channels must be the same number for every head, and heads for every group");
    } else {
        net.rank = size("rank");
        if (net.states > 256) refuse("more than 256 states");
        if (sizes.contains("mixer_epsilon")) net.mixer_epsilon = nb::cast<float>(sizes["mixer_epsilon"]);
    }
    for (const nb::dict &fields : layers) {
        Layer l = shape.count ? dual_layer(fields, net, shape) : layer(fields, net);
        l.conv_state = net.state_size;
        l.scan_state = l.conv_state + (net.taps - 1) * l.in_x->rows;
        const int64_t kept = shape.count ? static_cast<int64_t>(l.heads->kept.size()) * net.channels / shape.count * l.heads->directions
                                         : static_cast<int64_t>(l.A.size());
        net.state_size = l.scan_state + kept;
        net.channels = std::max(net.channels, l.channels);
        net.layers.push_back(std::move(l));
    }
    net.norm = floats(rest, "norm", net.width);
    net.embedding = matrix(rest, "embedding", net.vocabulary, net.width);
    net.head = matrix(rest, "head", net.vocabulary, net.width);
    return made;
}

// Runs `body` on a team of up to `threads`; the team may be smaller, and all of it runs at once. `body` throws nothing.
template <typename Body> void team(int threads, const Body &body) {
    if (threads <= 1) {
        body(0, 1);
        return;
    }
#if defined(__linux__)
    using Parallel = void (*)(void (*)(void *), void *, unsigned, unsigned);
    using Number = int (*)();
    static const auto parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    static const auto number = reinterpret_cast<Number>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
    static const auto count = reinterpret_cast<Number>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
    if (parallel && number && count) { // torch's own pool: two pools would spin against each other
        auto run = [](void *data) { (*static_cast<const Body *>(data))(number(), count()); };
        parallel(run, const_cast<void *>(static_cast<const void *>(&body)), static_cast<unsigned>(threads), 0);
        return;
    }
#endif
    std::vector<std::thread> others;
    std::atomic<int> size{0}; // of the team, known when no more threads can be had
    try {
        for (int t = 1; t < threads; ++t)
            others.emplace_back([&body, &size, t] {
                while (!size.load(std::memory_order_acquire)) std::this_thread::yield();
                body(t, size.load());
            });
    } catch (...) {
    }
    size.store(static_cast<int>(others.size()) + 1, std::memory_order_release);
    body(0, size.load());
    for (auto &thread : others) thread.join();
}

void step(Decoder &self, const std::string &level, int threads, Array<const int64_t, 1> tokens, Array<float, 2> state,
          Array<float, 2> logits) {
    const Network &net = self.net;
    const int64_t batch = tokens.shape(0);
    if (batch < 1 || static_cast<int64_t>(state.shape(0)) != batch || static_cast<int64_t>(logits.shape(0)) != batch ||
        static_cast<int64_t>(state.shape(1)) != net.state_size ||
        static_cast<int64_t>(logits.shape(1)) != net.vocabulary)
        refuse("tokens, state and logits do not fit each other and the model");
    for (int64_t b = 0; b < batch; ++b)
        if (tokens.data()[b] < 0 || tokens.data()[b] >= net.vocabulary)
            refuse("token " + std::to_string(tokens.data()[b]) + " is not in a vocabulary of " +
                   std::to_string(net.vocabulary));
    const Level &kernels = find(level);
    nb::gil_scoped_release release;
    const std::lock_guard<std::mutex> lock(self.busy);
    Workspace &w = self.work;
    int64_t mixed = 0, narrow = net.rank + 2 * net.states;
    for (const Layer &layer : net.layers) {
        mixed = std::max(mixed, layer.in_x->rows);
        if (layer.heads) narrow = std::max(narrow, layer.heads->count);
    }
    w.hidden.resize(batch * net.width), w.u.resize(batch * mixed), w.z.resize(batch * net.channels);
    w.y.resize(batch * net.channels), w.dbc.resize(batch * narrow);
    threads = bounded(threads);
    self.share(threads); // here, where it may fail; a smaller team shares anew
    std::atomic<bool> ready{false}, failed{false};
    std::exception_ptr failure;
    Step s{net, tokens.data(), state.data(), logits.data(), batch, w, self.barrier, self.shares};
    std::atomic<int> first{0};
    team(threads, [&](int thread, int count) {
        try {
            if (first.fetch_add(1) == 0) { // the size of the team is known only now
                try {
                    self.share(count);
                } catch (...) {
                    self.barrier.breaks(), ready.store(true, std::memory_order_release);
                    throw;
                }
                ready.store(true, std::memory_order_release);
            }
            while (!ready.load(std::memory_order_acquire)) std::this_thread::yield();
            if (count > 1 && self.barrier.broken()) return;
            kernels.step(s, thread, count);
        } catch (const Barrier::Broken &) {
        } catch (...) { // nothing may leave the function of a thread
            if (!failed.exchange(true)) failure = std::current_exception();
            self.barrier.breaks();
        }
    });
    if (failure) {
        self.barrier.mend();
        std::rethrow_exception(failure);
    }
}

void product(const Matrix &m, const std::string &level, int threads, nb::ndarray<const float, nb::ndim<2>, nb::device::cpu> x,
             std::optional<Array<const float, 1>> bias, bool softplus,
             nb::ndarray<float, nb::ndim<2>, nb::device::cpu> out) {
    if (static_cast<int64_t>(x.shape(1)) != m.cols || static_cast<int64_t>(out.shape(1)) != m.rows ||
        x.shape(0) != out.shape(0) || (bias && static_cast<int64_t>(bias->shape(0)) != m.rows))
        refuse("x, bias and out do not fit the matrix");
    if ((m.cols > 1 && x.stride(1) != 1) || (m.rows > 1 && out.stride(1) != 1)) refuse("rows must be contiguous");
    const Level &kernels = find(level);
    const Product p{m, x.data(), bias ? bias->data() : nullptr, out.data(), static_cast<int64_t>(x.shape(0)),
                    x.stride(0), out.stride(0), softplus};
    nb::gil_scoped_release release;
    if (p.length) kernels.product(p, bounded(threads));
}

} // namespace

void bind_runtime(nb::module_ &m) {
    const auto array = [](const char *name) { return nb::arg(name).noconvert(); };
    const auto maybe = [](const char *name) { return nb::arg(name).noconvert().none(); };
    nb::class_<Matrix>(m, "Matrix")
        .def_prop_ro("rows", [](const Matrix &h) { return h.rows; })
        .def_prop_ro("cols", [](const Matrix &h) { return h.cols; })
        .def_prop_ro("sparse", [](const Matrix &h) { return h.form == Form::sparse; })
        .def_prop_ro("nonzero", [](const Matrix &h) { return h.nonzero; })
        .def_prop_ro("nbytes", [](const Matrix &h) { return h.bytes(); })
        .def_prop_ro("values",
                     [](nb::handle self) {
                         const auto &m = nb::cast<const Matrix &>(self);
                         if (m.form != Form::dense) refuse("only a dense matrix has dense values");
                         return m.value == Value::f32 ? view<float>(self, m) : view<int16_t>(self, m);
                     })
        .def("row",
             [](const Matrix &h, int64_t index, Array<float, 1> out) {
                 if (index < 0 || index >= h.rows || static_cast<int64_t>(out.shape(0)) != h.cols)
                     refuse("no such row, or out does not fit it");
                 h.row(index, out.data());
             }, nb::arg("index"), array("out"))
        .def("product", &product, nb::arg("level"), nb::arg("threads"), array("x"), maybe("bias"),
             nb::arg("softplus"), array("out"));
    m.def("sparse", &sparse, array("mask"), nb::arg("cols"), array("values"), maybe("scale"), maybe("order"));
    m.def("codes", &codes, nb::arg("threads"), array("codes"), array("scale"), nb::arg("group"),
          maybe("columns"), maybe("order"));
    m.def("dense", &dense, nb::arg("threads"), array("values"), maybe("scale"));
    nb::class_<Decoder>(m, "Decoder")
        .def_prop_ro("state_size", [](const Decoder &d) { return d.net.state_size; })
        .def("step", &step, nb::arg("level"), nb::arg("threads"), array("tokens"), array("state"), array("logits"));
    m.def("crc32c",
          [](Array<const uint8_t, 1> bytes, uint32_t before, bool portable) {
              nb::gil_scoped_release release;
              return crc32c(before, bytes.data(), bytes.size(), portable);
          }, array("bytes"), nb::arg("before"), nb::arg("portable"));
    m.def("decoder", &decoder, nb::arg("sizes"), nb::arg("layers"), nb::arg("rest"));
}

} // namespace sparsessm
