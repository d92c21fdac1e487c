// Runs CUDA kernel bodies as C++ on one CPU thread, for tests: every CUDA thread is a fiber; warp
// operations and barriers are meeting points. Shared memory is poisoned before every block. What
// CUDA leaves undefined is an error here: lanes that miss a warp operation, barriers that some
// threads never reach, accesses that are not aligned.
// Blocks run one after another, or two at a time: one of them stops where its first thread waits at
// a barrier, and goes on when the other one has ended. It cannot see a missing fence: its memory is
// always coherent.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define PSAP_GRID_CONSTANT
#define PSAP_LAUNCH(KERNEL, GRID, BLOCK, STREAM, ...) \
  (void)(STREAM), ::emu::launch(GRID, BLOCK, [&] { KERNEL(__VA_ARGS__); })
#define PSAP_SHARED(TYPE, NAME, ...)                     \
  static ::emu::Shared<TYPE __VA_ARGS__> NAME##_storage; \
  auto& NAME = NAME##_storage.value

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct __half {
  uint16_t bits;
};

namespace emu {

struct Dim3 {
  unsigned x;
};
inline Dim3 thread_index, block_index, block_dim, grid_dim;

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Order in which ready threads and blocks run. kOverlap + k: of two blocks the first runs until its
// first thread, which goes ahead of all others, is at barrier k + 1; then all of the second one.
enum Schedule {
  kForward,
  kReverse,
  kWarpByWarp,
  kWarpByWarpReverse,
  kRandom,
  kOverlap,
  kSchedules = kOverlap + 3
};
inline int schedule = kForward;

struct SharedBase {
  static std::vector<SharedBase*>& all() {
    static std::vector<SharedBase*> list;
    return list;
  }
  SharedBase() { all().push_back(this); }
  virtual void poison() = 0;
  virtual std::pair<char*, size_t> bytes() = 0;
  virtual ~SharedBase() = default;
};

template <class T>
struct Shared : SharedBase {
  T value;
  Shared() { poison(); }
  // NaN as a floating-point number, true as bool, a large number as an integer.
  void poison() override { std::memset(static_cast<void*>(&value), 0xff, sizeof value); }
  std::pair<char*, size_t> bytes() override {
    return {reinterpret_cast<char*>(&value), sizeof value};
  }
};
template <>
inline void Shared<bool>::poison() {
  value = true;
}

enum State { kReady, kAtWarp, kAtBlock, kDone };

struct Fiber {
  ucontext_t context;
  State state;
  int parity, barriers;
  void* fake_stack;
};

struct Warp {
  unsigned arrived = 0, wanted = 0, exited = 0;
  const char* what = nullptr;
  uint64_t slot[2][32] = {};
};

// What runs one block.
struct Machine {
  static constexpr size_t kStack = 256 * 1024;  // frames are large under a sanitizer
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<char> stacks;
  ucontext_t main;
  void* main_fake = nullptr;
  const void* main_stack = nullptr;
  size_t main_size = 0;
  std::function<void()> body;
  std::exception_ptr failure;
  int current = 0, alive = 0, at_barrier = 0;
  unsigned block = 0;
  std::vector<std::vector<char>> shared;  // while another block runs
};
inline Machine machines[2];
inline Machine* active = machines;

inline Fiber& me() { return active->fibers[active->current]; }
inline std::string where() {
  return " (block " + std::to_string(block_index.x) + ", thread " +
         std::to_string(active->current) + ")";
}

inline void to_main(bool finished) {
  Fiber& fiber = me();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(finished ? nullptr : &fiber.fake_stack, active->main_stack,
                                 active->main_size);
#endif
  (void)finished;
  swapcontext(&fiber.context, &active->main);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
#endif
}

inline void entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &active->main_stack, &active->main_size);
#endif
  try {
    active->body();
  } catch (...) {
    active->failure = std::current_exception();
  }
  me().state = kDone;
  to_main(true);
}

inline void resume(int thread) {
  active->current = thread;
  thread_index.x = thread;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&active->main_fake, &active->stacks[Machine::kStack * thread],
                                 Machine::kStack);
#endif
  swapcontext(&active->main, &active->fibers[thread].context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(active->main_fake, nullptr, nullptr);
#endif
}

inline void wait(State state) {
  me().state = state;
  to_main(false);
}

inline void release_block() {
  if (active->alive == 0 || active->at_barrier < active->alive) return;
  active->at_barrier = 0;
  for (Fiber& fiber : active->fibers) {
    if (fiber.state == kAtBlock) fiber.state = kReady;
  }
}

// All lanes of `mask` meet here; each leaves a value.
inline void meet(const char* what, unsigned mask, uint64_t value) {
  Warp& warp = active->warps[active->current / 32];
  const unsigned bit = 1u << (active->current % 32);
  if (!(mask & bit))
    throw Error(std::string(what) + ": the mask leaves out its own lane" + where());
  if (mask & warp.exited)
    throw Error(std::string(what) + ": a lane of the mask has ended" + where());
  if (warp.arrived && (warp.wanted != mask || warp.what != what)) {
    throw Error(std::string(what) + ": other lanes are at " + warp.what + where());
  }
  warp.what = what;
  warp.wanted = mask;
  warp.arrived |= bit;
  warp.slot[me().parity][active->current % 32] = value;
  if (warp.arrived != mask) return wait(kAtWarp);
  warp.arrived = 0;
  const int first = active->current / 32 * 32;
  for (int lane = 0; lane < 32; lane++) {
    if (mask >> lane & 1 && first + lane != active->current)
      active->fibers[first + lane].state = kReady;
  }
}

