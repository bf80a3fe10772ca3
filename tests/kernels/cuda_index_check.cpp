// Checks csrc/cuda/index.h and logp.h on the CPU: tests/test_cuda_index.py compiles and runs it.
// The models of the copy engine and of wgmma are written from the PTX ISA, independently of the
// functions that they check.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "index.h"
#include "logp.h"

using namespace cpo;

#define CHECK(condition)                                                  \
  do {                                                                    \
    if (!(condition)) {                                                   \
      std::printf("line %d: %s does not hold\n", __LINE__, #condition);   \
      std::exit(1);                                                       \
    }                                                                     \
  } while (0)

void check_row_shares(int vocab) {
  const RowShare first = row_share(vocab, 0), second = row_share(vocab, 1);
  CHECK(first.first_vec == 0 && second.first_vec == first.vecs);
  CHECK(first.vecs + second.vecs == row_vecs(vocab));
  CHECK((row_vecs(vocab) - 1) * kVec < vocab && vocab <= row_vecs(vocab) * kVec);
  CHECK(first.vecs >= second.vecs && first.vecs - second.vecs <= 1);
  for (const RowShare& share : {first, second}) {
    int sum = 0;
    for (int piece = 0; piece < share.pieces; ++piece) {
      CHECK(piece_vecs(share, piece) > 0 && piece_vecs(share, piece) <= kPieceVecs);
      CHECK(piece + 1 == share.pieces || piece_vecs(share, piece) == kPieceVecs);
      sum += piece_vecs(share, piece);
    }
    CHECK(sum == share.vecs);
  }
}

// In whole rounds every thread has a vector inside the vocabulary; the label is where it is read.
void check_rounds(int vocab) {
  int found = 0;
  const int label = vocab / 3;
  for (int rank = 0; rank < 2; ++rank) {
    const RowShare share = row_share(vocab, rank);
    const RowRounds rounds = row_rounds(vocab, share);
    CHECK(rounds.whole >= 0 && rounds.whole <= rounds.all && rounds.all - rounds.whole <= 1);
    const int end = rounds.whole * kPieceVecs;
    CHECK(end <= share.vecs && (end == 0 || (share.first_vec + end) * kVec <= vocab));
    CHECK(rounds.all * kPieceVecs >= share.vecs);
    const LabelPlace at = label_place(label, share);
    CHECK((at.round == -1) == (at.thread == -1) && label_place(-1, share).round == -1);
    if (at.round < 0) continue;
    ++found;
    CHECK(at.round < rounds.all && at.thread < kRowThreads);
    CHECK(share.first_vec + at.round * kPieceVecs + at.thread == label / kVec);
  }
  CHECK(found == 1);
}

void check_units(int rows, int vocab) {
  const LinearPlan plan = linear_plan(rows, vocab);
  CHECK(static_cast<int64_t>(plan.row_pairs) * kPairRows >= rows);
  CHECK(static_cast<int64_t>(plan.row_pairs - 1) * kPairRows < rows);
  std::vector<int> seen(static_cast<size_t>(plan.row_pairs) * plan.vocab_tiles, 0);
  std::vector<int> split_seen(static_cast<size_t>(plan.units), 0);
  for (int64_t u = 0; u < plan.units; ++u) {
    const LinearUnit unit = linear_unit(plan, u);
    CHECK(unit.row_pair >= 0 && unit.row_pair < plan.row_pairs);
    CHECK(unit.split >= 0 && unit.split < plan.splits);
    CHECK(unit.first_tile < unit.end_tile && unit.end_tile <= plan.vocab_tiles);
    CHECK(unit.row_pair / kBand == u / (static_cast<int64_t>(kBand) * plan.splits));
    ++split_seen[static_cast<size_t>(unit.row_pair) * plan.splits + unit.split];
    for (int tile = unit.first_tile; tile < unit.end_tile; ++tile) {
      ++seen[static_cast<size_t>(unit.row_pair) * plan.vocab_tiles + tile];
    }
  }
  for (int count : seen) CHECK(count == 1);
  for (int count : split_seen) CHECK(count == 1);
}

// Every logit of a ragged matrix comes from its own row of H and of W, is summed once and stored
// once: box_row's stand-in for boxes outside is read by nothing that counts.
void check_tiles(int rows, int vocab) {
  const LinearPlan plan = linear_plan(rows, vocab);
  for (int64_t row_tile = 0; row_tile < int64_t{plan.row_pairs} * kCluster; ++row_tile) {
    for (int r = 0; r < kTileM; ++r) {
      const int64_t row = row_tile * kTileM + r;
      if (row < rows) CHECK(box_row(row_tile * kTileM, rows) + r == row);
    }
  }
  int64_t summed = 0;
  std::vector<int> stored(row_vecs(vocab), 0);
  for (int tile = 0; tile < plan.vocab_tiles; ++tile) {
    for (int column = 0; column < kTileN; ++column) {
      const int64_t global = int64_t{tile} * kTileN + column;
      if (global >= vocab) continue;
      ++summed;
      const int half = column / kHalfN;
      const int64_t first = int64_t{tile} * kTileN + half * kHalfN;
      CHECK(box_row(first, vocab) + column % kHalfN == global);
    }
    for (int four = 0; four < kTileN / kVec / 4; ++four) {
      for (int q = 0; q < 4; ++q) {
        const int vector = tile * kTileN / kVec + 4 * four + q;
        if (vector < row_vecs(vocab)) ++stored[vector];
      }
    }
  }
  CHECK(summed == vocab);
  for (int count : stored) CHECK(count == 1);
}

void check_accumulators() {
  std::vector<int> seen(64 * kTileN, 0);
  for (int thread = 0; thread < 128; ++thread) {
    for (int i = 0; i < 128; ++i) {
      const int row = acc_row(thread, i), column = acc_column(thread, i);
      CHECK(row >= 0 && row < 64 && column >= 0 && column < kTileN);
      ++seen[row * kTileN + column];
      // The epilogue's view: the row depends on i / 2 % 2 only, the quad shares its rows, the
      // column's lane is column / 2 % 4.
      CHECK(row == acc_row(thread, 2 * (i / 2 % 2)) && row == acc_row(thread / 4 * 4, i));
      CHECK(column / 2 % 4 == thread % 4);
      // The vector that word i / 2 belongs to and the word's place in it, as the store of E
      // assumes.
      CHECK(column / kVec == i / 4 && column % kVec / 2 == thread % 4);
    }
  }
  for (int count : seen) CHECK(count == 1);
}

// PTX ISA, "asynchronous warpgroup matrix instructions", shared-memory matrix layout: an operand's
// element (row, k) of 16-bit values lies at start + row / 8 * stride offset + row % 8 * 128 + 2 *
// k, and the 128-byte swizzle xors address bits 4..6 with bits 7..9. The copy engine swizzles the
// same bits of the address that it writes.
void check_swizzle(uint32_t base, int rows) {
  std::vector<int> memory(rows * 64, -1);
  const auto swizzle = [](uint32_t address) { return address ^ ((address >> 7 & 7) << 4); };
  for (int row = 0; row < rows; ++row) {
    for (int column = 0; column < kTileK; ++column) {
      const uint32_t written = swizzle(base + row * 128 + column * 2);
      memory[(written - base) / 2] = row * kTileK + column;
    }
  }
  for (int step = 0; step < kTileK / 16; ++step) {
    const uint64_t descriptor = operand_descriptor(base, step);
    CHECK(descriptor >> 62 == 1);                    // 128-byte swizzle
    CHECK((descriptor >> 49 & 7) == 0);              // base offset: tiles start at multiples of 1024
    const uint32_t start = (descriptor & 0x3FFF) << 4;
    const uint32_t stride = (descriptor >> 32 & 0x3FFF) << 4;
    for (int row = 0; row < rows; ++row) {
      for (int k = 0; k < 16; ++k) {
        const uint32_t read = swizzle(start + row / 8 * stride + row % 8 * 128 + 2 * k);
        CHECK(memory[(read - base) / 2] == row * kTileK + step * 16 + k);
      }
    }
  }
}

void check_quad_transpose() {
  int word[4][4];
  for (int lane = 0; lane < 4; ++lane) {
    for (int w = 0; w < 4; ++w) word[lane][w] = 10 * w + lane;  // word `lane` of vector w
  }
  for (int i = 0; i < 4; ++i) {
    const QuadSwap swap = quad_swap(i);
    int sent[4];
    for (int q = 0; q < 4; ++q) sent[q] = word[q][q & swap.step ? swap.low : swap.high];
    for (int q = 0; q < 4; ++q) word[q][q & swap.step ? swap.low : swap.high] = sent[q ^ swap.step];
  }
  for (int lane = 0; lane < 4; ++lane) {
    for (int w = 0; w < 4; ++w) CHECK(word[lane][w] == 10 * lane + w);
  }
}

// A row's columns dealt to any number of partial sums and merged must give float64's answer.
void check_logp(std::mt19937& random, double spread, double shift, double temperature, int columns) {
  std::normal_distribution<double> normal(0, spread);
  std::vector<float> z(columns);
  for (float& value : z) value = static_cast<float>(normal(random) + shift);
  const int label = static_cast<int>(random() % columns);
  const Scaling scale_of = scaling(static_cast<float>(temperature));
  std::vector<Partial> parts(random() % 9 + 1, empty_partial(scale_of));
  double others = 0;
  for (int i = 0; i < columns; ++i) {
    if (i == label) continue;
    Partial& part = parts[random() % parts.size()];
    part = merge(part, {z[i] * scale_of.c, std::exp2(std::fma(z[i], scale_of.c, -(z[i] * scale_of.c)))});
    others += std::exp((static_cast<double>(z[i]) - z[label]) / temperature);
  }
  Partial all = empty_partial(scale_of);
  for (const Partial& part : parts) all = merge(all, part);
  const Partial turned = merge(parts[0], all), again = merge(all, parts[0]);
  CHECK(turned.top == again.top && turned.sum == again.sum);  // symmetric to the bit
  const RowResult result = finish_row(all, z[label], true, scale_of);
  const double logp = -std::log1p(others), scale = 1 + std::abs(logp) + std::abs(shift / temperature);
  CHECK(result.logp <= 0);
  CHECK(std::abs(result.logp - logp) <= 2e-6 * scale);
  CHECK(std::abs(result.lse - (z[label] / temperature - logp)) <= 2e-6 * scale);
  CHECK(std::abs(result.others - others / (1 + others)) <= 4e-6 * scale * others / (1 + others));
  if (columns > 1) {
    const double p = others / (1 + others) / all.sum;  // of a column at the maximum
    CHECK(std::abs(result.factor - p) <= 8e-6 * scale * p);
  }
}

int main() {
  for (int vocab = 1; vocab < 20000; ++vocab) {
    check_row_shares(vocab);
    check_rounds(vocab);
  }
  for (int vocab : {32000, 50257, 128256, 151936, 152064, 229376, 262144}) {
    check_row_shares(vocab);
    check_rounds(vocab);
  }
  CHECK(row_share(152064, 0).pieces <= kMaxPieces && row_share(229376, 0).pieces == kMaxPieces);
  CHECK(row_share(229377, 0).pieces > kMaxPieces);
  CHECK(kMaxPieces * kPieceVecs * 16 + 2048 <= 227 * 1024);
  CHECK(kStages * kStageBytes + 2048 <= 227 * 1024);
  CHECK(kLag == CPO_LAG && kStages - 1 - kLag >= 1);  // a stage to load ahead of the first group

  for (int rows = 1; rows < 6000; rows += 97) {
    for (int vocab : {1, 255, 256, 257, 511, 513, 1000, 4099, 50257}) check_units(rows, vocab);
  }
  for (int rows = 1; rows <= 1025; ++rows) check_units(rows, 777);
  check_units(8192, 152064);
  check_units(16384, 151936);
  CHECK(linear_unit(linear_plan(1 << 30, 152064), linear_plan(1 << 30, 152064).units - 1).row_pair ==
        (1 << 30) / kPairRows - 1);
  CHECK(offset_2d(100000, 152064, 5) == int64_t{15206400005});
  CHECK(box_row(0, 1) == 0 && box_row(127, 128) == 127 && box_row(128, 128) == 0);

  for (int rows = 1; rows <= 1030; ++rows) check_tiles(rows, 1 + rows * 7 % 1500);
  for (int vocab = 1; vocab <= 2100; ++vocab) check_tiles(1 + vocab % 600, vocab);
  for (int vocab : {50257, 151936, 152064, 262144}) check_tiles(8192, vocab);

  check_accumulators();
  for (int stage = 0; stage < kStages; ++stage) {
    for (int group = 0; group < kTileM / 64; ++group) {
      check_swizzle(stage * kStageBytes + group * (kBytesH / 2), 64);
    }
    check_swizzle(stage * kStageBytes + kBytesH, kTileN);
  }
  check_swizzle(0, kTileM);
  check_swizzle(5 * 1024, kTileN);
  check_swizzle(kStages * kStageBytes - kBytesW, kTileN);
  check_quad_transpose();

  std::mt19937 random(7);
  for (int round = 0; round < 400; ++round) {
    for (double temperature : {1.0, 0.7, 3.0}) {
      check_logp(random, 0.1, 0, temperature, 1 + static_cast<int>(random() % 200));
      check_logp(random, 10, 0, temperature, 2 + static_cast<int>(random() % 200));
      check_logp(random, 30, -1e4, temperature, 200);
    }
  }
  const Scaling one = scaling(1.0f);
  // Nothing but the label, and nothing but an ignored label.
  CHECK(finish_row(empty_partial(one), 3.0f, true, one).logp == 0.0f);
  CHECK(finish_row(empty_partial(one), 3.0f, true, one).lse == 3.0f);
  CHECK(finish_row({2.0f * kLog2e, 1.0f}, 0.0f, false, one).logp == 0.0f);
  CHECK(std::abs(finish_row({2.0f * kLog2e, 1.0f}, 0.0f, false, one).lse - 2.0f) <= 1e-6f);
  // A label that is masked: its log-prob has a value, and the others keep theirs.
  const RowResult masked = finish_row({2.0f * kLog2e, 1.0f}, -3e38f, true, one);
  CHECK(std::abs(masked.logp / 3e38f + 1) <= 1e-6f && std::abs(masked.lse - 2.0f) <= 1e-6f);
  CHECK(masked.others == 1.0f && masked.factor == 1.0f);
  CHECK(finish_row({2.0f * kLog2e, 1.0f}, -INFINITY, true, one).logp == -INFINITY);
  // Infinite numbers, and sums that may only have overflowed, are shown.
  CHECK(std::isnan(finish_row({2.0f, 1.0f}, INFINITY, true, one).logp));
  CHECK(std::isnan(finish_row(empty_partial(one), -3e38f, true, one).logp));
  CHECK(std::isnan(finish_row({INFINITY, 0.0f}, 1.0f, true, one).logp));
  CHECK(std::isnan(finish_row({2e9f, 1.0f}, 1.0f, true, one).logp));
  CHECK(!counted(empty_partial(one), one) && !counted({2e9f, 0.0f}, one));
  CHECK(counted({-1e9f, 1.0f}, one) && counted({1e9f, 1.0f}, one));
  // Under rescue_scaling equal logits share the mass, others have none.
  for (const double temperature : {1.0, 1.5, 0.1}) {
    for (const float z : {-3.3e38f, 3.3e38f, 3e9f, -3e9f}) {
      const Scaling plain = scaling(static_cast<float>(temperature));
      const bool rescued = !counted({z * plain.c, 1.0f}, plain);
      CHECK(rescued);
      for (int rescue = std::abs(z) > 1e30f ? 2 : 1; rescue <= kRescues; ++rescue) {
        const Scaling scale = rescue_scaling(static_cast<float>(temperature), rescue);
        CHECK(rescue == 2 || (scale.c >= plain.c && scale.c <= 2 * plain.c));
        const Partial both = merge({z * scale.c, 2.0f}, {z * 1.01f * scale.c, 3.0f});
        const float highest = z > 0 ? z * 1.01f : z;
        const float sum = z > 0 ? 3.0f : 2.0f;
        CHECK(counted(both, scale) && both.top == highest * scale.c && both.sum == sum);
        const RowResult result = finish_row(both, highest, true, scale);
        CHECK(std::abs(result.logp + std::log1p(sum)) <= 1e-6);
        const double lse = highest / temperature;
        CHECK(std::abs(lse) > 3.4e38 || std::abs(result.lse / lse - 1) <= 1e-6);
      }
    }
  }
  std::puts("ok");
}
