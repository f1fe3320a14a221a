// The pybind11 module specvlm_kernels._C: pointers, sizes and the stream come in as integers, so no Torch header is
// needed and one build serves every torch version. Device pointers are uint64, 0 for "none".
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "specvlm/compact_kv.h"

namespace py = pybind11;

namespace {

using Address = std::uint64_t;
using Strides = std::tuple<std::int64_t, std::int64_t, std::int64_t>;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

cudaStream_t stream_of(Address address) { return reinterpret_cast<cudaStream_t>(address); }

std::vector<std::string> architectures() {
  std::vector<std::string> names;
  std::stringstream list(SPECVLM_ARCHITECTURES);
  for (std::string name; std::getline(list, name, ',');) names.push_back(name);
  return names;
}

void bind_compact_kv(py::module_& m) {
  m.def(
      "compact_kv",
      [](const std::vector<Address>& k_caches, const std::vector<Address>& v_caches, const Strides& k_strides,
         const Strides& v_strides, Address kv_lens, Address path, std::int64_t path_stride, Address length,
         Address page_table, std::int64_t page_table_stride, int batch, int nodes, int capacity, int pages,
         int page_shift, int heads, int head_vectors, Address stream) {
        specvlm::CompactKvParams p{};
        specvlm::check_argument(k_caches.size() == v_caches.size() && k_caches.size() <= specvlm::kCompactKvMaxLayers,
                                "k_caches, v_caches: expected equal lengths of at most ", specvlm::kCompactKvMaxLayers,
                                ", got ", k_caches.size(), " and ", v_caches.size());
        p.layers = static_cast<int>(k_caches.size());
        for (int layer = 0; layer < p.layers; ++layer) {
          p.caches[layer] = k_caches[layer];
          p.caches[p.layers + layer] = v_caches[layer];
        }
        std::tie(p.k_strides.outer, p.k_strides.token, p.k_strides.head) = k_strides;
        std::tie(p.v_strides.outer, p.v_strides.token, p.v_strides.head) = v_strides;
        p.kv_lens = pointer<std::int32_t>(kv_lens);
        p.path = pointer<const std::int32_t>(path);
        p.path_stride = path_stride;
        p.length = pointer<const std::int32_t>(length);
        p.page_table = pointer<const std::int32_t>(page_table);
        p.page_table_stride = page_table_stride;
        p.batch = batch;
        p.nodes = nodes;
        p.capacity = capacity;
        p.pages = pages;
        p.page_shift = page_shift;
        p.heads = heads;
        p.head_vectors = head_vectors;
        specvlm::compact_kv(p, stream_of(stream));
      },
      py::arg("k_caches"), py::arg("v_caches"), py::arg("k_strides"), py::arg("v_strides"), py::arg("kv_lens"),
      py::arg("path"), py::arg("path_stride"), py::arg("length"), py::arg("page_table"), py::arg("page_table_stride"),
      py::arg("batch"), py::arg("nodes"), py::arg("capacity"), py::arg("pages"), py::arg("page_shift"),
      py::arg("heads"), py::arg("head_vectors"), py::arg("stream"));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CUDA kernels of specvlm_kernels; call them through the package's functions.";
  m.def("architectures", &architectures, "Compute capabilities built in, such as 80 or 90a; 80+PTX is portable code.");
  bind_compact_kv(m);
}
