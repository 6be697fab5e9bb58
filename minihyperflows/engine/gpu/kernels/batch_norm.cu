// Batch norm with what follows it, over M rows of C channels:
//
//     y = relu(scale (x - mean) / sqrt(var + eps) + shift + residual)
//
// the residual and the ReLU being optional, as scale and shift are.
//
// Passes over memory, in numbers of x:
//   channel_statistics  reads x         mean, var; the running ones, with the unbiased var
//   normalise           reads x (and the residual), writes y
//   evaluate            likewise, with the running statistics: all there is outside training
//   cotangent_sums      reads c and x (or, with a residual, y too): the gradients of scale and shift
//   input_gradient      reads the same, writes dx (and with residual and ReLU the residual's
//                       cotangent)
//
// The backward pass finds out where y > 0 by computing y from x once more, in the very same way;
// only where a residual was added it reads y. So it reads less than it would otherwise.
//
// Each thread owns V neighbouring channels and takes every (number of lanes)-th row, several at a
// time so that many loads are on their way. What is constant in a channel stays in its registers.
// Sums are float; their order depends on the shape alone (reduction.cuh).
//
// Reference: BatchNorm, channel_statistics and normalise in engine/norm.py.
#include "reduction.cuh"

constexpr int THREADS = 256;   // of a block; the host knows this number
constexpr int ROWS = 4;        // that a thread reads at a time in the passes over one array
constexpr int FEWER_ROWS = 2;  // in those over several; the host knows these numbers too

// The rows of the array `statistics`, (4, C).
enum Statistic { MEAN, INVERSE_STD, FACTOR, OFFSET };

// The columns of this thread, whether there are any, and its place among those that share them.
template <int V>
struct Lane {
    int channel, number, lanes;
    bool exists;
    __device__ __forceinline__ Lane(int channels)
        : channel((blockIdx.x * blockDim.x + threadIdx.x) * V),
          number(threadIdx.y),
          lanes(blockDim.y),
          exists(channel < channels) {}
};

// y without the residual. One function for all passes, so that all of them see the same bits.
__device__ __forceinline__ float scaled(float x, float factor, float offset) {
    return fmaf(x, factor, offset);
}

__device__ __forceinline__ float rectified(float y) { return y > 0.0f || y != y ? y : 0.0f; }

// -- forward, training ---------------------------------------------------------------------------

// What the last block of a strip of channels makes of their mean and var.
struct Finish {
    const float *scale, *shift;  // (C), or null for the numbers
    float scale_number, shift_number, eps;
    float *running_mean, *running_var;  // (C) or null
    float momentum;
    float* statistics;  // (4, C)

    __device__ __forceinline__ void operator()(int channel, int channels, float mean, float var,
                                               float rows) const {
        const float inverse_std = 1.0f / sqrtf(var + eps);
        const float factor = (scale ? scale[channel] : scale_number) * inverse_std;
        statistics[MEAN * channels + channel] = mean;
        statistics[INVERSE_STD * channels + channel] = inverse_std;
        statistics[FACTOR * channels + channel] = factor;
        statistics[OFFSET * channels + channel] =
            fmaf(-mean, factor, shift ? shift[channel] : shift_number);
        if (running_mean) update(running_mean[channel], mean);
        if (running_var) update(running_var[channel], var * (rows / (rows - 1.0f)));
    }

    __device__ __forceinline__ void update(float& running, float batch) const {
        running = running * (1.0f - momentum) + momentum * batch;
    }
};

