// The selective scan (Gu & Dao, arXiv 2312.00752, eq. 2) with channels as vector lanes, its calibration statistics
// (sums over the batch and over time that never store a (time, channel, state) tensor) and its backward.
// Compiled once per instruction set by level_*.cpp, which define LANES and LEVEL.
//
//   h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t      y_t = (C_t . h_t + D u_t) silu(z_t)
//
// Time is cut into tiles short enough for everything that a tile touches to stay in the first-level cache.
#include "few_bits.h"
#include "runtime.h"
#include "scan.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <exception>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>
#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace sparsessm {
namespace {

// Inside the anonymous namespace: code compiled for one instruction set must never be linked into another level.
#include "simd.h"
#include "threads.h"

constexpr int TILE = 16;

// One block of up to LANES channels of one sequence over one tile.
struct Tile {
    int lanes, steps;
    int64_t c0, b, t0;
    vec delta[TILE], u[TILE], du[TILE], y[TILE];

    void open(const Scan &s, int64_t block, int64_t batch, int64_t time) {
        c0 = block * LANES, b = batch, t0 = time;
        lanes = static_cast<int>(std::min<int64_t>(LANES, s.channels - c0));
        steps = static_cast<int>(std::min<int64_t>(TILE, s.length - t0));
        const vec skip = load(s.D + c0, lanes);
        for (int t = 0; t < steps; ++t) {
            delta[t] = load(s.delta.at(b, t0 + t) + c0, lanes);
            u[t] = load(s.u.at(b, t0 + t) + c0, lanes);
            du[t] = delta[t] * u[t];
            y[t] = skip * u[t];
        }
    }
    vec gate(const Scan &s, int t) const {
        const vec z = load(s.z.at(b, t0 + t) + c0, lanes);
        return z * sigmoid(z);
    }
    void close(const Scan &s) const {
        for (int t = 0; t < steps; ++t) store(s.y.at(b, t0 + t) + c0, s.z.data ? y[t] * gate(s, t) : y[t], lanes);
    }
};

// (channels, states) in memory <-> [state] vectors of channels, optionally scaled.
void gather(const float *from, int64_t states, int lanes, vec *to, float scale = 1.0f) {
    for (int64_t n = 0; n < states; ++n) {
        vec value{};
        if (from)
            for (int lane = 0; lane < lanes; ++lane) value[lane] = from[lane * states + n] * scale;
        to[n] = value;
    }
}

template <typename Vector, typename Number>
void scatter(const Vector *from, int64_t states, int lanes, Number *to) {
    for (int64_t n = 0; n < states; ++n)
        for (int lane = 0; lane < lanes; ++lane) to[lane * states + n] = from[n][lane];
}

const float *state_of(const float *states, const Scan &s, int64_t b, int64_t c0) {
    return states ? states + (b * s.channels + c0) * s.states : nullptr;
}

// One state of a tile: h advances, y collects. Two states at a time share the loads of delta, du and y.
template <int WIDTH>
inline void advance(const Scan &s, Tile &tile, int64_t n, const vec *A, vec *H) {
    vec h[WIDTH], a[WIDTH];
    for (int k = 0; k < WIDTH; ++k) h[k] = H[n + k], a[k] = A[n + k];
    for (int t = 0; t < tile.steps; ++t) {
        const float *B = s.B.at(tile.b, tile.t0 + t) + n, *C = s.C.at(tile.b, tile.t0 + t) + n;
        vec y = tile.y[t];
        for (int k = 0; k < WIDTH; ++k) {
            h[k] = exp2v(tile.delta[t] * a[k]) * h[k] + tile.du[t] * splat(B[k]);
            y += h[k] * splat(C[k]);
        }
        tile.y[t] = y;
    }
    for (int k = 0; k < WIDTH; ++k) H[n + k] = h[k];
}

void advance_all(const Scan &s, Tile &tile, const vec *A, vec *H) {
    int64_t n = 0;
    for (; n + 2 <= s.states; n += 2) advance<2>(s, tile, n, A, H);
    for (; n < s.states; ++n) advance<1>(s, tile, n, A, H);
}

void scan(const Scan &s, int threads) {
    const int64_t blocks = (s.channels + LANES - 1) / LANES;
    parallel_for(s.batch * blocks, s.updates(), threads, [&](int64_t unit) {
        const int64_t b = unit / blocks, c0 = unit % blocks * LANES;
        const int lanes = static_cast<int>(std::min<int64_t>(LANES, s.channels - c0));
        std::vector<vec> A(s.states), H(s.states);
        gather(s.A + c0 * s.states, s.states, lanes, A.data(), LOG2E);
        gather(state_of(s.initial, s, b, c0), s.states, lanes, H.data());
        Tile tile;
        for (int64_t t0 = 0; t0 < s.length; t0 += TILE) {
            tile.open(s, unit % blocks, b, t0);
            advance_all(s, tile, A.data(), H.data());
            tile.close(s);
        }
        scatter(H.data(), s.states, lanes, s.last + (b * s.channels + c0) * s.states);
    });
}

// Sums of products over a tile in float32 (16 terms), then into float64.
inline void accumulate(dvec &into, vec value) { into += __builtin_convertvector(value, dvec); }

// e[n][t] of METHODS.md section 2, without the factor of the output projection: gate_t C_t (h_t - h'_t).
struct Errors {
    int64_t states, padded; // states rounded up to a multiple of 4; the extra rows stay zero
    std::vector<vec> e;
    vec through[TILE]; // gate_t u_t: what one unit of D carries, for the refit of D
    std::vector<dvec> pairs, cross;
    dvec power{};

