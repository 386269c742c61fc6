// Kernels on the host, for tests on a machine without a GPU: what platform.cuh has of CUDA, for a plain C++17 compiler.
//
// A block's threads are fibers on one thread of the operating system. One runs until it reaches a barrier, an operation of its warp
// or async_wait; then another one does, drawn at random from a seeded generator, so that a missing barrier shows as a wrong or a poisoned
// value. Blocks run one after the other in a shuffled order. Everything a GPU would leave undefined is made to show:
//
//   shared memory             exactly as large as the launch says, full of NaN (0xff) before each block
//   async_copy_16             its 16 bytes are NaN until async_wait of their group copies them
//   __syncthreads, *_sync     an error when threads have ended or are at another place in the source, or when the mask is not full
//   bounds                    with -fsanitize=address
//   alignment, races          with -fsanitize=thread: see below; ldmatrix and async_copy_16 check their alignment always
//
// src/cuda/emulated.rs compiles each file of csrc into a shared library of its own and calls the entries that KERNEL defines.
#pragma once

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <array>
#include <exception>
#include <memory>
#include <unordered_map>
#include <vector>

#ifdef __SANITIZE_THREAD__
#include <dlfcn.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__x86_64__)
#define HOST_ASSEMBLY
#else
#include <ucontext.h>
#endif

// What a kernel's entry is called with; `repr(C)` twin in src/cuda/emulated.rs.
struct HostLaunch {
  const void* params;
  u64 params_bytes;
  u32 grid[2];
  u32 threads;
  u32 shared_bytes;
  u64 seed;
  char* message;  // filled when the entry returns something else than 0
  u64 message_bytes;
  const u64 (*allocations)[2];  // where device memory is: begin and end, ascending
  u64 allocations_count;
};

// The machinery itself is not looked at by the sanitisers: it would take most of the time.
#define HOST_PLAIN __attribute__((no_sanitize("address", "undefined", "thread")))

namespace host {

struct Index {
  u32 x, y, z;
};

// Where in the source a thread waits.
struct Site {
  const char* what;
  const char* file;
  u32 line;
  HOST_PLAIN bool same(const Site& other) const {
    auto equal = [](const char* a, const char* b) { return a == b || !strcmp(a, b); };
    return line == other.line && equal(what, other.what) && equal(file, other.file);
  }
};

struct Copy {
  u8* to;
  const u8* from;
  u32 bytes;
  Site site;
};

#ifdef HOST_ASSEMBLY
using Context = void*;  // the stack pointer; registers lie above it
#else
using Context = ucontext_t;
#endif

struct Fiber {
  Index thread;
  bool ended;
  bool waits;
  Site site;
  void* payload;  // of the warp operation it waits at
  std::vector<Copy> copies;
  std::vector<size_t> groups;  // where in `copies` each committed group ends
  Context context;
  u8* stack;
  void* fake_stack;  // the address sanitiser's
};

// Threads that have arrived at the same place and wait for the others.
struct Meeting {
  Site site;
  u32 arrived;
};

// A thread's access to a byte, and how many barriers it had passed.
struct Access {
  u32 block;  // the how manieth of all that have run, from 1 on; 0: no access
  u32 thread;
  u32 barriers, warp_barriers;
  const void* at;  // the instruction, or the file's name when there is a line
  u32 line;
};
struct Cell {
  Access written, read[2];  // of many readers two
};

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t STACK_BYTES = 512 << 10;
#else
constexpr size_t STACK_BYTES = 192 << 10;
#endif
// Stacks begin at different places of a page: the cache has few places for lines at the same one.
constexpr size_t STACK_STEP = 448, STACK_STEPS = 128;
constexpr size_t GUARD_BYTES = 64 << 10;
constexpr size_t FENCE_BYTES = 128;

// Threads that end or are given up leave the address sanitiser's marks of their frames on their stacks.
inline void unmark(const void* from, size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(from, bytes);
#endif
  (void)from, (void)bytes;
}

struct Machine {
  const HostLaunch* launch;
  const char* kernel;
  void (*body)(const void*);
  const void* params;
  Index block, grid, threads;
  u8* shared;
  bool failed;
  u64 random;
  std::vector<Fiber> fibers;
  Fiber* ready[1024];
  u32 ready_count;
  std::vector<Meeting> warps;
  Meeting barrier;
  u32 block_number, barriers, warp_barriers[32];
  std::vector<Cell> shared_cells;
  std::unordered_map<u64, std::array<Access, 16>> written;  // device memory, by 16 bytes
  bool looking;
  Context scheduler;
  void* fake_stack;
  const void* scheduler_stack;
  size_t scheduler_stack_bytes;

