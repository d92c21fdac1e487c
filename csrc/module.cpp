// The Python module psap_kernels._C. Loading it registers the CPU kernels (static initialisers of
// csrc/cpu/*.cpp); what it exports is only what build_info() wants to know.
#include <Python.h>
#include <torch/headeronly/version.h>

#include <exception>

#include "cpu/capability.h"

namespace {

PyObject* cpu_capability(PyObject*, PyObject*) {
  try {
    return PyUnicode_FromString(psap::cpu_capability());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  }
}

PyMethodDef methods[] = {
    {"cpu_capability", cpu_capability, METH_NOARGS,
     "Instruction set in use: 'avx2' or 'default' (PSAP_CPU_CAPABILITY overrides)."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT,
                      "_C",
                      "CPU kernels of psap.",
                      0,
                      methods,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  PyObject* m = PyModule_Create(&module);
  if (m == nullptr) return nullptr;
  if (PyModule_AddStringConstant(m, "torch_version", TORCH_VERSION) != 0) {
    Py_DECREF(m);
    return nullptr;
  }
  return m;
}
