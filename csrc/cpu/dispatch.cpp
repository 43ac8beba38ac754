#include "dispatch.h"

#include <string.h>

#include <algorithm>
#include <vector>

#include "../cells/table.h"
#include "barrier.h"
#include "buffer.h"
#include "sharing.h"
#include "team.h"
#include "wavefront.h"

namespace fusedrnn {
namespace {

// f(direction, part) for every share of the work.
template <class D, class F>
void run_parts(const D* directions, const LayerWork& layer, int threads, F f) {
  const int count = layer.directions, each = share_layer(layer, threads).members;
  const Team alone{0, 1, nullptr};
  const auto run_alone = [&](const D& d) { f(d, part_of(layer, alone)); };
  if (each == 0) {
    for (int d = 0; d < count; ++d) run_alone(directions[d]);
    return;
  }
  Barrier barriers[2];
  const auto expect = [&](int team) {
    for (Barrier& barrier : barriers) barrier.reset(team / count);
  };
  in_team(threads, each * count, expect, [&](int me, int team) {
    const int size = team / count;
    if (size <= 1) {
      for (int d = me; d < count; d += team) run_alone(directions[d]);
    } else if (me < size * count) {
      f(directions[me / size], part_of(layer, {me % size, size, &barriers[me / size]}));
    }
  });
}

// Rows of `columns` values into rows of `stride` factors.
template <class S>
void spread(const Acc<S>* from, int64_t rows, int64_t columns, Factor<S>* to, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    if constexpr (Storage<S>::kPerFactor == 1) {
      memcpy(to + r * stride, from + r * columns, sizeof(S) * columns);
    } else {
      // Initial states were bf16 before they were widened: nothing is lost in the lower half.
      const auto* bits = reinterpret_cast<const uint32_t*>(from) + r * columns;
      for (int64_t i = 0; i < columns; i += 2) {
        to[r * stride + i / 2].bits = bits[i] >> 16 | (i + 1 < columns ? bits[i + 1] & 0xffff0000u : 0);
      }
    }
  }
}

// Zeros for the initial states of rows that their first step resets.
template <class S>
void reset_initial(const ForwardDirection<S>& d) {
  if (d.resets == nullptr) return;
  const Shape& s = d.shape;
  const auto size = [&](int64_t t) { return t == s.time ? 0 : s.batch_sizes ? s.batch_sizes[t] : s.batch; };
  int64_t row = 0;
  for (int64_t t = 0; t < s.time; row += size(t++)) {
    // Whose first step t is: forward all of step 0, in reverse those that end here.
    for (int64_t b = d.reverse ? size(t + 1) : t == 0 ? 0 : size(t); b < size(t); ++b) {
      if (!d.resets[row + b]) continue;
      std::fill_n(d.state0 + b * s.proj, s.proj, 0);
      if (d.state1) std::fill_n(d.state1 + b * s.hidden, s.hidden, 0);
    }
  }
}

template <class S>
const Functions<S>& functions_of(const Kernels& k);
template <>
const Functions<float>& functions_of<float>(const Kernels& k) {
  return k.f32;
}
template <>
const Functions<double>& functions_of<double>(const Kernels& k) {
  return k.f64;
}
template <>
const Functions<Bf16>& functions_of<Bf16>(const Kernels& k) {
  return k.bf16;
}

// Scratch of some scans, with their initial states in it.
template <class S>
Buffer start(int cell, ForwardDirection<S>* directions, int count) {
  using T = Acc<S>;
  const Shape& s = directions[0].shape;
  const bool projected = directions[0].weight_hr != nullptr;
  const int64_t elements = forward_scratch(s, sizeof(T), kTraits[cell].gates, projected);
  const int64_t stride = scratch_stride(s.proj, sizeof(T));
  Buffer scratch = allocate(elements * count * static_cast<int64_t>(sizeof(T)));
  for (int d = 0; d < count; ++d) {
    directions[d].scratch = reinterpret_cast<T*>(scratch.get()) + d * elements;
    reset_initial(directions[d]);
    for (int copy = 0; copy < 2; ++copy) {
      auto* h = reinterpret_cast<Factor<S>*>(directions[d].scratch) + copy * s.batch * stride;
      spread<S>(directions[d].state0, s.batch, s.proj, h, stride);
    }
  }
  return scratch;
}

template <class S, class D>
LayerWork work_of(int cell, const D& direction, int directions, const Functions<S>& f, int tile_rows) {
  return {direction.shape, direction.inputs, kTraits[cell].gates, directions, sizeof(S), f.width, tile_rows};
}

// The steps of a piece where layers run beside each other; 0 where one after the other, each shared out, is faster, and
// where a layer's weights are more than a core holds.
int64_t steps_of_piece(const LayerWork& layer, int count, int threads) {
  // Multiply-adds of a piece: below, the lines of its input take too long from one core to the other.
  constexpr double kWorthAPiece = 5.6e5;
  const Shape& s = layer.shape;
  const int team = std::min(threads, count);
  if (team <= 1 || count > Wavefront::kMost || s.batch_sizes != nullptr || !stays_in_own_cache(layer)) return 0;
  // Enough rows for the product of the inputs, and pieces enough to keep all threads at work.
  const int64_t steps = std::max(ceil_div(12, std::max<int64_t>(s.batch, 1)), s.time / 16);
  const double work = layer.of_direction();
  if (s.time < 2 * steps || work * double(steps) / double(s.time) < kWorthAPiece) return 0;
  const double beside = region_cost(threads) + work * count / team;
  return beside < count * share_layer(layer, threads).cost ? steps : 0;
}

}  // namespace