  ~Machine() {
    for (Fiber& fiber : fibers) {
      unmark(fiber.stack, STACK_BYTES);
      munmap(fiber.stack - GUARD_BYTES, STACK_BYTES + GUARD_BYTES);
    }
  }
  HOST_PLAIN u32 draw(u32 below) {  // 0 to below - 1
    random ^= random << 13;
    random ^= random >> 7;
    random ^= random << 17;
    return static_cast<u32>((random >> 32) * below >> 32);
  }
};

// A kernel never moves to another thread of the operating system.
static thread_local Machine* machine = nullptr;
static thread_local Fiber* self = nullptr;

#ifdef HOST_ASSEMBLY
// Saves what a function must preserve, changes the stack, and goes on where that one was left.
extern "C" __attribute__((visibility("hidden"))) void openlora_switch(void** leave, void* enter);
asm(R"(
.text
.type openlora_switch, @function
.hidden openlora_switch
.globl openlora_switch
openlora_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size openlora_switch, .-openlora_switch
)");
inline void switch_context(Context& leave, Context& enter) { openlora_switch(&leave, enter); }
inline void start_context(Context& context, u8*, u8* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack);
  top[-1] = nullptr;  // where a backtrace ends
  top[-2] = reinterpret_cast<void*>(entry);
  for (int i = 3; i <= 8; i++) top[-i] = nullptr;
  context = top - 8;
}
#else
inline void switch_context(Context& leave, Context& enter) { swapcontext(&leave, &enter); }
inline void start_context(Context& context, u8* stack, u8* end, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = static_cast<size_t>(end - stack);
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
#endif

HOST_PLAIN inline void enter_fiber(Fiber* fiber) {
  self = fiber;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&machine->fake_stack, fiber->stack, STACK_BYTES);
#endif
  switch_context(machine->scheduler, fiber->context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(machine->fake_stack, nullptr, nullptr);
#endif
  self = nullptr;
}

// Back to the scheduler, until it picks this thread again.
HOST_PLAIN inline void leave_fiber(bool for_good = false) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &self->fake_stack, machine->scheduler_stack, machine->scheduler_stack_bytes);
#endif
  switch_context(self->context, machine->scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self->fake_stack, nullptr, nullptr);
#endif
  (void)for_good;
}

__attribute__((format(printf, 1, 2))) inline void report(const char* format, ...) {
  if (machine->failed) return;
  machine->failed = true;
  char* to = machine->launch->message;
  size_t room = machine->launch->message_bytes;
  int used = snprintf(to, room, "block (%u, %u) of (%u, %u)", machine->block.x, machine->block.y, machine->grid.x, machine->grid.y);
  if (self && used > 0 && static_cast<size_t>(used) < room) used += snprintf(to + used, room - used, ", thread %u", self->thread.x);
  if (used > 0 && static_cast<size_t>(used) < room) used += snprintf(to + used, room - used, ": ");
  if (used < 0 || static_cast<size_t>(used) >= room) return;
  va_list values;
  va_start(values, format);
  vsnprintf(to + used, room - used, format, values);
  va_end(values);
}

// Ends the launch with a message.
#define HOST_FAIL(...)              \
  do {                              \
    ::host::report(__VA_ARGS__);    \
    for (;;) ::host::leave_fiber(); \
  } while (false)

#ifdef __SANITIZE_THREAD__
// Races. -fsanitize=thread calls a function before every access to memory; here is what these functions do instead of that sanitiser's
// library, which knows nothing of blocks and warps. Two accesses to a byte by different threads, one of them a write, need a barrier
// between them: __syncthreads, or __syncwarp within a warp. Shuffles, votes, ldmatrix and mma are none: they order no memory. Threads
// of different blocks have no barrier at all. In device memory only writes are remembered: what reads before another one writes is
// found in another order, which the next launch has.
HOST_PLAIN inline bool unordered(const Access& then, const Access& now) {
  if (then.block == 0 || (then.block == now.block && then.thread == now.thread)) return false;
  if (then.block != now.block) return true;
  if (then.barriers < now.barriers) return false;
  return then.thread / WARP != now.thread / WARP || then.warp_barriers >= now.warp_barriers;
}

// Where in the source an access is.
inline void describe(const Access& access, char* to, size_t room) {
  const void* instruction = access.at;
  if (access.line) {
    snprintf(to, room, "%s:%u", static_cast<const char*>(access.at), access.line);
    return;
  }
  Dl_info info;
  snprintf(to, room, "%p", instruction);
  if (!dladdr(instruction, &info)) return;
  char command[1024];
  snprintf(command, sizeof command, "addr2line -s -i -e '%s' 0x%llx", info.dli_fname,
           static_cast<u64>(static_cast<const u8*>(instruction) - static_cast<u8*>(info.dli_fbase)) - 1);
  FILE* output = popen(command, "r");
  if (!output) return;
  // A line for the place, then one for each function that it was inlined into.
  char frame[256];
  for (size_t used = 0; used < room && fgets(frame, sizeof frame, output);) {
    frame[strcspn(frame, " \n")] = 0;
    used += static_cast<size_t>(snprintf(to + used, room - used, "%s%s", used ? " from " : "", frame));
    if (strstr(frame, ".cu:")) break;
  }
  pclose(output);
}

