#include "emulator.h"

#include <cudaTypedefs.h>
#include <setjmp.h>
#include <ucontext.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "wgmma.h"

namespace emu {
namespace {

constexpr size_t kStack = 128 * 1024;
constexpr int kLag = 40, kSteady = 40;  // rounds of the scheduler
constexpr double kPatience = 60;  // seconds of waiting until a deadlock is assumed

struct Run : Fiber {
  ucontext_t context;  // for the first entry; later switches are jumps, which need no system call
  jmp_buf here;
  std::unique_ptr<char[]> stack;
  cpo::Products products;
  bool begun = false, done = false;
};

struct Warp {
  uint32_t words[2][32];
  int arrived = 0;
  int turn = 0;
};

struct Cluster {
  std::mutex mutex;  // barriers and copies
  std::vector<std::function<void()>> copies;
  std::mt19937 random;
  std::atomic<int> arrived{0};
  std::atomic<int> turn{0};
  std::vector<uint8_t*> bases;  // dynamic shared memory of each CTA
  std::atomic<int> ready{0};
  int threads = 0;  // of all CTAs
};

struct Cta {
  Cluster* cluster;
  uint32_t rank;
  std::vector<Run> runs;
  std::vector<Warp> warps;
  int current = 0;
  int arrived = 0;
  int turn = 0;
  int any[2] = {0, 0};  // of __syncthreads_or, by turn
  jmp_buf scheduler;
  const std::function<void()>* body;
  std::chrono::steady_clock::time_point moved;
};

thread_local Cta* cta;

// What ran since the last call of emulator_log, for tests: "name:copies:cluster barriers" each.
struct Log {
  std::string text;
  std::atomic<int> copies{0}, cluster_syncs{0};
};
Log ran;
alignas(16) thread_local uint8_t dynamic_memory[228 * 1024];

struct Barrier {  // in the 8 bytes of the mbarrier
  int32_t bytes;
  uint16_t pending;
  uint8_t arrivals;
  uint8_t phase;
};
Barrier& barrier_at(uint32_t where) { return *reinterpret_cast<Barrier*>(pointer(where)); }

void settle(Barrier& barrier) {
  if (barrier.pending == 0 && barrier.bytes == 0) {
    barrier.phase ^= 1;
    barrier.pending = barrier.arrivals;
  }
}

void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s\n", what);
  std::abort();
}

void stuck(const char* what) {
  const std::chrono::duration<double> idle = std::chrono::steady_clock::now() - cta->moved;
  if (idle.count() > kPatience) fail(what);
}

void enter() {
  (*cta->body)();
  cta->runs[cta->current].done = true;
  cta->moved = std::chrono::steady_clock::now();
  _longjmp(cta->scheduler, 1);
}

// Runs a thread until it yields or ends.
__attribute__((noinline)) void resume(Run& run) {
  if (_setjmp(cta->scheduler)) return;
  if (run.begun) _longjmp(run.here, 1);
  run.begun = true;
  setcontext(&run.context);
}

void run_cta(Cluster& cluster, uint32_t rank, unsigned block, unsigned grid, unsigned threads,
             const std::function<void()>& body) {
  Cta mine{};
  mine.cluster = &cluster;
  mine.rank = rank;
  mine.runs = std::vector<Run>(threads);
  mine.warps = std::vector<Warp>((threads + 31) / 32);
  mine.body = &body;
  mine.moved = std::chrono::steady_clock::now();
  cta = &mine;
  std::memset(dynamic_memory, 0xFF, sizeof(dynamic_memory));  // NaN
  cluster.bases[rank] = dynamic_memory;
  ++cluster.ready;
  while (cluster.ready < static_cast<int>(cluster.bases.size())) std::this_thread::yield();
  for (unsigned i = 0; i < threads; ++i) {
    Run& run = mine.runs[i];
    run.thread = {i, 0, 0};
    run.block = {block, 0, 0};
    run.block_size = dim3{threads, 1, 1};
    run.grid = dim3{grid, 1, 1};
    run.stack.reset(new char[kStack]);
    getcontext(&run.context);
    run.context.uc_stack.ss_sp = run.stack.get();
    run.context.uc_stack.ss_size = kStack;
    run.context.uc_link = nullptr;
    makecontext(&run.context, reinterpret_cast<void (*)()>(enter), 0);
  }
  // Now and then one warp lags behind the others, by as much as they can do without it.
  std::mt19937 random(block + 1);
  unsigned lagging = 0;
  int lag = 0;
  for (bool alive = true; alive;) {
    alive = false;
    if (--lag < -kSteady) {
      lag = kLag;
      lagging = random() % mine.warps.size();
    }
    const unsigned first = random() % threads;
    for (unsigned i = 0; i < threads; ++i) {
      mine.current = static_cast<int>((first + i) % threads);
      if (mine.runs[mine.current].done) continue;
      alive = true;
      if (lag > 0 && mine.current / 32 == static_cast<int>(lagging)) continue;
      resume(mine.runs[mine.current]);
    }
  }
}

}  // namespace