template <class S>
void run_forward(const Kernels& k, int cell, ForwardDirection<S>* directions, int count, int threads) {
  const Functions<S>& f = functions_of<S>(k);
  const Buffer scratch = start(cell, directions, count);
  run_parts(directions, work_of(cell, directions[0], count, f, f.rows[cell]), threads, f.forward[cell]);
}

template <class S>
void run_stack(const Kernels& k, int cell, ForwardDirection<S>* layers, int count, int threads) {
  const Functions<S>& f = functions_of<S>(k);
  const Shape& s = layers[0].shape;
  const int64_t steps = steps_of_piece(work_of(cell, layers[count - 1], 1, f, f.rows[cell]), count, threads);
  if (steps == 0) {
    for (int i = 0; i < count; ++i) run_forward<S>(k, cell, layers + i, 1, threads);
    return;
  }
  const Buffer scratch = start(cell, layers, count);
  run_wavefront(
      s, count, {s.time, s.time, steps}, threads,
      [&](int i, const Part& part) { f.forward[cell](layers[i], part); }, [](int, const Part&) {});
}

namespace {

// Scratch of some scans, of so many threads each.
template <class S>
Buffer start(int cell, BackwardDirection<S>* directions, int count, int threads) {
  using T = Acc<S>;
  const Shape& s = directions[0].shape;
  const CellTraits& traits = kTraits[cell];
  const int64_t elements = backward_scratch(s, sizeof(T), traits.gates, traits.splits, directions[0].weight_hr != nullptr,
                                            Storage<S>::kPerFactor > 1, std::max(threads, 1));
  Buffer scratch = allocate(elements * count * static_cast<int64_t>(sizeof(T)));
  for (int d = 0; d < count; ++d) directions[d].scratch = reinterpret_cast<T*>(scratch.get()) + d * elements;
  return scratch;
}

}  // namespace

template <class S>
void run_backward(const Kernels& k, int cell, BackwardDirection<S>* directions, int count, int threads) {
  const Functions<S>& f = functions_of<S>(k);
  const Buffer scratch = start(cell, directions, count, threads);
  run_parts(directions, work_of(cell, directions[0], count, f, f.rows[0]), threads, f.backward[cell]);
}

template <class S>
void run_stack(const Kernels& k, int cell, BackwardDirection<S>* layers, int count, int threads) {
  const Functions<S>& f = functions_of<S>(k);
  const Shape& s = layers[0].shape;
  const int64_t steps = steps_of_piece(work_of(cell, layers[0], 1, f, f.rows[0]), count, threads);
  if (steps == 0) {
    for (int i = 0; i < count; ++i) run_backward<S>(k, cell, layers + i, 1, threads);
    return;
  }
  const Buffer scratch = start(cell, layers, count, 1);
  const int64_t chunk = std::min(backward_chunk_rows(s) / s.batch, s.time);
  run_wavefront(
      s, count, {s.time, chunk, std::min(steps, chunk)}, threads,
      [&](int i, Part part) {
        part.sums = false;
        f.backward[cell](layers[i], part);
      },
      [&](int i, Part part) {
        part.steps = false;
        if (part.end_step % chunk == 0 || part.end_step == s.time) f.backward[cell](layers[i], part);
      });
}