// What a lane left at the meeting; the next meeting uses the other set of slots.
inline uint64_t left_by(int lane) {
  return active->warps[active->current / 32].slot[me().parity][lane];
}

inline void ended(int thread) {
  Warp& warp = active->warps[thread / 32];
  warp.exited |= 1u << (thread % 32);
  if (warp.arrived && warp.wanted & warp.exited) {
    throw Error(std::string(warp.what) + ": a lane of the mask has ended (block " +
                std::to_string(block_index.x) + ")");
  }
  active->alive--;
  release_block();
}

// Makes a machine the one that runs; its block finds its shared memory as it was.
inline void activate(Machine& machine) {
  if (active != &machine) {
    active->shared.clear();
    for (SharedBase* shared : SharedBase::all()) {
      const auto [data, size] = shared->bytes();
      active->shared.emplace_back(data, data + size);
    }
    for (size_t i = 0; i < machine.shared.size(); i++) {
      std::copy(machine.shared[i].begin(), machine.shared[i].end(),
                SharedBase::all()[i]->bytes().first);
    }
    active = &machine;
  }
  block_index.x = machine.block;
}

inline void begin_block(Machine& machine, unsigned block, unsigned threads) {
  machine.block = block;
  activate(machine);
  for (SharedBase* shared : SharedBase::all()) shared->poison();
  machine.warps.assign((threads + 31) / 32, Warp());
  if (threads % 32) machine.warps.back().exited = ~0u << threads % 32;
  machine.alive = static_cast<int>(threads);
  machine.at_barrier = 0;
  for (unsigned t = 0; t < threads; t++) {
    Fiber& fiber = machine.fibers[t];
    fiber.state = kReady;
    fiber.parity = fiber.barriers = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = &machine.stacks[Machine::kStack * t];
    fiber.context.uc_stack.ss_size = Machine::kStack;
    fiber.context.uc_link = &machine.main;
    makecontext(&fiber.context, entry, 0);
  }
}

inline void run_thread(int thread) {
  resume(thread);
  if (active->failure) std::rethrow_exception(active->failure);
  if (me().state == kDone) ended(thread);
}

// To the end of the block.
inline void run_block(unsigned threads, std::mt19937& random) {
  std::vector<int> order(threads);
  for (unsigned t = 0; t < threads; t++) {
    const bool back = schedule == kReverse;
    const unsigned warp = (threads + 31) / 32 - 1 - t / 32;
    order[t] = back ? threads - 1 - t : schedule == kWarpByWarpReverse ? warp * 32 + t % 32 : t;
  }
  const bool by_warp = schedule == kWarpByWarp || schedule == kWarpByWarpReverse;
  while (active->alive > 0) {
    bool ran = false;
    if (schedule == kRandom) std::shuffle(order.begin(), order.end(), random);
    for (size_t i = 0; i < order.size(); i++) {
      const int t = order[i];
      if (t >= static_cast<int>(threads) || active->fibers[t].state != kReady) continue;
      ran = true;
      run_thread(t);
      // A warp runs as far as it can before the next one gets its turn.
      if (by_warp) i = i / 32 * 32 - 1;
    }
    if (!ran) throw Error("a barrier that some threads never reach" + where());
  }
}

// Until thread 0 has ended or waits at that barrier; of those that can run, the first one does.
inline void run_ahead(int barrier) {
  std::vector<Fiber>& fibers = active->fibers;
  while (fibers[0].state != kDone &&
         !(fibers[0].state == kAtBlock && fibers[0].barriers == barrier)) {
    const auto ready = [](const Fiber& fiber) { return fiber.state == kReady; };
    const auto next = std::find_if(fibers.begin(), fibers.end(), ready);
    if (next == fibers.end()) throw Error("a barrier that some threads never reach" + where());
    run_thread(static_cast<int>(next - fibers.begin()));
  }
}

template <class Kernel>
void launch(int64_t grid, unsigned block, const Kernel& kernel) {
  for (Machine& machine : machines) {
    machine.fibers.resize(block);
    machine.stacks.resize(Machine::kStack * block);
    machine.body = kernel;
    machine.failure = nullptr;
    if (schedule < kOverlap) break;
  }
  activate(machines[0]);
  grid_dim.x = static_cast<unsigned>(grid);
  block_dim.x = block;
  std::mt19937 random(1);
  std::vector<unsigned> blocks(grid);
  for (unsigned b = 0; b < blocks.size(); b++) blocks[b] = b;
  if (schedule == kReverse || schedule == kWarpByWarpReverse) {
    std::reverse(blocks.begin(), blocks.end());
  }
  if (schedule == kRandom) std::shuffle(blocks.begin(), blocks.end(), random);
  // Blocks that have company are the last ones: those are the last to finish.
  for (size_t b = 0; b < blocks.size(); b++) {
    begin_block(machines[0], blocks[b], block);
    if (schedule >= kOverlap && (blocks.size() - b) % 2 == 0) {
      run_ahead(schedule - kOverlap + 1);
      begin_block(machines[1], blocks[++b], block);
      run_block(block, random);
      activate(machines[0]);
    }
    run_block(block, random);
  }
}

}  // namespace emu
