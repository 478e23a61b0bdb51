// Which row kernels a process uses, and why. Asked once, at first use:
//
//   1. MOECOMM_ISA (a build) and MOECOMM_ROW_KERNEL (a variant for all sums), where they are set
//   2. the table of CPUs whose best variant is known
//   3. a measurement of at most 30 ms: the first few processes make it, and keep the least times of all of
//   them in
//      a file of the user's cache folder, one per CPU model; later processes read the choice there
//
// All variants have equal bits, so processes of one job may differ.
#pragma once
#include <string>
#include <vector>

#include "fabric/cpu/rows.hpp"

namespace moecomm {

std::vector<const RowKernels*> row_kernel_builds();    // of this machine, the widest first
std::vector<const RowKernels*> row_kernel_variants();  // of all those builds

struct RowKernelTime {
  std::string name;
  double few, many;  // nanoseconds per row read, in sums of kFewTerms and of 8 terms
};

struct RowKernelChoice {
  std::string build;      // for everything but sums
  std::string few, many;  // variants for sums of at most kFewTerms, and of more
  std::string reason;     // in words
  std::string cpu;
  int processes = 0;                 // that have measured
  std::vector<RowKernelTime> times;  // empty where nothing was measured
};

const RowKernelChoice& row_kernel_choice();

// Times variants on rows of 7168 bf16 elements that lie apart in more memory than the second-level cache
// holds. `seconds`: about as long as it may take.
std::vector<RowKernelTime> time_row_kernels(const std::vector<const RowKernels*>& variants, double seconds);

// The choice in a folder's file for this CPU; what was read or measured. For tests.
RowKernelChoice choose_row_kernels(const std::string& folder, const char* build, const char* variant);

}  // namespace moecomm
