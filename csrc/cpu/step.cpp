#include "step.h"

#include <string.h>

#include <algorithm>

#include "../cells/table.h"
#include "barrier.h"
#include "scan.h"
#include "sharing.h"
#include "team.h"

namespace fusedrnn {
namespace {

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

int share_step(const StepPlan& p, int threads) {
  // A weight is read for one product, or for a few.
  constexpr double kMultiplyAdd = 1.5;
  const double work = kMultiplyAdd * double(step_work(p));
  const int64_t blocks = ceil_div(p.shape.hidden, p.kernels->f32.width);
  const auto layers = static_cast<double>(p.layers.size());
  const double barriers = p.layers[0].raw ? 2 * layers - 1 : layers - 1;
  return cheapest(threads, [&](int n) {
           return n == 1 ? work : region_cost(threads) + largest_share(blocks, n) * work + barriers * barrier_cost(n);
         }).members;
}

}  // namespace

int64_t step_work(const StepPlan& p) {
  const StepShape& s = p.shape;
  int64_t per_row = 0;
  for (const StepLayer& layer : p.layers) {
    per_row += kTraits[p.cell].gates * s.hidden * (layer.inputs + s.proj) + (layer.raw ? s.proj * s.hidden : 0);
  }
  return per_row * s.batch;
}

void run_step(StepPlan& p, const StepRows& x, int threads) {
  if (threads != p.threads) {
    p.members = share_step(p, threads);
    p.scratch.resize(static_cast<size_t>(step_scratch(p) * p.members));
    p.threads = threads;
  }
  p.backwards = !p.backwards;
  Barrier barrier;
  const int64_t scratch = step_scratch(p);
  in_team(threads, p.members, [&](int team) { barrier.reset(team); }, [&](int me, int team) {
    run_layers(p, x, {me, team, p.backwards, p.scratch.data() + me * scratch}, team > 1 ? &barrier : nullptr);
  });
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
