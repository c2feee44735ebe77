// The only file that knows pybind11. Each operation lives in its own .cpp and is declared here.
// Pointers arrive as integers; the Python file of the operation has checked dtype, device, shape
// and contiguity. Every function releases the GIL and takes its thread count from the caller.
#include <pybind11/pybind11.h>

#include <cstdint>

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled operations of maskprune; call them through maskprune.ops";
}
