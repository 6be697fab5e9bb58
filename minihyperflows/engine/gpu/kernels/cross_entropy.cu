// The cross-entropy of softmax, with label smoothing, for N rows of K logits:
//
//     loss = -1/N sum_n sum_k q_nk ln p_nk,   p = softmax(logits),   q = (1 - s) [k = label] + s / K
//     dlogits = cotangent (p - q) / N
//
// Passes over memory: cross_entropy reads the logits (three times, twice from the caches) and writes
// two numbers a row, the largest logit m and the sum of exp(logit - m); the gradient reads the
// logits once and writes dlogits. With m taken off, no exponential overflows.
//
// A label outside 0 ... K - 1 makes the loss and the gradient of its row NaN.
//
// Reference: CrossEntropy in engine/ops.py.
#include "reduction.cuh"

constexpr int THREADS = 128;  // of a block; the host knows this number

// blockDim.x rows for each block, with blockDim.y threads for each row.
template <typename T, typename Label>
__global__ void cross_entropy(const T* logits, const Label* labels, int rows, int classes,
                              float smoothing, float* normalisers, float* losses,
                              unsigned* arrivals, float* loss)
{
    __shared__ float shared[2 * THREADS];
    const int row = blockIdx.x * blockDim.x + threadIdx.x;
    const T* mine = logits + static_cast<long long>(row) * classes;
    const int end = row < rows ? classes : 0;

    float largest[1] = {end > 0 ? float(mine[0]) : 0.0f};
    for (int k = threadIdx.y; k < end; k += blockDim.y) {
        largest[0] = Maximum::of(largest[0], float(mine[k]));
    }
    over_lanes<Maximum>(largest, shared, blockDim.x);
    float sums[2] = {};  // of the exponentials, and of the logits
    for (int k = threadIdx.y; k < end; k += blockDim.y) {
        const float difference = float(mine[k]) - largest[0];
        sums[0] += expf(difference);
        sums[1] += difference;
    }
    over_lanes<Sum>(sums, shared, blockDim.x);
    if (row < rows && threadIdx.y == 0) {
        const long long label = labels[row];
        float of_row = nanf("");
        if (label >= 0 && label < classes) {
            of_row = logf(sums[0]) - (1.0f - smoothing) * (float(mine[label]) - largest[0]);
            if (smoothing > 0.0f) of_row -= smoothing / classes * sums[1];
        }
        losses[row] = of_row;
        normalisers[row] = largest[0];
        normalisers[rows + row] = sums[0];
    }

    if (!last_to_arrive(arrivals, gridDim.x)) return;
    float total[1] = {};
    const int first = threadIdx.y * blockDim.x + threadIdx.x;
    for (int n = first; n < rows; n += THREADS) total[0] += losses[n];
    over_lanes<Sum>(total, shared, 1);
    if (first == 0) *loss = total[0] / rows;
}

// The cotangent of the loss, one number, is read from device memory: a loss scale can lie there.
template <typename T, typename C, typename Label>
__global__ void cross_entropy_gradient(const C* cotangent, const T* logits, const Label* labels,
                                       const float* normalisers, int rows, int classes,
                                       float smoothing, T* dlogits)
{
    const float factor = float(*cotangent) / rows;
    for (long long i = first_item(); i < static_cast<long long>(rows) * classes; i += item_step()) {
        const int row = static_cast<int>(i / classes);
        const int k = static_cast<int>(i - static_cast<long long>(row) * classes);
        const long long label = labels[row];
        const float p = expf(float(logits[i]) - normalisers[row]) / normalisers[rows + row];
        const float q = smoothing / classes + (k == label ? 1.0f - smoothing : 0.0f);
        const bool exists = label >= 0 && label < classes;
        dlogits[i] = T(exists ? factor * (p - q) : nanf(""));
    }
}
