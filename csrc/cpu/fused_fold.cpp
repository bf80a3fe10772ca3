// The sweep over vocabulary and tokens, for both engines. See fused.h and tiles.h.
#include <cpuid.h>
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cmath>
#include <cstring>

#include "engine_amx.h"
#include "engine_avx512.h"

namespace cpo {
namespace {

struct Slot {
  Sums side[2];  // policy, reference
};

struct Scratch {  // per thread
  uint16_t* e;    // [kTokens / 16][kGroups] tiles
  uint16_t* wt;   // [D / 16][kGroups] tiles
  uint16_t* w;    // [32][D] padded rows, where W cannot be read in place
  float* z;       // two buffers of [32][32] logits and as many slopes
};

int64_t first_entry(int64_t V, int slots, int slot) {
  int64_t blocks = (V + kEntries - 1) / kEntries, first = blocks * slot / slots * kEntries;
  return first < V ? first : V;
}

// 32 rows of W -> one row group of wt.
FUSED_TARGET void pack_transposed(const uint16_t* w, int64_t stride, int64_t D, int64_t group,
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

// The groups of E of a block whose first entry is `start` -> rows of `kept`.
FUSED_TARGET void store_kept(const Job& job, const uint16_t* e, int64_t start, int64_t groups) {
  const Fold& fold = *job.fold;
  __m512i even, odd;  // words of the even and odd entries of two tiles
  alignas(64) uint16_t at[32];
  for (int i = 0; i < 32; i++) at[i] = uint16_t(2 * i);
  even = _mm512_load_si512(at);
  odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
  for (int64_t token = 0; token < job.tokens; token += 32) {
    const uint16_t* tile = e + token / 16 * kGroups * kTile;
    __mmask32 here = job.tokens - token < 32 ? (1u << (job.tokens - token)) - 1 : ~0u;
    for (int64_t pair = 0; pair < 16 * groups && start + 2 * pair < fold.V; pair++) {
      __m512i left = _mm512_load_si512(tile + 32 * pair);
      __m512i right = _mm512_load_si512(tile + kGroups * kTile + 32 * pair);
      uint16_t* row = fold.kept + (start + 2 * pair) * fold.n + job.start + token;
      _mm512_mask_storeu_epi16(row, here, _mm512_permutex2var_epi16(left, even, right));
      if (start + 2 * pair + 1 < fold.V)
        _mm512_mask_storeu_epi16(row + fold.n, here, _mm512_permutex2var_epi16(left, odd, right));
    }
  }
}

// One slot: entries first .. last-1 against the chunk.
template <class Engine>
FUSED_TARGET void fold_slot(Job& job, int64_t first, int64_t last, Slot& slot, float* g,
                          const Scratch& scratch) {
  const Fold& fold = *job.fold;
  Side sides[2];
  int count = fold.ref ? 2 : 1;
  for (int i = 0; i < count; i++) {
    sides[i] = {job.h[i], &slot.side[i], job.label_logits[i], job.label_slopes[i],
                i == 0 && (g || fold.kept) ? scratch.e : nullptr};
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
          float* z = scratch.z + parity * 2048;
          const uint16_t* h = sides[i].h + token / 16 * (job.D / 32) * kTile;
          auto go = [&](auto product) { product(w, stride, h, job.D, z, before, job, ahead); };
          switch (use_of(before, job)) {
            case Use::sum: go(Engine::template product_and_exponentials<Use::sum>); break;
            case Use::keep: go(Engine::template product_and_exponentials<Use::keep>); break;
            case Use::keep_capped:
              go(Engine::template product_and_exponentials<Use::keep_capped>);
          }
          before = {&sides[i], z, token, entry, group, first, start == first ? nullptr : g};
        }
      }
      if (g) pack_transposed(w, stride, job.D, group, scratch.wt);
    }
    drain(before, job);
    if (fold.kept) store_kept(job, scratch.e, start, groups);
    if (g) Engine::gradient(job, scratch.wt, scratch.e, groups, start == first, g);
    for (int i = 0; i < count; i++)
      for (int64_t t = 0; t < kTokens; t++) slot.side[i].sum[t] += slot.side[i].block[t];
  }
}

