// One time step of a stack of layers, with fp32 states: what a step is given, and who runs it.
// The kernels are in step_kernel.h, once per ISA level.
#pragma once

#include <stdint.h>

#include <vector>

namespace fusedrnn {

struct Kernels;

// How packed weights are stored: storage.h, step_digits.h.
enum StepStorage { kPlain, kBFloat16, kInt8, kStorages };

// Rows of a state lie `stride` apart, padded to whole vectors of every ISA level. What is made per gate
// and unit is packed as the weights are, with k = 1: [ceil(H/W), G, W].
struct StepLayer {
  int64_t inputs;          // I
  const void* weight_ih;   // packed [ceil(H/W), I, G, W]
  const void* weight_hh;   // packed [ceil(H/W), P, G, W]
  const void* weight_hr;   // packed [ceil(P/W), H, W], null without a projection
  const float* scale_ih;   // [ceil(H/W), G, W], null unless kInt8
  const float* scale_hh;   // [ceil(H/W), G, W], likewise
  const float* scale_hr;   // [ceil(P/W), W], likewise
  const float* bias_ih;    // [ceil(H/W), G, W]
  const float* bias_hh;    // [ceil(H/W), G, W]
  float* h;                // [B, proj_stride]
  float* h_new;            // [B, proj_stride] of this step, until all layers are done
  float* c;                // [B, hidden_stride] before, then after; null for cells with one state
  float* raw;              // [B, hidden_stride] hidden state before the projection, null without one
};

struct StepShape {
  int64_t batch;          // B
  int64_t hidden;         // H
  int64_t proj;           // P, H without a projection
  int64_t hidden_stride;  // from one row to the next
  int64_t proj_stride;
};

// Rows of an input: x[b][k] is at data[b * stride + k * k_stride].
struct StepRows {
  const float* data;
  int64_t stride, k_stride;
};

// The share of one thread: the member-th of `members` equal parts of the units.
struct StepPart {
  int member, members;
  bool backwards;  // the order of the units; what the last step read last is still in the cache
  char* scratch;   // a thread's own: what `scratch` says for the rows of both factors of a layer
};

struct StepFunctions {
  int together;                                  // steps of k that lie side by side in a packed weight
  int64_t (*scratch)(int64_t batch, int64_t k);  // bytes that rows of k values take as a factor
  void (*units[4])(const StepShape&, const StepLayer&, const StepRows&, const StepPart&);  // per cell
  void (*project)(const StepShape&, const StepLayer&, const StepPart&);
};

// A cell on gates that are made already.
struct CellUpdate {
  int64_t rows, hidden;            // B, H
  const float *x_gates, *h_gates;  // [B, G*H]: both halves, with their biases
  const float *h, *c;              // [B, H]; c null for cells with one state
  int64_t h_stride, c_stride;      // from one row to the next
  float *h_new, *c_new;            // [B, H]
  float* output;                   // h_new once more, or null
};

struct StepPlan {
  const Kernels* kernels;
  int cell;
  StepStorage storage;
  StepShape shape;
  std::vector<StepLayer> layers;
  float* output;           // [B, P]
  bool backwards = false;
  int threads = 0, members = 1;  // of so many threads, those that take part
  std::vector<char> scratch{};
};

// Multiply-adds of a step.
int64_t step_work(const StepPlan& plan);
// Steps all layers: states and output are written once all of them are done.
void run_step(StepPlan& plan, const StepRows& x, int threads);

}  // namespace fusedrnn
