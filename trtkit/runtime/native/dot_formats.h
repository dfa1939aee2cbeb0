// Weights for the instructions that multiply pairs of bf16 or fours of bytes and add them up, and how 8-bit codes become
// bf16: by two lookups among 128 bytes each, upper and lower half of the number, for 64 weights at once.
#pragma once

#include "weight_formats.h"

#ifdef TRTKIT_DOTS

namespace trtkit::dots {

#ifdef TRTKIT_BF16_DOTS
// A code's seven lower bits are looked up, its sign bit is carried over. A line of 64 codes holds two widened ones.
struct Looked {
  static constexpr int64_t K = 32, BYTES = TILE / 2, LINES = 2;
  static constexpr bool WIDENED = true, INTEGER = false;
  // Halves are interleaved in each 128 bits.
  static inline uint8_t* place(uint8_t* tile, int64_t k, int64_t n) {
    const int64_t line = k / 2;
    return tile + line / 2 * LINE + n / 4 * 16 + line % 2 * 8 + n % 4 * 2 + k % 2;
  }
  struct Table {
    alignas(64) uint8_t upper[128], lower[128];
  };
  struct Halves {
    __m512i lower, upper;
  };
  static inline Halves look(const Table& table, const uint8_t* from) {
    const __m512i codes = _mm512_loadu_si512(from), sign = _mm512_set1_epi8(static_cast<char>(0x80));
    const auto among = [&](const uint8_t* half) {
      return _mm512_permutex2var_epi8(_mm512_load_si512(half), codes, _mm512_load_si512(half + LINE));
    };
    return {among(table.lower), _mm512_ternarylogic_epi32(among(table.upper), codes, sign, 0xf8)};  // a | (b & c)
  }
  template <int I>
  static inline __m512i line(const Halves& held) {
    return I == 0 ? _mm512_unpacklo_epi8(held.lower, held.upper) : _mm512_unpackhi_epi8(held.lower, held.upper);
  }
};

inline constexpr Looked::Table looked(auto number) {  // the bits of bf16 of each code
  Looked::Table table{};
  for (int code = 0; code < 128; code++) {
    const uint16_t bits = number(code);
    table.upper[code] = static_cast<uint8_t>(bits >> 8), table.lower[code] = static_cast<uint8_t>(bits);
  }
  return table;
}

inline constexpr uint16_t whole_bf16(int number) {  // of 1 to 255
  int exponent = 0;
  while (number >> (exponent + 1)) exponent++;
  return static_cast<uint16_t>((127 + exponent) << 7 | ((number << 7 >> exponent) & 0x7f));
}

// Widened to 2 code + 1, an odd number from -255 to 255, which bf16 holds exactly, with its sign apart: the code itself
// has 256 values that a sign and 7 bits cannot tell. The sums of x are taken off; scales are halved.
struct Int8 : Looked {
  static constexpr float OFFSET = 1.0f, STEP = 2.0f;
  static void put(uint8_t* tile, int64_t k, int64_t n, uint16_t word) {
    *place(tile, k, n) = static_cast<uint8_t>(word & 0x80 ? word ^ 0x7f : word);
  }
  static inline Halves hold(const uint8_t* from) {
    static constexpr Table table = looked([](int code) { return whole_bf16(2 * code + 1); });
    return look(table, from);
  }
};

// e4m3: m * 2^-9 below 8, else (8 + m) * 2^(e - 10).
struct Fp8 : Looked {
  static constexpr float OFFSET = 0.0f, STEP = 1.0f;
  static void put(uint8_t* tile, int64_t k, int64_t n, uint16_t word) { *place(tile, k, n) = static_cast<uint8_t>(word); }
  static inline Halves hold(const uint8_t* from) {
    static constexpr Table table = looked([](int code) {
      const int mantissa = code & 7, exponent = code >> 3;
      if (code == 0) return uint16_t{0};
      if (exponent == 0) return static_cast<uint16_t>(whole_bf16(mantissa) - (9 << 7));
      return static_cast<uint16_t>((exponent + 120) << 7 | mantissa << 4);
    });
    return look(table, from);
  }
};
#endif

// The instruction multiplies bytes without a sign, here code + 128, with signed ones, here x rounded to codes.
struct Int8Codes {
  static constexpr int64_t K = 64, BYTES = TILE, LINES = 1;
  static constexpr float OFFSET = 128.0f;
  static constexpr bool WIDENED = false, INTEGER = true;
  static void put(uint8_t* tile, int64_t k, int64_t n, uint16_t word) {
    tile[k / 4 * LINE + n * 4 + k % 4] = static_cast<uint8_t>(word ^ 0x80);
  }
  static inline __m512i hold(const uint8_t* from) { return _mm512_load_si512(from); }
  template <int>
  static inline __m512i line(__m512i held) { return held; }
};

}  // namespace trtkit::dots
#endif
