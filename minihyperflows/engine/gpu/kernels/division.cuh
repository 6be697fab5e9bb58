// Division of whole numbers by a divisor that the host knows: one multiplication, where the
// processor would take some twenty instructions.
//
// n / d = (n m / 2^32 + n) / 2^l with l = ceil(log2 d) and m = floor(2^32 (2^l - d) / d) + 1, for
// 0 <= n < 2^31 and 1 <= d < 2^31. Source: Granlund & Montgomery 1994, theorem 4.2.
//
// The host works out m and l in minihyperflows/engine/gpu/division.py.
#pragma once

__device__ __forceinline__ int divide(int n, unsigned multiplier, unsigned shift) {
    const unsigned numerator = static_cast<unsigned>(n);
    return static_cast<int>((__umulhi(numerator, multiplier) + numerator) >> shift);
}
