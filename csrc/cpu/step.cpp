#include "step.h"

#include <omp.h>
#include <string.h>

#include <algorithm>
#include <chrono>

#include "../cells/gru.h"
#include "../cells/lstm.h"
#include "../cells/rnn.h"
#include "barrier.h"
#include "scan.h"

namespace fusedrnn {
namespace {

constexpr int64_t kGates[kCells] = {RnnTanh::kGates, RnnRelu::kGates, Lstm::kGates, Gru::kGates};

void run_layers(const StepPlan& p, const StepRows& input, const StepPart& part, Barrier* barrier) {
  const StepFunctions& f = p.kernels->step[p.storage];
  StepRows x = input;
  for (const StepLayer& layer : p.layers) {
    f.units[p.cell](p.shape, layer, x, part);
    if (layer.raw) {
      if (barrier) barrier_wait(barrier);
      f.project(p.shape, layer, part);
    }
    if (barrier && &layer != &p.layers.back()) barrier_wait(barrier);
    x = {layer.h_new, p.shape.proj_stride, 1};
  }
}

// Bytes for a thread, none of another's cache lines.
int64_t step_scratch(const StepPlan& p) {
  const auto bytes = p.kernels->step[p.storage].scratch;
  const StepShape& s = p.shape;
  int64_t most = 0;
  for (const StepLayer& layer : p.layers) {
    most = std::max({most, bytes(s.batch, layer.inputs) + bytes(s.batch, s.proj), bytes(s.batch, s.hidden)});
  }
  return (most + 127) / 128 * 128;
}

}  // namespace

int64_t step_work(const StepPlan& p) {
  const StepShape& s = p.shape;
  int64_t per_row = 0;
  for (const StepLayer& layer : p.layers) {
    per_row += kGates[p.cell] * s.hidden * (layer.inputs + s.proj) + (layer.raw ? s.proj * s.hidden : 0);
  }
  return per_row * s.batch;
}

void run_step(StepPlan& p, const StepRows& x, int threads) {
  using Clock = std::chrono::steady_clock;
  p.backwards = !p.backwards;
  if (threads > 1 && p.alone > 0) {
    --p.alone;
    threads = 1;
  }
  const int64_t scratch = step_scratch(p);
  p.scratch.resize(std::max(p.scratch.size(), static_cast<size_t>(scratch * std::max(threads, 1))));
  if (threads <= 1) {
    run_layers(p, x, {0, 1, p.backwards, p.scratch.data()}, nullptr);
  } else {
    const auto begin = Clock::now();
    Barrier barrier;
    barrier.reset(threads);
#pragma omp parallel num_threads(threads)
    {
      const int team = omp_get_num_threads();
      // OpenMP may give fewer threads than asked for; a `single` waits for all of them.
      if (team != threads) {
#pragma omp single
        barrier.reset(team);
      }
      const int me = omp_get_thread_num();
      run_layers(p, x, {me, team, p.backwards, p.scratch.data() + me * scratch}, team > 1 ? &barrier : nullptr);
    }
    // Longer than one thread takes on a slow machine: another one has had no core, and a turn of the scheduler is a
    // hundred steps. After the first few of them in a row a look every now and then is enough.
    if (std::chrono::duration<double>(Clock::now() - begin).count() > 2e-4 + 1e-9 * step_work(p)) {
      p.alone = p.next_alone;
      p.next_alone = std::min(2 * p.next_alone, 4096);
    } else {
      p.next_alone = 64;
    }
  }
  const StepShape& s = p.shape;
  for (const StepLayer& layer : p.layers) {
    memcpy(layer.h, layer.h_new, sizeof(float) * s.batch * s.proj_stride);
  }
  const float* last = p.layers.back().h_new;
  for (int64_t b = 0; b < s.batch; ++b) {
    memcpy(p.output + b * s.proj, last + b * s.proj_stride, sizeof(float) * s.proj);
  }
}

}  // namespace fusedrnn
