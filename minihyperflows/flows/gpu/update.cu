// One launch that steps all parameters of a network, and what a training step needs around it.
//
//   weights    g = m G / S + decay theta                          (m the gate, S the loss scale)
//              SGD   v <- momentum v + g,  theta <- theta - lr v  (or Nesterov's direction)
//              Adam  as adam_rule
//   presences  f = kappa theta G / S + gamma / N (where t > floor), then SGD or Adam on t
//   in use     theta where t >= 0, else 0, in the type that the network computes in
//
// All parameters lie one after another in flat arrays, each beginning at a multiple of TILE, so
// that a block deals with one tile of one parameter. Gated weights come first, then weights without
// a gate, then everything that is used as it is (biases, batch norm). The gaps hold zeros, and -1
// in t.
//
// Passes over memory for each gated weight with SGD on w and Adam on t: 6 floats read (theta, G,
// v, t and Adam's two), 5 written, and the weight in use: 46 bytes with half precision.
//
// Reference: nn.optim.sgd_rule and adam_rule, flows.gate.GatedWeight, flows.pressure.MeanPresence.
#include "common.cuh"

constexpr int UPDATE_THREADS = 256;
constexpr int PER_THREAD = 4;  // neighbours, 16 bytes
constexpr int TILE = 2048;
constexpr float KAPPA = 0.25f;

enum Rule { SGD, ADAM, NONE };

// What the host sets: a row for the weights, one for the presences, one for the pressure.
enum Setting { LR, DECAY, MOMENTUM, SECOND_MOMENTUM, EPSILON, NESTEROV, SETTINGS };
enum PressureSetting { SHARE, FLOOR };  // gamma / N; t at or below the floor feel none
enum Row { WEIGHTS, PRESENCES, PRESSURE };

// Adam's bias corrections, which finish_step works out: for the weights, then for the presences.
enum Correction { CORRECTED_EPSILON, CORRECTED_RATE, CORRECTIONS };

enum Counter {
    OVERFLOWED,      // 1 if a gradient of this step is infinite or NaN
    FROZEN,          // 1 from the step on that reaches the density at which t stops moving
    WEIGHT_STEPS,    // taken so far
    PRESENCE_STEPS,  // likewise
    GOOD_STEPS,      // since the loss scale last changed
    SKIPPED,         // steps of this epoch whose gradients were infinite or NaN
    BATCHES,         // of this epoch so far
    FIRST_BAD,       // the first batch of this epoch whose loss was not finite; -1 for none
    COUNTERS
};

// What happened in a tile. A sum of these over threads has room for 65535 of each count.
struct Report {
    unsigned long long counts;  // flips, regrowths and weights present before: 16 bits each
    float present, removed;     // sums of |flux| over the weights present and removed before
};

__device__ __forceinline__ void add_report(Report& a, const Report& b) {
    a.counts += b.counts;
    a.present += b.present;
    a.removed += b.removed;
}

// The step of one number, without the learning rate; ``first`` and ``second`` are its kept state.
template <int RULE>
__device__ __forceinline__ float direction(float gradient, float theta, float& first,
                                           float& second, const float* setting,
                                           const float* correction) {
    const float g = theta * setting[DECAY] + gradient;
    if (RULE == SGD) {
        first = first * setting[MOMENTUM] + g;
        return setting[NESTEROV] != 0.0f ? first * setting[MOMENTUM] + g : first;
    }
    first = first * setting[MOMENTUM] + g;
    second = second * setting[SECOND_MOMENTUM] + g * g;
    return first / (sqrtf(second) + correction[CORRECTED_EPSILON]) * correction[CORRECTED_RATE];
}