// Each block takes a slab of rows: blockIdx.y of gridDim.y, of slab_rows rows but for the last. It
// writes the slab's mean m_b and its sum of squares s_b around m_b to partial (slabs, 2, C). Then
//
//     mean = 1/M sum_b n_b m_b,   var = 1/M sum_b (s_b + n_b (m_b - mean)^2)
//
// where all sums are of differences: from the slab's first row in the slab, and m_b is kept as its
// difference from the first row of all. So a mean far from 0 costs no digits.
template <typename T, int V>
__global__ void __launch_bounds__(THREADS, 2) channel_statistics(
    const T* __restrict__ x, long long rows, int channels, long long slab_rows, float* partial,
    unsigned* arrivals, const float* scale, float scale_number, const float* shift,
    float shift_number, float eps, float momentum, float* running_mean, float* running_var,
    long long* batches, float* statistics)
{
    __shared__ float shared[2 * V * THREADS];
    const Lane<V> lane(channels);
    const long long begin = blockIdx.y * slab_rows;
    const long long end = min(begin + slab_rows, rows);

    float sums[2 * V] = {};  // of the differences, and of their squares
    Pack<T, V> pivot = {};
    if (lane.exists) {
        pivot = load_pack<V>(x + begin * channels + lane.channel);
        for (long long row = begin + lane.number; row < end; row += ROWS * lane.lanes) {
            Pack<T, V> packs[ROWS];
            #pragma unroll
            for (int k = 0; k < ROWS; ++k) {
                const long long at = row + k * lane.lanes;  // past the end: no difference
                packs[k] = at < end ? load_pack<V>(x + at * channels + lane.channel) : pivot;
            }
            #pragma unroll
            for (int k = 0; k < ROWS; ++k) {
                #pragma unroll
                for (int v = 0; v < V; ++v) {
                    const float d = float(packs[k].value[v]) - float(pivot.value[v]);
                    sums[v] += d;
                    sums[V + v] += d * d;
                }
            }
        }
    }
    over_lanes<Sum>(sums, shared, blockDim.x);
    const float in_slab = static_cast<float>(end - begin);
    if (lane.exists && lane.number == 0) {
        const Pack<T, V> first = load_pack<V>(x + lane.channel);
        float mean[V], squares[V];
        #pragma unroll
        for (int v = 0; v < V; ++v) {
            const float difference = sums[v] / in_slab;
            mean[v] = float(pivot.value[v]) - float(first.value[v]) + difference;
            const float s = sums[V + v] - difference * sums[v];
            squares[v] = s < 0.0f ? 0.0f : s;  // round-off; a NaN stays
        }
        float* mine = partial + (2 * static_cast<long long>(blockIdx.y)) * channels + lane.channel;
        store_floats(mine, mean);
        store_floats(mine + channels, squares);
    }

    if (!last_to_arrive(arrivals + blockIdx.x, gridDim.y)) return;
    const int slabs = gridDim.y;
    const float total = static_cast<float>(rows);
    float mean[V] = {}, var[V] = {};
    for (int slab = lane.number; lane.exists && slab < slabs; slab += lane.lanes) {
        float m[V];
        load_floats(partial + 2LL * slab * channels + lane.channel, m);
        const float n = static_cast<float>(min(slab_rows, rows - slab * slab_rows));
        #pragma unroll
        for (int v = 0; v < V; ++v) mean[v] += n * m[v];
    }
    over_lanes<Sum>(mean, shared, blockDim.x);
    #pragma unroll
    for (int v = 0; v < V; ++v) mean[v] /= total;
    for (int slab = lane.number; lane.exists && slab < slabs; slab += lane.lanes) {
        float m[V], s[V];
        load_floats(partial + 2LL * slab * channels + lane.channel, m);
        load_floats(partial + (2LL * slab + 1) * channels + lane.channel, s);
        const float n = static_cast<float>(min(slab_rows, rows - slab * slab_rows));
        #pragma unroll
        for (int v = 0; v < V; ++v) var[v] += s[v] + n * (m[v] - mean[v]) * (m[v] - mean[v]);
    }
    over_lanes<Sum>(var, shared, blockDim.x);

    if (lane.number != 0) return;
    if (batches && blockIdx.x == 0 && threadIdx.x == 0) ++*batches;
    const Finish finish = {scale, shift, scale_number, shift_number, eps,
                           running_mean, running_var, momentum, statistics};
    if (!lane.exists) return;
    const Pack<T, V> first = load_pack<V>(x + lane.channel);
    #pragma unroll
    for (int v = 0; v < V; ++v) {
        const float whole = float(first.value[v]) + mean[v];
        finish(lane.channel + v, channels, whole, var[v] / total, total);
    }
}

// y = relu(x factor + offset + residual) for the rows of this thread.
template <typename T, int V>
__device__ __forceinline__ void write_rows(
    const Lane<V>& lane, const T* __restrict__ x, const T* __restrict__ residual,
    T* __restrict__ y, long long rows, int channels, const float (&factor)[V],
    const float (&offset)[V], bool relu)
{
    const long long step = static_cast<long long>(gridDim.y) * ROWS * lane.lanes;
    long long row = static_cast<long long>(blockIdx.y) * ROWS * lane.lanes + lane.number;
    for (; row < rows; row += step) {
        Pack<T, V> packs[ROWS], added[ROWS];
        #pragma unroll
        for (int k = 0; k < ROWS; ++k) {
            const long long at = row + k * lane.lanes;
            if (at < rows) {
                packs[k] = load_pack<V>(x + at * channels + lane.channel);
                if (residual) added[k] = load_pack<V>(residual + at * channels + lane.channel);
            }
        }
        #pragma unroll
        for (int k = 0; k < ROWS; ++k) {
            const long long at = row + k * lane.lanes;
            if (at >= rows) continue;
            Pack<T, V> out;
            #pragma unroll
            for (int v = 0; v < V; ++v) {
                float value = scaled(float(packs[k].value[v]), factor[v], offset[v]);
                if (residual) value += float(added[k].value[v]);
                out.value[v] = T(relu ? rectified(value) : value);
            }
            store_pack(y + at * channels + lane.channel, out);
        }
    }
}

