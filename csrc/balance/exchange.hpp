// Bounded moves: improves a placement such that no rank changes more than a given number of slots.
//
// One round changes at most one slot per rank: every rank gives up one replica, and these replicas are
// redistributed, the largest to the rank that is lightest without its own. This redistribution is optimal, so
// only the choice of the replicas to give up is searched. Replica counts can change too: a replica that is
// given up, of an expert that can spare one, is replaced by a replica of an expert that has become too hot.
#pragma once
#include <vector>

#include "balance/bins.hpp"

namespace moecomm::balance {

// bins has the current placement; its sizes and loads are computed here. Makes at most `rounds` rounds, and
// stops when no rank has more load than `enough`.
void improve_by_moves(const double* load, int experts, int rounds, double enough, Bins& bins);

}  // namespace moecomm::balance
