/* XXH3 with 128 bits, over bytes that come in parts: what a weight file is known by.
 *
 * IS: the hash that the Python package xxhash computes, of more than 240 bytes in all, without a
 * seed; here because a thread that reads a file hashes it while a cache has it. IS NOT: the digest
 * of states (digest.c). Included by: load.c.
 */
#pragma once
#include "common.h"

enum {
  STRIPE = 64, /* bytes */
  SECRET_NBYTES = 192,
  STRIPES_PER_BLOCK = (SECRET_NBYTES - STRIPE) / 8,
  LAST_KEY = SECRET_NBYTES - STRIPE
};

typedef struct {
  uint64_t sums[8];
  uint64_t n_bytes, n_stripes; /* in all; of the block */
  uint64_t n_held;             /* bytes of `held`: a stripe waits until another byte follows it */
  uint8_t held[STRIPE], before[STRIPE]; /* `before`: the stripe that was taken last */
} xxh3_state;

#define P32_1 0x9E3779B1u
#define P32_2 0x85EBCA77u
#define P32_3 0xC2B2AE3Du
#define P64_1 0x9E3779B185EBCA87u
#define P64_2 DIGEST_B /* the digest of states has these two */
#define P64_3 DIGEST_C
#define P64_4 0x85EBCA77C2B2AE63u
#define P64_5 0x27D4EB2F165667C5u

static const uint8_t xxh3_secret[SECRET_NBYTES] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

static inline uint64_t word_at(const void *p) {
  uint64_t word;
  memcpy(&word, p, sizeof word);
  return word;
}

static inline void xxh3_begin(xxh3_state *s) {
  *s = (xxh3_state){.sums = {P32_3, P64_1, P64_2, P64_3, P64_4, P32_2, P64_5, P32_1}};
}

typedef uint64_t xxh3_words __attribute__((vector_size(STRIPE)));

INLINE xxh3_words words_at(const void *p) {
  xxh3_words words;
  memcpy(&words, p, sizeof words);
  return words;
}

INLINE xxh3_words pairs_swapped(xxh3_words words) {
#ifdef __clang__
  return __builtin_shufflevector(words, words, 1, 0, 3, 2, 5, 4, 7, 6);
#else
  return __builtin_shuffle(words, (xxh3_words){1, 0, 3, 2, 5, 4, 7, 6});
#endif
}

INLINE xxh3_words with_stripe(xxh3_words sums, const uint8_t *stripe, int key) {
  xxh3_words data = words_at(stripe), keyed = data ^ words_at(xxh3_secret + key);
  return sums + pairs_swapped(data) + (keyed & 0xffffffffu) * (keyed >> 32);
}

/* Whole stripes, each followed by at least one more byte. */
static inline void take_stripes(xxh3_state *s, const uint8_t *p, uint64_t n) {
  xxh3_words sums = words_at(s->sums);
  for (uint64_t i = 0; i < n; i++) {
    sums = with_stripe(sums, p + i * STRIPE, (int)s->n_stripes * 8);
    if (++s->n_stripes < STRIPES_PER_BLOCK) continue;
    sums = (sums ^ sums >> 47 ^ words_at(xxh3_secret + LAST_KEY)) * P32_1;
    s->n_stripes = 0;
  }
  memcpy(s->sums, &sums, sizeof sums);
  if (n) memcpy(s->before, p + (n - 1) * STRIPE, STRIPE);
}

static inline void xxh3_update(xxh3_state *s, const void *bytes, uint64_t n) {
  const uint8_t *p = bytes;
  s->n_bytes += n;
  if (s->n_held + n <= STRIPE) {
    memcpy(s->held + s->n_held, p, n);
    s->n_held += n;
    return;
  }
  if (s->n_held) {
    uint64_t more = STRIPE - s->n_held;
    memcpy(s->held + s->n_held, p, more);
    take_stripes(s, s->held, 1);
    p += more;
    n -= more;
  }
  uint64_t n_stripes = (n - 1) / STRIPE;
  take_stripes(s, p, n_stripes);
  s->n_held = n - n_stripes * STRIPE;
  memcpy(s->held, p + n_stripes * STRIPE, s->n_held);
}

static inline uint64_t folded(uint64_t a, uint64_t b) {
  unsigned __int128 product = (unsigned __int128)a * b;
  return (uint64_t)product ^ (uint64_t)(product >> 64);
}

static inline uint64_t merged(const uint64_t *sums, const uint8_t *key, uint64_t start) {
  for (int i = 0; i < 4; i++)
    start +=
        folded(sums[2 * i] ^ word_at(key + 16 * i), sums[2 * i + 1] ^ word_at(key + 16 * i + 8));
  start ^= start >> 37;
  start *= 0x165667919E3779F9u;
  return start ^ start >> 32;
}

/* out: low word, high word. The state stays as it is. */
static inline void xxh3_end(const xxh3_state *s, uint64_t out[2]) {
  uint8_t last[STRIPE];
  memcpy(last, s->before + s->n_held, STRIPE - s->n_held);
  memcpy(last + STRIPE - s->n_held, s->held, s->n_held);
  uint64_t sums[8];
  xxh3_words whole = with_stripe(words_at(s->sums), last, LAST_KEY - 7);
  memcpy(sums, &whole, sizeof sums);
  out[0] = merged(sums, xxh3_secret + 11, s->n_bytes * P64_1);
  out[1] = merged(sums, xxh3_secret + LAST_KEY - 11, ~(s->n_bytes * P64_2));
}
