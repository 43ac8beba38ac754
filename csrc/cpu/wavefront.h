// The layers of a stack beside each other, each a piece of time behind the one before it.
#pragma once

#include <algorithm>
#include <atomic>

#include "scan.h"
#include "team.h"

namespace fusedrnn {

// How far the layers of a stack are: a thread takes any layer that nobody else is in and whose input is there.
struct Wavefront {
  static constexpr int kMost = 16;
  struct alignas(64) Layer {
    std::atomic<bool> taken{false};
    std::atomic<int64_t> done{0};  // pieces
  } layers[kMost];
};

// Time in pieces of at most so many steps, none of which goes on behind the end of a chunk.
struct Pieces {
  int64_t time, chunk, each;
  int64_t per_chunk() const { return ceil_div(chunk, each); }
  int64_t count() const { return time / chunk * per_chunk() + ceil_div(time % chunk, each); }
  Part part(int64_t i, int64_t batch) const {
    const int64_t of_chunk = i / per_chunk() * chunk, begin = of_chunk + i % per_chunk() * each;
    return {0, batch, batch, 0, 1, nullptr, {0, 1, nullptr}, begin, std::min({begin + each, of_chunk + chunk, time})};
  }
};

// Layers beside each other, in pieces, the last that can go on first: no thread waits for another at every step, as those
// do that share the units of a layer. A piece, run(i, part), needs the i-1-th layer's; what finish(i, part) does to it is
// for the i-th layer alone.
template <class Run, class Finish>
void run_wavefront(const Shape& s, int count, const Pieces& pieces, int threads, Run run, Finish finish) {
  const int64_t all = pieces.count();
  Wavefront progress;
  std::atomic<int64_t> left{count * all};
  const auto make_a_piece = [&] {
    for (int i = count - 1; i >= 0; --i) {
      auto& mine = progress.layers[i];
      const auto ready = [&](int64_t piece) {
        return piece < all && (i == 0 || progress.layers[i - 1].done.load(std::memory_order_acquire) > piece);
      };
      if (!ready(mine.done.load(std::memory_order_relaxed))) continue;
      if (mine.taken.exchange(true, std::memory_order_acquire)) continue;
      const int64_t piece = mine.done.load(std::memory_order_relaxed);
      const bool found = ready(piece);  // nobody has made it meanwhile
      if (found) {
        const Part part = pieces.part(piece, s.batch);
        run(i, part);
        mine.done.store(piece + 1, std::memory_order_release);
        finish(i, part);
        left.fetch_sub(1, std::memory_order_release);
      }
      mine.taken.store(false, std::memory_order_release);
      if (found) return true;
    }
    return false;
  };
  in_team(threads, std::min(threads, count), [&](int, int) {
    while (left.load(std::memory_order_acquire) > 0) {
      if (make_a_piece()) continue;
      Wait wait;
      while (left.load(std::memory_order_acquire) > 0 && !make_a_piece()) wait.once();
    }
  });
}

}  // namespace fusedrnn
