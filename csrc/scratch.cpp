#include "scratch.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <new>

namespace dsfast {
namespace {

struct Buffer {
  float* data = nullptr;
  int64_t capacity = 0;
  ~Buffer() { std::free(data); }
};

// For tests: whether each call is to have memory of its own, full of NaN, behind which no byte can be touched. Apart
// from `scratch`: within it this would take 4% of the time of a token.
const bool GUARDED = std::getenv("DSFAST_GUARD_SCRATCH") != nullptr;

[[gnu::noinline, gnu::cold]] float* guarded(int64_t count, ScratchSlot slot) {
  struct Area {
    void* data;
    size_t bytes;
  };
  thread_local Area areas[SCRATCH_SLOTS] = {};
  const size_t page = sysconf(_SC_PAGESIZE), bytes = (count * sizeof(float) + page - 1) / page * page + page;
  if (areas[slot].data != nullptr) munmap(areas[slot].data, areas[slot].bytes);
  areas[slot] = {};
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  float* end = reinterpret_cast<float*>(static_cast<char*>(data) + bytes - page);
  if (data == MAP_FAILED || mprotect(end, page, PROT_NONE) != 0) out_of_memory();
  areas[slot] = {data, bytes};
  for (int64_t i = 1; i <= count; ++i) end[-i] = NAN;
  return end - count;
}

}  // namespace

void out_of_memory() { throw std::bad_alloc(); }

float* scratch(int64_t count, ScratchSlot slot) {
  if (GUARDED) return guarded(count, slot);
  thread_local Buffer buffers[SCRATCH_SLOTS];
  Buffer& buffer = buffers[slot];
  if (count > buffer.capacity) {
    std::free(buffer.data);
    buffer.capacity = 0;  // what is asked for next, too, if there is no room for this
    const size_t bytes = (static_cast<size_t>(count) * sizeof(float) + 63) / 64 * 64;
    buffer.data = static_cast<float*>(std::aligned_alloc(64, bytes));
    if (buffer.data == nullptr) out_of_memory();
    buffer.capacity = count;
  }
  return buffer.data;
}

}  // namespace dsfast
