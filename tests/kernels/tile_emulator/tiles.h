// The tile instructions of AMX-BF16 in plain C++, for a processor without them: put before a source by
// `-include`. Names and arguments are those of <immintrin.h>; sums are float32, in the order of the
// instruction (pairs of bfloat16 one after the other), denormals flushed as it does.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace tile_emulator {

struct Tile {
  uint16_t bytes = 0;  // of a row
  uint8_t rows = 0;
  alignas(64) char data[16][64];
};

struct Unit {
  bool configured = false;
  Tile tiles[8];
};
inline thread_local Unit unit;

inline Tile& tile(int i) {
  if (!unit.configured || !unit.tiles[i].rows) std::abort();  // the processor raises a fault
  return unit.tiles[i];
}

inline void load_config(const void* at) {
  const unsigned char* config = (const unsigned char*)at;
  if (config[0] != 1 || config[1] != 0) std::abort();
  unit.configured = true;
  for (int i = 0; i < 8; i++) {
    std::memcpy(&unit.tiles[i].bytes, config + 16 + 2 * i, 2);
    unit.tiles[i].rows = config[48 + i];
    if (unit.tiles[i].bytes > 64 || unit.tiles[i].rows > 16) std::abort();
    std::memset(unit.tiles[i].data, 0, 1024);
  }
}

inline void release() { unit = {}; }

inline void zero(int i) { std::memset(tile(i).data, 0, 1024); }

inline void load(int i, const void* base, int64_t stride) {
  Tile& t = tile(i);
  for (int row = 0; row < t.rows; row++)
    std::memcpy(t.data[row], (const char*)base + row * stride, t.bytes);
}

inline void store(int i, void* base, int64_t stride) {
  Tile& t = tile(i);
  for (int row = 0; row < t.rows; row++)
    std::memcpy((char*)base + row * stride, t.data[row], t.bytes);
}

inline float flushed(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }

inline float half(const char* at) {
  uint16_t bits16;
  std::memcpy(&bits16, at, 2);
  uint32_t bits = uint32_t(bits16) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return flushed(x);
}

inline void multiply(int c, int a, int b) {  // c += a b
  Tile &to = tile(c), &left = tile(a), &right = tile(b);
  if (left.bytes / 4 != right.rows || to.rows != left.rows || to.bytes != right.bytes) std::abort();
  for (int row = 0; row < to.rows; row++)
    for (int pair = 0; pair < left.bytes / 4; pair++)
      for (int column = 0; column < to.bytes / 4; column++) {
        float sum;
        std::memcpy(&sum, to.data[row] + 4 * column, 4);
        for (int i = 0; i < 2; i++)
          sum = flushed(sum + half(left.data[row] + 4 * pair + 2 * i) *
                                  half(right.data[pair] + 4 * column + 2 * i));
        std::memcpy(to.data[row] + 4 * column, &sum, 4);
      }
}

}  // namespace tile_emulator

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig tile_emulator::load_config
#define _tile_release tile_emulator::release
#define _tile_zero tile_emulator::zero
#define _tile_loadd tile_emulator::load
#define _tile_stored tile_emulator::store
#define _tile_dpbf16ps tile_emulator::multiply
