// What several kernels share. Every kernel is a template over the type T in which it reads and
// writes activations (float or __half); whatever it adds up, it adds up in float.
#pragma once

#include <cuda_fp16.h>

// V neighbouring numbers, moved by one instruction: up to 16 bytes, at an address that is a
// multiple of their size.
template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
    T value[V];
};

template <int V, typename T>
__device__ __forceinline__ Pack<T, V> load_pack(const T* address) {
    return *reinterpret_cast<const Pack<T, V>*>(address);
}

template <int V, typename T>
__device__ __forceinline__ void store_pack(T* address, const Pack<T, V>& pack) {
    *reinterpret_cast<Pack<T, V>*>(address) = pack;
}

// The first item of this thread, and the step to its next, when all threads of the grid share the
// items 0, 1, 2, ... in turn.
__device__ __forceinline__ long long first_item() {
    return static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
}

__device__ __forceinline__ long long item_step() {
    return static_cast<long long>(gridDim.x) * blockDim.x;
}
