// What the runtime's kernels take: matrices, and a whole model for one step of decoding. Filled by native_runtime.cpp,
// read by product_impl.h and step_impl.h.
#pragma once
#include "matrix.h"

#include <atomic>
#include <cstdint>
#include <memory>
#include <variant>
#include <vector>

namespace sparsessm {

// A product, and what is done to what comes out.
struct Linear {
    std::shared_ptr<const Matrix> matrix;
    std::vector<float> bias;                    // (rows) or empty
    float scale = 1;                            // of the product, before the bias
    std::shared_ptr<const Matrix> narrow, wide; // an adapter, wide (narrow x) is added; null: there is none
};

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
    std::vector<float> norm;             // (D); empty: there is none
    float epsilon = 0;                   // of it
    bool gate_first = true;              // the norm is of the gated output, else what it gives is gated
    float step_scale = 1;                // of what in_dt gives
    std::vector<int64_t> kept, memoryless; // heads with a state, in the order of the states, and without
    int64_t count, groups;                 // H, G
    int64_t directions;                    // states that a head keeps: N, or fewer behind projections of B and C
    std::vector<float> B_projection, C_projection; // (G, N, padded directions) transposed; empty: there are none
    float least, most;                     // bounds of a step size
};

struct Mamba {
    std::shared_ptr<const Matrix> in_x, in_z, x_proj, dt_proj, out_proj; // rows of dt_proj in the sorted order
    std::shared_ptr<const Heads> heads; // of Mamba-2, which has no x_proj, dt_proj and what belongs to them; else null
    int64_t channels;                   // D, in Mamba-1 each layer's own
    float in_scale = 1, gate_scale = 1; // of what in_x and in_z give
    std::vector<float> readings;        // (R + 2N): weights of the norms on the inputs of dt_proj, B and C; or empty
    // M channels go through the convolution: the D of the scan, and of Mamba-2 also B and C of every group.
    std::vector<float> conv, conv_bias, in_bias, out_bias; // conv: (K, M), in_bias: (M + D); biases may be empty
    std::vector<float> dt_bias, skip;                            // (padded channels), sorted; skip is D
    std::vector<float> A;                                        // (slots, SCAN_LANES) per group, times log2(e)
    std::vector<uint8_t> index;                                  // the same: which state a slot holds
    std::vector<int32_t> channel;                                // (padded channels): sorted -> own; -1: none
    std::vector<ScanGroup> groups;
    int64_t conv_state, scan_state; // floats from the beginning of a sequence's state
};

// A matrix that reads what a narrow one makes of the stream, or without that the stream.
struct Narrowed {
    std::shared_ptr<const Matrix> matrix, narrow;

    int64_t low() const { return narrow ? narrow->rows : 0; }
};

// A mixer of the gated delta rule: G groups of queries and keys of K channels, H heads with values of P channels, whose
// states (K, P) follow each other. A head whose decay is zero has none.
struct Delta {
    std::vector<std::shared_ptr<const Matrix>> mixed; // queries, keys and values, one behind the other
    Narrowed gate, step;                              // (H P), (H) or (H K)
    std::shared_ptr<const Matrix> beta;               // (H)
    Linear out;
    int64_t groups, keys, heads, channels, taps, mixed_rows; // mixed_rows: 2 G K + H P
    std::vector<float> conv;       // (taps, mixed_rows)
    std::vector<float> A, dt_bias; // (H), (step's rows)
    bool by_channel = false;       // each channel of a key has a step of its own, and so a decay (Kimi, arXiv 2510.26692)
    bool sigmoid = false;          // what the norm gives is multiplied by sigmoid(gate), else by silu(gate)
    std::vector<float> norm;       // (P), of each head
    float epsilon, most;           // of it; the largest share of a correction that is written
    std::vector<int64_t> places;   // of each head among those with a state, -1 without
    int64_t kept = 0;              // heads with a state
    int64_t conv_state = 0, rule_state = 0; // floats from the beginning of a sequence's state
};

// What KEPT tokens leave lies together, channel by channel: for each head of keys (width, KEPT), then the same of values.
// So a query meets KEPT keys lane by lane, and nothing is summed across lanes before its end. Where they lie in a block
// of a sequence's state says `place`.
constexpr int KEPT = 64;
// Of what a head keeps in a block: (width, KEPT) numbers, or as many bytes and behind them a scale for each token. Four
// bytes are a float in the state: token t of a channel is byte t / 16 of word t % 16. Byte 3 changed by 0x7f and the word
// turned right by one, no float is an infinity or NaN: bytes are -127 to 127, and the one that would be the largest exponent
// is -128.
constexpr int KEPT_WORDS = KEPT / 4;
constexpr uint32_t NO_EXPONENT = 0x7f000000;
inline int64_t kept_floats(int64_t width, bool int8) { return int8 ? width * KEPT_WORDS + KEPT : width * KEPT; }

