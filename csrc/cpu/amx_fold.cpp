// See amx.h. Layouts: a tile is 1 KiB. "Packed" operands are arrays of whole tiles, so that every tile load
// is 16 full cache lines.
//   h   [token / 16][d / 32] tiles of [16 d-pairs][16 tokens][2]     right operand of Z^T = W H^T
//   e   [token / 16][entry / 32] tiles of [16 entry-pairs][16 tokens][2]  right operand of G^T += W^T E
//   wt  [d / 16][entry / 32] tiles of [16 d][32 entries]             left operand of G^T += W^T E
//   g   [d / 16][token / 16] tiles of [16 d][16 tokens] float32
#include "amx.h"

#include <cpuid.h>
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cmath>
#include <cstring>

#include "amx_tiles.h"

namespace cpo {
namespace {

constexpr int64_t kTokens = 256;   // of a chunk: two of hidden states and one of G stay in L2
constexpr int64_t kEntries = 320;  // of a vocabulary block; no power of two, which cache sets dislike
constexpr int64_t kGroups = kEntries / 32;
constexpr float kNever = -1e30f;  // a logit that counts for nothing
constexpr float kRaiseBits = 48;  // exponents beyond this raise the offset

int slots_of(int64_t V, int threads) {
  int64_t blocks = (V + kEntries - 1) / kEntries, wanted = threads > 8 ? threads : 8;
  return int(blocks < wanted ? blocks : wanted);
}

struct Sums {            // of one slot, or of one side of a slot
  float k[kTokens];      // offset, in bits: E = 2^(z * log2e * scale - k)
  double sum[kTokens];   // of E over the slot's finished blocks
  float block[kTokens];  // of E over the block at hand
};

struct Slot {
  Sums side[2];  // policy, reference
};

struct Side {            // one of the two, as the tile loop sees it
  const uint16_t* h;     // packed hidden states
  Sums* sums;
  double* label_logits;  // [chunk]
  uint16_t* e;           // nullptr: no gradient, E is not kept
};

struct Scratch {  // of one thread
  uint16_t* e;    // [kTokens / 16][kGroups] tiles
  uint16_t* wt;   // [D / 16][kGroups] tiles
  uint16_t* w;    // [32][D] padded rows, where W cannot be read in place
  float* z;       // two buffers of [32][32]
};

struct Job {  // a chunk of tokens against all entries
  const Fold* fold;
  int64_t tokens, padded, D;  // tokens; both rounded up to 32
  int32_t labels[kTokens];
  double label_logits[2][kTokens];
  const uint16_t* h[2];
  float* g;  // [slots][D / 16][padded / 16] tiles
};

struct Pending {  // a finished tile whose exponentials are still to be done
  const Side* side = nullptr;
  float* z;
  int64_t token, entry, group;  // first token, first entry of the vocabulary, row group in the block
  float* g;                     // the slot's G, nullptr while nothing is in it
};

// --- packing ----------------------------------------------------------------------------------------

AMX_TARGET inline void transpose16(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

// 32 rows of W -> one row group of wt.
AMX_TARGET void pack_transposed(const uint16_t* w, int64_t stride, int64_t D, int64_t group,
                                uint16_t* wt) {
  for (int64_t d = 0; d < D; d += 16) {
    __m512i r[16];
    for (int i = 0; i < 16; i++) {
      const uint16_t* even = w + 2 * i * stride + d;
      __m512i lo = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)even));
      __m512i hi = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(even + stride)));
      r[i] = _mm512_or_si512(lo, _mm512_slli_epi32(hi, 16));
    }
    transpose16(r);
    uint16_t* tile = wt + (d / 16 * kGroups + group) * kTile;
    for (int i = 0; i < 16; i++) _mm512_store_si512(tile + 32 * i, r[i]);
  }
}

// --- exponentials -----------------------------------------------------------------------------------

// Raise the offset of one token: all that was summed under the old one shrinks.
__attribute__((noinline)) void raise_offset(const Pending& tile, int64_t token, float k,
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
      uint32_t bits = uint32_t(half) << 16;
      float value;
      std::memcpy(&value, &bits, 4);
      value *= factor;
      std::memcpy(&bits, &value, 4);
      half = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    }
  }
  if (!tile.g) return;
  for (int64_t d = 0; d < job.D; d++)
    tile.g[(d / 16 * (job.padded / 16) + token / 16) * 256 + d % 16 * 16 + token % 16] *= factor;
}