Fiber& fiber() { return cta->runs[cta->current]; }
uint8_t* dynamic_shared() { return dynamic_memory; }
void yield() {
  if (!_setjmp(cta->runs[cta->current].here)) _longjmp(cta->scheduler, 1);
}

void launch(const std::function<void()>& body, const char* name, unsigned grid, unsigned block,
            size_t shared, cudaStream_t) {
  const std::string kernel(name);
  const bool pairs = kernel.find("row_cluster") == 0 || kernel.find("linear_kernel") == 0;
  const unsigned size = pairs ? 2 : 1;
  ran.copies = ran.cluster_syncs = 0;
  if (grid % size || shared > sizeof(dynamic_memory)) fail("launch of a grid that cannot run");
  for (unsigned first = 0; first < grid; first += size) {
    Cluster cluster;
    cluster.random.seed(first);
    cluster.bases.resize(size);
    cluster.threads = static_cast<int>(size * block);
    std::vector<std::thread> threads;
    for (unsigned rank = 0; rank < size; ++rank) {
      threads.emplace_back(run_cta, std::ref(cluster), rank, first + rank, grid, block,
                           std::cref(body));
    }
    for (std::thread& thread : threads) thread.join();
    if (!cluster.copies.empty()) fail("a kernel ended before its copies");
  }
  ran.text += kernel.substr(0, kernel.find('<')) + ":" + std::to_string(ran.copies) + ":" +
              std::to_string(ran.cluster_syncs / static_cast<int>(block)) + " ";
}

uint32_t shuffle_xor(uint32_t value, int step) {
  const int thread = static_cast<int>(fiber().thread.x), lane = thread % 32;
  Warp& warp = cta->warps[thread / 32];
  const int turn = warp.turn;
  warp.words[turn % 2][lane] = value;
  if (++warp.arrived == 32) {
    warp.arrived = 0;
    ++warp.turn;
    cta->moved = std::chrono::steady_clock::now();
  }
  while (warp.turn == turn) {
    stuck("a warp waits for lanes that do not come");
    yield();
  }
  return warp.words[turn % 2][lane ^ step];
}

uint32_t address(const void* pointer) {
  const auto offset = static_cast<const uint8_t*>(pointer) - dynamic_memory + kDynamicStart;
  return (static_cast<uint32_t>(offset) & 0xFFFFFF) | cta->rank << 24;
}
uint8_t* pointer(uint32_t address) {
  const auto offset = static_cast<int32_t>(address << 8) >> 8;  // 24 bits, signed
  return cta->cluster->bases[address >> 24] + offset - static_cast<int32_t>(kDynamicStart);
}
uint32_t rank() { return cta->rank; }
uint32_t peer(uint32_t address, uint32_t rank) { return (address & 0xFFFFFF) | rank << 24; }

void cluster_sync() {
  Cluster& cluster = *cta->cluster;
  ++ran.cluster_syncs;
  const int turn = cluster.turn;
  if (++cluster.arrived == cluster.threads) {
    cluster.arrived = 0;
    ++cluster.turn;
  }
  while (cluster.turn == turn) {
    stuck("a cluster waits for threads that do not come");
    yield();
  }
  cta->moved = std::chrono::steady_clock::now();
}

void barrier_init(uint32_t barrier, uint32_t arrivals) {
  barrier_at(barrier) = {0, static_cast<uint16_t>(arrivals), static_cast<uint8_t>(arrivals), 0};
}
void barrier_expect(uint32_t barrier, uint32_t bytes) {
  const std::lock_guard<std::mutex> guard(cta->cluster->mutex);
  Barrier& here = barrier_at(barrier);
  if (here.pending == 0) fail("more arrivals than a barrier expects");
  here.bytes += static_cast<int32_t>(bytes);
  --here.pending;
  settle(here);
}
void barrier_arrive(uint32_t barrier) { barrier_expect(barrier, 0); }
void copied(uint32_t barrier, uint32_t bytes) {
  Barrier& here = barrier_at(barrier);
  here.bytes -= static_cast<int32_t>(bytes);
  settle(here);
}
void later(const std::function<void()>& copy) {
  const std::lock_guard<std::mutex> guard(cta->cluster->mutex);
  cta->cluster->copies.push_back(copy);
  ++ran.copies;
}

