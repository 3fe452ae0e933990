#include "scratch.h"

#include <sys/mman.h>

#include <cstdlib>
#include <new>

namespace dsfast {
namespace {

struct Buffer {
  float* data = nullptr;
  int64_t capacity = 0;
  ~Buffer() { std::free(data); }
};

}  // namespace

float* scratch(int64_t count, ScratchSlot slot) {
  thread_local Buffer buffers[SCRATCH_SLOTS];
  Buffer& buffer = buffers[slot];
  if (count > buffer.capacity) {
    std::free(buffer.data);
    const size_t need = static_cast<size_t>(count) * sizeof(float), page = need >= (1u << 20) ? 1u << 21 : 64;
    const size_t bytes = (need + page - 1) / page * page;
    buffer.data = static_cast<float*>(std::aligned_alloc(page, bytes));
    if (page > 64 && buffer.data != nullptr) madvise(buffer.data, bytes, MADV_HUGEPAGE);
    if (buffer.data == nullptr) throw std::bad_alloc();
    buffer.capacity = count;
  }
  return buffer.data;
}

}  // namespace dsfast
