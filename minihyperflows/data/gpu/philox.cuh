// Philox4x32-10 (Salmon et al. 2011): random numbers that are a function of where they are used. No
// state, so that each thread computes the numbers of its own sample. NumPy: data/philox.py.
#pragma once

struct RandomWords {
    unsigned word[4];
};

// Four random words for a counter and a key: ten rounds of multiplication. A round takes the counter
// c with the key k to
//     high(M1 c2) ^ c1 ^ k0,  low(M1 c2),  high(M0 c0) ^ c3 ^ k1,  low(M0 c0),
// where high and low are the halves of a 64-bit product.
__device__ __forceinline__ RandomWords philox4x32(RandomWords counter, unsigned key0,
                                                  unsigned key1) {
    unsigned* c = counter.word;
    #pragma unroll
    for (int round = 0; round < 10; ++round) {
        const unsigned high0 = __umulhi(0xD2511F53u, c[0]), low0 = 0xD2511F53u * c[0];
        const unsigned high1 = __umulhi(0xCD9E8D57u, c[2]), low1 = 0xCD9E8D57u * c[2];
        c[0] = high1 ^ c[1] ^ key0;
        c[1] = low1;
        c[2] = high0 ^ c[3] ^ key1;
        c[3] = low0;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return counter;
}

// A random word as an integer from 0 to n - 1: the whole part of n word / 2^32. A probability is off
// by less than the fraction n / 2^32 of itself.
__device__ __forceinline__ int random_below(unsigned word, int n) {
    return static_cast<int>(__umulhi(word, static_cast<unsigned>(n)));
}
