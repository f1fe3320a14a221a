// The attention mass of a score: an integer of 40 bits relative to the row's highest, from the score's order_key.
#pragma once

#include <cstdint>

namespace specvlm {

constexpr std::uint32_t kKeyOfZero = 0x80000000;

// floor(max(score,0) * 2^(40-e)), 2^e the smallest power of two above the row's maximum; infinity counts as FLT_MAX.
struct Weighing {
  int up;    // a significand of the highest score's exponent is shifted up by this
  int unit;  // that exponent

  __device__ explicit Weighing(std::uint32_t highest) {
    const std::uint32_t bits = magnitude(highest);
    up = 8 + __clz(static_cast<int>(significand(bits)));  // 16, or more where the highest score is subnormal
    unit = exponent(bits);
  }

  // The float's bits, 0 for scores that are not above 0.
  __device__ static std::uint32_t magnitude(std::uint32_t key) {
    return key > kKeyOfZero ? min(key - kKeyOfZero, 0x7F7FFFFFu) : 0;
  }
  __device__ static std::uint32_t significand(std::uint32_t bits) {
    return (bits & 0x7FFFFF) | (bits >= 0x800000 ? 0x800000 : 0);
  }
  __device__ static int exponent(std::uint32_t bits) { return max(static_cast<int>(bits >> 23), 1); }

  // A significand is shifted up by this; where it is negative, down, and loses bits.
  __device__ int shift(std::uint32_t key) const { return up - unit + exponent(magnitude(key)); }

  __device__ std::uint64_t of(std::uint32_t key) const { return of_equal(key, 1, 0); }

  // Of `count` scores that have all but the lowest bits in common, and with them the exponent. base: the key with those
  // bits 0; low: the sum of those bits, each shifted down by lost(key). No carry is missed: where a shift cuts into the
  // common bits, none of the low ones is left.
  __device__ std::uint64_t of_equal(std::uint32_t base, int count, std::uint64_t low) const {
    if (base < kKeyOfZero) return 0;
    const int by = shift(base);
    const std::uint64_t common = significand(magnitude(base));
    return by >= 0 ? (count * common + low) << by : count * (common >> min(-by, 31)) + low;
  }
  __device__ int lost(std::uint32_t key) const { return min(max(-shift(key), 0), 31); }
};

}  // namespace specvlm