struct Attention {
    Linear q, k, v, o;
    int64_t heads, shared, width; // of queries; of keys and values; channels of one
    float scale;                  // of the scores
    bool rotary;                  // queries and keys are turned by their position
    Linear gate;                  // its sigmoid multiplies what the heads give; without a matrix where there is none
    // Weights of norms of queries and keys: of each head (width), or of all together (heads, width); empty: there is none.
    std::vector<float> q_norm, k_norm;
    bool norm_whole = false;
    int64_t place = 0;            // floats from the beginning of a block

    int64_t floats(bool int8) const { return 2 * shared * kept_floats(width, int8); } // of a block
};

// Latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) without positions. A token leaves one row of R numbers, of
// which matrices of each head make keys and values, and S channels that the keys of all heads have in common. What is
// kept is that row: a head's query goes through its matrix of keys instead, and what it gathers through that of values.
struct Latent {
    Linear narrow, q; // (rank of queries), (H (N + S)): of each head N channels that meet the row, then S; narrow may be none
    Linear row, o;    // (R + S); (d_model, H P)
    std::vector<float> q_norm, norm; // of narrow's output, of the R numbers
    std::vector<std::shared_ptr<const Matrix>> keys, values; // of each head: (R, N), (P, R)
    int64_t heads, rank, common, own, width; // H, R, S, N, P
    float scale, epsilon; // of the scores; of the norms
    int64_t place = 0;    // floats from the beginning of a block: of the row R channels, then S

    int64_t floats(bool int8) const { return kept_floats(rank, int8) + kept_floats(common, int8); } // of a block
};

enum class Curve : uint8_t { silu, gelu, relu2 };
struct Mlp {
    Linear gate, up, down; // gate has no matrix where there is none
    Curve curve;
    Linear share; // of one row, whose sigmoid multiplies what the MLP gives; without a matrix where there is none
};

enum class Choice : uint8_t { softmax, softmax_of_chosen, sigmoid };
struct Experts {
    Linear router;
    std::vector<Mlp> each;
    Linear before, behind; // around the experts; without a matrix where there are none
    int64_t chosen;
    Choice choice;
    // Of sigmoid: what is added to a score for the choice, from how many of how many groups, and what is done then.
    std::vector<float> favour; // (experts)
    int64_t groups = 1, chosen_groups = 1;
    bool normalised = false;
    float factor = 1;
};

// A part of a layer: it reads the stream, or something beside it, and adds to it.
enum class Source : uint8_t { before, stream, both, side, sum }; // what the last part read; stream and embedding; sum of two
struct Part {
    Source source = Source::stream;
    std::vector<float> norm; // of what it reads; empty: as it is
    std::vector<float> after; // of a norm of what it gives; empty: there is none
    bool beside = false;     // what it gives does not go to the stream, but replaces what is beside it
    float scale = 1;         // of what is added to the stream
    std::variant<Mamba, Delta, Attention, Latent, Mlp, Experts, Linear> what;
    size_t share = 0;        // where in Step::shares its matrices begin
};

struct Network {
    int64_t width, channels, states, rank, taps, vocabulary; // d_model, the most D of a layer, N, R, K, V
    float epsilon;
    int64_t state_size; // floats a sequence, keys and values apart
    float mixer_epsilon = -1; // of FalconMamba's norms on the inputs of dt_proj, B and C; below zero: there are none
    std::vector<Part> parts;
    std::vector<float> norm;
    std::shared_ptr<const Matrix> embedding, head;
    float embedding_scale = 1;
    std::vector<float> turns; // radians a token of each pair of channels that `rotary` turns
    float turned = 1;         // factor of what is turned
    // Behind the state of a sequence are blocks of keys and values; the last float before them says of how many tokens.
    int64_t block = 0; // floats; 0: there are none
    bool int8 = false; // keys and values are bytes
    static constexpr float MOST = 16777216; // tokens, which a float counts
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
    std::vector<float> embedded, side;       // what was looked up, and what is beside the stream, where a part reads it
    std::vector<float> given;                // what a part gives, before its norm
    std::vector<float> turned;               // (turns) cosines, then as many sines
};

struct Step {
    const Network &net;
    const int64_t *tokens; // (batch)
    float *const *states;  // (batch) of state_size and blocks, advanced
    float *logits;         // (batch, vocabulary)
    int64_t batch;
    Workspace &work;
    Barrier &barrier;
    // Of each part's matrices, as native_runtime.cpp lists them, bounds of each thread's share of groups; of the head
    // behind them.
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
