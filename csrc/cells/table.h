// What code that knows a cell by its number asks of it; in the order of the numbers.
#pragma once

#include "gru.h"
#include "lstm.h"
#include "rnn.h"

namespace fusedrnn {

struct CellTraits {
  int gates, states;
  bool splits;       // a gate whose halves, of x and of h, stay apart
  bool saves_gates;  // for the backward
  bool has_extra;    // a value more that it saves
};

template <class Cell>
constexpr CellTraits traits_of = {Cell::kGates, Cell::kStates, Cell::kSplitGate >= 0, Cell::kSavesGates,
                                  Cell::kExtra != Extra::kNone};

constexpr CellTraits kTraits[] = {traits_of<RnnTanh>, traits_of<RnnRelu>, traits_of<Lstm>, traits_of<Gru>};

}  // namespace fusedrnn