template <typename T, int WEIGHT_RULE, int PRESENCE_RULE>
__global__ void __launch_bounds__(UPDATE_THREADS)
update(const int* __restrict__ tile_layer,  // (tiles,) gated layer; -1 no gate; -2 used as it is
       float* __restrict__ theta, const float* __restrict__ gradient,
       float* __restrict__ first, float* __restrict__ second,  // velocity; or m and v
       float* __restrict__ t, float* __restrict__ t_first, float* __restrict__ t_second,
       T* __restrict__ in_use,
       const float* __restrict__ settings, const float* __restrict__ corrections,
       const float* __restrict__ scale,  // S and 1 / S
       const int* __restrict__ counters,
       unsigned long long* __restrict__ changes,  // (layers, 2) flips and regrowths
       float* __restrict__ tile_flux,             // (gated tiles, 2) Report's sums
       int* __restrict__ tile_present) {          // (gated tiles,)
    if (counters[OVERFLOWED]) return;
    const int layer = tile_layer[blockIdx.x];
    const bool gated = layer >= 0;
    const float* weight_setting = settings + WEIGHTS * SETTINGS;
    const float* presence_setting = settings + PRESENCES * SETTINGS;
    const float share = settings[PRESSURE * SETTINGS + SHARE];
    const float floor = settings[PRESSURE * SETTINGS + FLOOR];
    const bool moving = PRESENCE_RULE != NONE && presence_setting[LR] > 0 && !counters[FROZEN];
    Report report{0, 0.0f, 0.0f};

    for (int k = threadIdx.x * PER_THREAD; k < TILE; k += UPDATE_THREADS * PER_THREAD) {
        const long long i = static_cast<long long>(blockIdx.x) * TILE + k;
        Pack<float, PER_THREAD> w = load_pack<PER_THREAD>(theta + i);
        const Pack<float, PER_THREAD> c = load_pack<PER_THREAD>(gradient + i);
        Pack<float, PER_THREAD> a = load_pack<PER_THREAD>(first + i);
        Pack<float, PER_THREAD> b{}, p{}, pa{}, pb{};
        if (WEIGHT_RULE == ADAM) b = load_pack<PER_THREAD>(second + i);
        if (gated) p = load_pack<PER_THREAD>(t + i);
        if (gated && moving) {
            pa = load_pack<PER_THREAD>(t_first + i);
            if (PRESENCE_RULE == ADAM) pb = load_pack<PER_THREAD>(t_second + i);
        }
        Pack<T, PER_THREAD> used;
        for (int j = 0; j < PER_THREAD; ++j) {
            const float g = c.value[j] * scale[1];
            const bool was_present = p.value[j] >= 0.0f;  // true without a gate: p is 0
            const float flux = KAPPA * w.value[j] * g;
            w.value[j] -= weight_setting[LR] *
                          direction<WEIGHT_RULE>(was_present ? g : 0.0f, w.value[j], a.value[j],
                                                 b.value[j], weight_setting, corrections);
            if (gated && moving) {
                const float pressure = p.value[j] > floor ? share : 0.0f;
                p.value[j] -= presence_setting[LR] *
                              direction<PRESENCE_RULE>(flux + pressure, p.value[j], pa.value[j],
                                                       pb.value[j], presence_setting,
                                                       corrections + CORRECTIONS);
            }
            const bool present = p.value[j] >= 0.0f;
            used.value[j] = present ? T(w.value[j]) : T(0.0f);
            if (gated) {
                const unsigned long long flips = present != was_present;
                const unsigned long long regrowths = present && !was_present;
                const unsigned long long before = was_present;
                report.counts += flips | regrowths << 16 | before << 32;
                (was_present ? report.present : report.removed) += fabsf(flux);
            }
        }
        store_pack(theta + i, w);
        store_pack(first + i, a);
        if (WEIGHT_RULE == ADAM) store_pack(second + i, b);
        if (gated && moving) {
            store_pack(t + i, p);
            store_pack(t_first + i, pa);
            if (PRESENCE_RULE == ADAM) store_pack(t_second + i, pb);
        }
        if (layer > -2) store_pack(in_use + i, used);
    }
    if (!gated) return;  // the whole block: a tile has one layer

    __shared__ Report reports[UPDATE_THREADS];
    reports[threadIdx.x] = report;
    __syncthreads();
    for (int half = UPDATE_THREADS / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) add_report(reports[threadIdx.x], reports[threadIdx.x + half]);
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        const Report& all = reports[0];
        atomicAdd(changes + 2 * layer, all.counts & 0xffffull);
        atomicAdd(changes + 2 * layer + 1, all.counts >> 16 & 0xffffull);
        tile_flux[2 * blockIdx.x] = all.present;
        tile_flux[2 * blockIdx.x + 1] = all.removed;
        tile_present[blockIdx.x] = static_cast<int>(all.counts >> 32);
    }
}

// in_use = theta where t >= 0, else 0: after the host has changed either of them.
template <typename T>
__global__ void write_in_use(const int* __restrict__ tile_layer, const float* __restrict__ theta,
                             const float* __restrict__ t, T* __restrict__ in_use) {
    const int layer = tile_layer[blockIdx.x];
    if (layer == -2) return;
    for (int k = threadIdx.x; k < TILE; k += blockDim.x) {
        const long long i = static_cast<long long>(blockIdx.x) * TILE + k;
        in_use[i] = layer < 0 || t[i] >= 0.0f ? T(theta[i]) : T(0.0f);
    }
}

// counters[OVERFLOWED] = 1 if any of the ``count`` numbers (a multiple of 4) is infinite or NaN.
__global__ void check_finite(const float* __restrict__ gradient, long long count,
                             int* __restrict__ counters) {
    bool finite = true;
    for (long long i = first_item() * 4; i < count; i += item_step() * 4) {
        const Pack<float, 4> g = load_pack<4>(gradient + i);
        for (int j = 0; j < 4; ++j) finite = finite && isfinite(g.value[j]);
    }
    if (!finite) atomicOr(counters + OVERFLOWED, 1);
}

