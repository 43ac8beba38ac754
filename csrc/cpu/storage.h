// How a product reads its two factors: rows and a packed weight. A product P has
//
//   Acc, Row, Element   the types of a sum, and of an element of a row and of the weight
//   kTogether           K, the steps of k whose elements of one unit lie side by side in the weight: where
//                       k has an odd end, the last group is filled up
//   kScaled             whether a sum is to be multiplied by its weight row's scale
//   load(from, w[K])    the K vectors of W units that begin at `from`
//   splat(row)          an element of a row in every lane
//   add(sum, w, row)    sum + w * row
#pragma once

#include "simd.h"

namespace fusedrnn {
namespace {

// Both factors as the scan's storage type S has them: [k][G][W].
template <class S>
struct Direct {
  using Acc = fusedrnn::Acc<S>;
  using Row = Factor<S>;
  using Element = Factor<S>;
  using V = typename Factors<Element>::V;
  static constexpr int kTogether = 1;
  static constexpr bool kScaled = false;
  static FUSEDRNN_HD void load(const Element* from, V* w) { w[0] = Factors<Element>::load(from); }
  static FUSEDRNN_HD V splat(Row row) { return Factors<Element>::splat(row); }
  static FUSEDRNN_HD typename Simd<Acc>::V add(typename Simd<Acc>::V sum, V w, V row) {
    return Factors<Element>::add_product(sum, w, row);
  }
};

// Rows are fp32, the weight is widened to it.
struct Widened {
  using Acc = float;
  using Row = float;
  using V = VecF;
  static FUSEDRNN_HD V splat(float row) { return fusedrnn::splat(row); }
  static FUSEDRNN_HD V add(V sum, V w, V row) { return sum + w * row; }
};

// bf16, the upper half of an fp32, in pairs: [ceil(k/2)][G][W][2]. One load, a shift and a mask give
// two vectors, where widening each would keep the units busy that multiply.
struct BFloat16 : Widened {
  using Element = uint16_t;
  static constexpr int kTogether = 2;
  static constexpr bool kScaled = false;
  static FUSEDRNN_HD void load(const uint16_t* from, VecF* w) {
    Simd<float>::Bits pairs;
    __builtin_memcpy(&pairs, from, sizeof pairs);
    // Else compilers load it twice, as an operand of each: 4 to 20 % slower, the latter where L2 holds the weights.
#if FUSEDRNN_VECTOR_BYTES == 64
    asm("" : "+v"(pairs));
#elif FUSEDRNN_VECTOR_BYTES == 32
    asm("" : "+x"(pairs));
#endif
    w[0] = (VecF)(pairs << 16);
    w[1] = (VecF)(pairs & 0xFFFF0000u);
  }
};

// Integers w from -127 to 127, in pairs as well, where the CPU multiplies no bytes (else: step_digits.h). The vectors
// hold 65536 w, so that a shift and a mask are enough here too; the scale that multiplies the sum is the row's over
// 65536.
struct Int8 : Widened {
  using Element = int8_t;
  static constexpr int kTogether = 2;
  static constexpr bool kScaled = true;
  static FUSEDRNN_HD void load(const int8_t* from, VecF* w) {
    typedef int32_t Pairs __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES)));
    typedef int8_t Bytes __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES / 2)));
    Bytes bytes;
    __builtin_memcpy(&bytes, from, sizeof bytes);
#if FUSEDRNN_VECTOR_BYTES == 64
    const Pairs pairs = (Pairs)_mm512_maskz_cvtepi8_epi16(~__mmask32{0}, (__m256i)bytes);
#elif FUSEDRNN_VECTOR_BYTES == 32
    const Pairs pairs = (Pairs)_mm256_cvtepi8_epi16((__m128i)bytes);
#else
    typedef int16_t Words __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES)));
    const Pairs pairs = (Pairs)__builtin_convertvector(bytes, Words);
#endif
    w[0] = __builtin_convertvector(pairs << 16, VecF);
    w[1] = __builtin_convertvector(pairs & ~0xFFFF, VecF);
  }
};

}  // namespace
}  // namespace fusedrnn
