// The dynamic split: how many of an expert's tokens each of its replicas takes, so that the heaviest rank is
// as light as this batch allows. A pure function of its input: every rank computes the same.
#pragma once
#include "balance/replicas.hpp"

namespace moecomm::balance {

// Gauss-Seidel water-filling: one expert after the other pours its tokens where its ranks are lowest, given what
// all others do. Each pour lowers the sum of squared rank loads, whose minimum also has the lowest maximum.
//
// load[experts] tokens; active[replicas] or null for all; share[replicas] out, fractional. An expert without an
// active replica gets no share. Stops when four rounds lower the heaviest rank by less than 1e-4 of the mean.
// Returns the heaviest rank's load.
double split(const Replicas& r, const double* load, const uint8_t* active, int rounds, double* share);

// Whole tokens of one source, replica by replica: the tokens of an expert are numbered over all sources in rank
// order, and the replicas take consecutive runs of them, the first of which belongs to replica (expert + turn) mod n.
// counts[sources, experts]; quota[replicas] out.
void quotas_of_source(const Replicas& r, const int32_t* counts, int sources, int source, const double* share, int turn, int32_t* quota);

// Every source for itself: its tokens evenly over the (active) replicas. counts[experts] of that source.
void even_quotas(const Replicas& r, const int32_t* counts, const uint8_t* active, int turn, int32_t* quota);

}  // namespace moecomm::balance
