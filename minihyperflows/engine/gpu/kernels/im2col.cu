// The windows of images as rows of a matrix, and the adjoint of that.
//
//   im2col          X[(n, i, j), (u, v, c)] = x[n, i s + u - p, j t + v - q, c], 0 outside the image
//   im2col_adjoint  x[n, y, z, c] = sum of its copies in X: over all u, v with y + p - u = i s and
//                                   z + q - v = j t for a window (i, j)
//
// for images x (N, H, W, C), windows of (kH, kW) at (H', W') positions with steps of (s, t), and
// padding (p, q). Lengths are counted in packs of V channels, what one instruction moves. A run is
// the part of a window that lies in one row of the image: kW C numbers side by side both in x and in
// X. A line is what stands side by side for one row of windows, W' rows of X. A row of X may be
// longer than a window, which fills it up with zeros: so the rows of 3 x 3 x 3 = 27 numbers become
// rows of 32, which cuBLAS reads in aligned pieces.
//
// Passes over memory, in numbers of x: im2col reads 1 (from device memory; the other kH kW - 1 times
// from the caches) and writes kH kW / (s t); im2col_adjoint reads kH kW / (s t) and writes 1. It is
// a gather: each number of x adds up its copies in a fixed order, in float.
//
// Both move 16 bytes with some 20 to 30 instructions, one to three divisions (as multiplications)
// among them. A multiprocessor of an H200 can afford 60 at full bandwidth. Each thread starts
// several loads before it needs the first: so much must be on its way to keep the memory busy.
//
// Reference: im2col and col2im in engine/im2col.py, with pad of engine/windows.py.
#include "common.cuh"
#include "division.cuh"

constexpr int PER_THREAD = 4;  // packs; the host knows this number

__device__ __forceinline__ bool within(int index, int length) {
    return static_cast<unsigned>(index) < static_cast<unsigned>(length);
}

// Grid: a line (n, i) for each blockIdx.x, a part of it for each blockIdx.y.
template <typename T, int V>
__global__ void im2col(
    const T* __restrict__ x, T* __restrict__ columns,
    int height, int image_row,          // H; W C
    int lines, int line,                // H'; W' times the next
    int row, int run, int kernel_rows,  // a row of X; kW C; kH
    int stride, int stride_packs,       // s; t C
    int padding, int padding_packs,     // p; q C
    unsigned lines_multiplier, unsigned lines_shift,
    unsigned row_multiplier, unsigned row_shift,
    unsigned run_multiplier, unsigned run_shift)
{
    const int n = divide(blockIdx.x, lines_multiplier, lines_shift);
    const int top = (static_cast<int>(blockIdx.x) - n * lines) * stride - padding;
    x += static_cast<long long>(n) * height * image_row * V;
    columns += static_cast<long long>(blockIdx.x) * line * V;
    const int first = static_cast<int>(blockIdx.y * PER_THREAD * blockDim.x + threadIdx.x);

    Pack<T, V> packs[PER_THREAD];
    #pragma unroll
    for (int k = 0; k < PER_THREAD; ++k) {
        const int at = first + k * static_cast<int>(blockDim.x);
        const int j = divide(at, row_multiplier, row_shift);
        const int in_row = at - j * row;
        const int u = divide(in_row, run_multiplier, run_shift);
        // The window's runs follow each other in the image as they do in X, but for the edges, so
        // that a place in the run is a place in the row of the image: nobody needs to know v and c.
        const int in_image_row = j * stride_packs + (in_row - u * run) - padding_packs;
        const bool inside = at < line && u < kernel_rows && within(top + u, height) &&
                            within(in_image_row, image_row);
        const long long from = static_cast<long long>(top + u) * image_row + in_image_row;
        packs[k] = inside ? load_pack<V>(x + from * V) : Pack<T, V>{};  // zeros
    }
    #pragma unroll
    for (int k = 0; k < PER_THREAD; ++k) {
        const int at = first + k * static_cast<int>(blockDim.x);
        if (at < line) store_pack<V>(columns + static_cast<long long>(at) * V, packs[k]);
    }
}

// Grid: a row (n, y) of the images for each blockIdx.x, a part of it for each blockIdx.y.
//
// SIZE is the side of the window if the compiler is to know it, 0 if not: then a thread starts the
// loads of a whole run at once. Only every s-th u and t-th v belong to a window: u0, u0 + s, ...
template <typename T, int V, int SIZE>
__global__ void im2col_adjoint(
    const T* __restrict__ columns, T* __restrict__ x,
    int height, int image_row, int packs,  // H; W C; C
    int lines, int windows, int row,       // H'; W'; a row of X
    int kernel_rows, int kernel_columns, int stride, int stride_columns,
    int padding, int padding_columns,
    unsigned height_multiplier, unsigned height_shift,
    unsigned packs_multiplier, unsigned packs_shift,
    unsigned stride_multiplier, unsigned stride_shift,
    unsigned stride_columns_multiplier, unsigned stride_columns_shift)
{
    const int at = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x);
    if (at >= image_row) return;
    const int n = divide(blockIdx.x, height_multiplier, height_shift);
    const int y = static_cast<int>(blockIdx.x) - n * height + padding;
    const int last_i = divide(y, stride_multiplier, stride_shift);
    const int u0 = y - last_i * stride;
    const int pixel = divide(at, packs_multiplier, packs_shift);
    const int z = pixel + padding_columns;
    const int last_j = divide(z, stride_columns_multiplier, stride_columns_shift);
    const int v0 = z - last_j * stride_columns;
    const int channel = at - pixel * packs;

    constexpr int AT_ONCE = SIZE ? SIZE : 1;
    float sum[V];
    #pragma unroll
    for (int k = 0; k < V; ++k) sum[k] = 0.0f;
    #pragma unroll
    for (int a = 0; a < (SIZE ? SIZE : kernel_rows); ++a) {
        const int u = u0 + a * stride, i = last_i - a;
        if (u >= kernel_rows || i < 0) break;
        if (i >= lines) continue;
        const long long line = (static_cast<long long>(n) * lines + i) * windows;
        for (int first = 0; first < (SIZE ? SIZE : kernel_columns); first += AT_ONCE) {
            Pack<T, V> copies[AT_ONCE];
            #pragma unroll
            for (int b = 0; b < AT_ONCE; ++b) {
                const int v = v0 + (first + b) * stride_columns, j = last_j - (first + b);
                const bool there = v < kernel_columns && within(j, windows);
                const int in_row = (u * kernel_columns + v) * packs + channel;
                const long long from = (line + j) * row + in_row;
                copies[b] = there ? load_pack<V>(columns + from * V) : Pack<T, V>{};
            }
            #pragma unroll
            for (int b = 0; b < AT_ONCE; ++b) {
                #pragma unroll
                for (int k = 0; k < V; ++k) sum[k] += float(copies[b].value[k]);
            }
        }
    }

    Pack<T, V> total;
    #pragma unroll
    for (int k = 0; k < V; ++k) total.value[k] = T(sum[k]);
    const long long to = static_cast<long long>(blockIdx.x) * image_row + at;
    store_pack<V>(x + to * V, total);
}
