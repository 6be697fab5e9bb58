// Adding a bias to each row of a matrix, and the sums of a matrix's columns, which are the gradient
// of the bias.
//
//   add_bias     y[m, c] <- y[m, c] + b[c]             in place
//   column_sums  sums[s, c] = sum over the rows m of part s of x[m, c]
//
// for y and x (M, C) in T, b and the sums in float. All sums over m would take too long in one
// block, so column_sums runs twice: on x, which it cuts into some hundred parts, and on their sums,
// as one part. Which thread adds what depends on the shape alone.
//
// A block is a rectangle: threadIdx.x counts packs of V channels, threadIdx.y rows. So nobody
// divides, and neighbouring threads read neighbouring memory.
//
// Passes over memory: add_bias reads and writes y once, column_sums reads x once.
//
// Reference: add_to in engine/ops.py; channel_sum in engine/norm.py.
#include "common.cuh"

constexpr int BIAS_THREADS = 256;  // of a block of column_sums; the host knows this number

// The first channel of this thread, and whether it exists.
template <int V>
__device__ __forceinline__ bool find_channel(int channels, int& channel) {
    channel = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x) * V;
    return channel < channels;
}

template <typename T, int V>
__global__ void add_bias(T* __restrict__ y, const float* __restrict__ bias, long long rows,
                         int channels) {
    int channel;
    if (!find_channel<V>(channels, channel)) return;
    float b[V];
    #pragma unroll
    for (int k = 0; k < V; ++k) b[k] = bias[channel + k];
    const long long step = static_cast<long long>(gridDim.x) * blockDim.y;
    for (long long m = blockIdx.x * blockDim.y + threadIdx.y; m < rows; m += step) {
        T* address = y + m * channels + channel;
        Pack<T, V> pack = load_pack<V>(address);
        #pragma unroll
        for (int k = 0; k < V; ++k) pack.value[k] = T(float(pack.value[k]) + b[k]);
        store_pack<V>(address, pack);
    }
}

// Part s is blockIdx.x, `length` rows from row s `length` on. blockDim.y is a power of two.
template <typename T, int V>
__global__ void column_sums(const T* __restrict__ x, float* __restrict__ sums, long long rows,
                            int channels, long long length) {
    __shared__ float shared[V][BIAS_THREADS];
    const int place = threadIdx.y * blockDim.x + threadIdx.x;
    int channel;
    const bool there = find_channel<V>(channels, channel);
    const long long first = blockIdx.x * length;
    const long long end = first + length < rows ? first + length : rows;

    float sum[V];
    #pragma unroll
    for (int k = 0; k < V; ++k) sum[k] = 0.0f;
    if (there) {
        #pragma unroll 4  // four loads at a time
        for (long long m = first + threadIdx.y; m < end; m += blockDim.y) {
            const Pack<T, V> pack = load_pack<V>(x + m * channels + channel);
            #pragma unroll
            for (int k = 0; k < V; ++k) sum[k] += float(pack.value[k]);
        }
    }

    #pragma unroll
    for (int k = 0; k < V; ++k) shared[k][place] = sum[k];
    __syncthreads();
    for (int half = blockDim.y / 2; half > 0; half /= 2) {
        if (static_cast<int>(threadIdx.y) < half) {
            #pragma unroll
            for (int k = 0; k < V; ++k) shared[k][place] += shared[k][place + half * blockDim.x];
        }
        __syncthreads();
    }
    if (there && threadIdx.y == 0) {
        float* out = sums + static_cast<long long>(blockIdx.x) * channels + channel;
        #pragma unroll
        for (int k = 0; k < V; ++k) out[k] = shared[k][place];
    }
}
