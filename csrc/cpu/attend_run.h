// Attention over threads.
#pragma once

#include "attend.h"

namespace fusedrnn {

template <class S>
void run_attend(const Kernels& k, const AttendForward<S>& a, int threads);
template <class S>
void run_attend(const Kernels& k, AttendBackward<S> a, int threads);
void run_projection(const Kernels& k, const Projection& p, int threads);

}  // namespace fusedrnn
