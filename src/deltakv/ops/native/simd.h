// Vectors of floats as GCC and Clang know them, wide enough for the processor's registers.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX512F__)
#define LANES 16
#else
#define LANES 8
#endif

namespace {

constexpr float INF = std::numeric_limits<float>::infinity();

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));
typedef uint16_t hvec __attribute__((vector_size(LANES * 2)));

struct bf16 {
  uint16_t bits;
};

inline float value(const float* p) { return *p; }
inline float value(const bf16* p) {
  const uint32_t bits = uint32_t(p->bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline vec load(const float* p) {
  vec result;
  std::memcpy(&result, p, sizeof result);
  return result;
}
inline vec load(const bf16* p) {
  hvec bits;
  std::memcpy(&bits, p, sizeof bits);
  return (vec)(__builtin_convertvector(bits, ivec) << 16);
}
inline void store(float* p, vec x) { std::memcpy(p, &x, sizeof x); }

// Sums of neighbours: those of a, then those of b. Folding 16 vectors to one, in pairs, gives the 16 sums in order.
inline vec fold(vec a, vec b) {
#if LANES == 16
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#else
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14) +
         __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#endif
}

inline vec max(vec a, vec b) { return a > b ? a : b; }

inline float sum(vec x) {
  float total = 0;
  for (int i = 0; i < LANES; i++) total += x[i];
  return total;
}

inline float max(vec x) {
  float top = x[0];
  for (int i = 1; i < LANES; i++) top = x[i] > top ? x[i] : top;
  return top;
}

// e^x for x <= 0 to two units in the last place (the minimax polynomial of Cephes' expf); 0 below the normal numbers.
inline vec exponential(vec x) {
  const vec clamped = max(x, (vec){} - 87.0f);
  vec n = clamped * 1.44269504088896341f + 12582912.0f;  // rounds to an integer, which stands in the low bits
  const ivec exponent = (ivec)n + 127;
  n -= 12582912.0f;
  const vec r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
  vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  p *= (vec)(exponent << 23);
  return x < -87.0f ? (vec){} : x == x ? p : x;  // NaN stays NaN
}

}  // namespace
