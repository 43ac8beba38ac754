// The shape of an attention score. A score is a struct of constants and three functions, templated on value types
// (float, double, a SIMD vector, or where many pairs meet at once a bundle of vectors on one side and a vector on the
// other); it knows no loop, no tile and no thread. A score is
//
//   e_ij = scale * sum_h term(q_ih, k_jh, v_h)
//
//   kParts      values that `prepare` makes of an element of a query or key, once for all of its pairs
//   kWeighted   whether the score has a vector v; its gradients of q and k lack the factor v_h, that of one
//               without lacks the scale
//
//   prepare(x, parts[kParts])
//   add(q[kParts], k[kParts], v, sum)               sum + term
//   gradients(q[kParts], k[kParts], g, dq, dk, dv)  adds the gradients that d e_ij = g gives
#pragma once

#include "../cells/math.h"
