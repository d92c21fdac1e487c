// How layer_stats cuts its work into units, by shape alone, and adds them up again, in order.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "stats_kernel.h"

namespace psap {

// What one thread does in one go: some filters of a layer, or one piece of each where they are
// long. Cut by shape alone.
struct Unit {
  int64_t layer, begin, end;        // filters
  int64_t from, to;                 // elements of each
  int64_t totals;                   // where its totals are: one, or one a filter if it has pieces
  int64_t channel, channels, sums;  // input channels that it meets, and where their sums are
};

constexpr int64_t kUnitElements = 1 << 17;
constexpr int64_t kUnitFilters = 128;  // so many terms are added in the input's arithmetic
constexpr int64_t kPieceElements = 1 << 16;

// The outputs, and the plain pointers into them.
struct Outputs {
  torch::stable::Tensor filter_sums, filter_counts, layer_sums, layer_counts, input_sums;
  float* fs;
  int32_t* fc;
  int64_t filters;

  Outputs(const torch::stable::Tensor& like, int64_t layers, int64_t all_filters, int64_t inputs)
      : filter_sums(torch::stable::new_empty(like, {kFilterSums, all_filters},
                                             torch::headeronly::ScalarType::Float)),
        filter_counts(torch::stable::new_empty(like, {kCounts, all_filters},
                                               torch::headeronly::ScalarType::Int)),
        layer_sums(torch::stable::new_empty(like, {layers, kLayerSums},
                                            torch::headeronly::ScalarType::Double)),
        layer_counts(
            torch::stable::new_empty(like, {layers, kCounts}, torch::headeronly::ScalarType::Long)),
        input_sums(torch::stable::new_empty(like, {inputs}, torch::headeronly::ScalarType::Float)),
        fs(filter_sums.mutable_data_ptr<float>()),
        fc(filter_counts.mutable_data_ptr<int32_t>()),
        filters(all_filters) {}

  void filter(int64_t f, const Totals& totals) const {
    for (int s = 0; s < kFilterSums; s++) fs[s * filters + f] = static_cast<float>(totals.sum[s]);
    for (int c = 0; c < kCounts; c++) {
      fc[c * filters + f] = static_cast<int32_t>(totals.count(c));
    }
  }
};

// All units, and how much memory they need.
struct Work {
  std::vector<Unit> units;
  std::vector<int64_t> start{0};  // elements before each unit, at least one a filter
  int64_t totals = 0, sums = 0, scratch = 0;

  void add(const StatsLayer& layer, int64_t index) {
    const int64_t length = layer.inner.count();
    const int64_t piece = std::max<int64_t>(1, std::min(length, kPieceElements));
    const int64_t rows = std::min(kUnitFilters, std::max<int64_t>(1, kUnitElements / piece));
    for (int64_t f = 0; f < layer.filters; f += rows) {
      const int64_t end = std::min(layer.filters, f + rows);
      int64_t from = 0;
      do {
        const int64_t to = std::min(length, from + piece);
        add(layer, {index, f, end, from, to, totals, 0, 0, sums});
        from = to;
      } while (from < length);
    }
  }

 private:
  void add(const StatsLayer& layer, Unit unit) {
    const int64_t elements = unit.to - unit.from, filters = unit.end - unit.begin;
    totals += elements == layer.inner.count() ? 1 : filters;
    start.push_back(start.back() + filters * std::max<int64_t>(1, elements));
    if (layer.inputs > 0 && elements > 0) {
      const int64_t round = layer.inputs * layer.after;
      const bool all = unit.from / round != (unit.to - 1) / round;
      unit.channel = all ? 0 : unit.from / layer.after % layer.inputs;
      unit.channels =
          all ? layer.inputs : (unit.to - 1) / layer.after % layer.inputs + 1 - unit.channel;
      sums += unit.channels;
      scratch = std::max(scratch, elements + 16);  // a load more than there is
    }
    units.push_back(unit);
  }
};

// Adds the units of every layer, in order: totals of layers, filters that were read in pieces, and
// sums per input channel.
class Combine {
 public:
  Combine(const Work& work, const Totals* totals, const double* sums, const Outputs& out)
      : work_(work), totals_(totals), sums_(sums), out_(out) {}

  void layers(const std::vector<StatsLayer>& layers) {
    double* ls = out_.layer_sums.mutable_data_ptr<double>();
    int64_t* lc = out_.layer_counts.mutable_data_ptr<int64_t>();
    float* is = out_.input_sums.mutable_data_ptr<float>();
    std::vector<double> columns;
    for (size_t l = 0; l < layers.size(); l++) {
      columns.assign(layers[l].inputs, 0.0);
      const Totals total = layer(layers[l], static_cast<int64_t>(l), columns);
      for (int s = 0; s < kLayerSums; s++) *ls++ = total.sum[s];
      for (int c = 0; c < kCounts; c++) *lc++ = total.count(c);
      for (double column : columns) *is++ = static_cast<float>(column);
    }
  }

 private:
  Totals layer(const StatsLayer& layer, int64_t index, std::vector<double>& columns) {
    Totals total;
    total.clear();
    while (at_ < work_.units.size() && work_.units[at_].layer == index) {
      const size_t first = at_;
      for (; at_ < work_.units.size() && work_.units[at_].layer == index &&
             work_.units[at_].begin == work_.units[first].begin;
           at_++) {
        const Unit& unit = work_.units[at_];
        for (int64_t c = 0; c < unit.channels; c++)
          columns[unit.channel + c] += sums_[unit.sums + c];
      }
      if (at_ - first == 1) {
        total.add(totals_[work_.units[first].totals]);
      } else {
        pieces(layer, first, total);
      }
    }
    return total;
  }

  // Units first to at_ - 1 are the pieces of the same filters.
  void pieces(const StatsLayer& layer, size_t first, Totals& total) {
    const Unit& unit = work_.units[first];
    for (int64_t f = unit.begin; f < unit.end; f++) {
      Totals filter;
      filter.clear();
      for (size_t u = first; u < at_; u++)
        filter.add(totals_[work_.units[u].totals + f - unit.begin]);
      total.add(filter);
      out_.filter(layer.first + f, filter);
    }
  }

  const Work& work_;
  const Totals* totals_;
  const double* sums_;
  const Outputs& out_;
  size_t at_ = 0;
};

}  // namespace psap
