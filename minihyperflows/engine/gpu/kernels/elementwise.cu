// Passes over arrays in which every number is dealt with by itself.
//
//   relu            y = x where x > 0, else 0; a NaN stays one      reads x, writes y
//   relu_backward   dx = c where y > 0, else 0                      reads c and y, writes dx
//   add             out = a + b, in float                           reads a and b, writes out
//   convert         out = a in another type                         reads a, writes out
//
// Each thread takes packs of V numbers in turn; what is left at the end, fewer than V, one by one.
// `out` may be one of the arrays that are read.
//
// Reference: rectify and ReLU in engine/ops.py, add in engine/threads.py, NumPy's astype.
#include "common.cuh"

template <typename T, int V>
__global__ void relu(const T* x, T* y, long long size)
{
    const auto rectified = [](T value) {
        const float number = float(value);
        return number > 0.0f || number != number ? value : T(0.0f);
    };
    for (long long i = first_item(); i < size / V; i += item_step()) {
        Pack<T, V> pack = load_pack<V>(x + i * V);
        #pragma unroll
        for (int v = 0; v < V; ++v) pack.value[v] = rectified(pack.value[v]);
        store_pack(y + i * V, pack);
    }
    const long long last = size / V * V + first_item();
    if (last < size) y[last] = rectified(x[last]);
}

template <typename T, int V>
__global__ void relu_backward(const T* c, const T* y, T* dx, long long size)
{
    for (long long i = first_item(); i < size / V; i += item_step()) {
        Pack<T, V> cotangent = load_pack<V>(c + i * V);
        const Pack<T, V> output = load_pack<V>(y + i * V);
        #pragma unroll
        for (int v = 0; v < V; ++v) {
            if (!(float(output.value[v]) > 0.0f)) cotangent.value[v] = T(0.0f);
        }
        store_pack(dx + i * V, cotangent);
    }
    const long long last = size / V * V + first_item();
    if (last < size) dx[last] = float(y[last]) > 0.0f ? c[last] : T(0.0f);
}

template <typename A, typename B, typename Out, int V>
__global__ void add(const A* a, const B* b, Out* out, long long size)
{
    for (long long i = first_item(); i < size / V; i += item_step()) {
        const Pack<A, V> left = load_pack<V>(a + i * V);
        const Pack<B, V> right = load_pack<V>(b + i * V);
        Pack<Out, V> sum;
        #pragma unroll
        for (int v = 0; v < V; ++v) sum.value[v] = Out(float(left.value[v]) + float(right.value[v]));
        store_pack(out + i * V, sum);
    }
    const long long last = size / V * V + first_item();
    if (last < size) out[last] = Out(float(a[last]) + float(b[last]));
}

template <typename A, typename Out, int V>
__global__ void convert(const A* a, Out* out, long long size)
{
    for (long long i = first_item(); i < size / V; i += item_step()) {
        const Pack<A, V> from = load_pack<V>(a + i * V);
        Pack<Out, V> to;
        #pragma unroll
        for (int v = 0; v < V; ++v) to.value[v] = Out(float(from.value[v]));
        store_pack(out + i * V, to);
    }
    const long long last = size / V * V + first_item();
    if (last < size) out[last] = Out(float(a[last]));
}
