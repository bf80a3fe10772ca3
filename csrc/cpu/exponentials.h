// Exponentials of logits, tile by tile: the work of both engines of the fused kernel between products.
#pragma once

#include <cmath>

#include "fused.h"
#include "tiles.h"

namespace cpo {

constexpr int64_t kTokens = 256;   // per chunk: two chunks of hidden states and one of G stay in L2
constexpr int64_t kEntries = 320;  // per vocabulary block; a power of two would cause conflicts in cache sets
constexpr int64_t kGroups = kEntries / 32;
constexpr float kRaiseBits = 48;  // exponents beyond this raise the offset

struct Sums {            // of one slot, or of one side of a slot
  float k[kTokens];      // offset, in bits: E = 2^(z * log2e * scale - k)
  double sum[kTokens];   // of E over the slot's finished blocks
  float block[kTokens];  // of E over the current block
};

struct Side {  // policy or reference, for the tile loop
  const uint16_t* h;            // packed hidden states
  Sums* sums;
  double *labels, *slopes;      // [chunk] the label's logit, and the soft cap's slope there
  uint16_t* e;                  // [kTokens / 16][kGroups] tiles; nullptr: E is not stored
};

struct Job {  // a chunk of tokens against all entries
  const Fold* fold;
  int64_t start, tokens, padded, D;  // first token, tokens; the last two rounded up to 32
  int32_t labels[kTokens];
  double label_logits[2][kTokens], label_slopes[2][kTokens];
  const uint16_t* h[2];
  float* g;  // [slots][D / 16][padded / 16] tiles
};

struct Pending {  // a finished tile without its exponentials
  const Side* side = nullptr;
  float* z;  // [32 entries][32 tokens], followed by as many slopes
  int64_t token, entry, group;  // first token, first entry of the vocabulary, row group in the block
  int64_t first;                // of the slot's entries
  float* g;                     // the slot's G, nullptr while it is empty
};

inline float widened(uint16_t half) {
  uint32_t bits = uint32_t(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint16_t bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Entries first .. last-1 of one token's stored E.
inline void scale_kept(const Fold& fold, int64_t first, int64_t last, int64_t token, float factor) {
  for (int64_t entry = first; entry < last; entry++) {
    uint16_t& e = fold.kept[entry * fold.n + token];
    e = bfloat16(widened(e) * factor);
  }
}

// Raise the offset of one token and rescale its sums.
__attribute__((noinline)) inline void raise_offset(const Pending& tile, int64_t token, float k,
                                            const Job& job) {
  const Side& side = *tile.side;
  float factor = std::exp2(side.sums->k[token] - k);
  side.sums->k[token] = k;
  side.sums->sum[token] *= factor;
  side.sums->block[token] *= factor;
  if (!side.e) return;
  for (int64_t group = 0; group < tile.group; group++) {
    uint16_t* e = side.e + (token / 16 * kGroups + group) * kTile + token % 16 * 2;
    for (int i = 0; i < 32; i++) {
      uint16_t& half = e[i / 2 * 32 + i % 2];
      half = bfloat16(widened(half) * factor);
    }
  }
  if (job.fold->kept)
    scale_kept(*job.fold, tile.first, tile.entry - 32 * tile.group, job.start + token, factor);
  if (!tile.g) return;
  for (int64_t d = 0; d < job.D; d++)
    tile.g[(d / 16 * (job.padded / 16) + token / 16) * 256 + d % 16 * 16 + token % 16] *= factor;
}

// Before a tile's exponentials, for 16 of its tokens: mask rows beyond V and the label's own logit.
FUSED_TARGET inline void mask(const Pending& tile, int64_t half, Job& job) {
  float* z = tile.z + 16 * half;  // [32] rows, stride 32
  int64_t token = tile.token + 16 * half, V = job.fold->V;
  for (int64_t row = V - tile.entry < 0 ? 0 : V - tile.entry; row < 32; row++)
    _mm512_store_ps(z + 32 * row, _mm512_set1_ps(kNever));
  __m512i label = _mm512_sub_epi32(_mm512_loadu_si512(job.labels + token),
                                   _mm512_set1_epi32(int32_t(tile.entry)));
  for (uint32_t here = _mm512_cmplt_epu32_mask(label, _mm512_set1_epi32(32)); here;
       here &= here - 1) {
    int lane = __builtin_ctz(here);
    float* at = z + 32 * (job.labels[token + lane] - tile.entry) + lane;
    tile.side->labels[token + lane] = double(*at) * job.fold->how.scale;
    if (job.fold->how.softcap > 0) {
      double t = double(*at) / job.fold->how.softcap;
      bool stored = tile.side->e;  // the slopes, after z: more accurate than 1 - t^2
      tile.side->slopes[token + lane] = stored ? at[1024] : 1 - t * t;
    }
    *at = kNever;
  }
}

// After a tile's exponentials: raise the offsets of tokens that exceed theirs by too much. The
// exponentials must then be recomputed.
FUSED_TARGET inline void raise_offsets(const Pending& tile, int64_t half, uint32_t above, Job& job) {
  for (uint32_t rest = above; rest; rest &= rest - 1) {
    int lane = __builtin_ctz(rest);
    float top = kNever;
    for (int row = 0; row < 32; row++) top = std::fmax(top, tile.z[32 * row + 16 * half + lane]);
    raise_offset(tile, tile.token + 16 * half + lane, top * kLog2e * job.fold->how.scale, job);
  }
}

enum class Use { sum, keep, keep_capped };  // summed only; stored; stored times the soft cap's slope

// Exponentials of a pair of rows for 16 tokens: summed, and stored as bfloat16 pairs where E is wanted.
template <Use USE>
FUSED_TARGET inline void exponentials(const Pending& tile, int64_t half, int64_t pair, __m512 slope,
                                    __m512 k, __m512& sum, __m512& top) {
  const float* z = tile.z + 64 * pair + 16 * half;
  __m512 even = _mm512_fmsub_ps(_mm512_load_ps(z), slope, k);
  __m512 odd = _mm512_fmsub_ps(_mm512_load_ps(z + 32), slope, k);
  top = _mm512_max_ps(top, _mm512_max_ps(even, odd));
  even = exp2_vector(even);
  odd = exp2_vector(odd);
  sum = _mm512_add_ps(sum, _mm512_add_ps(even, odd));
  if (USE != Use::sum) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                           8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    if (USE == Use::keep_capped) {
      even = _mm512_mul_ps(even, _mm512_load_ps(z + 1024));
      odd = _mm512_mul_ps(odd, _mm512_load_ps(z + 1024 + 32));
    }
    __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
    uint16_t* e = tile.side->e + ((tile.token / 16 + half) * kGroups + tile.group) * kTile;
    _mm512_store_si512(e + 32 * pair, _mm512_permutexvar_epi16(order, halves));
  }
}

// The remaining work on a tile's exponentials, in small steps.
template <Use USE>
struct Exponentials {
  const Pending& tile;
  Job& job;
  __m512 slope, k[2], sum[2], top[2];
  int64_t pair = -1;  // the next pair of rows; -1: not started

  FUSED_TARGET Exponentials(const Pending& tile, Job& job) : tile(tile), job(job) {
    slope = _mm512_set1_ps(kLog2e * job.fold->how.scale);
  }

  FUSED_INLINE void begin() {
    for (int half = 0; half < 2; half++) {
      k[half] = _mm512_loadu_ps(tile.side->sums->k + tile.token + 16 * half);
      sum[half] = _mm512_setzero_ps();
      top[half] = _mm512_set1_ps(kNever);
    }
    pair = 0;
  }

  FUSED_INLINE void step() {
    if (pair < 0) {
      const Fold& fold = *job.fold;
      if (fold.how.bias || fold.how.softcap > 0)
        transform_tile(fold.how, tile.entry, fold.V - tile.entry, tile.z,
                       USE == Use::keep_capped ? tile.z + 1024 : nullptr);
      mask(tile, 0, job);
      mask(tile, 1, job);
      begin();
      return;
    }
    exponentials<USE>(tile, 0, pair, slope, k[0], sum[0], top[0]);
    exponentials<USE>(tile, 1, pair, slope, k[1], sum[1], top[1]);
    pair++;
  }

  FUSED_INLINE void finish() {
    __m512 limit = _mm512_set1_ps(kRaiseBits);
    while (true) {
      while (pair < 16) step();
      uint32_t above0 = _mm512_cmp_ps_mask(top[0], limit, _CMP_GT_OQ);
      uint32_t above1 = _mm512_cmp_ps_mask(top[1], limit, _CMP_GT_OQ);
      if (!(above0 | above1)) break;
      raise_offsets(tile, 0, above0, job);
      raise_offsets(tile, 1, above1, job);
      begin();
    }
    float* block = tile.side->sums->block + tile.token;
    _mm512_storeu_ps(block, _mm512_add_ps(_mm512_loadu_ps(block), sum[0]));
    _mm512_storeu_ps(block + 16, _mm512_add_ps(_mm512_loadu_ps(block + 16), sum[1]));
  }
};

inline Use use_of(const Pending& tile, const Job& job) {
  if (!tile.side || !tile.side->e) return Use::sum;
  return job.fold->how.softcap > 0 ? Use::keep_capped : Use::keep;
}

// The exponentials of the last tile, which no other tile's product follows.
FUSED_TARGET inline void drain(const Pending& tile, Job& job) {
  switch (use_of(tile, job)) {
    case Use::sum: return Exponentials<Use::sum>(tile, job).finish();
    case Use::keep: return Exponentials<Use::keep>(tile, job).finish();
    case Use::keep_capped: return Exponentials<Use::keep_capped>(tile, job).finish();
  }
}

}  // namespace cpo