template <typename T, int V>
__global__ void __launch_bounds__(THREADS, 2) normalise(const T* x, const T* residual, T* y, long long rows, int channels,
                          const float* statistics, bool relu)
{
    const Lane<V> lane(channels);
    if (!lane.exists) return;
    float factor[V], offset[V];
    load_floats(statistics + FACTOR * channels + lane.channel, factor);
    load_floats(statistics + OFFSET * channels + lane.channel, offset);
    write_rows(lane, x, residual, y, rows, channels, factor, offset, relu);
}

// -- forward, evaluation -------------------------------------------------------------------------

template <typename T, int V>
__global__ void __launch_bounds__(THREADS, 2) evaluate(const T* x, const T* residual, T* y, long long rows, int channels,
                         const float* scale, float scale_number, const float* shift,
                         float shift_number, const float* running_mean, const float* running_var,
                         float eps, bool relu)
{
    const Lane<V> lane(channels);
    if (!lane.exists) return;
    float factor[V], offset[V];
    #pragma unroll
    for (int v = 0; v < V; ++v) {
        const int channel = lane.channel + v;
        const float inverse_std = 1.0f / sqrtf(running_var[channel] + eps);
        factor[v] = (scale ? scale[channel] : scale_number) * inverse_std;
        offset[v] = fmaf(-running_mean[channel], factor[v], shift ? shift[channel] : shift_number);
    }
    write_rows(lane, x, residual, y, rows, channels, factor, offset, relu);
}

// -- backward ------------------------------------------------------------------------------------

// How the cotangent of what lies before the ReLU comes from c. Without a ReLU it is c.
template <typename T, int V>
struct Mask {
    const T* y;  // null: y is recomputed from x
    float factor[V], offset[V];
    bool relu;

    __device__ __forceinline__ bool passes(float x, T known, int v) const {
        if (!relu) return true;
        return float(y ? known : T(scaled(x, factor[v], offset[v]))) > 0.0f;
    }
};

template <typename T, int V>
__device__ __forceinline__ Mask<T, V> mask_of(const Lane<V>& lane, const T* y, int channels,
                                              const float* statistics, bool relu)
{
    Mask<T, V> mask;
    mask.y = y;
    mask.relu = relu;
    load_floats(statistics + FACTOR * channels + lane.channel, mask.factor);
    load_floats(statistics + OFFSET * channels + lane.channel, mask.offset);
    return mask;
}

// What the two kernels of the backward pass read: FEWER_ROWS rows, ``lanes`` apart, of the cotangent,
// x and y (if there). All loads are started before the first number is needed.
template <typename T, int V>
struct Rows {
    Pack<T, V> c[FEWER_ROWS], x[FEWER_ROWS], y[FEWER_ROWS];

    __device__ __forceinline__ Rows(const T* all_c, const T* all_x, const T* all_y, long long row,
                                    long long end, int channels, const Lane<V>& lane)
    {
        #pragma unroll
        for (int k = 0; k < FEWER_ROWS; ++k) {
            const long long at = row + k * lane.lanes;
            if (at >= end) continue;
            const long long place = at * channels + lane.channel;
            c[k] = load_pack<V>(all_c + place);
            x[k] = load_pack<V>(all_x + place);
            if (all_y) y[k] = load_pack<V>(all_y + place);
        }
    }
};

