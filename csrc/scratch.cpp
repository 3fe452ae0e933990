#include "scratch.h"

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

void out_of_memory() { throw std::bad_alloc(); }

float* scratch(int64_t count, ScratchSlot slot) {
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
