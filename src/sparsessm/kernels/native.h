// What native.cpp, native_runtime.cpp and native_entropy.cpp, the parts of the door, share.
#pragma once
#include "scan.h"

#include <nanobind/nanobind.h>

#include <algorithm>
#include <string>
#include <thread>
#include <vector>

namespace sparsessm {

const Level &find(const std::string &name); // throws std::invalid_argument
// A number of threads that a machine can have: thousands end the process inside the OpenMP runtime. As no result depends
// on it, more is no mistake here (runtime/threads.py refuses what a user asks for).
inline int bounded(int threads) {
    static const int most = std::max(64, 4 * static_cast<int>(std::thread::hardware_concurrency()));
    return std::clamp(threads, 1, most);
}

void bind_runtime(nanobind::module_ &m);
void bind_entropy(nanobind::module_ &m);

} // namespace sparsessm