inline void report_race(const Access& then, bool then_writes, const Access& now, bool writes, const char* space, u64 offset) {
  char here[256], there[256], other[64] = "";
  describe(now, here, sizeof here);
  describe(then, there, sizeof there);
  if (then.block != now.block) snprintf(other, sizeof other, " of another block");
  report("a race for byte %llu of %s: %s at %s what thread %u%s %s at %s, with no barrier between", offset, space,
         writes ? "writes" : "reads", here, then.thread, other, then_writes ? "wrote" : "read", there);
}

inline void look_at_alignment(const void* address, u64 bytes, bool write, const Access& now) {
  if (bytes > 16 || (bytes & (bytes - 1)) || reinterpret_cast<u64>(address) % (bytes ? bytes : 1) == 0) return;
  char here[256];
  describe(now, here, sizeof here);
  report("%s %llu bytes at %s from an address that is not aligned to them", write ? "writes" : "reads", bytes, here);
}

HOST_PLAIN inline void look_at_shared(u64 offset, bool write, const Access& now) {
  Cell& cell = machine->shared_cells[offset];
  // What earlier blocks did there was in memory of their own.
  if (cell.written.block != now.block) cell.written.block = 0;
  if (unordered(cell.written, now)) return report_race(cell.written, true, now, write, "shared memory", offset);
  Access* slot = &cell.read[machine->draw(2)];
  for (Access& read : cell.read) {
    if (read.block != now.block) read.block = 0;
    if (write && unordered(read, now)) return report_race(read, false, now, true, "shared memory", offset);
    if (read.block == 0 || read.thread == now.thread) slot = &read;
  }
  if (write) {
    cell = Cell{now, {}};
  } else {
    *slot = now;
  }
}

HOST_PLAIN inline void look_at_global(u64 address, u64 bytes, bool write, const Access& now) {
  u64 low = 0, high = machine->launch->allocations_count;
  while (low < high) {
    u64 middle = (low + high) / 2;
    if (machine->launch->allocations[middle][1] <= address) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  if (low == machine->launch->allocations_count || machine->launch->allocations[low][0] > address) return;
  look_at_alignment(reinterpret_cast<const void*>(address), bytes, write, now);
  std::array<Access, 16>* line = nullptr;
  for (u64 i = address; i < address + bytes && !machine->failed; i++) {
    if (!line || i % 16 == 0) {
      auto found = machine->written.find(i / 16);
      line = found != machine->written.end() ? &found->second : write ? &machine->written[i / 16] : nullptr;
      if (!line) {
        i |= 15;
        continue;
      }
    }
    Access& then = (*line)[i % 16];
    if (unordered(then, now)) report_race(then, true, now, write, "an allocation", i - machine->launch->allocations[low][0]);
    if (write) then = now;
  }
}

HOST_PLAIN __attribute__((noinline)) void access(const void* address, u64 bytes, bool write, const void* at, u32 line = 0) {
  if (!machine || !self || machine->looking || machine->failed) return;
  const u8* from = static_cast<const u8*>(address);
  if (from >= self->stack && from < self->stack + STACK_BYTES) return;
  Machine& m = *machine;
  Access now{m.block_number, self->thread.x, m.barriers, m.warp_barriers[self->thread.x / WARP], at, line};
  m.looking = true;
  if (from >= m.shared && from < m.shared + m.launch->shared_bytes) {
    u64 begin = static_cast<u64>(from - m.shared);
    look_at_alignment(address, bytes, write, now);
    for (u64 i = begin; i < begin + bytes && i < m.launch->shared_bytes && !m.failed; i++) look_at_shared(i, write, now);
  } else {
    look_at_global(reinterpret_cast<u64>(address), bytes, write, now);
  }
  m.looking = false;
  if (m.failed) {
    for (;;) leave_fiber();
  }
}

#define HOST_ACCESS(bytes)                                                                                              \
  extern "C" HOST_PLAIN void __tsan_read##bytes(void* at) { access(at, bytes, false, __builtin_return_address(0)); }    \
  extern "C" HOST_PLAIN void __tsan_write##bytes(void* at) { access(at, bytes, true, __builtin_return_address(0)); }
HOST_ACCESS(1)
HOST_ACCESS(2)
HOST_ACCESS(4)
HOST_ACCESS(8)
HOST_ACCESS(16)
extern "C" HOST_PLAIN void __tsan_read_range(void* at, unsigned long bytes) {
  access(at, bytes, false, __builtin_return_address(0));
}
extern "C" HOST_PLAIN void __tsan_write_range(void* at, unsigned long bytes) {
  access(at, bytes, true, __builtin_return_address(0));
}
extern "C" HOST_PLAIN void __tsan_init() {}
extern "C" HOST_PLAIN void __tsan_func_entry(void*) {}
extern "C" HOST_PLAIN void __tsan_func_exit() {}
extern "C" HOST_PLAIN void __tsan_vptr_update(void*, void*) {}
#define HOST_LOOK(address, bytes, write, site) ::host::access(address, bytes, write, (site).file, (site).line)
#else
#define HOST_LOOK(address, bytes, write, site) ((void)0)
#endif

inline void fiber_entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine->scheduler_stack, &machine->scheduler_stack_bytes);
#endif
  try {
    machine->body(machine->params);
  } catch (const std::exception& thrown) {
    report("an exception: %s", thrown.what());
  } catch (...) {
    report("an exception");
  }
  self->ended = true;
  leave_fiber(true);
  abort();  // an ended thread is never picked
}

