// How weights lie in memory for the tile registers (AMX), and how codes become numbers that tiles can hold.
//
// A tile of weights has 16 outputs and 16 rows of 64 bytes: two inputs in a row for bf16, four for int8. A format's
// K: inputs of a tile. BYTES: of a tile in memory. WIDENED: its codes become bf16 on the way, by ``widen``, exactly.
// INTEGER: tiles and sums are integers. DIGITS: tiles that a row of x fills. OFFSET: what a widened weight is too large by.
// ``put`` writes one weight into a tile.
#pragma once

#include <cstring>

#include "tile_registers.h"

namespace trtkit {

constexpr int64_t PANEL = 2 * SIDE;  // outputs whose tiles take turns in memory
constexpr int64_t UNIT = 2 * PANEL;  // N is padded to a multiple

struct Bf16 {
  static constexpr int64_t K = 32, BYTES = TILE;
  static constexpr int DIGITS = 1;
  static constexpr float OFFSET = 0.0f;
  static constexpr bool WIDENED = false, INTEGER = false;
  static void put(uint8_t* tile, int64_t k, int64_t n, uint16_t word) {
    std::memcpy(tile + k / 2 * 64 + n * 4 + k % 2 * 2, &word, 2);
  }
};

// x is rounded to int8 codes: W8A8.
struct Int8Codes {
  static constexpr int64_t K = 64, BYTES = TILE;
  static constexpr int DIGITS = 1;
  static constexpr float OFFSET = 0.0f;
  static constexpr bool WIDENED = false, INTEGER = true;
  static void put(uint8_t* tile, int64_t k, int64_t n, uint16_t word) {
    tile[k / 4 * 64 + n * 4 + k % 4] = static_cast<uint8_t>(word);
  }
};

// x is written with three digits of base 256: its numbers next to the row's largest as exactly as in float32.
struct Int8 : Int8Codes {
  static constexpr int DIGITS = 3;
};

struct Fp8 {
  static constexpr int64_t K = 32, BYTES = TILE / 2;
  static constexpr int DIGITS = 1;
  static constexpr float OFFSET = 0.0f;
  static constexpr bool WIDENED = true, INTEGER = false;
  static void put(uint8_t* tile, int64_t k, int64_t n, uint16_t word) {
    tile[k / 2 * 32 + n * 2 + k % 2] = static_cast<uint8_t>(word);
  }
  // e4m3 to bf16: the seven bits below the sign move by four and the exponent's bias grows by 120, apart from the seven
  // subnormal numbers, m * 2^-9, which are looked up.
  static inline void widen(const uint8_t* from, uint8_t* to) {
    const __m512i small =
        _mm512_zextsi128_si512(_mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
    const __m512i magnitude = _mm512_set1_epi16(0x7f0), bias = _mm512_set1_epi16(120 << 7);
    const __m512i normal = _mm512_set1_epi16(0x80), sign = _mm512_set1_epi16(static_cast<short>(0x8000));
    for (int row = 0; row < SIDE; row++, from += 32, to += 64) {
      const __m512i words = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
      const __m512i moved = _mm512_and_si512(_mm512_slli_epi16(words, 4), magnitude);
      const __mmask32 subnormal = _mm512_cmplt_epu16_mask(moved, normal);
      __m512i out = _mm512_add_epi16(moved, bias);
      out = _mm512_mask_permutexvar_epi16(out, subnormal, words, small);
      out = _mm512_ternarylogic_epi32(out, _mm512_slli_epi16(words, 8), sign, 0xf8);  // a | (b & c)
      _mm512_store_si512(to, out);
    }
  }
};

// Widened to 16 + (code + 8), whose bits are those of the code next to a constant: seven instructions for 128 weights, and
// no lookup. The sums of x, times 24, are taken off the sums of a group.
struct Int4 {
  static constexpr int64_t K = 32, BYTES = TILE / 4;
  static constexpr int DIGITS = 1;
  static constexpr float OFFSET = 24.0f;
  static constexpr bool WIDENED = true, INTEGER = false;
  // The codes of four neighbouring rows of the tile in a 16-bit word: the first lies where bf16 has its upper four bits
  // of mantissa, the others follow upwards; the fourth goes round the end.
  static void put(uint8_t* tile, int64_t k, int64_t n, uint16_t word) {
    const int64_t row = k / 2;
    uint8_t* at = tile + row / 4 * 64 + (n * 2 + k % 2) * 2;
    uint16_t four;
    std::memcpy(&four, at, 2);
    const uint32_t code = static_cast<uint32_t>((word + 8) & 0xf) << (3 + 4 * (row % 4));
    four = static_cast<uint16_t>(four | code | code >> 16);
    std::memcpy(at, &four, 2);
  }
  static inline void widen(const uint8_t* from, uint8_t* to) {
    const __m512i mantissa = _mm512_set1_epi16(0x78), sixteen = _mm512_set1_epi16(0x4180);
    const auto put = [&](__m512i words, int64_t row) {
      _mm512_store_si512(to + row * 64, _mm512_ternarylogic_epi32(words, mantissa, sixteen, 0xea));  // (a & b) | c
    };
    for (int row = 0; row < SIDE; row += 4, from += 64) {
      const __m512i words = _mm512_loadu_si512(from);
      put(words, row);
      put(_mm512_srli_epi16(words, 4), row + 1);
      put(_mm512_srli_epi16(words, 8), row + 2);
      put(_mm512_shldi_epi16(words, words, 4), row + 3);
    }
  }
};

}  // namespace trtkit
