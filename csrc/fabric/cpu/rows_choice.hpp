// Which row kernels a process uses, and why. Decided once, at first use, by the first of these that applies:
//
//   1. MOECOMM_ISA (a build) and MOECOMM_ROW_KERNEL (a variant for all sums), if set
//   2. the table of CPUs whose best variant is known
//   3. a measurement of at most 30 ms. The first few processes make it, and keep the least times of all of
//      them in a file in the user's cache folder, one per CPU model. Later processes read the choice there.
//
// All variants give the same bits, so the processes of a job may choose differently.
#pragma once
#include <string>
#include <vector>

#include "base/offset.hpp"
#include "fabric/cpu/rows.hpp"

namespace moecomm {

std::vector<const RowKernels*> row_kernel_builds();    // that this machine can run, the widest first
std::vector<const RowKernels*> row_kernel_variants();  // of all these builds

struct RowKernelTime {
  std::string name;
  double few, many;  // nanoseconds per row read, in sums of kFewTerms and of 8 terms
};

struct RowKernelChoice {
  std::string build;      // for everything but sums
  std::string few, many;  // variants for sums of at most kFewTerms terms, and of more
  std::string reason;     // for users
  std::string cpu;
  int processes = 0;                 // number of processes that have measured
  std::vector<RowKernelTime> times;  // empty if nothing was measured
};

const RowKernelChoice& row_kernel_choice();

// Times variants on rows of 7168 bf16 elements, spread over more memory than the second-level cache holds.
// seconds: approximate limit of the duration.
std::vector<RowKernelTime> time_row_kernels(const std::vector<const RowKernels*>& variants, double seconds);

// Makes the choice for this CPU with the file in `folder`. For tests.
RowKernelChoice choose_row_kernels(const std::string& folder, const char* build, const char* variant);

}  // namespace moecomm
