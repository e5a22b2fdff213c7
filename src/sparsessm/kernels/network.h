// A network of the runtime as Python hands it over: checked and made by native_network.cpp, run by native_runtime.cpp.
#pragma once
#include "runtime.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <stdexcept>
#include <string>
#include <vector>

namespace sparsessm {

template <typename T, int DIMS>
using Array = nanobind::ndarray<T, nanobind::ndim<DIMS>, nanobind::device::cpu, nanobind::c_contig>;

[[noreturn]] inline void refuse(const std::string &what) { throw std::invalid_argument(what); }

// Throws std::invalid_argument for what is missing or does not fit the rest.
Network network(const nanobind::dict &sizes, const std::vector<nanobind::dict> &parts, const nanobind::dict &rest);

// A part's matrices in the order of Step::shares; those that stand together are shared out alike.
std::vector<std::vector<const Matrix *>> matrices_of(const Part &part);
std::vector<int64_t> shared(const std::vector<const Matrix *> &together, int threads);

// The most that any part needs of a workspace, for one sequence.
struct Room {
    int64_t width, wide, between, narrow; // of Workspace: hidden; u and z; y; dbc
    bool embedded, side;
    void grow(const Part &part);
};

} // namespace sparsessm