void barrier_wait(uint32_t barrier, uint32_t parity) {
  Cluster& cluster = *cta->cluster;
  while (true) {
    {
      const std::lock_guard<std::mutex> guard(cluster.mutex);
      // Complete is the phase before the running one.
      if ((barrier_at(barrier).phase ^ 1) == static_cast<int>(parity & 1)) break;
      auto& copies = cluster.copies;
      if (!copies.empty() && cluster.random() % 8 == 0) {
        const size_t chosen = cluster.random() % copies.size();
        std::swap(copies[chosen], copies.back());
        const auto copy = copies.back();
        copies.pop_back();
        copy();
        cta->moved = std::chrono::steady_clock::now();
      }
    }
    stuck("a thread waits for a barrier whose phase does not end");
    yield();
  }
  cta->moved = std::chrono::steady_clock::now();
}

// --- tensor maps and the runtime calls of the launchers ------------------------------------------

struct Map {
  const uint16_t* base;
  uint64_t columns, rows, stride;
};

void read_box(uint32_t target, const CUtensorMap* opaque, int column, int row) {
  Map map;
  std::memcpy(&map, opaque, sizeof(map));
  for (int r = 0; r < 128; ++r) {
    for (int c = 0; c < 64; ++c) {
      const bool inside = static_cast<uint64_t>(row + r) < map.rows &&
                          static_cast<uint64_t>(column + c) < map.columns;
      const uint16_t value =
          inside ? map.base[static_cast<uint64_t>(row + r) * map.stride + column + c] : 0;
      uint32_t to = target + r * 128 + c * 2;
      to ^= (to >> 7 & 7) << 4;  // CU_TENSOR_MAP_SWIZZLE_128B
      std::memcpy(pointer(to), &value, 2);
    }
  }
}

static thread_local bool has_context = false;

static CUresult encode(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* base,
                       const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                       const cuuint32_t* steps, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  if (!has_context) return CUDA_ERROR_INVALID_CONTEXT;
  if (rank != 2 || strides[0] % 16 || reinterpret_cast<uintptr_t>(base) % 16 || box[0] != 64 ||
      box[1] != 128 || steps[0] != 1 || steps[1] != 1 || swizzle != CU_TENSOR_MAP_SWIZZLE_128B) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  const Map made{static_cast<const uint16_t*>(base), sizes[0], sizes[1], strides[0] / 2};
  std::memcpy(map, &made, sizeof(made));
  return CUDA_SUCCESS;
}

}  // namespace emu

namespace cpo {
Products& products() { return static_cast<emu::Run&>(emu::fiber()).products; }
}  // namespace cpo

void __syncthreads() {
  using namespace emu;
  const int turn = cta->turn;
  if (++cta->arrived == static_cast<int>(cta->runs.size())) {
    cta->arrived = 0;
    ++cta->turn;
    cta->moved = std::chrono::steady_clock::now();
  }
  while (cta->turn == turn) {
    stuck("a CTA waits for threads that do not come");
    yield();
  }
}

int __syncthreads_or(int predicate) {
  using namespace emu;
  const int place = cta->turn % 2;
  cta->any[place] |= predicate != 0;
  cta->any[place ^ 1] = 0;  // everybody has left the turn before
  __syncthreads();
  return cta->any[place];
}

extern "C" {
const char* emulator_log() {
  static std::string last;
  last = emu::ran.text;
  emu::ran.text.clear();
  return last.c_str();
}
static int current_device = 0;
// As in the runtime, a fresh thread has a current device but no current context.
cudaError_t cudaSetDevice(int device) {
  current_device = device;
  emu::has_context = true;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "emulated error"; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int device) {
  // Device 0 is a Hopper of six multiprocessors, device 1 an Ampere of two.
  const bool hopper = device == 0;
  *value = name == cudaDevAttrMultiProcessorCount           ? (hopper ? 6 : 2)
           : name == cudaDevAttrComputeCapabilityMajor ? (hopper ? 9 : 8)
                                                       : 0;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* status) {
  *function = reinterpret_cast<void*>(&emu::encode);
  *status = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
}
