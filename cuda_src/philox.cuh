// philox.cuh - random words from counters, and uniform numbers of them.
//
// IS: a function of (key, counter) alone, so a number depends on nothing that ran before it.
// IS NOT: a distribution; whoever draws makes its own of the uniform numbers.
#pragma once
#include "flashrt.cuh"

// 4x32-10, Salmon et al., SC'11
DEVICE void philox(uint32_t (&counter)[4], uint32_t key0, uint32_t key1) {
#pragma unroll
  for (int round = 0; round < 10; round++) {
    uint32_t high0 = __umulhi(counter[0], 0xD2511F53u), low0 = counter[0] * 0xD2511F53u;
    uint32_t high1 = __umulhi(counter[2], 0xCD9E8D57u), low1 = counter[2] * 0xCD9E8D57u;
    counter[0] = high1 ^ counter[1] ^ key0;
    counter[1] = low1;
    counter[2] = high0 ^ counter[3] ^ key1;
    counter[3] = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// (word + 1/2) / 2^32 in float, at most 1 - 2^-24.
DEVICE float uniform(uint32_t word) {
  return fminf(fmaf((float)word, 2.3283064365386963e-10f, 1.1641532182693481e-10f), 0.99999994f);
}
