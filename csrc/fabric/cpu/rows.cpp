#include "fabric/cpu/rows.hpp"

#include <cstring>

#include "fabric/cpu/rows_choice.hpp"

namespace moecomm {
#if defined(__x86_64__)
namespace rows_avx512 {
extern const RowKernels kKernels;
extern const SumVariant kVariants[kSumVariants];
}  // namespace rows_avx512
namespace rows_avx2 {
extern const RowKernels kKernels;
extern const SumVariant kVariants[kSumVariants];
}  // namespace rows_avx2
#endif
#if defined(__aarch64__)
namespace rows_neon {
extern const RowKernels kKernels;
extern const SumVariant kVariants[kSumVariants];
}  // namespace rows_neon
#endif
namespace rows_base {
extern const RowKernels kKernels;
extern const SumVariant kVariants[kSumVariants];
}  // namespace rows_base

namespace {

// Every build that this machine can run, the best one first, with kernels for each of its variants.
struct Build {
  const RowKernels* kernels;
  RowKernels variants[kSumVariants];
};

std::vector<Build> make_builds() {
  std::vector<Build> builds;
  const auto add = [&](const RowKernels& kernels, const SumVariant* variants) {
    Build& build = builds.emplace_back();
    build.kernels = &kernels;
    for (int i = 0; i < kSumVariants; ++i) {
      build.variants[i] = kernels;
      build.variants[i].name = variants[i].name;
      build.variants[i].few = build.variants[i].many = variants[i];
    }
  };
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    add(rows_avx512::kKernels, rows_avx512::kVariants);
  if (__builtin_cpu_supports("avx2")) add(rows_avx2::kKernels, rows_avx2::kVariants);
#endif
#if defined(__aarch64__)
  add(rows_neon::kKernels, rows_neon::kVariants);
#endif
  add(rows_base::kKernels, rows_base::kVariants);
  return builds;
}

const std::vector<Build>& builds() {
  static const std::vector<Build> made = make_builds();
  return made;
}

}  // namespace

const RowKernels* row_kernels_named(const char* name) {
  for (const Build& build : builds()) {
    if (std::strcmp(name, build.kernels->name) == 0) return build.kernels;
    for (const RowKernels& variant : build.variants)
      if (std::strcmp(name, variant.name) == 0) return &variant;
  }
  return nullptr;
}

std::vector<const RowKernels*> row_kernel_builds() {
  std::vector<const RowKernels*> found;
  for (const Build& build : builds()) found.push_back(build.kernels);
  return found;
}

std::vector<const RowKernels*> row_kernel_variants() {
  std::vector<const RowKernels*> found;
  for (const Build& build : builds())
    for (const RowKernels& variant : build.variants) found.push_back(&variant);
  return found;
}

const RowKernels& row_kernels() {
  static const RowKernels chosen = [] {
    const RowKernelChoice& choice = row_kernel_choice();
    RowKernels kernels = *row_kernels_named(choice.build.c_str());
    kernels.few = row_kernels_named(choice.few.c_str())->few;
    kernels.many = row_kernels_named(choice.many.c_str())->many;
    return kernels;
  }();
  return chosen;
}

}  // namespace moecomm
