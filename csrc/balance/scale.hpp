// Scales loads to a range in which their sums, products and ratios neither overflow nor underflow.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

namespace moecomm::balance {

// Multiplies load[experts] by a power of two such that the largest is in [0.5, 1). This is exact, so a
// placement does not depend on the unit of the loads: the solvers only compare loads. A load below 2^-300 of
// the largest becomes 2^-300, so that the product of two loads does not underflow; its contribution to a rank
// is far below a rounding error in any case. A load of 0 stays 0.
inline std::vector<double> scaled_loads(const double* load, int experts) {
  constexpr double kLeast = 0x1p-300;
  std::vector<double> scaled(load, load + experts);
  int exponent = 0;
  std::frexp(*std::max_element(load, load + experts), &exponent);
  for (double& l : scaled) {
    if (l > 0.0) l = std::max(kLeast, std::ldexp(l, -exponent));
  }
  return scaled;
}

}  // namespace moecomm::balance
