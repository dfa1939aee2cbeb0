// What a matrix product does to its input before it multiplies, and to its sums after: shared by linear.cpp and tiles.cpp.
#pragma once

#include <c10/util/BFloat16.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace trtkit {

enum Rounding : int64_t { NONE = 0, TO_INT8 = 1, TO_FP8 = 2 };  // of the input, after ``pre`` and ``inverse``

inline uint16_t rounded(float x) {  // to bf16, nearest even
  uint32_t word;
  std::memcpy(&word, &x, 4);
  const uint32_t near = (word + 0x7fffu + ((word >> 16) & 1u)) >> 16, nan = (word >> 16) | 0x40u;
  return static_cast<uint16_t>((word & 0x7fffffffu) > 0x7f800000u ? nan : near);
}

inline float to_fp8(float x) {  // nearest even e4m3, saturated; a NaN stays
  x = x > 448.0f ? 448.0f : x < -448.0f ? -448.0f : x;
  const float small = (x + 24576.0f) - 24576.0f;  // multiples of 2^-9
  uint32_t word;
  std::memcpy(&word, &x, 4);
  word = (word + 0x7ffffu + ((word >> 20) & 1u)) & 0xfff00000u;
  float large;
  std::memcpy(&large, &word, 4);
  return std::fabs(x) < 0.015625f ? small : x == x ? large : x;
}

inline float to_int8(float x) {
  x = x < -128.0f ? -128.0f : x;
  x = x > 127.0f ? 127.0f : x;
  return (x + 12582912.0f) - 12582912.0f;
}

// A row of x as floats, multiplied by ``pre``, rounded to whole activation codes, and times ``lift``.
inline void take(
    const c10::BFloat16* x, const float* pre, Rounding rounding, float inverse, float lift, int64_t width, float* out) {
  const uint16_t* from = reinterpret_cast<const uint16_t*>(x);
  for (int64_t k = 0; k < width; k++) {
    const uint32_t word = static_cast<uint32_t>(from[k]) << 16;
    std::memcpy(out + k, &word, 4);
  }
  if (pre != nullptr)
    for (int64_t k = 0; k < width; k++) out[k] *= pre[k];
  if (rounding == TO_INT8)
    for (int64_t k = 0; k < width; k++) out[k] = to_int8(out[k] * inverse);
  if (rounding == TO_FP8)
    for (int64_t k = 0; k < width; k++) out[k] = to_fp8(out[k] * inverse);
  if (lift != 1.0f)
    for (int64_t k = 0; k < width; k++) out[k] *= lift;
}

inline int64_t padded(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

}  // namespace trtkit