// --- merging ----------------------------------------------------------------------------------------

// Rescale the slots' sums to one offset per token; factors[slot][token] rescales their G.
void merge_sums(const Job& job, const Slot* slots, int side, const State& state, float* factors) {
  int64_t start = job.start;
  int count = job.fold->slots;
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
    state.slope[start + t] = job.label_slopes[side][t];
  }
}

// Finish the stored E: the offsets of its slots, and the label's entry.
void finish_kept(const Job& job, const Slot* slots, int64_t t) {
  const Fold& fold = *job.fold;
  int64_t token = job.start + t, label = job.labels[t];
  constexpr double kLn2 = 0.6931471805599453;
  double top = fold.state.k[token] / kLn2, sum = fold.state.sum[token];
  for (int s = 0; s < fold.slots; s++) {
    int64_t first = first_entry(fold.V, fold.slots, s), last = first_entry(fold.V, fold.slots, s + 1);
    double k = slots[s].side[0].k[t];
    if (first <= label && label < last) {
      if (top - k > kRaiseBits) {  // the sum of the others would overflow under this slot's offset
        scale_kept(fold, first, last, token, float(std::exp2(k - top)));
        k = top;
      }
      fold.kept[label * fold.n + token] =
          bfloat16(float(-sum * std::exp2(top - k) * fold.state.slope[token]));
    }
    fold.offsets[s * fold.n + token] = k * kLn2;
  }
}

// grad rows of 16 tokens = sum over slots of factor * G, converted from tiles to rows.
void merge_gradient(const Job& job, int64_t group, const float* factors) {
  const Fold& fold = *job.fold;
  int64_t columns = job.padded / 16, size = job.D / 16 * columns * 256, start = job.start;
  int64_t tokens = job.tokens - group * 16 < 16 ? job.tokens - group * 16 : 16;
  for (int64_t d0 = 0; d0 < fold.D; d0 += 16) {
    int64_t ds = fold.D - d0 < 16 ? fold.D - d0 : 16;
    for (int64_t t = 0; t < tokens; t++) {
      float* grad = fold.grad + fold.index[start + group * 16 + t] * fold.D + d0;
      const float* g = job.g + (d0 / 16 * columns + group) * 256 + t;
      for (int64_t d = 0; d < ds; d++) {
        float sum = 0;
        for (int s = 0; s < fold.slots; s++)
          sum += factors[s * kTokens + group * 16 + t] * g[s * size + d * 16];
        grad[d] = sum;
      }
    }
  }
}

