// The door of the entropy coder (entropy.h). Shapes and classes are checked here, because a wrong one would read out of
// bounds; what a stream holds is checked where it is read.
#include "entropy.h"
#include "native.h"

#include <nanobind/ndarray.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

namespace nb = nanobind;

namespace sparsessm {

namespace {

template <typename T, int DIMS> using Array = nb::ndarray<T, nb::ndim<DIMS>, nb::c_contig, nb::device::cpu>;
using Bytes = Array<const uint8_t, 1>;

template <typename A> void expect(const char *name, const A &array, int64_t length) {
    if (static_cast<int64_t>(array.size()) != length)
        throw std::invalid_argument(std::string(name) + ": " + std::to_string(array.size()) + " numbers, expected " +
                                    std::to_string(length));
}


// Every index that a class makes is checked here.
template <typename A>
entropy::Codes coded(const int16_t *codes, int64_t rows, int64_t cols, const A &by_row, const Bytes &by_column,
                     int tables) {
    expect("by_row", by_row, rows);
    expect("by_column", by_column, cols);
    if (tables < 1 || tables > entropy::MOST_TABLES || tables & (tables - 1))
        throw std::invalid_argument("tables: " + std::to_string(tables) + "; allowed: 1, 2, 4, 8 and 16");
    const auto known = [tables](uint8_t one) { return one < tables; };
    if (!std::all_of(by_row.data(), by_row.data() + rows, known) ||
        !std::all_of(by_column.data(), by_column.data() + cols, known))
        throw std::invalid_argument("a class that has no table");
    return {codes, rows, cols, by_row.data(), by_column.data(), tables};
}

template <typename A>
entropy::Codes coded(const Array<const int16_t, 2> &codes, const A &by_row, const Bytes &by_column, int tables) {
    for (size_t i = 0; i < codes.size(); ++i)
        if (codes.data()[i] == -32768) throw std::invalid_argument("codes: -32768; allowed: -32767 to 32767");
    return coded(codes.data(), codes.shape(0), codes.shape(1), by_row, by_column, tables);
}

template <typename T> nb::ndarray<nb::numpy, T, nb::ndim<1>> handed(std::vector<T> made) {
    auto *kept = new std::vector<T>(std::move(made));
    nb::capsule owner(kept, [](void *held) noexcept { delete static_cast<std::vector<T> *>(held); });
    return {kept->data(), {kept->size()}, owner};
}

std::vector<uint8_t> copied(const Bytes &bytes) {
    return {bytes.data(), bytes.data() + bytes.size()};
}

nb::ndarray<nb::numpy, int64_t, nb::ndim<1>> entropy_tally(int threads, Array<const int16_t, 2> codes, Bytes by_row, Bytes by_column, int tables) {
    const entropy::Codes found = coded(codes, by_row, by_column, tables);
    std::vector<int64_t> total;
    {
        nb::gil_scoped_release release;
        total = entropy::tally(found, bounded(threads));
    }
    return handed(std::move(total));
}

void entropy_assign(int threads, Array<const int16_t, 2> codes, Array<uint8_t, 1> by_row, Bytes by_column,
                    Array<const int32_t, 2> prices) {
    const int tables = static_cast<int>(prices.shape(0));
    const entropy::Codes found = coded(codes, by_row, by_column, tables);
    if (prices.shape(1) != entropy::TOKENS) throw std::invalid_argument("prices: 60 tokens in a table");
    nb::gil_scoped_release release;
    entropy::assign(found, prices.data(), by_row.data(), bounded(threads));
}

template <typename A> void expect_ends(const A &ends, int64_t rows, int64_t together) {
    if (together < 1) throw std::invalid_argument("together: at least 1 row");
    expect("ends", ends, (rows + together - 1) / together);
}

nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>> entropy_encode(int threads, Array<const int16_t, 2> codes, Bytes by_row, Bytes by_column, int many, Bytes tables,
                    int64_t together, Array<int64_t, 1> ends) {
    const entropy::Codes found = coded(codes, by_row, by_column, many);
    expect_ends(ends, found.rows, together);
    const std::vector<uint8_t> held = copied(tables);
    std::vector<uint8_t> stream;
    {
        nb::gil_scoped_release release;
        stream = entropy::encode(found, held, together, ends.data(), bounded(threads));
    }
    return handed(std::move(stream));
}

void entropy_decode(int threads, Bytes stream, Array<const int64_t, 1> ends, Bytes by_row, Bytes by_column, int many,
                    Bytes tables, int64_t together, Array<int16_t, 2> codes) {
    const int64_t rows = codes.shape(0), cols = codes.shape(1), bytes = stream.size();
    expect_ends(ends, rows, together);
    const int64_t *first = ends.data(), *last = first + ends.size();
    if (!std::is_sorted(first, last) || (first == last ? 0 : last[-1]) != bytes || (first != last && *first < 0))
        throw std::invalid_argument("'ends' does not rise to the " + std::to_string(bytes) + " bytes of 'stream'");
    const entropy::Codes found = coded(nullptr, rows, cols, by_row, by_column, many);
    const std::vector<uint8_t> held = copied(tables);
    nb::gil_scoped_release release;
    entropy::decode(found, held, stream.data(), ends.data(), together, codes.data(), bounded(threads));
}

} // namespace

void bind_entropy(nb::module_ &m) {
    const auto array = [](const char *name) { return nb::arg(name).noconvert(); };
    const auto threads = nb::arg("threads"), many = nb::arg("many"), together = nb::arg("together");
    m.def("entropy_tally", &entropy_tally, threads, array("codes"), array("by_row"), array("by_column"), many);
    m.def("entropy_assign", &entropy_assign, threads, array("codes"), array("by_row"), array("by_column"),
          array("prices"));
    m.def("entropy_encode", &entropy_encode, threads, array("codes"), array("by_row"), array("by_column"), many,
          array("tables"), together, array("ends"));
    m.def("entropy_decode", &entropy_decode, threads, array("stream"), array("ends"), array("by_row"),
          array("by_column"), many, array("tables"), together, array("codes"));
}

} // namespace sparsessm
