// The Python module psap_kernels._C_cuda. Loading it registers the CUDA kernels (static
// initialisers of csrc/cuda/*.cu) and touches no device.
#include <Python.h>
#include <torch/headeronly/version.h>

namespace {

PyModuleDef module = {PyModuleDef_HEAD_INIT,
                      "_C_cuda",
                      "CUDA kernels of psap.",
                      0,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C_cuda() {
  PyObject* m = PyModule_Create(&module);
  if (m == nullptr) return nullptr;
  if (PyModule_AddStringConstant(m, "torch_version", TORCH_VERSION) != 0 ||
      PyModule_AddStringConstant(m, "architectures", PSAP_CUDA_ARCHITECTURES) != 0) {
    Py_DECREF(m);
    return nullptr;
  }
  return m;
}
