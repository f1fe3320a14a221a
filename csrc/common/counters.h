// Zero-initialised device counters for "the last CTA does the rest" kernels.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace specvlm {

// A device pointer to `count` counters that are 0 now and that the kernel must leave at 0 (atomicInc with the number
// of arrivals as its limit does). Consecutive eager calls get different counters, and calls captured in a graph get
// theirs from a region that eager calls never use, so launches in flight together on several streams do not meet:
// that would take kCountersPerRegion calls queued at once, or as many captured ones alive.
std::uint32_t* acquire_counters(int count, cudaStream_t stream);

}  // namespace specvlm
