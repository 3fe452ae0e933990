// Working memory of a thread, kept between calls so that the steady state allocates nothing.
#pragma once
#include <cstddef>
#include <cstdint>

namespace dsfast {

// What must stay while others call `scratch` takes a slot of its own.
enum ScratchSlot { OF_PIECES, GRADIENTS, ACTIVATIONS, WEIGHTS, WORDS, FIRST_FACTORS, SECOND_FACTORS, SCRATCH_SLOTS };

// At least `count` floats, 64-byte aligned, this thread's own; the content is whatever was left there. A second call
// by the same thread for the same slot hands out the same memory again. Throws std::bad_alloc.
float* scratch(int64_t count, ScratchSlot slot = OF_PIECES);

// Throws std::bad_alloc, which becomes Python's MemoryError.
[[noreturn]] void out_of_memory();

}  // namespace dsfast
