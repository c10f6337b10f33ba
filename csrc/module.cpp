// The Python module drcnn._C: says how the operator library beside it was built. It links nothing of torch;
// Python loads the library with torch.ops.load_library.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <filesystem>
#include <sstream>
#include <string>
#include <vector>

#include "build_info.h"

namespace py = pybind11;

namespace {

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  std::stringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  return parts;
}

py::dict build_info() {
  const auto file = py::module_::import("drcnn._C").attr("__file__").cast<std::string>();
  py::dict info;
  info["library"] = (std::filesystem::path(file).parent_path() / DRCNN_LIBRARY_FILE).string();
  info["compiler"] = DRCNN_COMPILER;
  info["torch"] = DRCNN_TORCH_VERSION;
  info["cuda"] = DRCNN_CUDA_VERSION;
  info["cuda_note"] = DRCNN_CUDA_NOTE;
  info["architectures"] = split(DRCNN_CUDA_ARCHITECTURES);
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "How the native operators of drcnn were built.";
  m.def("build_info", &build_info, "Returns a dict: library, compiler, torch, cuda, cuda_note, architectures.");
}
