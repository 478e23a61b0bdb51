// Loads in a range where sums, products and ratios of them neither overflow nor vanish.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

namespace moecomm::balance {

// load[experts] times a power of two such that the largest lies in [0.5, 1). Exact, so a plan does not depend
// on the unit in which loads are given: the solvers only compare loads. A load below 2^-300 of the largest
// becomes 2^-300, so that products of two of them do not vanish; either way what it adds to a rank is far
// below a rounding error. No load stays none.
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
