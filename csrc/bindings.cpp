// The pybind11 module specvlm_kernels._C: pointers, sizes and the stream come in as integers, so no Torch header is
// needed and one build serves every torch version. Device pointers are uint64, 0 for "none".
//
// Each op is a class. An object holds what sizes and strides decide, by keyword; its launch(stream, workspace, inputs,
// outputs) takes addresses alone, by position, and may be called any number of times, from any thread.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/dlpack.h"
#include "specvlm/compact_kv.h"
#include "specvlm/draft_topk.h"
#include "specvlm/expand_tree.h"
#include "specvlm/logits.h"
#include "specvlm/select_tokens.h"
#include "specvlm/token_scores.h"
#include "specvlm/tree_attention.h"
#include "specvlm/verify_greedy.h"
#include "specvlm/verify_sample.h"

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

struct TreeAttentionCall {
  specvlm::TreeAttentionParams params;
  specvlm::TreeAttentionPlan plan;
};

struct TokenScoresCall {
  specvlm::TokenScoresParams params;
  specvlm::TokenScoresPlan plan;
};

struct SelectTokensCall {
  specvlm::SelectTokensParams params;
  specvlm::SelectTokensPlan plan;
};

struct DraftTopkCall {
  specvlm::DraftTopkParams params;
  specvlm::DraftTopkPlan plan;
};

struct ExpandTreeCall {
  specvlm::ExpandTreeParams params;
};

struct VerifyGreedyCall {
  specvlm::VerifyGreedyParams params;
  bool aligned;
};

struct VerifySampleCall {
  specvlm::VerifySampleParams params;
  bool aligned, overlap;
};

struct CompactKvCall {
  specvlm::CompactKvParams params;
  std::optional<std::int64_t> k_layer_stride, v_layer_stride;  // bytes, of a stacked cache; none for a list
};

// A stacked cache is one address, a list one a layer.
Address layer_address(const py::args& caches, std::size_t first, std::optional<std::int64_t> stride, int layer) {
  return stride ? caches[first].cast<Address>() + layer * *stride : caches[first + layer].cast<Address>();
}

// A function like launches.describe of specvlm_kernels, for objects of exactly these types: (tensors, given) ->
// (layouts as bytes, addresses), or None. exchange_api: what the types offer as __dlpack_c_exchange_api__; None if that
// is no use.
py::object describer(const py::object& exchange_api, const py::tuple& types) {
  using specvlm::dlpack::ExchangeApi;
  if (!PyCapsule_IsValid(exchange_api.ptr(), specvlm::dlpack::kExchangeApiName)) return py::none();
  const auto* api =
      static_cast<const ExchangeApi*>(PyCapsule_GetPointer(exchange_api.ptr(), specvlm::dlpack::kExchangeApiName));
  if (api->major != specvlm::dlpack::kMajorVersion || api->tensor_from_py_object == nullptr) return py::none();
  return py::cpp_function([api, types](const py::tuple& tensors, const py::tuple& given) -> py::object {
    std::vector<std::int64_t> layouts;
    layouts.reserve(16 * (tensors.size() + given.size()));
    py::list addresses;
    for (const py::tuple& part : {tensors, given}) {
      for (const py::handle x : part) {
        specvlm::dlpack::Tensor t{};
        const auto type = std::find_if(types.begin(), types.end(), [x](py::handle type) {
          return type.ptr() == reinterpret_cast<PyObject*>(Py_TYPE(x.ptr()));
        });
        if (!x.is_none()) {
          if (type == types.end()) return py::none();
          if (api->tensor_from_py_object(x.ptr(), &t) != 0) {
            PyErr_Clear();
            return py::none();
          }
        }
        const auto address = reinterpret_cast<Address>(t.data) + t.byte_offset;
        layouts.insert(layouts.end(), {type - types.begin(), t.dims, t.type_code, t.type_bits, t.type_lanes,
                                       t.device_type, t.device_id, static_cast<std::int64_t>(address % 16)});
        layouts.insert(layouts.end(), t.shape, t.shape + t.dims);
        layouts.insert(layouts.end(), t.strides, t.strides + t.dims);
        addresses.append(address);
      }
    }
    const py::bytes bytes(reinterpret_cast<const char*>(layouts.data()), layouts.size() * sizeof(layouts[0]));
    return py::make_tuple(bytes, addresses);
  });
}

