// What native_runtime.cpp and native_network.cpp share.
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

// A network as Python hands it over; throws std::invalid_argument for what is missing or does not fit the rest.
Network network(const nanobind::dict &sizes, const std::vector<nanobind::dict> &parts, const nanobind::dict &rest);

} // namespace sparsessm
