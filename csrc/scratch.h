// Working memory of a thread, kept between calls so that the steady state allocates nothing.
#pragma once
#include <cstddef>
#include <cstdint>

namespace dsfast {

// At least `count` floats, 64-byte aligned, this thread's own; the content is whatever was left there. A second call
// by the same thread hands out the same memory again; what stays while others call takes a `slot` of its own.
constexpr int SCRATCH_SLOTS = 4;
float* scratch(int64_t count, int slot = 0);

}  // namespace dsfast
