// Parts of one block of memory.
#pragma once
#include <cstdint>

#include "scratch.h"

namespace DSFAST_ISA {

constexpr int64_t LINE = 16;  // floats of a cache line

// Hands out parts of one block of memory; with no block yet it only counts.
struct Carver {
  float* base;
  int64_t size = 0;
  float* floats(int64_t count) {
    float* part = base == nullptr ? nullptr : base + size;
    size += (count + LINE - 1) / LINE * LINE;
    return part;
  }
  template <class T>
  T* of(int64_t count) {
    return reinterpret_cast<T*>(floats(count * int64_t(sizeof(T)) / 4 + 1));
  }
};

// What `make(Carver&)` makes of memory that it asks for, in this thread's scratch memory. It is called twice, at first
// only to count.
template <class Make>
inline auto carved(dsfast::ScratchSlot slot, Make make) {
  Carver count = {nullptr};
  make(count);
  Carver carver = {dsfast::scratch(count.size, slot)};
  return make(carver);
}

}  // namespace DSFAST_ISA