int shared_memory(int device) {
  int bytes = 0;
  specvlm::check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
                      "cudaDeviceGetAttribute");
  return bytes;
}

void bind_tree_attention(py::module_& m) {
  py::enum_<specvlm::TreeAttentionKernel>(m, "TreeAttentionKernel")
      .value("SM80", specvlm::TreeAttentionKernel::kSm80)
      .value("SM90", specvlm::TreeAttentionKernel::kSm90)
      .value("SM90_ROWS", specvlm::TreeAttentionKernel::kSm90Rows)
      .value("SM90_CLUSTER", specvlm::TreeAttentionKernel::kSm90Cluster);
  py::class_<specvlm::TreeAttentionPlan>(m, "TreeAttentionPlan")
      .def_readonly("kernel", &specvlm::TreeAttentionPlan::kernel)
      .def_readonly("row_tile", &specvlm::TreeAttentionPlan::row_tile)
      .def_readonly("row_tiles", &specvlm::TreeAttentionPlan::row_tiles)
      .def_readonly("columns", &specvlm::TreeAttentionPlan::columns)
      .def_readonly("side", &specvlm::TreeAttentionPlan::side)
      .def_readonly("cluster", &specvlm::TreeAttentionPlan::cluster)
      .def_readonly("ctas", &specvlm::TreeAttentionPlan::ctas)
      .def_readonly("workspace_floats", &specvlm::TreeAttentionPlan::workspace_floats);
  m.def("tree_attention_plan", &specvlm::tree_attention_plan, py::arg("batch"), py::arg("nodes"), py::arg("q_heads"),
        py::arg("kv_heads"), py::arg("head_dim"), py::arg("capacity"), py::arg("page_size"), py::arg("architecture"),
        py::arg("multiprocessors"), py::arg("shared_memory"));
  py::class_<TreeAttentionCall>(m, "TreeAttention")
      .def(py::init([](const specvlm::TreeAttentionPlan& plan, const Strides& q_strides, const Strides& k_strides,
                       const Strides& v_strides, const Strides& out_strides, std::int64_t mask_batch_stride,
                       std::int64_t mask_node_stride, std::int64_t page_table_stride, int mask_words, int batch,
                       int nodes, int q_heads, int kv_heads, int head_dim, int capacity, int page_size, int pages,
                       int max_pages, float scale, bool bfloat16) {
             TreeAttentionCall call{{}, plan};
             auto& p = call.params;
             std::tie(p.q_strides.batch, p.q_strides.token, p.q_strides.head) = q_strides;
             std::tie(p.k_strides.batch, p.k_strides.token, p.k_strides.head) = k_strides;
             std::tie(p.v_strides.batch, p.v_strides.token, p.v_strides.head) = v_strides;
             std::tie(p.out_strides.batch, p.out_strides.token, p.out_strides.head) = out_strides;
             p.mask_batch_stride = mask_batch_stride;
             p.mask_node_stride = mask_node_stride;
             p.page_table_stride = page_table_stride;
             p.mask_words = mask_words;
             p.batch = batch;
             p.nodes = nodes;
             p.q_heads = q_heads;
             p.kv_heads = kv_heads;
             p.head_dim = head_dim;
             p.capacity = capacity;
             p.page_size = page_size;
             p.pages = pages;
             p.max_pages = max_pages;
             p.scale = scale;
             p.dtype = bfloat16 ? specvlm::HalfType::kBFloat16 : specvlm::HalfType::kFloat16;
             return call;
           }),
           py::kw_only(), py::arg("plan"), py::arg("q_strides"), py::arg("k_strides"), py::arg("v_strides"),
           py::arg("out_strides"), py::arg("mask_batch_stride"), py::arg("mask_node_stride"),
           py::arg("page_table_stride"), py::arg("mask_words"), py::arg("batch"), py::arg("nodes"), py::arg("q_heads"),
           py::arg("kv_heads"), py::arg("head_dim"), py::arg("capacity"), py::arg("page_size"), py::arg("pages"),
           py::arg("max_pages"), py::arg("scale"), py::arg("bfloat16"))
      .def(
          "launch",
          [](const TreeAttentionCall& call, Address stream, Address workspace, Address q, Address k, Address v,
             Address kv_lens, Address tree_mask, Address tree_lens, Address page_table, Address out, Address lse) {
            auto p = call.params;
            p.q = pointer<const void>(q);
            p.k = pointer<const void>(k);
            p.v = pointer<const void>(v);
            p.kv_lens = pointer<const std::int32_t>(kv_lens);
            p.tree_mask = pointer<const std::int64_t>(tree_mask);
            p.tree_lens = pointer<const std::int32_t>(tree_lens);
            p.page_table = pointer<const std::int32_t>(page_table);
            p.out = pointer<void>(out);
            p.lse = pointer<float>(lse);
            p.workspace = pointer<float>(workspace);
            specvlm::tree_attention(p, call.plan, stream_of(stream));
          },
          py::arg("stream"), py::arg("workspace"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("kv_lens"),
          py::arg("tree_mask"), py::arg("tree_lens"), py::arg("page_table"), py::arg("out"), py::arg("lse") = 0);
}

void bind_token_scores(py::module_& m) {
  py::enum_<specvlm::TokenScoresKernel>(m, "TokenScoresKernel")
      .value("SM80", specvlm::TokenScoresKernel::kSm80)
      .value("SM90", specvlm::TokenScoresKernel::kSm90);
  py::class_<specvlm::TokenScoresPlan>(m, "TokenScoresPlan")
      .def_readonly("kernel", &specvlm::TokenScoresPlan::kernel)
      .def_readonly("columns", &specvlm::TokenScoresPlan::columns)
      .def_readonly("row_tiles", &specvlm::TokenScoresPlan::row_tiles)
      .def_readonly("tile_queries", &specvlm::TokenScoresPlan::tile_queries)
      .def_readonly("chunks", &specvlm::TokenScoresPlan::chunks)
      .def_readonly("chunk_queries", &specvlm::TokenScoresPlan::chunk_queries)
      .def_readonly("rows", &specvlm::TokenScoresPlan::rows)
      .def_readonly("stages", &specvlm::TokenScoresPlan::stages)
      .def_readonly("ctas", &specvlm::TokenScoresPlan::ctas)
      .def_readonly("workspace_floats", &specvlm::TokenScoresPlan::workspace_floats);
  m.def("token_scores_plan", &specvlm::token_scores_plan, py::arg("batch"), py::arg("queries"), py::arg("q_heads"),
        py::arg("kv_heads"), py::arg("head_dim"), py::arg("span_len"), py::arg("page_size"), py::arg("architecture"),
        py::arg("multiprocessors"));
  py::class_<TokenScoresCall>(m, "TokenScores")
      .def(py::init([](const specvlm::TokenScoresPlan& plan, const Strides& q_strides, const Strides& k_strides,
                       std::int64_t lse_batch_stride, std::int64_t lse_token_stride, std::int64_t mask_batch_stride,
                       std::int64_t page_table_stride, std::int64_t out_batch_stride, int batch, int queries,
                       int q_heads, int kv_heads, int head_dim, int capacity, int page_size, int pages, int max_pages,
                       int span_start, int span_len, double scale, float weight, bool bfloat16) {
             TokenScoresCall call{{}, plan};
             auto& p = call.params;
             std::tie(p.q_strides.batch, p.q_strides.token, p.q_strides.head) = q_strides;
             std::tie(p.k_strides.batch, p.k_strides.token, p.k_strides.head) = k_strides;
             p.lse_batch_stride = lse_batch_stride;
             p.lse_token_stride = lse_token_stride;
             p.mask_batch_stride = mask_batch_stride;
             p.page_table_stride = page_table_stride;
             p.out_batch_stride = out_batch_stride;
             p.batch = batch;
             p.queries = queries;
             p.q_heads = q_heads;
             p.kv_heads = kv_heads;
             p.head_dim = head_dim;
             p.capacity = capacity;
             p.page_size = page_size;
             p.pages = pages;
             p.max_pages = max_pages;
             p.span_start = span_start;
             p.span_len = span_len;
             p.scale = scale;
             p.weight = weight;
             p.dtype = bfloat16 ? specvlm::HalfType::kBFloat16 : specvlm::HalfType::kFloat16;
             return call;
           }),
           py::kw_only(), py::arg("plan"), py::arg("q_strides"), py::arg("k_strides"), py::arg("lse_batch_stride"),
           py::arg("lse_token_stride"), py::arg("mask_batch_stride"), py::arg("page_table_stride"),
           py::arg("out_batch_stride"), py::arg("batch"), py::arg("queries"), py::arg("q_heads"), py::arg("kv_heads"),
           py::arg("head_dim"), py::arg("capacity"), py::arg("page_size"), py::arg("pages"), py::arg("max_pages"),
           py::arg("span_start"), py::arg("span_len"), py::arg("scale"), py::arg("weight"), py::arg("bfloat16"))
      .def(
          "launch",
          [](const TokenScoresCall& call, Address stream, Address workspace, Address q, Address k, Address lse,
             Address kv_lens, Address span_starts, Address query_mask, Address page_table, Address out) {
            auto p = call.params;
            p.q = pointer<const void>(q);
            p.k = pointer<const void>(k);
            p.lse = pointer<const float>(lse);
            p.kv_lens = pointer<const std::int32_t>(kv_lens);
            p.span_starts = pointer<const std::int32_t>(span_starts);
            p.query_mask = pointer<const bool>(query_mask);
            p.page_table = pointer<const std::int32_t>(page_table);
            p.out = pointer<float>(out);
            p.workspace = pointer<float>(workspace);
            specvlm::token_scores(p, call.plan, stream_of(stream));
          },
          py::arg("stream"), py::arg("workspace"), py::arg("q"), py::arg("k"), py::arg("lse"), py::arg("kv_lens"),
          py::arg("span_starts"), py::arg("query_mask"), py::arg("page_table"), py::arg("out"));
}

void bind_select_tokens(py::module_& m) {
  py::enum_<specvlm::SelectTokensKernel>(m, "SelectTokensKernel")
      .value("ALONE", specvlm::SelectTokensKernel::kAlone)
      .value("CLUSTER", specvlm::SelectTokensKernel::kCluster)
      .value("GRID", specvlm::SelectTokensKernel::kGrid);
  py::class_<specvlm::SelectTokensPlan>(m, "SelectTokensPlan")
      .def_readonly("kernel", &specvlm::SelectTokensPlan::kernel)
      .def_readonly("ctas", &specvlm::SelectTokensPlan::ctas)
      .def_readonly("slots", &specvlm::SelectTokensPlan::slots)
      .def_readonly("resident", &specvlm::SelectTokensPlan::resident)
      .def_readonly("rows_per_launch", &specvlm::SelectTokensPlan::rows_per_launch)
      .def_readonly("workspace_words", &specvlm::SelectTokensPlan::workspace_words);
  m.def("select_tokens_plan", &specvlm::select_tokens_plan, py::arg("rows"), py::arg("tokens"), py::arg("architecture"),
        py::arg("multiprocessors"), py::arg("shared_memory"));
  py::class_<SelectTokensCall>(m, "SelectTokens")
      .def(py::init([](const specvlm::SelectTokensPlan& plan, std::int64_t scores_stride, std::int64_t mask_stride,
                       std::int64_t indices_stride, int rows, int tokens, int keep, int share) {
             SelectTokensCall call{{}, plan};
             auto& p = call.params;
             p.scores_stride = scores_stride;
             p.mask_stride = mask_stride;
             p.indices_stride = indices_stride;
             p.rows = rows;
             p.tokens = tokens;
             p.keep = keep;
             p.share = share;
             return call;
           }),
           py::kw_only(), py::arg("plan"), py::arg("scores_stride"), py::arg("mask_stride"), py::arg("indices_stride"),
           py::arg("rows"), py::arg("tokens"), py::arg("keep"), py::arg("share"))
      .def(
          "launch",
          [](const SelectTokensCall& call, Address stream, Address workspace, Address scores, Address mask,
             Address indices, Address num_attention) {
            auto p = call.params;
            p.scores = pointer<const float>(scores);
            p.mask = pointer<const std::uint8_t>(mask);
            p.indices = pointer<std::int64_t>(indices);
            p.num_attention = pointer<std::int32_t>(num_attention);
            p.workspace = pointer<std::uint64_t>(workspace);
            specvlm::select_tokens(p, call.plan, stream_of(stream));
          },
          py::arg("stream"), py::arg("workspace"), py::arg("scores"), py::arg("mask"), py::arg("indices"),
          py::arg("num_attention"));
}

void bind_draft_topk(py::module_& m) {
  py::class_<specvlm::DraftTopkPlan>(m, "DraftTopkPlan")
      .def_readonly("parts", &specvlm::DraftTopkPlan::parts)
      .def_readonly("workspace_entries", &specvlm::DraftTopkPlan::workspace_entries);
  m.def("draft_topk_plan", &specvlm::draft_topk_plan, py::arg("rows"), py::arg("vocab"), py::arg("k"),
        py::arg("aligned"));
  py::class_<DraftTopkCall>(m, "DraftTopk")
      .def(py::init([](const specvlm::DraftTopkPlan& plan, std::int64_t row_stride, int rows, int vocab, int k,
                       float factor, specvlm::LogitsType dtype) {
             DraftTopkCall call{{}, plan};
             auto& p = call.params;
             p.row_stride = row_stride;
             p.rows = rows;
             p.vocab = vocab;
             p.k = k;
             p.factor = factor;
             p.dtype = dtype;
             return call;
           }),
           py::kw_only(), py::arg("plan"), py::arg("row_stride"), py::arg("rows"), py::arg("vocab"), py::arg("k"),
           py::arg("factor"), py::arg("dtype"))
      .def(
          "launch",
          [](const DraftTopkCall& call, Address stream, Address workspace, Address logits, Address log_probs,
             Address token_ids) {
            auto p = call.params;
            p.logits = pointer<const void>(logits);
            p.log_probs = pointer<float>(log_probs);
            p.token_ids = pointer<std::int64_t>(token_ids);
            p.workspace = pointer<std::uint64_t>(workspace);
            specvlm::draft_topk(p, call.plan, stream_of(stream));
          },
          py::arg("stream"), py::arg("workspace"), py::arg("logits"), py::arg("log_probs"), py::arg("token_ids"));
}

void bind_expand_tree(py::module_& m) {
  py::class_<ExpandTreeCall>(m, "ExpandTree")
      .def(py::init([](std::int64_t log_probs_stride, std::int64_t log_probs_row, std::int64_t token_ids_stride,
                       std::int64_t token_ids_row, int batch, int rows, int width, int nodes, bool all_rows) {
             ExpandTreeCall call{};
             auto& p = call.params;
             p.log_probs_stride = log_probs_stride;
             p.log_probs_row = log_probs_row;
             p.token_ids_stride = token_ids_stride;
             p.token_ids_row = token_ids_row;
             p.batch = batch;
             p.rows = rows;
             p.width = width;
             p.nodes = nodes;
             p.all_rows = all_rows;
             return call;
           }),
           py::kw_only(), py::arg("log_probs_stride"), py::arg("log_probs_row"), py::arg("token_ids_stride"),
           py::arg("token_ids_row"), py::arg("batch"), py::arg("rows"), py::arg("width"), py::arg("nodes"),
           py::arg("all_rows"))
      .def(
          "launch",
          [](const ExpandTreeCall& call, Address stream, Address /*workspace*/, Address log_probs, Address token_ids,
             Address root, Address tokens, Address parents, Address depths, Address mask, Address node_rows) {
            auto p = call.params;
            p.log_probs = pointer<const float>(log_probs);
            p.token_ids = pointer<const std::int64_t>(token_ids);
            p.root = pointer<const std::int64_t>(root);
            p.tokens = pointer<std::int64_t>(tokens);
            p.parents = pointer<std::int32_t>(parents);
            p.depths = pointer<std::int32_t>(depths);
            p.mask = pointer<std::int64_t>(mask);
            p.node_rows = pointer<std::int32_t>(node_rows);
            specvlm::expand_tree(p, stream_of(stream));
          },
          py::arg("stream"), py::arg("workspace"), py::arg("log_probs"), py::arg("token_ids"), py::arg("root"),
          py::arg("tokens"), py::arg("parents"), py::arg("depths"), py::arg("mask"), py::arg("node_rows"));
}

void bind_verify_greedy(py::module_& m) {
  m.def("verify_greedy_workspace", &specvlm::verify_greedy_workspace, py::arg("batch"), py::arg("nodes"),
        py::arg("vocab"), py::arg("aligned"));
  py::class_<VerifyGreedyCall>(m, "VerifyGreedy")
      .def(py::init([](std::int64_t batch_stride, std::int64_t node_stride, std::int64_t tokens_stride,
                       std::int64_t parents_stride, std::int64_t path_stride, int batch, int nodes, int vocab,
                       specvlm::LogitsType dtype, bool aligned) {
             VerifyGreedyCall call{{}, aligned};
             auto& p = call.params;
             p.batch_stride = batch_stride;
             p.node_stride = node_stride;
             p.tokens_stride = tokens_stride;
             p.parents_stride = parents_stride;
             p.path_stride = path_stride;
             p.batch = batch;
             p.nodes = nodes;
             p.vocab = vocab;
             p.dtype = dtype;
             return call;
           }),
           py::kw_only(), py::arg("batch_stride"), py::arg("node_stride"), py::arg("tokens_stride"),
           py::arg("parents_stride"), py::arg("path_stride"), py::arg("batch"), py::arg("nodes"), py::arg("vocab"),
           py::arg("dtype"), py::arg("aligned"))
      .def(
          "launch",
          [](const VerifyGreedyCall& call, Address stream, Address workspace, Address logits, Address tokens,
             Address parents, Address tree_lens, Address path, Address length, Address next_token) {
            auto p = call.params;
            p.logits = pointer<const void>(logits);
            p.tokens = pointer<const std::int64_t>(tokens);
            p.parents = pointer<const std::int32_t>(parents);
            p.tree_lens = pointer<const std::int32_t>(tree_lens);
            p.path = pointer<std::int32_t>(path);
            p.length = pointer<std::int32_t>(length);
            p.next_token = pointer<std::int64_t>(next_token);
            p.workspace = pointer<std::uint64_t>(workspace);
            specvlm::verify_greedy(p, call.aligned, stream_of(stream));
          },
          py::arg("stream"), py::arg("workspace"), py::arg("logits"), py::arg("tokens"), py::arg("parents"),
          py::arg("tree_lens"), py::arg("path"), py::arg("length"), py::arg("next_token"));
}

void bind_verify_sample(py::module_& m) {
  m.def("verify_sample_workspace", &specvlm::verify_sample_workspace, py::arg("batch"), py::arg("nodes"),
        py::arg("vocab"), py::arg("aligned"), py::arg("filtered"));
  py::class_<VerifySampleCall>(m, "VerifySample")
      .def(py::init([](std::int64_t batch_stride, std::int64_t node_stride, std::int64_t tokens_stride,
                       std::int64_t parents_stride, std::int64_t coins_stride, std::int64_t path_stride, int batch,
                       int nodes, int vocab, int top_k, double top_p, double factor, specvlm::LogitsType dtype,
                       bool aligned, bool overlap) {
             VerifySampleCall call{{}, aligned, overlap};
             auto& p = call.params;
             p.batch_stride = batch_stride;
             p.node_stride = node_stride;
             p.tokens_stride = tokens_stride;
             p.parents_stride = parents_stride;
             p.coins_stride = coins_stride;
             p.path_stride = path_stride;
             p.batch = batch;
             p.nodes = nodes;
             p.vocab = vocab;
             p.top_k = top_k;
             p.top_p = top_p;
             p.factor = factor;
             p.dtype = dtype;
             return call;
           }),
           py::kw_only(), py::arg("batch_stride"), py::arg("node_stride"), py::arg("tokens_stride"),
           py::arg("parents_stride"), py::arg("coins_stride"), py::arg("path_stride"), py::arg("batch"),
           py::arg("nodes"), py::arg("vocab"), py::arg("top_k"), py::arg("top_p"), py::arg("factor"), py::arg("dtype"),
           py::arg("aligned"), py::arg("overlap"))
      .def(
          "launch",
          [](const VerifySampleCall& call, Address stream, Address workspace, Address logits, Address tokens,
             Address parents, Address coins, Address path, Address length, Address next_token) {
            auto p = call.params;
            p.logits = pointer<const void>(logits);
            p.tokens = pointer<const std::int64_t>(tokens);
            p.parents = pointer<const std::int32_t>(parents);
            p.coins = pointer<const float>(coins);
            p.path = pointer<std::int32_t>(path);
            p.length = pointer<std::int32_t>(length);
            p.next_token = pointer<std::int64_t>(next_token);
            p.workspace = pointer<void>(workspace);
            specvlm::verify_sample(p, call.aligned, call.overlap, stream_of(stream));
          },
          py::arg("stream"), py::arg("workspace"), py::arg("logits"), py::arg("tokens"), py::arg("parents"),
          py::arg("coins"), py::arg("path"), py::arg("length"), py::arg("next_token"));
}

void bind_compact_kv(py::module_& m) {
  py::class_<CompactKvCall>(m, "CompactKv")
      .def(py::init([](int layers, std::optional<std::int64_t> k_layer_stride,
                       std::optional<std::int64_t> v_layer_stride, const Strides& k_strides, const Strides& v_strides,
                       std::int64_t path_stride, std::int64_t page_table_stride, int batch, int nodes, int capacity,
                       int pages, int page_shift, int heads, int head_vectors) {
             specvlm::check_argument(layers >= 1 && layers <= specvlm::kCompactKvMaxLayers, "layers: expected 1..",
                                     specvlm::kCompactKvMaxLayers, ", got ", layers);
             CompactKvCall call{{}, k_layer_stride, v_layer_stride};
             auto& p = call.params;
             std::tie(p.k_strides.outer, p.k_strides.token, p.k_strides.head) = k_strides;
             std::tie(p.v_strides.outer, p.v_strides.token, p.v_strides.head) = v_strides;
             p.path_stride = path_stride;
             p.page_table_stride = page_table_stride;
             p.layers = layers;
             p.batch = batch;
             p.nodes = nodes;
             p.capacity = capacity;
             p.pages = pages;
             p.page_shift = page_shift;
             p.heads = heads;
             p.head_vectors = head_vectors;
             return call;
           }),
           py::kw_only(), py::arg("layers"), py::arg("k_layer_stride"), py::arg("v_layer_stride"), py::arg("k_strides"),
           py::arg("v_strides"), py::arg("path_stride"), py::arg("page_table_stride"), py::arg("batch"),
           py::arg("nodes"), py::arg("capacity"), py::arg("pages"), py::arg("page_shift"), py::arg("heads"),
           py::arg("head_vectors"))
      .def("launch", [](const CompactKvCall& call, Address stream, Address /*workspace*/, Address path, Address kv_lens,
                        Address length, Address page_table, const py::args& caches) {
        auto p = call.params;
        const std::size_t keys = call.k_layer_stride ? 1 : p.layers, values = call.v_layer_stride ? 1 : p.layers;
        specvlm::check_argument(caches.size() == keys + values, "caches: expected ", keys, " of keys and ", values,
                                " of values, got ", caches.size(), " in all");
        for (int layer = 0; layer < p.layers; ++layer) {
          p.caches[layer] = layer_address(caches, 0, call.k_layer_stride, layer);
          p.caches[p.layers + layer] = layer_address(caches, keys, call.v_layer_stride, layer);
        }
        p.kv_lens = pointer<std::int32_t>(kv_lens);
        p.path = pointer<const std::int32_t>(path);
        p.length = pointer<const std::int32_t>(length);
        p.page_table = pointer<const std::int32_t>(page_table);
        specvlm::compact_kv(p, stream_of(stream));
      });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CUDA kernels of specvlm_kernels; call them through the package's functions.";
  m.def("architectures", &architectures, "Compute capabilities built in, such as 80 or 90a; 80+PTX is portable code.");
  py::enum_<specvlm::LogitsType>(m, "LogitsType")
      .value("BFLOAT16", specvlm::LogitsType::kBFloat16)
      .value("FLOAT16", specvlm::LogitsType::kFloat16)
      .value("FLOAT32", specvlm::LogitsType::kFloat32);
  m.def("shared_memory", &shared_memory, py::arg("device"), "Bytes of shared memory of a multiprocessor.");
  m.def("describer", &describer, py::arg("exchange_api"), py::arg("types"));
  bind_tree_attention(m);
  bind_token_scores(m);
  bind_select_tokens(m);
  bind_draft_topk(m);
  bind_expand_tree(m);
  bind_verify_greedy(m);
  bind_verify_sample(m);
  bind_compact_kv(m);
}