// Waits at a place in the source, and notices who comes to another one. True for the last.
HOST_PLAIN inline bool arrive(Meeting& meeting, u32 expected, const Site& site) {
  if (meeting.arrived > 0 && !meeting.site.same(site)) {
    HOST_FAIL("is at %s (%s:%u) while others wait at %s (%s:%u)", site.what, site.file, site.line, meeting.site.what,
              meeting.site.file, meeting.site.line);
  }
  meeting.site = site;
  self->site = site;
  self->waits = true;
  return ++meeting.arrived == expected;
}

HOST_PLAIN inline void release(Meeting& meeting, u32 first, u32 count) {
  meeting.arrived = 0;
  // Warps from an arbitrary one on.
  u32 turn = count > WARP ? machine->draw(count / WARP) * WARP : 0;
  for (u32 i = 0; i < count; i++) {
    u32 at = i + turn < count ? i + turn : i + turn - count;
    Fiber& fiber = machine->fibers[first + at];
    fiber.waits = false;
    machine->ready[machine->ready_count++] = &fiber;
  }
}

HOST_PLAIN inline void sync_block(const Site& site) {
  if (arrive(machine->barrier, machine->threads.x, site)) {
    machine->barriers++;
    release(machine->barrier, 0, machine->threads.x);
  }
  leave_fiber();
}

// The last lane to arrive does the work for all: `combine` has what each lane brought, by its number.
HOST_PLAIN inline void sync_warp(const Site& site, u32 mask, void* payload = nullptr, void (*combine)(void* const (&lanes)[WARP]) = nullptr) {
  if (mask != ALL_LANES) HOST_FAIL("%s (%s:%u) with mask %08x, which is not full", site.what, site.file, site.line, mask);
  u32 warp = self->thread.x / WARP;
  self->payload = payload;
  if (arrive(machine->warps[warp], WARP, site)) {
    if (combine) {
      void* lanes[WARP];
      for (u32 lane = 0; lane < WARP; lane++) lanes[lane] = machine->fibers[warp * WARP + lane].payload;
      combine(lanes);
    }
    release(machine->warps[warp], warp * WARP, WARP);
  }
  leave_fiber();
}

inline bool in_shared(const void* address, u64 bytes) {
  const u8* at = static_cast<const u8*>(address);
  return at >= machine->shared && at + bytes <= machine->shared + machine->launch->shared_bytes;
}

// Says why no thread can go on.
inline void report_stuck() {
  u32 ended = 0;
  const Fiber *first = nullptr, *other = nullptr;
  for (const Fiber& fiber : machine->fibers) {
    if (fiber.thread.x >= machine->threads.x) break;
    if (fiber.ended) ended++;
    if (!fiber.waits) continue;
    if (!first) first = &fiber;
    if (!other && !first->site.same(fiber.site)) other = &fiber;
  }
  if (!first) return report("no thread is left that could go on");
  char more[256] = "";
  if (other) {
    snprintf(more, sizeof more, ", thread %u at %s (%s:%u)", other->thread.x, other->site.what, other->site.file, other->site.line);
  }
  report("%u of %u threads have ended, but thread %u waits at %s (%s:%u)%s", ended, machine->threads.x, first->thread.x,
         first->site.what, first->site.file, first->site.line, more);
}

