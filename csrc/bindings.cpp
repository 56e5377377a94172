// Python bindings over raw pointers: no torch header, so no tie to a torch version. vitlr/ops/_native.py checks
// tensors before they come here; it is the only importer.
#include <pybind11/pybind11.h>

#include <chrono>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/attention.h"
#include "cpu/chain.h"
#include "cpu/gram.h"
#include "cpu/int8_attention.h"
#include "cpu/rounding.h"
#include "cpu/team.h"

namespace py = pybind11;

namespace {

using vitlr::ChainKernel;

template <class T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

const ChainKernel& chain_kernel(const std::string& isa, bool bf16) {
  return vitlr::chain_kernel(vitlr::select_isa(isa.c_str()), bf16);
}

const ChainKernel& int8_chain_kernel(const std::string& isa, bool bf16) {
  return vitlr::int8_chain_kernel(vitlr::select_isa(isa.c_str()), bf16);
}

void gram(uintptr_t C, bool triangle, uintptr_t X, int64_t T, int64_t n, int64_t row_stride, int64_t column_stride,
          uintptr_t weight, int threads, const std::string& isa) {
  const vitlr::Isa chosen = vitlr::select_isa(isa.c_str());
  py::gil_scoped_release release;
  vitlr::gram_update(pointer<double>(C), triangle, pointer<const float>(X), T, n, row_stride, column_stride,
                     pointer<const float>(weight), threads, chosen);
}

// (packed, scales, N, K, group, form)
vitlr::Weight weight_of(const py::tuple& fields) {
  return {pointer(fields[0].cast<uintptr_t>()),
          pointer<const float>(fields[1].cast<uintptr_t>()),
          fields[2].cast<int64_t>(),
          fields[3].cast<int64_t>(),
          fields[4].cast<int64_t>(),
          static_cast<vitlr::Form>(fields[5].cast<int>())};
}

// layers: [(weight, residual weight or None, bias, act)]
void chain(bool bf16, uintptr_t x, int64_t M, int64_t K, int64_t row_stride, int64_t column_stride, uintptr_t y,
           uintptr_t residual, int64_t residual_stride, const py::list& layers, int threads, const std::string& isa) {
  std::vector<vitlr::Weight> residuals(layers.size());
  std::vector<vitlr::Layer> chained;
  for (size_t i = 0; i < layers.size(); ++i) {
    const py::tuple fields = layers[i];
    const bool two = !fields[1].is_none();
    if (two) residuals[i] = weight_of(fields[1]);
    chained.push_back({weight_of(fields[0]), two ? &residuals[i] : nullptr, pointer(fields[2].cast<uintptr_t>()),
                       static_cast<vitlr::Activation>(fields[3].cast<int>())});
  }
  const ChainKernel& kernel = chain_kernel(isa, bf16);
  py::gil_scoped_release release;
  const vitlr::Rows rows{pointer(x), M, K, row_stride, column_stride, pointer(y), pointer(residual), residual_stride};
  vitlr::run_chain(kernel, rows, chained.data(), static_cast<int>(chained.size()), threads);
}

// layers: [(packed, scales, N, K, bias, act, multiplier, shift, wide, how many)], those of floats in fp32; norm: (gamma, beta,
// eps) of the input of the first of them, null where there is none
std::vector<vitlr::Layer> int8_layers(const char* op, const py::list& layers, const py::tuple& norm) {
  std::vector<vitlr::Layer> chained;
  for (const auto& item : layers) {
    const auto fields = item.cast<py::tuple>();
    const auto floats = [&](size_t i) { return pointer<const float>(fields[i].cast<uintptr_t>()); };
    chained.push_back({{pointer(fields[0].cast<uintptr_t>()), floats(1), fields[2].cast<int64_t>(),
                        fields[3].cast<int64_t>(), 1, vitlr::kInt8},
                       nullptr,
                       floats(4),
                       static_cast<vitlr::Activation>(fields[5].cast<int>()),
                       {floats(6), floats(7), pointer<const int32_t>(fields[8].cast<uintptr_t>()),
                        fields[9].cast<int64_t>(), {}}});
    const vitlr::Bytes& input = chained.back().input;
    const int64_t channels = chained.back().weight.K - input.more;
    for (int64_t e = 0; e < input.more; ++e)
      if (input.wide[e] < (e ? input.wide[e - 1] : 0) || input.wide[e] >= channels)
        throw std::invalid_argument(std::string(op) + ": wide is no rising list of channels from 0 to " +
                                    std::to_string(channels - 1));
  }
  chained.at(0).input.norm = {pointer(norm[0].cast<uintptr_t>()), pointer(norm[1].cast<uintptr_t>()),
                              norm[2].cast<float>()};
  return chained;
}

void int8_chain(bool bf16, uintptr_t x, int64_t M, int64_t K, int64_t row_stride, int64_t column_stride, uintptr_t y,
                uintptr_t residual, int64_t residual_stride, const py::list& layers, const py::tuple& norm, int threads,
                const std::string& isa) {
  const std::vector<vitlr::Layer> chained = int8_layers("int8_chain", layers, norm);
  const ChainKernel& kernel = int8_chain_kernel(isa, bf16);
  py::gil_scoped_release release;
  const vitlr::Rows rows{pointer(x), M, K, row_stride, column_stride, pointer(y), pointer(residual), residual_stride};
  vitlr::run_chain(kernel, rows, chained.data(), static_cast<int>(chained.size()), threads);
}

// sizes: images, tokens, K, heads, width of a head; starts [heads + 1] of its queries and keys where they are narrower
void int8_attention(bool bf16, uintptr_t x, const py::tuple& sizes, uintptr_t y, uintptr_t residual,
                    int64_t residual_stride, const py::list& qkv, const py::list& proj, const py::tuple& norm,
                    const py::list& starts, int threads, const std::string& isa) {
  const std::vector<vitlr::Layer> before = int8_layers("int8_attention", qkv, norm);
  const std::vector<vitlr::Layer> after = int8_layers("int8_attention", proj, py::make_tuple(0, 0, 0.0f));
  const ChainKernel& kernel = int8_chain_kernel(isa, bf16);
  const vitlr::AttentionKernel& attention = vitlr::attention_kernel(vitlr::select_isa(isa.c_str()), bf16);
  const auto size = [&](size_t i) { return sizes[i].cast<int64_t>(); };
  std::vector<int64_t> first;
  for (const auto& start : starts) first.push_back(start.cast<int64_t>());
  const vitlr::Int8Attention call{pointer(x), before.data(), after.data(), static_cast<int>(before.size()),
                                  static_cast<int>(after.size()), size(0), size(1), size(2), size(3), size(4),
                                  pointer(residual), residual_stride, pointer(y),
                                  first.empty() ? nullptr : first.data()};
  py::gil_scoped_release release;
  vitlr::run_int8_attention(kernel, attention, call, threads);
}

// q, k, v, bias: (address, strides of image, head and row), a bias at 0 is none; y [images, queries, heads, width]
void attention(bool bf16, const py::tuple& q, const py::tuple& k, const py::tuple& v, const py::tuple& bias, uintptr_t y, int64_t images,
               int64_t heads, int64_t queries, int64_t keys, int64_t width, float scale, int threads,
               const std::string& isa) {
  vitlr::Attention call{};
  const auto read = [](const py::tuple& from, const void*& to, vitlr::Strides& strides) {
    to = pointer(from[0].cast<uintptr_t>());
    strides = {from[1].cast<int64_t>(), from[2].cast<int64_t>(), from[3].cast<int64_t>()};
  };
  read(q, call.q, call.q_strides), read(k, call.k, call.k_strides), read(v, call.v, call.v_strides);
  read(bias, call.bias, call.bias_strides);
  call.images = images, call.heads = heads, call.queries = queries, call.keys = keys, call.width = width;
  call.scale = scale, call.y = pointer(y);
  const vitlr::AttentionKernel& kernel = vitlr::attention_kernel(vitlr::select_isa(isa.c_str()), bf16);
  py::gil_scoped_release release;
  vitlr::run_attention(kernel, call, threads);
}

// matrices: W, step, least, largest, rows, columns, by_row, by_column, E, F, A, codes as in cpu/rounding.h
void round_tile(int64_t height, int64_t width, const py::list& matrices, int64_t stride, int64_t least_stride,
                int64_t largest_stride, int64_t rows_stride, int64_t columns_stride) {
  const auto at = [&](size_t i) { return pointer<double>(matrices[i].cast<uintptr_t>()); };
  const vitlr::RoundingTile tile{height, width,  at(0),        at(1),          at(2),       at(3),         at(4),
                                 at(5),  at(6),  at(7),        at(8),          at(9),       at(10),        at(11),
                                 stride, least_stride, largest_stride, rows_stride, columns_stride};
  py::gil_scoped_release release;
  vitlr::round_tile(tile);
}

void pack(bool bf16, uintptr_t W, int64_t row_stride, int64_t column_stride, int64_t N, int64_t K, uintptr_t packed,
          const std::string& isa) {
  const ChainKernel& kernel = chain_kernel(isa, bf16);
  py::gil_scoped_release release;
  kernel.pack(pointer(W), row_stride, column_stride, N, K, pointer(packed));
}

void pack_codes(bool bf16, uintptr_t codes, uintptr_t scales, int64_t N, int64_t K, int64_t group, int form,
                uintptr_t packed, uintptr_t packed_scales, const std::string& isa) {
  const ChainKernel& kernel = chain_kernel(isa, bf16);
  py::gil_scoped_release release;
  kernel.pack_codes(pointer(codes), pointer(scales), N, K, group, static_cast<vitlr::Form>(form), pointer(packed),
                    pointer<float>(packed_scales));
}

void int8_pack(uintptr_t W, int64_t row_stride, int64_t column_stride, int64_t N, int64_t K, uintptr_t packed,
               const std::string& isa) {
  const ChainKernel& kernel = int8_chain_kernel(isa, false);
  py::gil_scoped_release release;
  kernel.pack(pointer(W), row_stride, column_stride, N, K, pointer(packed));
}

// FLOP/s of multiply-adds between registers: the best of `repeats` runs of about a millisecond.
double peak(const ChainKernel& kernel, int repeats) {
  py::gil_scoped_release release;
  double best = 0;
  for (int i = 0; i < repeats; ++i) {
    const auto start = std::chrono::steady_clock::now();
    const double flops = kernel.peak(100000);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = flops / seconds.count() > best ? flops / seconds.count() : best;
  }
  return best;
}

py::dict build_info() {
  py::list isas;
#ifdef VITLR_WITH_PORTABLE
  isas.append("portable");
#endif
#ifdef VITLR_WITH_AVX2
  isas.append("avx2");
#endif
#ifdef VITLR_WITH_AVX_VNNI
  isas.append("avx_vnni");
#endif
#ifdef VITLR_WITH_AVX512
  isas.append("avx512");
#endif
#ifdef VITLR_WITH_AVX512_VNNI
  isas.append("avx512_vnni");
#endif
#ifdef VITLR_WITH_AVX512_BF16
  isas.append("avx512_bf16");
#endif
#ifdef VITLR_WITH_AMX_INT8
  isas.append("amx_int8");
#endif
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "Clang " __clang_version__;
#else
  info["compiler"] = "GCC " __VERSION__;
#endif
  info["isa_compiled"] = py::tuple(isas);
#ifdef VITLR_BINDINGS
  info["bindings"] = VITLR_BINDINGS;  // a checksum of this file
#endif
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  vitlr::watch_forks();
  m.doc() = "Native kernels of vitlr; use them through vitlr.ops.";
  m.def("gram", &gram, py::arg("C"), py::arg("triangle"), py::arg("X"), py::arg("T"), py::arg("n"),
        py::arg("row_stride"), py::arg("column_stride"), py::arg("weight"), py::arg("threads"), py::arg("isa"));
  m.def("attention", &attention);
  m.def("chain", &chain);
  m.def("round_tile", &round_tile);
  m.def("pack", &pack);
  m.def("pack_codes", &pack_codes);
  m.def("packed_bytes", [](bool bf16, int64_t N, int64_t K, int form, const std::string& isa) {
    return chain_kernel(isa, bf16).packed_bytes(N, K, static_cast<vitlr::Form>(form));
  });
  m.def("fingerprint", [](uintptr_t W, int64_t bytes, int64_t N, int64_t K, int64_t row_stride, int64_t column_stride,
                          int64_t samples) {
    return vitlr::fingerprint(pointer(W), bytes, N, K, row_stride, column_stride, samples);
  });
  m.def("int8_chain", &int8_chain);
  m.def("int8_attention", &int8_attention);
  m.def("int8_pack", &int8_pack);
  m.def("int8_packed_bytes", [](int64_t N, int64_t K, const std::string& isa) {
    return int8_chain_kernel(isa, false).packed_bytes(N, K, vitlr::kInt8);
  });
  m.def("peak", [](bool bf16, int repeats, const std::string& isa) { return peak(chain_kernel(isa, bf16), repeats); });
  m.def("int8_peak", [](int repeats, const std::string& isa) { return peak(int8_chain_kernel(isa, false), repeats); });
  m.def("select_isa", [](const std::string& isa) { return vitlr::name_of(vitlr::select_isa(isa.c_str())); },
        py::arg("isa"));
  m.def("build_info", &build_info);
}
