// What the kernels take: plain pointers with strides (in floats), channel-last. Filled by native.cpp, read by scan_impl.h.
#pragma once
#include <cstdint>
#include <vector>

namespace sparsessm {

// x[batch, time, channel or state]; the last stride is 1. A null pointer means "not given".
struct Rows {
    float *data = nullptr;
    int64_t batch = 0, time = 0;
    float *at(int64_t b, int64_t t) const { return data + b * batch + t * time; }
};

struct Scan {
    int64_t batch, length, channels, states;
    Rows u, delta, z, B, C, y;
    const float *A, *D;      // (channels, states), (channels)
    const float *initial;    // (batch, channels, states) or null
    float *last;             // (batch, channels, states)

    int64_t updates() const { return batch * length * channels * states; }
};

struct Stats {
    bool unit;                  // removed value: A = -1 instead of a_t = 0
    const float *removed_initial; // (batch, channels, states) or null: the state of the recurrence with A = -1
    float *removed_last;
    float *energy, *decay;      // (length, states, channels) or null: sum over the batch of h_{t-1}^2 and of a_t
    double *gram;               // (channels, states, states) or null
    double *diagonal;           // (channels, states) or null
    double *cross, *power;      // (channels, states), (channels): with gram or diagonal
};

struct Backward {
    Rows dy, du, ddelta, dz;
    float *dA, *dD;             // (batch, channels, states), (batch, channels): the caller sums over the batch
    float *dB, *dC;             // (groups, batch, length, states): the caller sums over the groups
    int64_t groups;
};

struct Conv {
    int64_t batch, length, channels, width;
    Rows x, before, y;          // before: (batch, width - 1, channels) or null
    const float *weight, *bias; // (channels, width), (channels) or null
    bool silu;
};

// The scan of Mamba-2. A head's channels lie side by side, and so do a group's states.
struct Dual {
    int64_t batch, length, heads, channels, groups, states; // channels of a head; states of a group
    Rows u, delta, B, C, y;     // u, y: heads * channels; delta: heads; B, C: groups * states
    const float *A, *D;         // (heads), (heads) or null
    const float *initial;       // (batch, heads, channels, states) or null
    float *last;                // (batch, heads, channels, states)
    float *sampled;             // (batch, length / every, heads, channels, states) or null
    int64_t every;

    int64_t updates() const { return batch * length * heads * channels * states; }
};

// The gated delta rule. A head's channels lie side by side, and so do a group's keys.
struct Rule {
    int64_t batch, length, heads, groups, keys, channels; // channels of a head's value
    bool by_channel;            // each channel of a key has a decay of its own
    Rows q, k, v, g, beta, y;   // q, k: groups * keys; v, y: heads * channels; g: heads or heads * keys; beta: heads
    const float *initial;       // (batch, heads, keys, channels) or null
    float *last;                // (batch, heads, keys, channels)
    float *squares;             // (batch, heads, length), zeros at first: of the state before each step; then no q and no y

    int64_t updates() const { return batch * length * heads * keys * channels; }
};

struct RuleBackward {
    Rows dy, dq, dk, dv, dg, dbeta; // dq, dk: heads * keys, zeros at first as dg and dbeta are; the caller sums over groups
    const float *dlast;             // (batch, heads, keys, channels) or null
    float *dinitial;                // (batch, heads, keys, channels)
};

struct Product; // runtime.h
struct Step;

// One set of kernels per instruction set.
struct Level {
    const char *name;
    void (*scan)(const Scan &, int threads);
    void (*stats)(const Scan &, const Stats &, int threads);
    void (*backward)(const Scan &, const Backward &, int threads);
    void (*conv)(const Conv &, int threads);
    void (*dual)(const Dual &, int threads);
    void (*rule)(const Rule &, int threads);
    void (*rule_backward)(const Rule &, const RuleBackward &, int threads);
    void (*product)(const Product &, int threads);
    void (*step)(const Step &, int thread, int threads);
};

const Level &portable_level();
const Level &avx2_level();
const Level &avx512_level();
const Level &avx512vbmi2_level();
const Level &dotprod_level(); // of aarch64
std::vector<const Level *> supported(); // by this CPU, slowest first (levels.cpp)

} // namespace sparsessm
