// A network as a whole: what its threads share out, and the room they need (network.cpp).
#pragma once
#include "runtime.h"

#include <cstddef>
#include <vector>

namespace sparsessm {

// How many entries a part has in Step::shares.
size_t shares_of(const Part &part);
// Of all parts, and of the head behind them: bounds of each thread's share.
std::vector<std::vector<int64_t>> shares_of(const Network &net, int threads);

void make_room(const Network &net, int64_t batch, Workspace &work);

} // namespace sparsessm
