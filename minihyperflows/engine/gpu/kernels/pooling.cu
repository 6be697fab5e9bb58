// Pooling of images x (N, H, W, C) by windows of (kH, kW), (s, t) apart, to y (N, H', W', C).
//
//   max_pool            y = the first of the largest numbers in each window, row by row; NaN if
//                       there is one. place = where in the window it was found: u kW + v
//   max_pool_gradient   dx = sum of c over the windows that found their largest number here
//   avg_pool            y = the mean of each window
//   avg_pool_gradient   dx = sum of c / (kH kW) over the windows that contain the pixel
//
// Passes over memory: max_pool reads x and writes y and one byte for each number of y;
// max_pool_gradient reads c and those bytes and writes dx; avg_pool reads x and writes y;
// avg_pool_gradient reads c and writes dx. What several windows have in common comes from the
// caches. The gradients are gathers: each number of dx adds up its windows in a fixed order, in
// float, whether they overlap or not.
//
// Each thread makes V neighbouring channels of one pixel. A row (n, i) of the images for each
// blockIdx.x, a part of it for each blockIdx.y.
//
// Reference: MaxPool2d and AvgPool2d in engine/pooling.py.
#include "common.cuh"

using Place = unsigned char;

// Where a thread writes, in images of which one row has `width` pixels.
template <int V>
struct Pixel {
    int image, row, column, channel;
    bool exists;

    __device__ __forceinline__ Pixel(int height, int width, int channels) {
        const int packs = channels / V;
        const int at = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x);
        image = static_cast<int>(blockIdx.x) / height;
        row = static_cast<int>(blockIdx.x) - image * height;
        column = at / packs;
        channel = (at - column * packs) * V;
        exists = column < width;
    }
};

__device__ __forceinline__ long long offset(int image, int row, int column, int channel, int height,
                                            int width, int channels) {
    return ((static_cast<long long>(image) * height + row) * width + column) * channels + channel;
}

// The windows first ... last that contain a row (or column), of `number` windows.
struct Windows {
    int first, last;

    __device__ __forceinline__ Windows(int row, int size, int stride, int number) {
        first = row < size ? 0 : (row - size) / stride + 1;
        last = min(row / stride, number - 1);
    }
};

template <typename T, int V>
__global__ void max_pool(const T* __restrict__ x, T* __restrict__ y, Place* __restrict__ places,
                         int height, int width, int channels, int y_height, int y_width, int kernel_rows,
                         int kernel_columns, int stride, int stride_columns)
{
    const Pixel<V> to(y_height, y_width, channels);
    if (!to.exists) return;
    Pack<T, V> largest;
    Pack<Place, V> place;
    for (int u = 0; u < kernel_rows; ++u) {
        const T* line = x + offset(to.image, to.row * stride + u, to.column * stride_columns,
                                   to.channel, height, width, channels);
        #pragma unroll 4
        for (int v = 0; v < kernel_columns; ++v) {
            const Pack<T, V> pack = load_pack<V>(line + static_cast<long long>(v) * channels);
            const int k = u * kernel_columns + v;
            #pragma unroll
            for (int w = 0; w < V; ++w) {
                const float number = float(pack.value[w]);
                if (k == 0 || number > float(largest.value[w]) || number != number) {
                    largest.value[w] = pack.value[w];
                    place.value[w] = static_cast<Place>(k);
                }
            }
        }
    }
    const long long at = offset(to.image, to.row, to.column, to.channel, y_height, y_width, channels);
    store_pack(y + at, largest);
    store_pack(places + at, place);
}

template <typename T, int V>
__global__ void max_pool_gradient(const T* __restrict__ c, const Place* __restrict__ places,
                                  T* __restrict__ dx, int height, int width, int channels,
                                  int y_height, int y_width, int kernel_rows, int kernel_columns,
                                  int stride, int stride_columns)
{
    const Pixel<V> to(height, width, channels);
    if (!to.exists) return;
    const Windows rows(to.row, kernel_rows, stride, y_height);
    const Windows columns(to.column, kernel_columns, stride_columns, y_width);
    float sum[V] = {};
    for (int i = rows.last; i >= rows.first; --i) {
        for (int j = columns.last; j >= columns.first; --j) {
            const long long at = offset(to.image, i, j, to.channel, y_height, y_width, channels);
            const Pack<Place, V> place = load_pack<V>(places + at);
            const Pack<T, V> cotangent = load_pack<V>(c + at);
            const int here = (to.row - i * stride) * kernel_columns + to.column - j * stride_columns;
            #pragma unroll
            for (int w = 0; w < V; ++w) {
                if (place.value[w] == here) sum[w] += float(cotangent.value[w]);
            }
        }
    }
    Pack<T, V> total;
    #pragma unroll
    for (int w = 0; w < V; ++w) total.value[w] = T(sum[w]);
    store_pack(dx + offset(to.image, to.row, to.column, to.channel, height, width, channels), total);
}

template <typename T, int V>
__global__ void avg_pool(const T* __restrict__ x, T* __restrict__ y, int height, int width,
                         int channels, int y_height, int y_width, int kernel_rows, int kernel_columns,
                         int stride, int stride_columns)
{
    const Pixel<V> to(y_height, y_width, channels);
    if (!to.exists) return;
    float sum[V] = {};
    for (int u = 0; u < kernel_rows; ++u) {
        const T* line = x + offset(to.image, to.row * stride + u, to.column * stride_columns,
                                   to.channel, height, width, channels);
        #pragma unroll 4
        for (int v = 0; v < kernel_columns; ++v) {
            const Pack<T, V> pack = load_pack<V>(line + static_cast<long long>(v) * channels);
            #pragma unroll
            for (int w = 0; w < V; ++w) sum[w] += float(pack.value[w]);
        }
    }
    Pack<T, V> mean;
    const float numbers = static_cast<float>(kernel_rows) * kernel_columns;
    #pragma unroll
    for (int w = 0; w < V; ++w) mean.value[w] = T(sum[w] / numbers);
    store_pack(y + offset(to.image, to.row, to.column, to.channel, y_height, y_width, channels), mean);
}

template <typename T, int V>
__global__ void avg_pool_gradient(const T* __restrict__ c, T* __restrict__ dx, int height, int width,
                                  int channels, int y_height, int y_width, int kernel_rows,
                                  int kernel_columns, int stride, int stride_columns)
{
    const Pixel<V> to(height, width, channels);
    if (!to.exists) return;
    const Windows rows(to.row, kernel_rows, stride, y_height);
    const Windows columns(to.column, kernel_columns, stride_columns, y_width);
    float sum[V] = {};
    for (int i = rows.last; i >= rows.first; --i) {
        for (int j = columns.last; j >= columns.first; --j) {
            const Pack<T, V> cotangent = load_pack<V>(
                c + offset(to.image, i, j, to.channel, y_height, y_width, channels));
            #pragma unroll
            for (int w = 0; w < V; ++w) sum[w] += float(cotangent.value[w]);
        }
    }
    Pack<T, V> total;
    const float numbers = static_cast<float>(kernel_rows) * kernel_columns;
    #pragma unroll
    for (int w = 0; w < V; ++w) total.value[w] = T(sum[w] / numbers);
    store_pack(dx + offset(to.image, to.row, to.column, to.channel, height, width, channels), total);
}