HOST_PLAIN inline void run_block() {
  Machine& m = *machine;
  memset(m.shared - FENCE_BYTES, 0xA5, FENCE_BYTES);
  memset(m.shared, 0xFF, m.launch->shared_bytes);
  m.ready_count = 0;
  m.barrier.arrived = 0;
  m.block_number++;
  m.barriers = 0;
  memset(m.warp_barriers, 0, sizeof m.warp_barriers);
  m.warps.assign(m.threads.x / WARP, Meeting{});
  for (u32 i = 0; i < m.threads.x; i++) {
    Fiber& fiber = m.fibers[i];
    fiber.thread = {i, 0, 0};
    fiber.ended = fiber.waits = false;
    fiber.copies.clear();
    fiber.groups.clear();
    u8* end = fiber.stack + STACK_BYTES - i % STACK_STEPS * STACK_STEP;
    unmark(end - 4096, 4096);
    start_context(fiber.context, fiber.stack, end, fiber_entry);
  }
  release(m.barrier, 0, m.threads.x);
  // In most blocks one warp runs ahead of the others as far as it can, in the others threads are drawn from all warps.
  u32 among = m.draw(4) ? WARP : ~0u;
  while (m.ready_count > 0 && !m.failed) {
    u32 last = m.ready_count - 1, pick = last - m.draw(last < among ? last + 1 : among);
    Fiber* fiber = m.ready[pick];
    m.ready[pick] = m.ready[last];
    m.ready_count = last;
    enter_fiber(fiber);
  }
  for (u32 i = 0; i < m.threads.x && !m.failed; i++) {
    if (!m.fibers[i].ended) report_stuck();
  }
  for (size_t i = 0; i < FENCE_BYTES && !m.failed; i++) {
    if (m.shared[i - FENCE_BYTES] != 0xA5) report("wrote %zu bytes before its shared memory", FENCE_BYTES - i);
  }
}

// Behind a pointer: a library loaded late has little room for what every thread has one of.
inline Machine& machine_of_this_thread() {
  static thread_local std::unique_ptr<Machine> mine;
  if (!mine) mine = std::make_unique<Machine>();
  return *mine;
}

inline void make_fibers(Machine& m, u32 count) {
  while (m.fibers.size() < count) {
    size_t bytes = STACK_BYTES + GUARD_BYTES;
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, GUARD_BYTES, PROT_NONE);
    Fiber fiber{};
    fiber.stack = static_cast<u8*>(memory) + GUARD_BYTES;
    m.fibers.push_back(std::move(fiber));
  }
}

template <typename Params>
int run(const char* kernel, u32 threads_max, const HostLaunch* launch, void (*body)(const void*)) {
  static_assert(sizeof(Params) <= 4096, "a kernel's argument has at most 4096 bytes");
  auto refuse = [&](const char* why, u64 found, u64 expected) {
    snprintf(launch->message, launch->message_bytes, "%s: %llu, expected %llu", why, found, expected);
    return 1;
  };
  if (launch->params_bytes != sizeof(Params)) return refuse("bytes of the argument", launch->params_bytes, sizeof(Params));
  if (launch->threads > threads_max) return refuse("threads of a block", launch->threads, threads_max);
  alignas(Params) u8 params[sizeof(Params)];
  memcpy(params, launch->params, sizeof(Params));

  Machine& m = machine_of_this_thread();
  machine = &m;
  m.launch = launch;
  m.kernel = kernel;
  m.body = body;
  m.params = params;
  m.grid = {launch->grid[0], launch->grid[1], 1};
  m.threads = {launch->threads, 1, 1};
  m.failed = m.looking = false;
  m.written.clear();
#ifdef __SANITIZE_THREAD__
  if (m.shared_cells.size() < launch->shared_bytes) m.shared_cells.resize(launch->shared_bytes);
#endif
  m.random = (launch->seed + 1) * 0x9E3779B97F4A7C15ull | 1;
  make_fibers(m, launch->threads);
  // Exactly as large as asked for, so that the address sanitiser sees the byte behind it; the fence is for the one before it.
  void* shared = nullptr;
  if (posix_memalign(&shared, 128, FENCE_BYTES + launch->shared_bytes)) return refuse("shared memory", launch->shared_bytes, 0);
  m.shared = static_cast<u8*>(shared) + FENCE_BYTES;

  u64 blocks = static_cast<u64>(launch->grid[0]) * launch->grid[1];
  std::vector<u32> order(blocks);
  for (u64 i = 0; i < blocks; i++) {
    u64 at = m.draw(static_cast<u32>(i + 1));
    order[i] = order[at];
    order[at] = static_cast<u32>(i);
  }
  for (u64 i = 0; i < blocks && !m.failed; i++) {
    m.block = {order[i] % launch->grid[0], order[i] / launch->grid[0], 0};
    run_block();
  }
  if (m.failed) {
    for (Fiber& fiber : m.fibers) unmark(fiber.stack, STACK_BYTES);
  }
  free(shared);
  machine = nullptr;
  return m.failed ? 2 : 0;
}

// Bits as another type of the same size.
template <typename To, typename From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "sizes");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace host

