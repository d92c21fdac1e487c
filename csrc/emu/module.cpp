// The Python module of the emulator. Tensors come as (address, dtype or element size, sizes,
// strides); planning, tables and kernels are those of the CUDA build.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <list>

#include "../cuda/abs_histogram.cuh"
#include "../cuda/gate_stats_.cuh"
#include "../cuda/input_sums.cuh"
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

// Runs a kernel over jobs: by value where they fit, or as on a GPU from a table in memory.
template <class Job, class Launch>
void over(std::vector<Job>& jobs, const Launch& launch) {
  std::vector<Job> copy;
  with_table(
      jobs,
      [&](const Job* from, size_t bytes) {
        copy.assign(from, from + bytes / sizeof(Job));
        return copy.data();
      },
      launch);
}

// Returns how many blocks the launch had; partial and ticket hold at least as many.
int64_t layer_stats(const std::vector<Spec>& weights, const std::vector<Spec>& grads, uintptr_t tau,
                    int64_t filters, const std::vector<uintptr_t>& out, int64_t capacity) {
  std::vector<StatsJob> jobs;
  int64_t first = 0;
  for (size_t l = 0; l < weights.size(); l++) {
    const View w = view(weights[l]);
    const View g = grads.empty() ? w : view(grads[l]);
    jobs.push_back(plan_stats(w, grads.empty() ? nullptr : &g, static_cast<int32_t>(l), first));
    first += w.sizes[0];
  }
  const int64_t blocks = number_blocks(jobs);
  if (blocks > capacity) throw std::runtime_error("the scratch is too small");
  const StatsOutput output{pointer<float>(tau),
                           pointer<float>(out[0]),
                           pointer<int32_t>(out[1]),
                           pointer<double>(out[2]),
                           pointer<int64_t>(out[3]),
                           pointer<double>(out[4]),
                           pointer<unsigned>(out[5]),
                           filters,
                           1};
  over(jobs, [&](const auto& table) {
    using Table = std::decay_t<decltype(table)>;
    if (grads.empty()) {
      PSAP_LAUNCH((stats_kernel<Table, false>), blocks, kStatsThreads, 0, table, output);
    } else {
      PSAP_LAUNCH((stats_kernel<Table, true>), blocks, kStatsThreads, 0, table, output);
    }
  });
  return blocks;
}

void input_sums(const std::vector<Spec>& weights, const std::vector<Spec>& grads, uintptr_t out) {
  std::vector<InputJob> jobs;
  int64_t first = 0;
  for (size_t l = 0; l < weights.size(); l++) {
    const View w = view(weights[l]);
    if (w.dims < 2) continue;
    jobs.push_back(plan_inputs(w, view(grads[l]), first));
    first += w.sizes[1];
  }
  const int64_t blocks = number_blocks(jobs);
  over(jobs, [&](const auto& table) {
    using Table = std::decay_t<decltype(table)>;
    PSAP_LAUNCH((input_kernel<Table>), blocks, kInputThreads, 0, table, pointer<float>(out));
  });
}

void abs_histogram(const std::vector<Spec>& tensors, uintptr_t scales, int32_t first, int32_t shift,
                   int32_t bins, uintptr_t counts) {
  std::vector<HistogramJob> jobs;
  for (size_t t = 0; t < tensors.size(); t++) {
    jobs.push_back(plan_histogram(view(tensors[t]), static_cast<int32_t>(t)));
  }
  const int64_t blocks = number_blocks(jobs);
  const HistogramBins output{
      pointer<float>(scales), pointer<unsigned long long>(counts), 1, first, shift, bins};
  over(jobs, [&](const auto& table) {
    using Table = std::decay_t<decltype(table)>;
    PSAP_LAUNCH((histogram_kernel<Table>), blocks, kHistogramThreads, 0, table, output);
  });
}

// lists: bool [O] masks of rows that stay, or int64 rows where there are saved ones.
void rows(const std::vector<Spec>& tensors, const std::vector<Spec>& lists,
          const std::vector<Spec>& saved) {
  std::vector<RowJob> jobs;
  for (size_t t = 0; t < tensors.size(); t++) {
    const View list = view(lists[t]);
    const View from = saved.empty() ? view(tensors[t]) : view(saved[t]);
    jobs.push_back(plan_rows(view(tensors[t]), saved.empty() ? nullptr : &from, list.data,
                             list.strides[0], list.sizes[0]));
  }
  const int64_t blocks = number_blocks(jobs);
  over(jobs, [&](const auto& table) {
    using Table = std::decay_t<decltype(table)>;
    PSAP_LAUNCH((row_kernel<Table>), blocks, kRowThreads, 0, table);
  });
}

void shrink(const std::vector<Spec>& tensors, const std::vector<Spec>& keep0,
            const std::vector<Spec>& keep1, const std::vector<Spec>& outputs, int64_t limit) {
  std::vector<ShrinkJob> jobs;
  const auto list = [](const Spec& spec) {
    const View v = view(spec);
    return KeepList{static_cast<const int64_t*>(v.data), v.sizes[0], v.strides[0]};
  };
  for (size_t t = 0; t < tensors.size(); t++) {
    const KeepList second = list(keep1[t]);
    const View x = view(tensors[t]);
    plan_shrink(jobs, x, view(outputs[t]), list(keep0[t]), x.dims > 1 ? &second : nullptr, limit);
  }
  const int64_t blocks = number_blocks(jobs);
  over(jobs, [&](const auto& table) {
    using Table = std::decay_t<decltype(table)>;
    PSAP_LAUNCH((shrink_kernel<Table>), blocks, kShrinkThreads, 0, table);
  });
}

void gate_stats(uintptr_t sums, uintptr_t seen, const std::vector<Spec>& values,
                const std::vector<Spec>& grads, uintptr_t terms, int64_t count, uintptr_t offsets,
                int64_t channels, double scale, uintptr_t scratch, uintptr_t ticket) {
  std::vector<GateJob> jobs;
  for (size_t k = 0; k < values.size(); k++) {
    jobs.push_back(plan_gate(view(values[k]), view(grads[k])));
  }
  const GateOutput output{pointer<double>(sums),
                          pointer<long long>(seen),
                          pointer<int32_t>(terms),
                          pointer<int32_t>(offsets),
                          pointer<double>(scratch),
                          pointer<unsigned>(ticket),
                          channels,
                          count,
                          scale,
                          gate_lane_bits(jobs, channels, count)};
  over(jobs, [&](const auto& table) {
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
  m.def("input_sums", &psap::input_sums);
  m.def("abs_histogram", &psap::abs_histogram);
  m.def("rows", &psap::rows);
  m.def("shrink", &psap::shrink, py::arg("tensors"), py::arg("keep0"), py::arg("keep1"),
        py::arg("outputs"), py::arg("limit") = psap::kShrinkRow);
  m.def("gate_stats_", &psap::gate_stats);
}