    Errors(int64_t states, bool full)
        : states(states), padded((states + 3) / 4 * 4), e(padded * TILE), pairs(full ? padded * padded : states),
          cross(states) {}

    void add_cross(int steps) {
        vec total{};
        for (int t = 0; t < steps; ++t) total += through[t] * through[t];
        accumulate(power, total);
        for (int64_t n = 0; n < states; ++n) {
            vec sum{};
            for (int t = 0; t < steps; ++t) sum += e[n * TILE + t] * through[t];
            accumulate(cross[n], sum);
        }
    }
    void add_diagonal(int steps) {
        for (int64_t n = 0; n < states; ++n) {
            vec sum{};
            for (int t = 0; t < steps; ++t) sum += e[n * TILE + t] * e[n * TILE + t];
            accumulate(pairs[n], sum);
        }
    }
    void add_gram(int steps) { // the upper 4x4 blocks; the lower ones are mirrored at the end
        for (int64_t i = 0; i < padded; i += 4)
            for (int64_t j = i; j < padded; j += 4) {
                vec sums[4][4] = {};
                for (int t = 0; t < steps; ++t)
                    for (int p = 0; p < 4; ++p)
                        for (int q = 0; q < 4; ++q) sums[p][q] += e[(i + p) * TILE + t] * e[(j + q) * TILE + t];
                for (int p = 0; p < 4; ++p)
                    for (int q = 0; q < 4; ++q) accumulate(pairs[(i + p) * padded + j + q], sums[p][q]);
            }
    }
};

template <bool ENERGY, bool ERROR, bool UNIT>
void observe(const Scan &s, Tile &tile, const vec *A, vec *H, vec *R, const vec *gates, const vec *unit_decay,
             dvec *energy, dvec *decay, Errors &errors) {
    for (int64_t n = 0; n < s.states; ++n) {
        vec h = H[n], r = UNIT ? R[n] : vec{};
        const vec a_n = A[n];
        for (int t = 0; t < tile.steps; ++t) {
            const vec b = splat(s.B.at(tile.b, tile.t0 + t)[n]), c = splat(s.C.at(tile.b, tile.t0 + t)[n]);
            const vec a = exp2v(tile.delta[t] * a_n), in = tile.du[t] * b, kept = a * h;
            if (ENERGY) {
                accumulate(energy[t * s.states + n], h * h);
                accumulate(decay[t * s.states + n], a);
            }
            h = kept + in;
            tile.y[t] += h * c;
            if (UNIT) {
                r = unit_decay[t] * r + in;
                if (ERROR) errors.e[n * TILE + t] = gates[t] * c * (h - r);
            } else if (ERROR) {
                errors.e[n * TILE + t] = gates[t] * c * kept;
            }
        }
        H[n] = h;
        if (UNIT) R[n] = r;
    }
}

// Tiles outside, sequences inside: the sums over the batch of one tile are complete when the tile is.
void stats(const Scan &s, const Stats &o, int threads) {
    const int64_t blocks = (s.channels + LANES - 1) / LANES, N = s.states;
    const bool error = o.gram || o.diagonal;
    auto step = o.energy ? (error ? (o.unit ? observe<true, true, true> : observe<true, true, false>)
                                  : observe<true, false, false>)
                         : (error ? (o.unit ? observe<false, true, true> : observe<false, true, false>)
                                  : observe<false, false, false>);
    parallel_for(blocks, s.updates(), threads, [&](int64_t block) {
        const int64_t c0 = block * LANES;
        const int lanes = static_cast<int>(std::min<int64_t>(LANES, s.channels - c0));
        std::vector<vec> A(N), H(s.batch * N), R(o.unit && error ? s.batch * N : 0);
        std::vector<dvec> energy(o.energy ? TILE * N : 0), decay(energy.size());
        gather(s.A + c0 * N, N, lanes, A.data(), LOG2E);
        for (int64_t b = 0; b < s.batch; ++b) {
            gather(state_of(s.initial, s, b, c0), N, lanes, &H[b * N]);
            if (!R.empty()) gather(state_of(o.removed_initial, s, b, c0), N, lanes, &R[b * N]);
        }
        Errors errors(N, o.gram != nullptr);
        Tile tile;
        for (int64_t t0 = 0; t0 < s.length; t0 += TILE) {
            std::fill(energy.begin(), energy.end(), dvec{});
            std::fill(decay.begin(), decay.end(), dvec{});
            for (int64_t b = 0; b < s.batch; ++b) {
                tile.open(s, block, b, t0);
                vec gates[TILE], unit_decay[TILE];
                for (int t = 0; t < tile.steps; ++t) {
                    gates[t] = s.z.data ? tile.gate(s, t) : splat(1.0f);
                    if (!R.empty()) unit_decay[t] = exp2v(tile.delta[t] * splat(-LOG2E));
                    errors.through[t] = gates[t] * tile.u[t];
                }
                step(s, tile, A.data(), &H[b * N], R.empty() ? nullptr : &R[b * N], gates, unit_decay, energy.data(),
                     decay.data(), errors);
                for (int t = 0; t < tile.steps; ++t)
                    store(s.y.at(b, t0 + t) + c0, s.z.data ? tile.y[t] * gates[t] : tile.y[t], lanes);
                if (error) {
                    errors.add_cross(tile.steps);
                    o.gram ? errors.add_gram(tile.steps) : errors.add_diagonal(tile.steps);
                }
            }
            if (o.energy)
                for (int64_t row = 0; row < std::min<int64_t>(TILE, s.length - t0) * N; ++row)
                    for (int lane = 0; lane < lanes; ++lane) {
                        const int64_t at = (t0 * N + row) * s.channels + c0 + lane;
                        o.energy[at] = static_cast<float>(energy[row][lane]);
                        o.decay[at] = static_cast<float>(decay[row][lane]);
                    }
        }
        for (int64_t b = 0; b < s.batch; ++b) {
            scatter(&H[b * N], N, lanes, s.last + (b * s.channels + c0) * N);
            if (!R.empty()) scatter(&R[b * N], N, lanes, o.removed_last + (b * s.channels + c0) * N);
        }
        if (!error) return;
        scatter(errors.cross.data(), N, lanes, o.cross + c0 * N);
        for (int lane = 0; lane < lanes; ++lane) o.power[c0 + lane] = errors.power[lane];
        if (o.diagonal) scatter(errors.pairs.data(), N, lanes, o.diagonal + c0 * N);
        if (o.gram)
            for (int64_t i = 0; i < N; ++i)
                for (int64_t j = 0; j < N; ++j) {
                    const dvec &pair = errors.pairs[std::min(i, j) * errors.padded + std::max(i, j)];
                    for (int lane = 0; lane < lanes; ++lane) o.gram[((c0 + lane) * N + i) * N + j] = pair[lane];
                }
    });
}

// Backward: the states at the start of every tile are kept, those inside a tile recomputed. A unit of work is one
// sequence and one group of channel blocks; within it tiles run backwards and blocks inside a tile, so that the sums
// over channels of dB and dC stay in the cache.
constexpr int BACK = 8;

void backward(const Scan &s, const Backward &g, int threads) {
    const int64_t blocks = (s.channels + LANES - 1) / LANES, N = s.states, tiles = (s.length + BACK - 1) / BACK;
    parallel_for(s.batch * g.groups, s.updates(), threads, [&](int64_t unit) {
        const int64_t b = unit / g.groups, group = unit % g.groups;
        const int64_t first = blocks * group / g.groups, past = blocks * (group + 1) / g.groups, mine = past - first;
        std::vector<vec> A(mine * N), start(mine * tiles * N), dH(mine * N, vec{}), dA(mine * N, vec{}), dD(mine, vec{});
        std::vector<vec> a(N * BACK), before(N * BACK), dB(N * BACK), dC(N * BACK);
        auto lanes_of = [&](int64_t block) {
            return static_cast<int>(std::min<int64_t>(LANES, s.channels - block * LANES));
        };
        for (int64_t i = 0; i < mine; ++i) {
            const int64_t c0 = (first + i) * LANES;
            const int lanes = lanes_of(first + i);
            gather(s.A + c0 * N, N, lanes, &A[i * N]);
            std::vector<vec> H(N);
            gather(state_of(s.initial, s, b, c0), N, lanes, H.data());
            for (int64_t tile = 0; tile < tiles; ++tile) {
                std::copy(H.begin(), H.end(), &start[(i * tiles + tile) * N]);
                const int64_t t0 = tile * BACK, t1 = std::min(t0 + BACK, s.length);
                vec delta[BACK], du[BACK];
                for (int64_t t = t0; t < t1; ++t) {
                    delta[t - t0] = load(s.delta.at(b, t) + c0, lanes);
                    du[t - t0] = delta[t - t0] * load(s.u.at(b, t) + c0, lanes);
                }
                for (int64_t n = 0; n < N; ++n) {
                    const vec a_n = A[i * N + n] * splat(LOG2E);
                    vec h = H[n];
                    for (int64_t t = t0; t < t1; ++t)
                        h = exp2v(delta[t - t0] * a_n) * h + du[t - t0] * splat(s.B.at(b, t)[n]);
                    H[n] = h;
                }
            }
        }
        for (int64_t tile = tiles - 1; tile >= 0; --tile) {
            const int64_t t0 = tile * BACK, t1 = std::min(t0 + BACK, s.length);
            const int steps = static_cast<int>(t1 - t0);
            std::fill(dB.begin(), dB.end(), vec{});
            std::fill(dC.begin(), dC.end(), vec{});
            for (int64_t i = 0; i < mine; ++i) {
                const int64_t c0 = (first + i) * LANES;
                const int lanes = lanes_of(first + i);
                const vec skip = load(s.D + c0, lanes);
                vec delta[BACK], u[BACK], y[BACK], dy[BACK], ddelta[BACK], du[BACK];
                for (int t = 0; t < steps; ++t) {
                    delta[t] = load(s.delta.at(b, t0 + t) + c0, lanes);
                    u[t] = load(s.u.at(b, t0 + t) + c0, lanes);
                    dy[t] = load(g.dy.at(b, t0 + t) + c0, lanes);
                    y[t] = skip * u[t];
                    ddelta[t] = vec{};
                }
                for (int64_t n = 0; n < N; ++n) {
                    const vec a_n = A[i * N + n] * splat(LOG2E);
                    vec h = start[(i * tiles + tile) * N + n];
                    for (int t = 0; t < steps; ++t) {
                        const vec decay = exp2v(delta[t] * a_n);
                        a[n * BACK + t] = decay;
                        before[n * BACK + t] = h;
                        h = decay * h + delta[t] * u[t] * splat(s.B.at(b, t0 + t)[n]);
                        y[t] += h * splat(s.C.at(b, t0 + t)[n]);
                    }
                }
                for (int t = 0; t < steps; ++t) {
                    if (s.z.data) {
                        const vec z = load(s.z.at(b, t0 + t) + c0, lanes), gate = sigmoid(z);
                        const vec slope = gate * (splat(1.0f) + z * (splat(1.0f) - gate));
                        store(g.dz.at(b, t0 + t) + c0, dy[t] * y[t] * slope, lanes);
                        dy[t] *= z * gate;
                    }
                    dD[i] += dy[t] * u[t];
                    du[t] = dy[t] * skip;
                }
                for (int64_t n = 0; n < N; ++n) {
                    const vec A_n = A[i * N + n];
                    vec dh = dH[i * N + n], da = dA[i * N + n];
                    for (int t = steps - 1; t >= 0; --t) {
                        const vec Bt = splat(s.B.at(b, t0 + t)[n]), Ct = splat(s.C.at(b, t0 + t)[n]);
                        const vec kept = a[n * BACK + t] * before[n * BACK + t], in = delta[t] * u[t];
                        dh += dy[t] * Ct;
                        dC[n * BACK + t] += dy[t] * (kept + in * Bt);
                        dB[n * BACK + t] += dh * in;
                        const vec through = dh * kept, input = dh * Bt;
                        ddelta[t] += through * A_n + input * u[t];
                        du[t] += input * delta[t];
                        da += through * delta[t];
                        dh *= a[n * BACK + t];
                    }
                    dH[i * N + n] = dh, dA[i * N + n] = da;
                }
                for (int t = 0; t < steps; ++t) {
                    store(g.ddelta.at(b, t0 + t) + c0, ddelta[t], lanes);
                    store(g.du.at(b, t0 + t) + c0, du[t], lanes);
                }
            }
            for (int t = 0; t < steps; ++t)
                for (int64_t n = 0; n < N; ++n) {
                    const int64_t at = ((group * s.batch + b) * s.length + t0 + t) * N + n;
                    g.dB[at] = sum(dB[n * BACK + t]);
                    g.dC[at] = sum(dC[n * BACK + t]);
                }
        }
        for (int64_t i = 0; i < mine; ++i) {
            const int64_t c0 = (first + i) * LANES;
            const int lanes = lanes_of(first + i);
            scatter(&dA[i * N], N, lanes, g.dA + (b * s.channels + c0) * N);
            store(g.dD + b * s.channels + c0, dD[i], lanes);
        }
    });
}

// Depthwise causal convolution: y_t = silu(bias + sum_k weight_k x_{t - width + 1 + k}), one pass over x.
void conv(const Conv &c, int threads) {
    const int64_t blocks = (c.channels + LANES - 1) / LANES, past = c.width - 1;
    parallel_for(c.batch * blocks, c.batch * c.length * c.channels, threads, [&](int64_t unit) {
        const int64_t b = unit / blocks, c0 = unit % blocks * LANES;
        const int lanes = static_cast<int>(std::min<int64_t>(LANES, c.channels - c0));
        std::vector<vec> weight(c.width), window(c.width, vec{}); // window[k]: the input that weight[k] meets
        gather(c.weight + c0 * c.width, c.width, lanes, weight.data());
        const vec bias = c.bias ? load(c.bias + c0, lanes) : vec{};
        for (int64_t k = 0; k < past && c.before.data; ++k) window[k + 1] = load(c.before.at(b, k) + c0, lanes);
        for (int64_t t = 0; t < c.length; ++t) {
            vec y = bias;
            for (int64_t k = 0; k < past; ++k) {
                window[k] = window[k + 1];
                y += weight[k] * window[k];
            }
            window[past] = load(c.x.at(b, t) + c0, lanes);
            y += weight[past] * window[past];
            store(c.y.at(b, t) + c0, c.silu ? y * sigmoid(y) : y, lanes);
        }
    });
}

#include "product_impl.h"
#include "step_impl.h"
#include "ssd_impl.h"
#include "delta_scan_impl.h"

} // namespace

#define JOIN(a, b) a##b
#define LEVEL_FUNCTION(name) JOIN(name, _level)
#define QUOTE(name) #name
#define NAME(name) QUOTE(name)
const Level &LEVEL_FUNCTION(LEVEL)() {
    static const Level level{NAME(LEVEL), scan, stats, backward, conv, dual, rule, rule_backward,
                             product, step};
    return level;
}

} // namespace sparsessm
