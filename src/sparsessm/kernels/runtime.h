// What the runtime's kernels take: matrices, and a whole model for one step of decoding. Filled by native_runtime.cpp,
// read by product_impl.h and step_impl.h.
#pragma once
#include "matrix.h"

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

namespace sparsessm {

// The recurrence of one layer with only the states that remember something. Channels are sorted by how many they keep;
// SCAN_LANES of them share a group, and its states lie as (slots, SCAN_LANES).
constexpr int SCAN_LANES = 16;
struct ScanGroup {
    int64_t state;   // floats from the layer's first state
    int64_t entries; // of A and index, at which the group's begin
    int32_t slots;
    bool ordered;     // slot n holds state n of every channel: B and C need no look-up
    bool consecutive; // its channels follow each other, all SCAN_LANES
};

// What Mamba-2 has between convolution and out_proj (Dao & Gu, arXiv 2405.21060): heads of P channels with one step size
// and one decay each, B and C for each group of heads, and a norm of the gated output. A head whose decay is zero has no
// state; the others' follow each other as (N, P).
struct Heads {
    std::shared_ptr<const Matrix> in_dt; // (H, d_model)
    std::vector<float> dt_bias, A, skip; // (padded heads); A times log2(e), skip is D
    std::vector<float> norm;             // (D)
    std::vector<int64_t> kept, memoryless; // heads with a state, in the order of the states, and without
    int64_t count, groups;                 // H, G
    int64_t directions;                    // states that a head keeps: N, or fewer behind projections of B and C
    std::vector<float> B_projection, C_projection; // (G, N, padded directions) transposed; empty: there are none
    float least, most;                     // bounds of a step size
};

struct Layer {
    std::shared_ptr<const Matrix> in_x, in_z, x_proj, dt_proj, out_proj; // rows of dt_proj in the sorted order
    std::shared_ptr<const Heads> heads; // of Mamba-2, which has no x_proj, dt_proj and what belongs to them; else null
    int64_t channels;                   // D, in Mamba-1 each layer's own
    // M channels go through the convolution: the D of the scan, and of Mamba-2 also B and C of every group.
    std::vector<float> norm, conv, conv_bias, in_bias, out_bias; // conv: (K, M), in_bias: (M + D); biases may be empty
    std::vector<float> dt_bias, skip;                            // (padded channels), sorted; skip is D
    std::vector<float> A;                                        // (slots, SCAN_LANES) per group, times log2(e)
    std::vector<uint8_t> index;                                  // the same: which state a slot holds
    std::vector<int32_t> channel;                                // (padded channels): sorted -> own; -1: none
    std::vector<ScanGroup> groups;
    int64_t conv_state, scan_state; // floats from the beginning of a sequence's state
};

struct Network {
    int64_t width, channels, states, rank, taps, vocabulary; // d_model, the most D of a layer, N, R, K, V
    float epsilon;
    int64_t state_size; // floats a sequence
    float mixer_epsilon = -1; // of FalconMamba's norms on the inputs of dt_proj, B and C; below zero: there are none
    std::vector<Layer> layers;
    std::vector<float> norm;
    std::shared_ptr<const Matrix> embedding, head;
};

// All threads meet here; short waits spin, long ones give the core away. A thread that fails breaks the barrier, which
// ends whoever waits at it: nobody else would come.
class Barrier {
  public:
    struct Broken {};

    void wait(int count) {
        if (count == 1) return;
        const uint32_t turn = turn_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == count - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            turn_.store(turn + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; turn_.load(std::memory_order_acquire) == turn; ++spins) {
            if (broken()) throw Broken{};
            pause(spins);
        }
    }

    bool broken() const { return broken_.load(std::memory_order_acquire); }

    void breaks() { broken_.store(true, std::memory_order_release); }

    void mend() { arrived_.store(0), broken_.store(false); } // when nobody waits any more

  private:
    static void pause(int spins);
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> turn_{0};
    std::atomic<bool> broken_{false};
};

struct Workspace { // shared by the threads of one step, (batch, ...) each
    std::vector<float> hidden, u, z, dbc, y; // u: what the convolution gives; dbc: R + 2N values, or H step sizes
};

struct Step {
    const Network &net;
    const int64_t *tokens; // (batch)
    float *state;          // (batch, state_size), advanced
    float *logits;         // (batch, vocabulary)
    int64_t batch;
    Workspace &work;
    Barrier &barrier;
    // Per layer in_x, in_z, x_proj or in_dt, out_proj: bounds of each thread's share of groups; of the head behind them.
    const std::vector<std::vector<int64_t>> &shares;
};

struct Product {
    const Matrix &matrix;
    const float *x, *bias; // (length, cols) with a stride between rows, (rows) or null
    float *out;            // (length, rows) with a stride between rows
    int64_t length, x_stride, out_stride;
    bool softplus;         // of what comes out
};

} // namespace sparsessm