// Before a tile's exponentials, for 16 of its tokens: rows beyond V and the label's own logit are taken
// out.
AMX_TARGET inline void mask(const Pending& tile, int64_t half, Job& job) {
  float* z = tile.z + 16 * half;  // [32] rows, stride 32
  int64_t token = tile.token + 16 * half, V = job.fold->V;
  for (int64_t row = V - tile.entry < 0 ? 0 : V - tile.entry; row < 32; row++)
    _mm512_store_ps(z + 32 * row, _mm512_set1_ps(kNever));
  __m512i label = _mm512_sub_epi32(_mm512_loadu_si512(job.labels + token),
                                   _mm512_set1_epi32(int32_t(tile.entry)));
  for (uint32_t here = _mm512_cmplt_epu32_mask(label, _mm512_set1_epi32(32)); here;
       here &= here - 1) {
    int lane = __builtin_ctz(here);
    float& at = z[32 * (job.labels[token + lane] - tile.entry) + lane];
    tile.side->label_logits[token + lane] = double(at) * job.fold->scale;
    at = kNever;
  }
}

// After a tile's exponentials: raise the offsets of the tokens that are too far above theirs. The
// exponentials must be done again then.
AMX_TARGET void raise_offsets(const Pending& tile, int64_t half, uint32_t above, Job& job) {
  for (uint32_t rest = above; rest; rest &= rest - 1) {
    int lane = __builtin_ctz(rest);
    float top = kNever;
    for (int row = 0; row < 32; row++) top = std::fmax(top, tile.z[32 * row + 16 * half + lane]);
    raise_offset(tile, tile.token + 16 * half + lane, top * kLog2e * job.fold->scale, job);
  }
}

// Exponentials of a pair of rows for 16 tokens: summed, and kept as bfloat16 pairs where E is wanted.
template <bool KEEP>
AMX_TARGET inline void exponentials(const Pending& tile, int64_t half, int64_t pair, __m512 slope,
                                    __m512 k, __m512& sum, __m512& top) {
  const float* z = tile.z + 64 * pair + 16 * half;
  __m512 even = _mm512_fmsub_ps(_mm512_load_ps(z), slope, k);
  __m512 odd = _mm512_fmsub_ps(_mm512_load_ps(z + 32), slope, k);
  top = _mm512_max_ps(top, _mm512_max_ps(even, odd));
  even = exp2_vector(even);
  odd = exp2_vector(odd);
  sum = _mm512_add_ps(sum, _mm512_add_ps(even, odd));
  if (KEEP) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                           8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
    uint16_t* e = tile.side->e + ((tile.token / 16 + half) * kGroups + tile.group) * kTile;
    _mm512_store_si512(e + 32 * pair, _mm512_permutexvar_epi16(order, halves));
  }
}

// --- tiles ------------------------------------------------------------------------------------------

// What is left to do of a tile's exponentials, in small steps.
template <bool KEEP>
struct Exponentials {
  const Pending& tile;
  Job& job;
  __m512 slope, k[2], sum[2], top[2];
  int64_t pair = -1;  // the next pair of rows; -1: nothing done yet

  AMX_TARGET Exponentials(const Pending& tile, Job& job) : tile(tile), job(job) {
    slope = _mm512_set1_ps(kLog2e * job.fold->scale);
  }

  AMX_TARGET inline __attribute__((always_inline)) void begin() {
    for (int half = 0; half < 2; half++) {
      k[half] = _mm512_loadu_ps(tile.side->sums->k + tile.token + 16 * half);
      sum[half] = _mm512_setzero_ps();
      top[half] = _mm512_set1_ps(kNever);
    }
    pair = 0;
  }

