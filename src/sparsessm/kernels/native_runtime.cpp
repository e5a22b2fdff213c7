// sparsessm.kernels._native, second half: the matrices and the decoder of the runtime; native_network.cpp makes the
// network.
#include "checksum.h"
#include "native.h"
#include "native_network.h"
#include "network.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
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

using Raw = nb::ndarray<nb::device::cpu, nb::c_contig>;

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
        shares = shares_of(net, threads);
        shared_by = threads;
    }
};

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

// How many tokens' keys and values are in a state. Throws where there is no room for one more.
void refuse_full(const Network &net, const float *state, int64_t size) {
    if (size < net.state_size || (!net.block && size != net.state_size))
        refuse("a state has " + std::to_string(size) + " values, expected " + std::to_string(net.state_size));
    if (!net.block) return;
    const float tokens = state[net.state_size - 1];
    if (!(tokens >= 0 && tokens < Network::MOST && tokens == std::floor(tokens)))
        refuse("a state says that it has seen " + std::to_string(tokens) + " tokens");
    if ((size - net.state_size) / net.block <= static_cast<int64_t>(tokens) / KEPT)
        refuse("a state has no room for the keys and values of one more token");
}

std::shared_ptr<Decoder> decoder(const nb::dict &sizes, const std::vector<nb::dict> &parts, const nb::dict &rest) {
    auto made = std::make_shared<Decoder>();
    made->net = network(sizes, parts, rest);
    return made;
}

void step(Decoder &self, const std::string &level, int threads, Array<const int64_t, 1> tokens,
          const std::vector<Array<float, 1>> &states, Array<float, 2> logits) {
    const Network &net = self.net;
    const int64_t batch = tokens.shape(0);
    if (batch < 1 || static_cast<int64_t>(states.size()) != batch || static_cast<int64_t>(logits.shape(0)) != batch ||
        static_cast<int64_t>(logits.shape(1)) != net.vocabulary)
        refuse("tokens, state and logits do not fit each other and the model");
    for (int64_t b = 0; b < batch; ++b)
        if (tokens.data()[b] < 0 || tokens.data()[b] >= net.vocabulary)
            refuse("token " + std::to_string(tokens.data()[b]) + " is not in a vocabulary of " +
                   std::to_string(net.vocabulary));
    std::vector<float *> rows;
    for (const auto &state : states) {
        refuse_full(net, state.data(), state.shape(0));
        rows.push_back(state.data());
    }
    std::vector<float *> sorted = rows;
    std::sort(sorted.begin(), sorted.end());
    if (net.state_size && std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end())
        refuse("a state is there twice");
    const Level &kernels = find(level);
    nb::gil_scoped_release release;
    const std::lock_guard<std::mutex> lock(self.busy);
    Workspace &w = self.work;
    make_room(net, batch, w);
    threads = bounded(threads);
    self.share(threads); // here, where it may fail; a smaller team shares anew
    std::atomic<bool> ready{false}, failed{false};
    std::exception_ptr failure;
    Step s{net, tokens.data(), rows.data(), logits.data(), batch, w, self.barrier, self.shares};
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
        .def_prop_ro("block", [](const Decoder &d) { return d.net.block; })
        .def("step", &step, nb::arg("level"), nb::arg("threads"), array("tokens"), nb::arg("states"), array("logits"));
    m.def("crc32c",
          [](Array<const uint8_t, 1> bytes, uint32_t before, bool portable) {
              nb::gil_scoped_release release;
              return crc32c(before, bytes.data(), bytes.size(), portable);
          }, array("bytes"), nb::arg("before"), nb::arg("portable"));
    m.def("decoder", &decoder, nb::arg("sizes"), nb::arg("parts"), nb::arg("rest"));
}

} // namespace sparsessm