#define DEVICE inline
#define KERNEL(name, Params, THREADS) HOST_KERNEL(name, Params, THREADS)
#define HOST_KERNEL(name, Params, THREADS)                                                                              \
  static void name(const Params& p);                                                                                    \
  extern "C" __attribute__((visibility("default"))) int openlora_host_##name(const HostLaunch* launch) {                \
    return ::host::run<Params>(#name, THREADS, launch, [](const void* p) { name(*static_cast<const Params*>(p)); });    \
  }                                                                                                                     \
  static void name(const Params& p)

#define threadIdx (::host::self->thread)
#define blockIdx (::host::machine->block)
#define gridDim (::host::machine->grid)
#define blockDim (::host::machine->threads)
#define HOST_HERE u32 line = __builtin_LINE(), const char *file = __builtin_FILE()

#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __constant__ static const
#define __align__(bytes) __attribute__((aligned(bytes)))

inline u8* shared_memory() { return ::host::machine->shared; }

inline void __syncthreads(HOST_HERE) { ::host::sync_block({"__syncthreads", file, line}); }
inline void __syncwarp(u32 mask = ALL_LANES, HOST_HERE) {
  ::host::sync_warp({"__syncwarp", file, line}, mask, nullptr, [](void* const (&)[WARP]) {
    ::host::machine->warp_barriers[::host::self->thread.x / WARP]++;
  });
}
[[noreturn]] inline void __trap(HOST_HERE) { HOST_FAIL("__trap (%s:%u)", file, line); }

namespace host {

template <typename T>
struct Shuffle {
  T value, result;
  int from;
};
// `from` is a lane, or -1 for the lane's own value.
template <typename T>
inline T shuffle(const Site& site, u32 mask, T value, int from) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  Shuffle<T> mine{value, value, from};
  sync_warp(site, mask, &mine, [](void* const(&lanes)[WARP]) {
    for (void* lane : lanes) {
      auto* to = static_cast<Shuffle<T>*>(lane);
      if (to->from >= 0) to->result = static_cast<Shuffle<T>*>(lanes[to->from])->value;
    }
  });
  return mine.result;
}
inline int lane() { return static_cast<int>(self->thread.x % WARP); }

struct Vote {
  bool mine;
  u32 all;
};
inline u32 vote(const Site& site, u32 mask, bool yes) {
  Vote mine{yes, 0};
  sync_warp(site, mask, &mine, [](void* const(&lanes)[WARP]) {
    u32 all = 0;
    for (u32 i = 0; i < WARP; i++) all |= static_cast<u32>(static_cast<Vote*>(lanes[i])->mine) << i;
    for (void* lane : lanes) static_cast<Vote*>(lane)->all = all;
  });
  return mine.all;
}

}  // namespace host

template <typename T>
inline T __shfl_sync(u32 mask, T value, int from, int width = 32, HOST_HERE) {
  int first = ::host::lane() & ~(width - 1);
  return ::host::shuffle({"__shfl_sync", file, line}, mask, value, first + (from & (width - 1)));
}
template <typename T>
inline T __shfl_xor_sync(u32 mask, T value, int distance, int width = 32, HOST_HERE) {
  int from = ::host::lane() ^ distance, last = ::host::lane() | (width - 1);
  return ::host::shuffle({"__shfl_xor_sync", file, line}, mask, value, from > last ? -1 : from);
}
template <typename T>
inline T __shfl_up_sync(u32 mask, T value, u32 distance, int width = 32, HOST_HERE) {
  int from = ::host::lane() - static_cast<int>(distance), first = ::host::lane() & ~(width - 1);
  return ::host::shuffle({"__shfl_up_sync", file, line}, mask, value, from < first ? -1 : from);
}
template <typename T>
inline T __shfl_down_sync(u32 mask, T value, u32 distance, int width = 32, HOST_HERE) {
  int from = ::host::lane() + static_cast<int>(distance), last = ::host::lane() | (width - 1);
  return ::host::shuffle({"__shfl_down_sync", file, line}, mask, value, from > last ? -1 : from);
}
inline u32 __ballot_sync(u32 mask, int yes, HOST_HERE) { return ::host::vote({"__ballot_sync", file, line}, mask, yes != 0); }
inline int __any_sync(u32 mask, int yes, HOST_HERE) { return ::host::vote({"__any_sync", file, line}, mask, yes != 0) != 0; }
inline int __all_sync(u32 mask, int yes, HOST_HERE) { return ::host::vote({"__all_sync", file, line}, mask, yes != 0) == ALL_LANES; }

inline u32 __float_as_uint(float x) { return ::host::bits_as<u32>(x); }
inline i32 __float_as_int(float x) { return ::host::bits_as<i32>(x); }
inline float __uint_as_float(u32 x) { return ::host::bits_as<float>(x); }
inline float __int_as_float(i32 x) { return ::host::bits_as<float>(x); }
inline i64 __double_as_longlong(double x) { return ::host::bits_as<i64>(x); }
inline double __longlong_as_double(i64 x) { return ::host::bits_as<double>(x); }

inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

inline int __popc(u32 x) { return __builtin_popcount(x); }
inline int __popcll(u64 x) { return __builtin_popcountll(x); }
inline int __ffs(i32 x) { return __builtin_ffs(x); }
inline int __ffsll(i64 x) { return __builtin_ffsll(x); }
inline int __clz(i32 x) { return x == 0 ? 32 : __builtin_clz(static_cast<u32>(x)); }
inline int __clzll(i64 x) { return x == 0 ? 64 : __builtin_clzll(static_cast<u64>(x)); }
inline u32 __umulhi(u32 a, u32 b) { return static_cast<u32>(static_cast<u64>(a) * b >> 32); }
inline u64 __umul64hi(u64 a, u64 b) { return static_cast<u64>(static_cast<unsigned __int128>(a) * b >> 64); }

#define HOST_MIN_MAX(T)                                  \
  inline T min(T a, T b) { return b < a ? b : a; }       \
  inline T max(T a, T b) { return a < b ? b : a; }
HOST_MIN_MAX(i32)
HOST_MIN_MAX(u32)
HOST_MIN_MAX(i64)
HOST_MIN_MAX(u64)
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

template <typename T>
inline T __ldg(const T* from) {
  return *from;
}

inline float as_float(bf16 x) { return __uint_as_float(static_cast<u32>(x.bits) << 16); }
inline float as_float(f16 x) {
  u32 sign = static_cast<u32>(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  // NaN and infinity, numbers, and what is too small for an exponent: so many times 2^-24.
  if (rest >= 0x7c00) return __uint_as_float(sign | 0x7f800000 | (rest & 0x3ff) << 13 | (rest > 0x7c00 ? 0x400000 : 0));
  if (rest >= 0x0400) return __uint_as_float(sign | ((rest << 13) + 0x38000000));
  float small = static_cast<float>(rest) * 0x1p-24f;
  return sign ? -small : small;
}
inline bf16 to_bf16(float x) {
  u32 bits = __float_as_uint(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return bf16{static_cast<u16>(bits >> 16 | 0x40)};
  return bf16{static_cast<u16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline f16 to_f16(float x) {
  u32 bits = __float_as_uint(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return f16{static_cast<u16>(sign | 0x7e00 | (rest >> 13 & 0x3ff))};
  if (rest >= 0x477fe000) return f16{static_cast<u16>(sign | 0x7bff)};  // 65504 and above
  if (rest < 0x38800000) {
    // Below 2^-14. The lowest bit of a number around 0.5 is worth 2^-24: the sum rounds as it must.
    return f16{static_cast<u16>(sign | (__float_as_uint(__uint_as_float(rest) + 0.5f) - 0x3f000000))};
  }
  return f16{static_cast<u16>(sign | ((rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13))};
}

namespace host {
// Numbers too small for an exponent are zeros.
inline float flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }
}  // namespace host
inline float exp2_approx(float x) { return ::host::flushed(exp2f(::host::flushed(x))); }
inline float rsqrt_approx(float x) { return ::host::flushed(1.0f / sqrtf(::host::flushed(x))); }

namespace host {

struct Mma {
  float* d;
  const u32 *a, *b;
};
inline u16 half_of(u32 word, u32 which) { return static_cast<u16>(word >> 16 * which); }

// With g = lane / 4 and t = lane % 4, a register holds two numbers that are neighbours in k:
//   a[0]: row g, k 2t    a[1]: row g + 8, k 2t    a[2]: row g, k 2t + 8    a[3]: row g + 8, k 2t + 8
//   b[0]: k 2t, column g    b[1]: k 2t + 8, column g
//   d[0], d[1]: row g, columns 2t and 2t + 1    d[2], d[3]: row g + 8
template <typename T>
HOST_PLAIN void mma(void* const (&lanes)[WARP]) {
  float a[16][16], b[16][8];
  for (u32 lane = 0; lane < WARP; lane++) {
    const Mma& mine = *static_cast<Mma*>(lanes[lane]);
    u32 g = lane / 4, t = lane % 4;
    for (u32 i = 0; i < 8; i++) a[g + (i / 2 % 2) * 8][2 * t + (i / 4) * 8 + i % 2] = as_float(T{half_of(mine.a[i / 2], i % 2)});
    for (u32 i = 0; i < 4; i++) b[2 * t + (i / 2) * 8 + i % 2][g] = as_float(T{half_of(mine.b[i / 2], i % 2)});
  }
  for (u32 lane = 0; lane < WARP; lane++) {
    const Mma& mine = *static_cast<Mma*>(lanes[lane]);
    for (u32 i = 0; i < 4; i++) {
      u32 row = lane / 4 + (i / 2) * 8, column = lane % 4 * 2 + i % 2;
      float sum = mine.d[i];
      for (u32 k = 0; k < 16; k++) sum += a[row][k] * b[k][column];
      mine.d[i] = sum;
    }
  }
}

// A lane brings what its row holds when it arrives: what another lane writes later, without a barrier between, is not in it.
struct Matrices {
  u32* to;
  u16 row[8];
};
template <bool trans>
HOST_PLAIN void load_matrices(void* const (&lanes)[WARP]) {
  for (u32 lane = 0; lane < WARP; lane++) {
    for (u32 matrix = 0; matrix < 4; matrix++) {
      u16 pair[2];
      for (u32 i = 0; i < 2; i++) {
        u32 row = trans ? lane % 4 * 2 + i : lane / 4, column = trans ? lane / 4 : lane % 4 * 2 + i;
        pair[i] = static_cast<Matrices*>(lanes[matrix * 8 + row])->row[column];
      }
      static_cast<Matrices*>(lanes[lane])->to[matrix] = static_cast<u32>(pair[1]) << 16 | pair[0];
    }
  }
}
template <bool trans>
void ldmatrix(const Site& site, u32 (&r)[4], const void* row) {
  if (!in_shared(row, 16)) HOST_FAIL("%s (%s:%u) of a row that is not in shared memory", site.what, site.file, site.line);
  if (reinterpret_cast<u64>(row) % 16) HOST_FAIL("%s (%s:%u) of a row that is not aligned to 16 bytes", site.what, site.file, site.line);
  HOST_LOOK(row, 16, false, site);
  Matrices mine{r, {}};
  memcpy(mine.row, row, sizeof mine.row);
  sync_warp(site, ALL_LANES, &mine, load_matrices<trans>);
}

}  // namespace host

template <typename T>
inline void mma_16x8x16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], HOST_HERE) {
  ::host::Mma mine{d, a, b};
  ::host::sync_warp({"mma_16x8x16", file, line}, ALL_LANES, &mine, ::host::mma<T>);
}
inline void ldmatrix_x4(u32 (&r)[4], const void* row, HOST_HERE) { ::host::ldmatrix<false>({"ldmatrix_x4", file, line}, r, row); }
inline void ldmatrix_x4_trans(u32 (&r)[4], const void* row, HOST_HERE) {
  ::host::ldmatrix<true>({"ldmatrix_x4_trans", file, line}, r, row);
}

// Undefined until its group's async_wait, so poisoned until then; read at once too, so that a bad address shows where it comes from.
inline void async_copy_16(void* shared, const void* global, u32 bytes = 16, HOST_HERE) {
  ::host::Site site{"async_copy_16", file, line};
  if (bytes > 16) HOST_FAIL("async_copy_16 (%s:%u) of %u bytes", file, line, bytes);
  if (!::host::in_shared(shared, 16)) HOST_FAIL("async_copy_16 (%s:%u) to what is not shared memory", file, line);
  if (::host::in_shared(global, 1)) HOST_FAIL("async_copy_16 (%s:%u) from shared memory", file, line);
  if (reinterpret_cast<u64>(shared) % 16 || reinterpret_cast<u64>(global) % 16) {
    HOST_FAIL("async_copy_16 (%s:%u) of addresses that are not aligned to 16 bytes", file, line);
  }
  HOST_LOOK(shared, 16, true, site);
  HOST_LOOK(global, bytes, false, site);
  u8 there[16];
  memcpy(there, global, bytes);
  memset(shared, 0xFF, 16);
  ::host::self->copies.push_back({static_cast<u8*>(shared), static_cast<const u8*>(global), bytes, site});
}
inline void async_commit() { ::host::self->groups.push_back(::host::self->copies.size()); }
template <int pending>
inline void async_wait() {
  ::host::Fiber& me = *::host::self;
  if (me.groups.size() > static_cast<size_t>(pending)) {
    size_t groups = me.groups.size() - static_cast<size_t>(pending), copies = me.groups[groups - 1];
    for (size_t i = 0; i < copies; i++) {
      const ::host::Copy& copy = me.copies[i];
      HOST_LOOK(copy.to, 16, true, copy.site);
      memset(copy.to, 0, 16);
      memcpy(copy.to, copy.from, copy.bytes);
    }
    me.copies.erase(me.copies.begin(), me.copies.begin() + static_cast<long>(copies));
    me.groups.erase(me.groups.begin(), me.groups.begin() + static_cast<long>(groups));
    for (size_t& end : me.groups) end -= copies;
  }
  // Only this thread's copies are there now: let the others look before a barrier.
  ::host::machine->ready[::host::machine->ready_count++] = &me;
  ::host::leave_fiber();
}
