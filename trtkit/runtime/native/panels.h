// Weights in panels: how each stored format lies in memory, and how it becomes float vectors.
//
// A panel holds 2 vectors of output features; its codes lie K-major, CHUNK inputs at a time, so that the matrix product
// is "load a vector of weights, multiply it with one number of x, add": each output is one chain of fused
// multiply-adds over K, in order, in its own lane. The order is the same for every row count, batch and thread count.
//
// The numbers multiplied are affine in the codes, code = (number - OFFSET) * FACTOR: bits laid into the mantissa of 1.0
// take two operations where a conversion to float takes four. The offset is taken off once per sum: OFFSET * sum(x).
// Zen 1 has half as wide units as its neighbours, so that operations count, and computes with subnormal numbers at full
// speed: there a byte in the top of the mantissa is a number as it is, byte * 2^-133, and x is lifted to make up for it.
//
// Letters: N output features, K input features, lanes W, outputs of a panel 2 W.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace trtkit::panels {

#if defined(__AVX512F__) && defined(__AVX512BW__)
typedef __m512 vec;
typedef __m512i ivec;
constexpr int64_t W = 16;
constexpr int ROWS = 12;  // of x in one pass: their sums stay in registers
inline vec load(const float* p) { return _mm512_loadu_ps(p); }
inline ivec load(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline void store(float* p, vec x) { _mm512_storeu_ps(p, x); }
inline vec all(float x) { return _mm512_set1_ps(x); }
inline vec multiply_add(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
inline ivec bits(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
inline ivec shift_left(ivec x) { return _mm512_slli_epi32(x, 16); }
inline ivec both(ivec x, ivec mask) { return _mm512_and_si512(x, mask); }
inline vec as_float(ivec x) { return _mm512_castsi512_ps(x); }
template <int BYTES>
inline ivec turn(ivec x) { return BYTES == 0 ? x : _mm512_rol_epi32(x, 8 * BYTES); }
template <int BYTE>
inline ivec top_byte(ivec x) { return _mm512_and_si512(turn<(6 - BYTE) % 4>(x), _mm512_set1_epi32(0xff0000)); }
inline vec field(ivec x, ivec mask, ivec ones) {
  return as_float(_mm512_ternarylogic_epi32(x, mask, ones, 0xea));  // (x & mask) | ones
}
#else
typedef __m256 vec;
typedef __m256i ivec;
constexpr int64_t W = 8;
constexpr int ROWS = 6;
inline vec load(const float* p) { return _mm256_loadu_ps(p); }
inline ivec load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline void store(float* p, vec x) { _mm256_storeu_ps(p, x); }
inline vec all(float x) { return _mm256_set1_ps(x); }
inline vec multiply_add(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
inline ivec bits(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
inline ivec shift_left(ivec x) { return _mm256_slli_epi32(x, 16); }
inline ivec both(ivec x, ivec mask) { return _mm256_and_si256(x, mask); }
inline vec as_float(ivec x) { return _mm256_castsi256_ps(x); }
template <int BYTES>
inline ivec turn(ivec x) {  // 32-bit rotation to the left; a byte shuffle has twice the ports of a shift
  if (BYTES == 0) return x;
  constexpr int a = (4 - BYTES) % 4, b = (5 - BYTES) % 4, c = (6 - BYTES) % 4, d = (7 - BYTES) % 4;
  const __m256i order = _mm256_setr_epi8(
      a, b, c, d, a + 4, b + 4, c + 4, d + 4, a + 8, b + 8, c + 8, d + 8, a + 12, b + 12, c + 12, d + 12, a, b, c, d,
      a + 4, b + 4, c + 4, d + 4, a + 8, b + 8, c + 8, d + 8, a + 12, b + 12, c + 12, d + 12);
  return _mm256_shuffle_epi8(x, order);
}
inline vec field(ivec x, ivec mask, ivec ones) { return as_float(_mm256_or_si256(_mm256_and_si256(x, mask), ones)); }
template <int BYTE>
inline ivec top_byte(ivec x) {  // byte BYTE of each word in bits 16..23, nothing else
  if (BYTE == 2) return both(x, bits(0xff0000));
  constexpr char n = -1, b = BYTE;
  const __m256i order = _mm256_setr_epi8(
      n, n, b, n, n, n, b + 4, n, n, n, b + 8, n, n, n, b + 12, n, n, n, b, n, n, n, b + 4, n, n, n, b + 8, n, n, n,
      b + 12, n);
  return _mm256_shuffle_epi8(x, order);
}
#endif

#if defined(__znver1__)
constexpr bool SUBNORMAL = true;
#else
constexpr bool SUBNORMAL = false;
#endif

constexpr int64_t PANEL = 2 * W;
constexpr int64_t CHUNK = 4;         // inputs packed together; K is padded to a multiple
constexpr uint32_t ONE = 0x3f800000;  // 1.0f

inline void put(uint8_t* p, uint32_t word) { std::memcpy(p, &word, 4); }

// A format's PANELS: how many a single row reads side by side, so that its sums do not wait for each other. PASSES: so
// often the codes may be widened again, for ROWS rows each, before a room of widened ones pays.
// ``number<k, v>(p)``: of the chunk at p, input k's weights of the panel's vector v.
// ``pack(p, code)`` writes a chunk; ``code(k, n)`` gives the bits of one weight, k and n counted inside the chunk and
// the panel.

// Numbers as ``widen`` leaves them.
struct Wide {
  static constexpr int64_t BYTES = CHUNK * PANEL * 4;
  template <int K, int V>
  static inline vec number(const uint8_t* p) { return load(reinterpret_cast<const float*>(p) + K * PANEL + V * W); }
};

// A lane's word: the first vector's weight in the low half, the second's in the high half.
struct Bf16 {
  static constexpr int PANELS = 4, PASSES = 4;
  static constexpr int64_t BYTES = CHUNK * PANEL * 2;
  static constexpr float FACTOR[2] = {1, 1}, OFFSET[2] = {0, 0};
  template <int K, int V>
  static inline vec number(const uint8_t* p) {
    const ivec words = load(p + K * W * 4);
    return as_float(V ? both(words, bits(0xffff0000)) : shift_left(words));
  }
  template <typename C>
  static void pack(uint8_t* p, C code) {
    for (int k = 0; k < CHUNK; k++)
      for (int64_t n = 0; n < W; n++) put(p + (k * W + n) * 4, code(k, n) | code(k, n + W) << 16);
  }
};

constexpr float LIFT = SUBNORMAL ? 0x1p64f : 1.0f;  // what x is multiplied by, for the formats below

// Where input k's bits lie in a word: in byte k as they are, or where ``turn<k>`` brings them into the mantissa.
inline uint32_t placed(uint32_t code, int k) {
  if (SUBNORMAL) return code << 8 * k;
  const uint32_t field = code << 15;
  return k ? field >> 8 * k | field << (32 - 8 * k) : field;
}

// A lane's word: 4 inputs of one output, bytes code + 128, which come out as 1 + byte / 256.
struct Int8 {
  static constexpr int PANELS = 2, PASSES = SUBNORMAL ? 4 : W == 16 ? 2 : 1;
  static constexpr int64_t BYTES = CHUNK * PANEL;
  static constexpr float STEP = SUBNORMAL ? 0x1p69f : 256, ZERO = SUBNORMAL ? 0x1p-126f : 1.5f;
  static constexpr float FACTOR[2] = {STEP, STEP}, OFFSET[2] = {ZERO, ZERO};
  template <int K, int V>
  static inline vec number(const uint8_t* p) {
    const ivec words = load(p + V * W * 4);
    return SUBNORMAL ? as_float(top_byte<K>(words)) : field(turn<K>(words), bits(0xff << 15), bits(ONE));
  }
  template <typename C>
  static void pack(uint8_t* p, C code) {
    for (int64_t n = 0; n < PANEL; n++) {
      uint32_t word = 0;
      for (int k = 0; k < CHUNK; k++) word |= placed((code(k, n) + 128) & 0xff, k);
      put(p + n * 4, word);
    }
  }
};

// A lane's word: 4 inputs of two outputs, nibbles code + 8, which come out as 1 + nibble / 16 and 1 + nibble / 256.
struct Int4 {
  static constexpr int PANELS = 2, PASSES = SUBNORMAL ? 4 : W == 16 ? 2 : 1;
  static constexpr int64_t BYTES = CHUNK * PANEL / 2;
  static constexpr float FACTOR[2] = {SUBNORMAL ? 0x1p65f : 16, SUBNORMAL ? 0x1p69f : 256};
  static constexpr float OFFSET[2] = {SUBNORMAL ? 0x1p-126f : 1.5f, SUBNORMAL ? 0x1p-130f : 1.03125f};
  template <int K, int V>
  static inline vec number(const uint8_t* p) {
    const ivec words = load(p);
    if (SUBNORMAL) return as_float(both(top_byte<K>(words), bits(V ? 0x0f0000 : 0xf00000)));
    return field(turn<K>(words), bits(0xf << (V ? 15 : 19)), bits(ONE));
  }
  template <typename C>
  static void pack(uint8_t* p, C code) {
    for (int64_t n = 0; n < W; n++) {
      uint32_t word = 0;
      for (int k = 0; k < CHUNK; k++) word |= placed(((code(k, n) + 8) & 0xf) << 4 | ((code(k, n + W) + 8) & 0xf), k);
      put(p + n * 4, word);
    }
  }
};

// While it lives, subnormal numbers count: a library built with -ffast-math may have switched them off.
struct Subnormals {
  const unsigned before = _mm_getcsr();
  Subnormals() { _mm_setcsr(before & ~0x8040u); }
  ~Subnormals() { _mm_setcsr(before); }
};

}  // namespace trtkit::panels