struct Arena {  // allocates parts of the workspace, or only counts bytes
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

Buffers lay_out(char* base, int64_t D, int slots, bool ref, bool grad) {
  Arena arena{base};
  Buffers b;
  b.job = arena.take<Job>(1);
  b.slots = arena.take<Slot>(slots);
  b.factors = arena.take<float>(slots * kTokens);
  b.g = arena.take<float>(grad ? slots * D * kTokens : 0);
  b.h[0] = arena.take<uint16_t>(D * kTokens);
  b.h[1] = arena.take<uint16_t>(ref ? D * kTokens : 0);
  b.rest = arena;
  return b;
}

Scratch lay_out_thread(Arena& arena, int64_t D, bool grad, bool kept) {
  Scratch s;
  s.e = arena.take<uint16_t>(grad || kept ? kEntries * kTokens : 0);
  s.wt = arena.take<uint16_t>(grad ? kEntries * D : 0);
  s.w = arena.take<uint16_t>(32 * D);
  s.z = arena.take<float>(2 * 2048);
  return s;
}

template <class Engine>
void fold_with(const Fold& fold) {
  int64_t D = round_up(fold.D, 32), chunks = (fold.n + kTokens - 1) / kTokens;
  Buffers b = lay_out((char*)fold.workspace, D, fold.slots, fold.ref, fold.grad);
  Job& job = *b.job;
#pragma omp parallel num_threads(fold.threads)
  {
    Arena arena = b.rest;
    Scratch scratch;
    for (int i = 0; i <= omp_get_thread_num(); i++)
      scratch = lay_out_thread(arena, D, fold.grad, fold.kept);
    unsigned int mode = _mm_getcsr();
    _mm_setcsr(mode | 0x8040);  // flush denormals
    Engine::begin();
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
#pragma omp single
      {
        job.fold = &fold;
        job.start = chunk * kTokens;
        job.tokens = fold.n - job.start < kTokens ? fold.n - job.start : kTokens;
        job.padded = round_up(job.tokens, 32);
        job.D = D;
        job.g = b.g;
        for (int64_t t = 0; t < kTokens; t++)
          job.labels[t] = t < job.tokens ? int32_t(fold.labels[job.start + t]) : -1;
        for (int i = 0; i < 2; i++) {
          job.h[i] = b.h[i];
          for (double& slope : job.label_slopes[i]) slope = 1;
        }
      }
#pragma omp for schedule(static)
      for (int64_t group = 0; group < 2 * (job.padded / 16); group++) {
        const uint16_t* source = group % 2 ? fold.ref : fold.hidden;
        if (source)
          pack_hidden(source + job.start * fold.D, job.tokens, fold.D, D, group / 2, b.h[group % 2]);
      }
#pragma omp for schedule(dynamic, 1)
      for (int s = 0; s < fold.slots; s++) {
        int64_t size = D / 16 * (job.padded / 16) * 256;
        int64_t first = first_entry(fold.V, fold.slots, s);
        int64_t last = first_entry(fold.V, fold.slots, s + 1);
        float* g = fold.grad ? b.g + s * size : nullptr;
        if (g && first == last) std::memset(g, 0, size * sizeof(float));
        fold_slot<Engine>(job, first, last, b.slots[s], g, scratch);
      }
#pragma omp single
      {
        merge_sums(job, b.slots, 0, fold.state, b.factors);
        if (fold.ref) merge_sums(job, b.slots, 1, fold.ref_state, nullptr);
      }
      if (fold.kept) {
#pragma omp for schedule(static)
        for (int64_t t = 0; t < job.tokens; t++) finish_kept(job, b.slots, t);
      }
      if (fold.grad) {
#pragma omp for schedule(static)
        for (int64_t group = 0; group < (job.tokens + 15) / 16; group++)
          merge_gradient(job, group, b.factors);
      }
    }
    Engine::end();
    _mm_setcsr(mode);
  }
}

}  // namespace

int64_t fused_workspace(int64_t D, int slots, bool ref, bool grad, bool kept, int threads) {
  D = round_up(D, 32);
  Arena arena = lay_out(nullptr, D, slots, ref, grad).rest;
  int64_t shared = arena.used;
  lay_out_thread(arena, D, grad, kept);
  return shared + threads * (arena.used - shared);
}

int64_t fused_slot(int64_t V, int slots, int slot) { return first_entry(V, slots, slot); }

void fused_fold(Engine engine, const Fold& fold) {
  engine == Engine::amx ? fold_with<Amx>(fold) : fold_with<Avx512Bf16>(fold);
}

bool fused_available(Engine engine) {
  unsigned a, b, c, d;
  if (choose("avx512") == nullptr) return false;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return false;  // AVX512-BF16
  if (engine == Engine::avx512_bf16) return true;
#ifdef CPO_FAST_EMULATED_TILES  // set by a test
  return true;
#endif
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if (!(d >> 22 & 1) || !(d >> 24 & 1)) return false;  // AMX-BF16, AMX-TILE
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace cpo
