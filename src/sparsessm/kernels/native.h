// What native.cpp and native_runtime.cpp, the two halves of the door, share.
#pragma once
#include "scan.h"

#include <nanobind/nanobind.h>

#include <string>
#include <vector>

namespace sparsessm {

std::vector<const Level *> supported();     // by this CPU, slowest first
const Level &find(const std::string &name); // throws std::invalid_argument
void bind_runtime(nanobind::module_ &m);

} // namespace sparsessm
