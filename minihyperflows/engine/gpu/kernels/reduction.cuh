// Sums whose order is fixed, so that they are the same bit for bit on every run: over the threads of
// a block, and over blocks through partial sums that the last block to arrive adds up.
//
// A block is a table of threads: blockDim.x columns that have nothing to do with each other, and
// blockDim.y lanes, a power of two, that share the work of a column.
#pragma once

#include "common.cuh"

struct Sum {
    static __device__ __forceinline__ float of(float a, float b) { return a + b; }
};

struct Maximum {  // NaN if there is one
    static __device__ __forceinline__ float of(float a, float b) { return a > b || a != a ? a : b; }
};

// Reduces each of the W numbers of the threads over the lanes of their column, which all get the
// result; with columns = 1, over the whole block. `shared` has W numbers for each thread. All threads
// must call it.
template <typename Operation, int W>
__device__ __forceinline__ void over_lanes(float (&value)[W], float* shared, int columns) {
    const int threads = blockDim.x * blockDim.y;
    const int thread = threadIdx.y * blockDim.x + threadIdx.x;
    #pragma unroll
    for (int w = 0; w < W; ++w) shared[w * threads + thread] = value[w];
    __syncthreads();
    for (int half = threads / 2; half >= columns; half /= 2) {
        if (thread < half) {
            #pragma unroll
            for (int w = 0; w < W; ++w) {
                float* mine = shared + w * threads + thread;
                *mine = Operation::of(mine[0], mine[half]);
            }
        }
        __syncthreads();
    }
    #pragma unroll
    for (int w = 0; w < W; ++w) value[w] = shared[w * threads + thread % columns];
    __syncthreads();  // `shared` may be written again
}

// True in all threads of the block that is the last of `blocks` to call this, which then sees what
// the others wrote before they did. `arrivals` is 0 before and afterwards.
__device__ __forceinline__ bool last_to_arrive(unsigned* arrivals, unsigned blocks) {
    __shared__ bool last;
    __threadfence();
    __syncthreads();  // all threads of this block have written
    if (threadIdx.x == 0 && threadIdx.y == 0) {
        last = atomicAdd(arrivals, 1u) == blocks - 1;
        if (last) *arrivals = 0;
    }
    __syncthreads();
    __threadfence();
    return last;
}

// V neighbouring floats at an address that is a multiple of their size or of 16 bytes.
template <int V>
__device__ __forceinline__ void load_floats(const float* address, float (&value)[V]) {
    constexpr int W = V < 4 ? V : 4;
    #pragma unroll
    for (int v = 0; v < V; v += W) {
        const Pack<float, W> pack = load_pack<W>(address + v);
        #pragma unroll
        for (int w = 0; w < W; ++w) value[v + w] = pack.value[w];
    }
}

template <int V>
__device__ __forceinline__ void store_floats(float* address, const float (&value)[V]) {
    constexpr int W = V < 4 ? V : 4;
    #pragma unroll
    for (int v = 0; v < V; v += W) {
        Pack<float, W> pack;
        #pragma unroll
        for (int w = 0; w < W; ++w) pack.value[w] = value[v + w];
        store_pack(address + v, pack);
    }
}