namespace {

// Multiply-adds in the time that a byte takes to be packed.
constexpr double kPackedByte = 1.5;

// f(begin, end) for shares of `blocks` blocks.
template <class F>
void share_blocks(int64_t blocks, double work, int threads, F f) {
  in_team(worth_a_region(work, threads),
          [&](int64_t me, int64_t team) { f(blocks * me / team, blocks * (me + 1) / team); });
}

}  // namespace

template <class S>
void run_pack_rows(const Kernels& k, const S* weight, int64_t gates, int64_t n, int64_t columns, Factor<S>* packed,
                   int threads) {
  const Functions<S>& f = functions_of<S>(k);
  const double bytes = double(gates) * double(n) * double(columns) * sizeof(S);
  share_blocks(ceil_div(n, f.width), kPackedByte * bytes, threads, [&](int64_t begin, int64_t end) {
    f.pack_rows(weight, gates, n, columns, begin, end, packed);
  });
}

template <class S>
void run_pack_columns(const Kernels& k, const S* weight, int64_t rows, int64_t n, Factor<S>* packed, int threads) {
  const Functions<S>& f = functions_of<S>(k);
  const double bytes = double(rows) * double(n) * sizeof(S);
  share_blocks(ceil_div(n, f.width), kPackedByte * bytes, threads, [&](int64_t begin, int64_t end) {
    f.pack_columns(weight, rows, n, begin, end, packed);
  });
}

namespace {

template <class Arguments>
void run_team(void (*function)(const Arguments&, const Team&), const Arguments& a, double products, int threads) {
  const double work = products * double(a.rows) * double(a.inputs) * double(a.outputs);
  in_team(worth_a_region(work, threads), [&](int me, int team) { function(a, {me, team, nullptr}); });
}

}  // namespace

void run_linear(const Kernels& k, const LinearForward& l, int threads) { run_team(k.linear_forward, l, 1, threads); }

void run_linear(const Kernels& k, const LinearBackward& l, int threads) {
  run_team(k.linear_backward, l, (l.d_x != nullptr) + (l.d_weight != nullptr), threads);
}

uint64_t run_fingerprint(const Kernels& k, const void* data, int64_t bytes, int threads) {
  constexpr int64_t kPiece = 256 << 10;
  const int64_t pieces = ceil_div(bytes, kPiece);
  if (pieces <= 1) return k.fingerprint(data, static_cast<size_t>(bytes));
  const auto* from = static_cast<const char*>(data);
  std::vector<uint64_t> of(static_cast<size_t>(pieces));
  in_team(worth_a_region(double(bytes), threads), [&](int64_t me, int64_t team) {
    for (int64_t i = pieces * me / team; i < pieces * (me + 1) / team; ++i) {
      const int64_t begin = i * kPiece;
      of[static_cast<size_t>(i)] = k.fingerprint(from + begin, static_cast<size_t>(std::min(kPiece, bytes - begin)));
    }
  });
  return k.fingerprint(of.data(), of.size() * sizeof(uint64_t));
}

uint64_t run_read(const Kernels& k, const void* data, size_t bytes, int64_t repeats, int threads) {
  uint64_t all = 0;
#pragma omp parallel num_threads(threads) reduction(^ : all)
  {
    const int64_t blocks = static_cast<int64_t>(bytes) / kReadBytes;
    const int64_t me = omp_get_thread_num(), team = omp_get_num_threads();
    const int64_t begin = blocks * me / team * kReadBytes, end = blocks * (me + 1) / team * kReadBytes;
    for (int64_t i = 0; i < repeats; ++i) {
      all ^= k.read(static_cast<const char*>(data) + begin, static_cast<size_t>(end - begin));
    }
  }
  return all;
}

#define FUSEDRNN_INSTANTIATE(S)                                                                        \
  template void run_forward<S>(const Kernels&, int, ForwardDirection<S>*, int, int);                   \
  template void run_stack<S>(const Kernels&, int, ForwardDirection<S>*, int, int);                     \
  template void run_backward<S>(const Kernels&, int, BackwardDirection<S>*, int, int);                 \
  template void run_stack<S>(const Kernels&, int, BackwardDirection<S>*, int, int);                    \
  template void run_pack_rows<S>(const Kernels&, const S*, int64_t, int64_t, int64_t, Factor<S>*, int); \
  template void run_pack_columns<S>(const Kernels&, const S*, int64_t, int64_t, Factor<S>*, int);
FUSEDRNN_INSTANTIATE(float)
FUSEDRNN_INSTANTIATE(double)
FUSEDRNN_INSTANTIATE(Bf16)
#undef FUSEDRNN_INSTANTIATE

}  // namespace fusedrnn