// Slabs as in channel_statistics; partial is (slabs, 2, C): the sums of c and of c (x - mean).
//
//     shift_gradient = sum of c,   scale_gradient = sum of c z,   z = (x - mean) / sqrt(var + eps)
//
// and slopes (2, C), for input_gradient: the sum of c / M, and that of c z / (M sqrt(var + eps)).
template <typename T, int V>
__global__ void __launch_bounds__(THREADS, 2) cotangent_sums(
    const T* __restrict__ c, const T* __restrict__ x, const T* __restrict__ y, long long rows,
    int channels, long long slab_rows, const float* __restrict__ statistics, bool relu,
    float* partial, unsigned* arrivals, float* scale_gradient, float* shift_gradient, float* slopes)
{
    __shared__ float shared[2 * V * THREADS];
    const Lane<V> lane(channels);
    const long long begin = blockIdx.y * slab_rows;
    const long long end = min(begin + slab_rows, rows);

    float sums[2 * V] = {};
    if (lane.exists) {
        const Mask<T, V> mask = mask_of(lane, y, channels, statistics, relu);
        float mean[V];
        load_floats(statistics + MEAN * channels + lane.channel, mean);
        for (long long row = begin + lane.number; row < end; row += FEWER_ROWS * lane.lanes) {
            const Rows<T, V> some(c, x, y, row, end, channels, lane);
            #pragma unroll
            for (int k = 0; k < FEWER_ROWS; ++k) {
                if (row + k * lane.lanes >= end) continue;
                #pragma unroll
                for (int v = 0; v < V; ++v) {
                    const float value = float(some.x[k].value[v]);
                    if (!mask.passes(value, some.y[k].value[v], v)) continue;
                    const float cotangent = float(some.c[k].value[v]);
                    sums[v] += cotangent;
                    sums[V + v] += cotangent * (value - mean[v]);
                }
            }
        }
    }
    over_lanes<Sum>(sums, shared, blockDim.x);
    if (lane.exists && lane.number == 0) {
        float* mine = partial + (2 * static_cast<long long>(blockIdx.y)) * channels + lane.channel;
        float of_c[V], along_x[V];
        #pragma unroll
        for (int v = 0; v < V; ++v) of_c[v] = sums[v], along_x[v] = sums[V + v];
        store_floats(mine, of_c);
        store_floats(mine + channels, along_x);
    }

    if (!last_to_arrive(arrivals + blockIdx.x, gridDim.y)) return;
    #pragma unroll
    for (int v = 0; v < 2 * V; ++v) sums[v] = 0.0f;
    const int slabs = gridDim.y;
    for (int slab = lane.number; lane.exists && slab < slabs; slab += lane.lanes) {
        float of_c[V], along_x[V];
        load_floats(partial + 2LL * slab * channels + lane.channel, of_c);
        load_floats(partial + (2LL * slab + 1) * channels + lane.channel, along_x);
        #pragma unroll
        for (int v = 0; v < V; ++v) sums[v] += of_c[v], sums[V + v] += along_x[v];
    }
    over_lanes<Sum>(sums, shared, blockDim.x);

    if (lane.number != 0 || !lane.exists) return;
    const float total = static_cast<float>(rows);
    #pragma unroll
    for (int v = 0; v < V; ++v) {
        const int channel = lane.channel + v;
        const float inverse_std = statistics[INVERSE_STD * channels + channel];
        const float along_z = sums[V + v] * inverse_std;
        if (shift_gradient) shift_gradient[channel] = sums[v];
        if (scale_gradient) scale_gradient[channel] = along_z;
        slopes[channel] = sums[v] / total;
        slopes[channels + channel] = along_z * inverse_std / total;
    }
}

// dx = factor (c - sum(c) / M - z sum(c z) / M);  masked, if there: c where y > 0.
template <typename T, int V>
__global__ void __launch_bounds__(THREADS, 2) input_gradient(
    const T* __restrict__ c, const T* __restrict__ x, const T* __restrict__ y, long long rows,
    int channels, const float* __restrict__ statistics, const float* __restrict__ slopes, bool relu,
    T* __restrict__ dx, T* __restrict__ masked)
{
    const Lane<V> lane(channels);
    if (!lane.exists) return;
    const Mask<T, V> mask = mask_of(lane, y, channels, statistics, relu);
    float mean[V], constant[V], slope[V];
    load_floats(statistics + MEAN * channels + lane.channel, mean);
    load_floats(slopes + lane.channel, constant);
    load_floats(slopes + channels + lane.channel, slope);

    const long long step = static_cast<long long>(gridDim.y) * FEWER_ROWS * lane.lanes;
    long long row = static_cast<long long>(blockIdx.y) * FEWER_ROWS * lane.lanes + lane.number;
    for (; row < rows; row += step) {
        const Rows<T, V> some(c, x, y, row, rows, channels, lane);
        #pragma unroll
        for (int k = 0; k < FEWER_ROWS; ++k) {
            const long long at = row + k * lane.lanes;
            if (at >= rows) continue;
            Pack<T, V> out, before;
            #pragma unroll
            for (int v = 0; v < V; ++v) {
                const float value = float(some.x[k].value[v]);
                const bool passes = mask.passes(value, some.y[k].value[v], v);
                const float cotangent = passes ? float(some.c[k].value[v]) : 0.0f;
                const float along_x = (value - mean[v]) * slope[v];
                out.value[v] = T(mask.factor[v] * (cotangent - constant[v] - along_x));
                before.value[v] = T(cotangent);
            }
            const long long place = at * channels + lane.channel;
            if (dx) store_pack(dx + place, out);
            if (masked) store_pack(masked + place, before);
        }
    }
}
