// The Python module of the emulator. Tensors come as (address, dtype or element size, sizes,
// strides); planning, tables and kernels are those of the CUDA build.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <list>

#include "../cuda/abs_histogram.cuh"
#include "../cuda/gate_stats_.cuh"
#include "../cuda/layer_stats.cuh"
#include "../cuda/rows.cuh"
#include "../cuda/shrink.cuh"

namespace py = pybind11;

namespace psap {
namespace {

using Spec = std::tuple<uintptr_t, int32_t, std::vector<int64_t>, std::vector<int64_t>>;

View view(const Spec& spec) {
  const auto& [data, dtype, sizes, strides] = spec;
  return {reinterpret_cast<const void*>(data), dtype, static_cast<int32_t>(sizes.size()),
          sizes.data(), strides.data()};
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Runs a kernel over a plan: by value where it fits, or as on a GPU from a table in memory.
template <class Job, class Launch>
void over(const Plan<Job>& plan, const Launch& launch) {
  std::vector<char> copy;
  with_table(
      plan, true,
      [&](const std::vector<char>& bytes) {
        copy = bytes;
        return copy.data();
      },
      launch);
}

// out: filter_sums, filter_counts, layer_sums, layer_counts, input_sums, and tickets, of which
// there are `tickets`.
void layer_stats(const std::vector<Spec>& weights, const std::vector<Spec>& grads, uintptr_t tau,
                 int64_t tau_stride, const std::vector<uintptr_t>& out, int64_t tickets,
                 bool per_input) {
  StatsPlan work;
  for (size_t l = 0; l < weights.size(); l++) {
    const View w = view(weights[l]);
    const View g = grads.empty() ? w : view(grads[l]);
    work.add(w, grads.empty() ? nullptr : &g);
  }
  for (size_t l = 0; per_input && l < weights.size(); l++) {
    const View w = view(weights[l]);
    if (w.dims > 1) work.add_inputs(w, view(grads[l]));
  }
  if (work.tickets() > tickets) throw std::runtime_error("too few tickets");
  std::vector<double> partial(work.partials() * kTotals, NAN);
  const StatsOutput output{pointer<float>(tau),
                           pointer<float>(out[0]),
                           pointer<int32_t>(out[1]),
                           pointer<double>(out[2]),
                           pointer<int64_t>(out[3]),
                           pointer<float>(out[4]),
                           partial.data(),
                           pointer<unsigned>(out[5]),
                           work.filters,
                           tau_stride,
                           work.layers,
                           work.blocks};
  over(work.plan, [&](const auto& table) {
    launch_stats(!grads.empty(), per_input, table, output, work.plan.blocks, 0);
  });
}

void abs_histogram(const std::vector<Spec>& tensors, uintptr_t scales, int32_t first, int32_t shift,
                   int32_t bins, uintptr_t counts) {
  Plan<HistogramJob> plan;
  for (size_t t = 0; t < tensors.size(); t++) {
    plan_histogram(plan, view(tensors[t]), static_cast<int32_t>(t));
  }
  const HistogramBins output{
      pointer<float>(scales), pointer<unsigned long long>(counts), 1, first, shift, bins};
  over(plan, [&](const auto& table) {
    using Table = std::decay_t<decltype(table)>;
    PSAP_LAUNCH((histogram_kernel<Table>), plan.blocks, kHistogramThreads, 0, table, output);
  });
}

// lists: bool [O] masks of rows that stay, or int64 rows where there are saved ones.
void rows(const std::vector<Spec>& tensors, const std::vector<Spec>& lists,
          const std::vector<Spec>& saved) {
  Plan<RowJob> plan;
  for (size_t t = 0; t < tensors.size(); t++) {
    const View list = view(lists[t]);
    const View from = saved.empty() ? view(tensors[t]) : view(saved[t]);
    plan_rows(plan, view(tensors[t]), saved.empty() ? nullptr : &from, list.data, list.strides[0],
              list.sizes[0]);
  }
  over(plan, [&](const auto& table) {
    using Table = std::decay_t<decltype(table)>;
    PSAP_LAUNCH((row_kernel<Table>), plan.blocks, kRowThreads, 0, table);
  });
}

void shrink(const std::vector<Spec>& tensors, const std::vector<Spec>& keep0,
            const std::vector<Spec>& keep1, const std::vector<Spec>& outputs, int64_t limit) {
  Plan<ShrinkJob> plan;
  const auto list = [](const Spec& spec) {
    const View v = view(spec);
    return KeepList{static_cast<const int64_t*>(v.data), v.sizes[0], v.strides[0]};
  };
  for (size_t t = 0; t < tensors.size(); t++) {
    const KeepList second = list(keep1[t]);
    const View x = view(tensors[t]);
    plan_shrink(plan, x, view(outputs[t]), list(keep0[t]), x.dims > 1 ? &second : nullptr, limit);
  }
  over(plan, [&](const auto& table) {
    using Table = std::decay_t<decltype(table)>;
    PSAP_LAUNCH((shrink_kernel<Table>), plan.blocks, kShrinkThreads, 0, table);
  });
}

void gate_stats(uintptr_t sums, uintptr_t seen, const std::vector<Spec>& values,
                const std::vector<Spec>& grads, uintptr_t terms, int64_t count, uintptr_t offsets,
                int64_t channels, double scale, uintptr_t scratch, uintptr_t ticket) {
  Plan<GateJob> plan;
  for (size_t k = 0; k < values.size(); k++) plan_gate(plan, view(values[k]), view(grads[k]));
  const GateOutput output{pointer<double>(sums),
                          pointer<long long>(seen),
                          pointer<int32_t>(terms),
                          pointer<int32_t>(offsets),
                          pointer<double>(scratch),
                          pointer<unsigned>(ticket),
                          channels,
                          count,
                          scale,
                          gate_lane_bits(plan, channels, count)};
  over(plan, [&](const auto& table) {
    using Table = std::decay_t<decltype(table)>;
    PSAP_LAUNCH((gate_kernel<Table>), gate_blocks(channels, output.lane_bits), kGateThreads, 0,
                table, output);
  });
}

}  // namespace
}  // namespace psap

PYBIND11_MODULE(psap_emulator, m) {
  // Local: emulators of different sources may be loaded side by side.
  py::register_local_exception<emu::Error>(m, "EmulatorError");
  m.attr("SCHEDULES") = static_cast<int>(emu::kSchedules);
  m.def("set_schedule", [](int schedule) { emu::schedule = schedule; });
  m.def("layer_stats", &psap::layer_stats);
  m.def("abs_histogram", &psap::abs_histogram);
  m.def("rows", &psap::rows);
  m.def("shrink", &psap::shrink, py::arg("tensors"), py::arg("keep0"), py::arg("keep1"),
        py::arg("outputs"), py::arg("limit") = psap::kShrinkRow);
  m.def("gate_stats_", &psap::gate_stats);
}