// Adam's bias corrections for step number ``step`` (from 1), as nn.optim.Adam puts them.
__device__ void correct(float* correction, const float* setting, int step) {
    const double b1 = setting[MOMENTUM], b2 = setting[SECOND_MOMENTUM];
    const double first = (1 - b1) / (1 - pow(b1, double(step)));
    const double second = sqrt((1 - b2) / (1 - pow(b2, double(step))));
    correction[CORRECTED_EPSILON] = float(setting[EPSILON] / second);
    correction[CORRECTED_RATE] = float(first / second);
}

// The bias corrections of the next step. One thread.
__global__ void prepare(const float* __restrict__ settings, const int* __restrict__ counters,
                        float* __restrict__ corrections) {
    correct(corrections, settings + WEIGHTS * SETTINGS, counters[WEIGHT_STEPS] + 1);
    correct(corrections + CORRECTIONS, settings + PRESENCES * SETTINGS,
            counters[PRESENCE_STEPS] + 1);
}

// The book-keeping between two steps. One thread.
//
// The loss scale S is halved after a step whose gradients overflowed, which was skipped, and
// doubled after ``growth_interval`` good ones in a row (0: it is constant).
__global__ void finish_step(const float* __restrict__ loss, int batch, int growth_interval,
                            const float* __restrict__ settings, float* __restrict__ corrections,
                            float* __restrict__ scale, int* __restrict__ counters,
                            long long* __restrict__ position, double* __restrict__ loss_sum,
                            const unsigned long long* __restrict__ changes, int layers,
                            const long long* __restrict__ present) {  // at first; where t freezes
    if (!isfinite(*loss) && counters[FIRST_BAD] < 0) counters[FIRST_BAD] = counters[BATCHES];
    *loss_sum += static_cast<double>(*loss) * batch;
    *position += batch;
    counters[BATCHES] += 1;
    if (counters[OVERFLOWED]) {
        counters[SKIPPED] += 1;
        counters[GOOD_STEPS] = 0;
        if (growth_interval > 0) scale[0] *= 0.5f;
    } else {
        counters[WEIGHT_STEPS] += 1;
        const bool moving = settings[PRESENCES * SETTINGS + LR] > 0 && !counters[FROZEN];
        if (moving) counters[PRESENCE_STEPS] += 1;
        counters[GOOD_STEPS] += 1;
        if (growth_interval > 0 && counters[GOOD_STEPS] == growth_interval) {
            scale[0] *= 2.0f;
            counters[GOOD_STEPS] = 0;
        }
    }
    scale[1] = 1.0f / scale[0];
    counters[OVERFLOWED] = 0;
    long long now = present[0];
    for (int layer = 0; layer < layers; ++layer) {
        now += 2 * static_cast<long long>(changes[2 * layer + 1]) -
               static_cast<long long>(changes[2 * layer]);
    }
    if (now >= present[1]) counters[FROZEN] = 1;
    correct(corrections, settings + WEIGHTS * SETTINGS, counters[WEIGHT_STEPS] + 1);
    correct(corrections + CORRECTIONS, settings + PRESENCES * SETTINGS,
            counters[PRESENCE_STEPS] + 1);
}

// Add to (layers, 2) the mean |flux| of the last step over the weights present and over those
// removed, and to ``observed`` 1 where there were any. One block for each layer, whose threads
// take its tiles in turn.
__global__ void add_mean_flux(const int* __restrict__ layer_tiles,  // (layers + 1,) first tiles
                              const int* __restrict__ layer_size,   // (layers,) weights
                              const float* __restrict__ tile_flux,
                              const int* __restrict__ tile_present, double* __restrict__ flux,
                              int* __restrict__ observed) {
    __shared__ double sums[2][UPDATE_THREADS];
    __shared__ int counts[UPDATE_THREADS];
    const int layer = blockIdx.x, me = threadIdx.x;
    sums[0][me] = sums[1][me] = 0.0;
    counts[me] = 0;
    for (int tile = layer_tiles[layer] + me; tile < layer_tiles[layer + 1];
         tile += UPDATE_THREADS) {
        sums[0][me] += tile_flux[2 * tile];
        sums[1][me] += tile_flux[2 * tile + 1];
        counts[me] += tile_present[tile];
    }
    __syncthreads();
    if (me != 0) return;
    for (int i = 1; i < UPDATE_THREADS; ++i) {
        sums[0][0] += sums[0][i];
        sums[1][0] += sums[1][i];
        counts[0] += counts[i];
    }
    const int present = counts[0], removed = layer_size[layer] - counts[0];
    if (present > 0) flux[2 * layer] += sums[0][0] / present;
    if (removed > 0) flux[2 * layer + 1] += sums[1][0] / removed;
    observed[2 * layer] += present > 0;
    observed[2 * layer + 1] += removed > 0;
}