  AMX_TARGET inline __attribute__((always_inline)) void step() {
    if (pair < 0) {
      mask(tile, 0, job);
      mask(tile, 1, job);
      begin();
      return;
    }
    exponentials<KEEP>(tile, 0, pair, slope, k[0], sum[0], top[0]);
    exponentials<KEEP>(tile, 1, pair, slope, k[1], sum[1], top[1]);
    pair++;
  }

  AMX_TARGET inline __attribute__((always_inline)) void finish() {
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

// z [32 entries][32 tokens] = W H^T, and, between the tile products, the exponentials of the tile before:
// the vector units work while the tile unit does.
template <bool KEEP>
AMX_TARGET void logits_tile(const uint16_t* w, int64_t stride, const uint16_t* h, int64_t D,
                            float* z, const Pending& before, Job& job, const char*& ahead) {
  int64_t steps = D / 32;
  const uint16_t *w1 = w + 16 * stride, *h1 = h + steps * kTile;
  Exponentials<KEEP> side(before, job);
  bool busy = before.side;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  FENCE();
  for (int64_t s = 0; s < steps; s++) {
    _tile_loadd(4, w + 32 * s, stride * 2);
    _tile_loadd(6, h + kTile * s, 64);
    _tile_loadd(7, h1 + kTile * s, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, w1 + 32 * s, stride * 2);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    _mm_prefetch(ahead, _MM_HINT_T1);
    _mm_prefetch(ahead + 64, _MM_HINT_T1);
    ahead += 128;
    if (busy && side.pair < 16) side.step();
  }
  FENCE();
  _tile_stored(0, z, 128);
  _tile_stored(1, z + 16, 128);
  _tile_stored(2, z + 16 * 32, 128);
  _tile_stored(3, z + 16 * 32 + 16, 128);
  FENCE();
  if (busy) side.finish();
}

// What logits_tile does on the side, for the last tile of a block.
AMX_TARGET void drain(const Pending& before, Job& job) {
  if (before.side->e)
    Exponentials<true>(before, job).finish();
  else
    Exponentials<false>(before, job).finish();
}

// G^T += W^T E over the groups of a block; `fresh`: nothing is in G yet.
AMX_TARGET void gradient_block(const Job& job, const Scratch& scratch, int64_t groups, bool fresh,
                               float* g) {
  int64_t columns = job.padded / 16;
  for (int64_t d = 0; d < job.D / 16; d += 2) {
    for (int64_t t = 0; t < columns; t += 2) {
      float *g0 = g + (d * columns + t) * 256, *g1 = g0 + columns * 256;
      FENCE();
      if (fresh) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      } else {
        _tile_loadd(0, g0, 64);
        _tile_loadd(1, g0 + 256, 64);
        _tile_loadd(2, g1, 64);
        _tile_loadd(3, g1 + 256, 64);
      }
      const uint16_t *a = scratch.wt + d * kGroups * kTile, *b = scratch.e + t * kGroups * kTile;
      for (int64_t group = 0; group < groups; group++) {
        _tile_loadd(4, a + group * kTile, 64);
        _tile_loadd(6, b + group * kTile, 64);
        _tile_loadd(7, b + (kGroups + group) * kTile, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, a + (kGroups + group) * kTile, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, g0, 64);
      _tile_stored(1, g0 + 256, 64);
      _tile_stored(2, g1, 64);
      _tile_stored(3, g1 + 256, 64);
      FENCE();
    }
  }
}

// One slot: entries first .. last-1 against the chunk.
AMX_TARGET void fold_slot(Job& job, int64_t first, int64_t last, Slot& slot, float* g,
                          const Scratch& scratch) {
  const Fold& fold = *job.fold;
  Side sides[2];
  int count = fold.ref ? 2 : 1;
  for (int i = 0; i < count; i++) {
    sides[i] = {job.h[i], &slot.side[i], job.label_logits[i], i == 0 && g ? scratch.e : nullptr};
    for (int64_t t = 0; t < kTokens; t++) slot.side[i].k[t] = kNever, slot.side[i].sum[t] = 0;
  }
  for (int64_t start = first; start < last; start += kEntries) {
    int64_t entries = last - start < kEntries ? last - start : kEntries;
    int64_t groups = (entries + 31) / 32;
    for (int i = 0; i < count; i++)
      for (int64_t t = 0; t < kTokens; t++) slot.side[i].block[t] = 0;
    Pending before;
    int parity = 0;
    for (int64_t group = 0; group < groups; group++) {
      int64_t entry = start + 32 * group, rows = fold.V - entry < 32 ? fold.V - entry : 32;
      const uint16_t* w = fold.weight + entry * fold.D;
      int64_t stride = fold.D;
      if (rows < 32 || fold.D != job.D) {  // pad with zeros
        std::memset(scratch.w, 0, 32 * job.D * 2);
        for (int64_t row = 0; row < rows; row++)
          std::memcpy(scratch.w + row * job.D, w + row * fold.D, fold.D * 2);
        w = scratch.w, stride = job.D;
      }
      const char* ahead = (const char*)(fold.weight + (entry + 32) * fold.D);
      for (int i = 0; i < count; i++) {
        for (int64_t token = 0; token < job.padded; token += 32, parity ^= 1) {
          float* z = scratch.z + parity * 1024;
          const uint16_t* h = sides[i].h + token / 16 * (job.D / 32) * kTile;
          if (before.side && before.side->e)
            logits_tile<true>(w, stride, h, job.D, z, before, job, ahead);
          else
            logits_tile<false>(w, stride, h, job.D, z, before, job, ahead);
          before = {&sides[i], z, token, entry, group, start == first ? nullptr : g};
        }
      }
      if (g) pack_transposed(w, stride, job.D, group, scratch.wt);
    }
    drain(before, job);
    if (g) gradient_block(job, scratch, groups, start == first, g);
    for (int i = 0; i < count; i++)
      for (int64_t t = 0; t < kTokens; t++) slot.side[i].sum[t] += slot.side[i].block[t];
  }
}

// --- merging ----------------------------------------------------------------------------------------

// The slots' sums under one offset per token; factors[slot][token] is what their G is worth under it.
void merge_sums(const Job& job, const Slot* slots, int count, int side, int64_t start,
                const State& state, float* factors) {
  for (int64_t t = 0; t < job.tokens; t++) {
    float k = kNever;
    for (int s = 0; s < count; s++) k = std::fmax(k, slots[s].side[side].k[t]);
    double sum = 0;
    for (int s = 0; s < count; s++) {
      double factor = std::exp2(double(slots[s].side[side].k[t]) - k);
      sum += slots[s].side[side].sum[t] * factor;
      if (factors) factors[s * kTokens + t] = float(factor);
    }
    state.k[start + t] = k * 0.6931471805599453;
    state.sum[start + t] = sum;
    state.label[start + t] = job.label_logits[side][t];
  }
}

// grad rows of 16 tokens = sum over slots of factor * G, turned back from tiles.
void merge_gradient(const Job& job, int count, int64_t group, int64_t start, const float* factors) {
  const Fold& fold = *job.fold;
  int64_t columns = job.padded / 16, size = job.D / 16 * columns * 256;
  int64_t tokens = job.tokens - group * 16 < 16 ? job.tokens - group * 16 : 16;
  for (int64_t d0 = 0; d0 < fold.D; d0 += 16) {
    int64_t ds = fold.D - d0 < 16 ? fold.D - d0 : 16;
    for (int64_t t = 0; t < tokens; t++) {
      float* grad = fold.grad + fold.index[start + group * 16 + t] * fold.D + d0;
      const float* g = job.g + (d0 / 16 * columns + group) * 256 + t;
      for (int64_t d = 0; d < ds; d++) {
        float sum = 0;
        for (int s = 0; s < count; s++)
          sum += factors[s * kTokens + group * 16 + t] * g[s * size + d * 16];
        grad[d] = sum;
      }
    }
  }
}

struct Arena {  // hands out parts of the workspace, or only counts them
  char* base;
  int64_t used = 0;
  template <typename T>
  T* take(int64_t count) {
    char* at = base + used;
    used += round_up(count * int64_t(sizeof(T)), 64);
    return base ? (T*)at : nullptr;
  }
};

struct Buffers {
  Slot* slots;
  float *g, *factors;
  uint16_t* h[2];
  Job* job;
  Arena rest;  // the threads' scratch follows
};

Buffers lay_out(char* base, int64_t D, int count, bool ref, bool grad) {
  Arena arena{base};
  Buffers b;
  b.job = arena.take<Job>(1);
  b.slots = arena.take<Slot>(count);
  b.factors = arena.take<float>(count * kTokens);
  b.g = arena.take<float>(grad ? count * D * kTokens : 0);
  b.h[0] = arena.take<uint16_t>(D * kTokens);
  b.h[1] = arena.take<uint16_t>(ref ? D * kTokens : 0);
  b.rest = arena;
  return b;
}

Scratch lay_out_thread(Arena& arena, int64_t D, bool grad) {
  Scratch s;
  s.e = arena.take<uint16_t>(grad ? kEntries * kTokens : 0);
  s.wt = arena.take<uint16_t>(grad ? kEntries * D : 0);
  s.w = arena.take<uint16_t>(32 * D);
  s.z = arena.take<float>(2 * 32 * 32);
  return s;
}

}  // namespace

int64_t amx_workspace(int64_t D, int64_t V, bool ref, bool grad, int threads) {
  D = round_up(D, 32);
  Arena arena = lay_out(nullptr, D, slots_of(V, threads), ref, grad).rest;
  int64_t shared = arena.used;
  lay_out_thread(arena, D, grad);
  return shared + threads * (arena.used - shared);
}

void amx_fold(const Fold& fold) {
  int64_t D = round_up(fold.D, 32), blocks = (fold.V + kEntries - 1) / kEntries;
  int count = slots_of(fold.V, fold.threads);
  Buffers b = lay_out((char*)fold.workspace, D, count, fold.ref, fold.grad);
  Job& job = *b.job;
  int64_t chunks = (fold.n + kTokens - 1) / kTokens;
#pragma omp parallel num_threads(fold.threads)
  {
    Arena arena = b.rest;
    Scratch scratch;
    for (int i = 0; i <= omp_get_thread_num(); i++) scratch = lay_out_thread(arena, D, fold.grad);
    unsigned int mode = _mm_getcsr();
    _mm_setcsr(mode | 0x8040);  // flush denormals
    configure_tiles();
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
      int64_t start = chunk * kTokens;
#pragma omp single
      {
        job.fold = &fold;
        job.tokens = fold.n - start < kTokens ? fold.n - start : kTokens;
        job.padded = round_up(job.tokens, 32);
        job.D = D;
        job.g = b.g;
        for (int64_t t = 0; t < kTokens; t++)
          job.labels[t] = t < job.tokens ? int32_t(fold.labels[start + t]) : -1;
        for (int i = 0; i < 2; i++) job.h[i] = b.h[i];
      }
#pragma omp for schedule(static)
      for (int64_t group = 0; group < 2 * (job.padded / 16); group++) {
        const uint16_t* source = group % 2 ? fold.ref : fold.hidden;
        if (source)
          pack_hidden(source + start * fold.D, job.tokens, fold.D, D, group / 2, b.h[group % 2]);
      }
#pragma omp for schedule(dynamic, 1)
      for (int s = 0; s < count; s++) {
        int64_t first = blocks * s / count * kEntries, last = blocks * (s + 1) / count * kEntries;
        float* g = fold.grad ? b.g + s * (D / 16) * (job.padded / 16) * 256 : nullptr;
        fold_slot(job, first, last < fold.V ? last : fold.V, b.slots[s], g, scratch);
      }
#pragma omp single
      {
        merge_sums(job, b.slots, count, 0, start, fold.state, b.factors);
        if (fold.ref) merge_sums(job, b.slots, count, 1, start, fold.ref_state, nullptr);
      }
      if (fold.grad) {
#pragma omp for schedule(static)
        for (int64_t group = 0; group < (job.tokens + 15) / 16; group++)
          merge_gradient(job, count, group, start, b.factors);
      }
    }
    release_tiles();
    _mm_setcsr(mode);
  }
}

bool amx_available() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  bool amx = (d >> 22 & 1) && (d >> 24 & 1);  // AMX-BF16, AMX-TILE
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return false;  // AVX512-BF16
  if (!amx || choose("avx512") == nullptr) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace cpo
