// lowrank_sm90(x, B1, A1, B2, A2, residual, b1, b2, y, M, K, D, N, r1, r2, act, fp16, plan, device, stream): the MLP, or
// with D = 0 lowrank_linear of B1 and A2. Matrices are (address, elements from row to row) or None; vectors addresses,
// 0: none; plan None, or (R, warpgroups, ranks, clusters, groups) in place of the one that the model picks.
// lowrank_sm90_plan(M, K, D, N, r1, r2, residual, device) -> (R, warpgroups, ranks, clusters, groups, modelled µs).
#include <pybind11/pybind11.h>

#include "cuda/hang.h"
#include "cuda/lowrank_sm90.h"
#include "cuda/status.h"

namespace py = pybind11;
using namespace vitlr::cuda;
using namespace vitlr::cuda::lowrank;

namespace {

constexpr const char* kName = "the low-rank kernel for Hopper";

Matrix matrix_of(const py::object& given) {
  if (given.is_none()) return {nullptr, 0};
  const py::tuple fields = given;
  return {reinterpret_cast<const void*>(fields[0].cast<uintptr_t>()), fields[1].cast<int64_t>()};
}

// What TMA asks for: bases and rows at multiples of 16 bytes. The last column of a matrix is in its last row, so sizes
// that are inner ones are multiples of 8.
void require(const LowrankParams& p, int device) {
  require_capability(device, 90, true, kName);
  const Matrix matrices[] = {p.x, p.B1, p.A1, p.B2, p.A2, p.residual, {p.y, p.N}};
  const char* names[] = {"x", "B1", "A1", "B2", "A2", "residual", "y"};
  for (int i = 0; i < 7; ++i) {
    if (matrices[i].data == nullptr && (i == 2 || i == 3 || i == 5)) continue;
    require_on_device(matrices[i].data, device, 16, names[i]);
    if (matrices[i].stride <= 0 || matrices[i].stride % 8)
      refuse(std::string(names[i]) + " has rows " + std::to_string(matrices[i].stride) +
             " elements apart, expected a multiple of 8");
  }
  for (const auto& [vector, name] : {std::pair<const void*, const char*>{p.b1, "b1"}, {p.b2, "b2"}})
    if (vector != nullptr) require_on_device(vector, device, 4, name);
  if (p.mlp() != (p.A1.data != nullptr) || p.mlp() != (p.B2.data != nullptr))
    refuse("A1 and B2 come with D, all or none");
  if (p.act < Act::none || p.act > Act::relu) refuse("no such activation");
  if (p.M <= 0 || p.M > 1 << 30 || p.K <= 0 || p.N <= 0 || p.K % 8 || p.D % 8 || p.N % 8 || p.r1 % 8 || p.r2 % 8)
    refuse("widths and ranks have to be multiples of 8, rows 1 to 2^30");
}

Plan given_plan(const LowrankParams& p, const py::tuple& fields) {
  if (fields.size() != 5) refuse("a plan is (R, warpgroups, ranks, clusters, groups)");
  int values[5];
  for (int i = 0; i < 5; ++i) values[i] = fields[i].cast<int>();
  const Plan found{values[0], values[1], values[2], values[3], values[4], 0};
  const std::string why = objection(p, found);
  if (!why.empty()) refuse("the plan that was given does not run: " + why);
  return found;
}

int processors(int device) { return attribute(cudaDevAttrMultiProcessorCount, device); }

}  // namespace

void register_lowrank_sm90(py::module_& m) {
#ifdef VITLR_BOUNDED_WAITS
  m.def("hung", [] {  // who waited for what; empty where nothing hung
    const Hang* note = hang_of_this_process();
    return note == nullptr ? std::string() : told(*note);
  });
#endif
  m.def("lowrank_sm90_plan", [](int M, int K, int D, int N, int r1, int r2, bool residual, int device) {
    LowrankParams p{};
    p.M = M, p.K = K, p.D = D, p.N = N, p.r1 = r1, p.r2 = r2;
    p.residual.data = residual ? &p : nullptr;
    const Plan found = plan(p, processors(device));
    return py::make_tuple(found.R, found.warpgroups, found.ranks, found.clusters, found.groups, found.microseconds);
  });
  m.def("lowrank_sm90", [](const py::object& x, const py::object& B1, const py::object& A1, const py::object& B2,
                           const py::object& A2, const py::object& residual, uintptr_t b1, uintptr_t b2, uintptr_t y,
                           int M, int K, int D, int N, int r1, int r2, int act, bool fp16,
                           const py::object& given, int device, uintptr_t stream) {
    const DeviceGuard guard(device);
    const LowrankParams p{matrix_of(x), matrix_of(B1), matrix_of(A1), matrix_of(B2), matrix_of(A2), matrix_of(residual),
                          reinterpret_cast<const void*>(b1), reinterpret_cast<const void*>(b2),
                          reinterpret_cast<void*>(y), M, K, D, N, r1, r2, static_cast<Act>(act), fp16};
    require(p, device);
    const Plan found = given.is_none() ? plan(p, processors(device)) : given_plan(p, given);
    if (found.R == 0) refuse("ranks " + std::to_string(r1) + " and " + std::to_string(r2) + " are beyond 256");
    void* const on = reinterpret_cast<void*>(stream);
    if (!p.mlp())
      launch_linear(p, found, on);
    else if (fp16)
      launch_mlp_fp16(p, found, on);
    else
      launch_mlp_bf16(p, found, on);
  });
}
