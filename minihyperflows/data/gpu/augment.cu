// A training batch out of the data set in GPU memory: for each image
//
//     x = (crop(image padded with zeros) / 255 - mean) / std,   mirrored left to right or not,
//
// where the crop's place and the flip are random numbers of the sample's place within the epoch, so
// that neither the size of a batch nor the order of the threads changes them.
//
// Memory: reads one byte, writes one T per number. NumPy: batch_in_numpy in data/gpu/batches.py.
#include "common.cuh"
#include "philox.cuh"

// Where the padded image is cut, and whether what was cut is mirrored.
struct Crop {
    int top, left;
    bool flip;
};

__device__ __forceinline__ Crop random_crop(long long place, const unsigned* key, int pad) {
    const RandomWords counter = {
        {static_cast<unsigned>(place), static_cast<unsigned>(place >> 32), 0u, 0u}};
    const RandomWords random = philox4x32(counter, key[0], key[1]);
    const int crops = 2 * pad + 1;
    return {random_below(random.word[0], crops), random_below(random.word[1], crops),
            random.word[2] >> 31 != 0};
}

// images (N, height, width, channels), labels (N); order (samples) says which of the N come when in
// this epoch; position[0] is the place of the batch's first sample in it. blockIdx.x is the image of
// the batch; each thread makes V neighbours of one row. A place past the end of the epoch becomes
// zeros with the label -1.
template <typename T, int V>
__global__ void load_batch(const unsigned char* images, const int* labels, const int* order,
                           const long long* position, const unsigned* key, const float* mean,
                           const float* std, T* x, int* batch_labels, long long samples, int height,
                           int width, int channels, bool augment, int pad) {
    const int size = height * width * channels;
    const int first = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x) * V;
    if (first >= size) return;

    const long long place = position[0] + blockIdx.x;
    const bool exists = place >= 0 && place < samples;
    const int sample = exists ? order[place] : 0;
    if (first == 0) batch_labels[blockIdx.x] = exists ? labels[sample] : -1;

    const Crop crop = augment ? random_crop(place, key, pad) : Crop{pad, pad, false};
    const unsigned char* image = images + static_cast<long long>(sample) * size;
    const int row = first / (width * channels) + crop.top - pad;  // in the image, perhaps outside
    int column = first / channels % width;                        // in the batch
    int channel = first % channels;
    Pack<T, V> pack;
    #pragma unroll
    for (int i = 0; i < V; ++i) {
        const int from = (crop.flip ? width - 1 - column : column) + crop.left - pad;
        const bool inside = row >= 0 && row < height && from >= 0 && from < width;
        const float pixel = inside ? image[(row * width + from) * channels + channel] : 0;
        pack.value[i] = T(exists ? (pixel / 255.0f - mean[channel]) / std[channel] : 0.0f);
        if (++channel == channels) {
            channel = 0;
            ++column;
        }
    }
    store_pack(x + static_cast<long long>(blockIdx.x) * size + first, pack);
}

// The next batch begins `count` samples later. One thread.
__global__ void advance(long long* position, int count) {
    position[0] += count;
}
