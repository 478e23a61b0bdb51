// Dispatch: the roles in the order in which one rank runs them. docs/protocol.md tells one token's way.
//
//   exchange.hpp   announce, relay, place            counts, and the position of every row
//   picks.hpp      derive_tables                     the same where every batch chooses the replicas of its
//   experts send.hpp       send, judge                       the rail hop forward.hpp    forward,
//   announce_arrival         the node hop arrive.hpp     arrive                            the receiver's
//   part
//
// `place` may run before or after `send`: rows leave for the gateways without knowing their final places.
#pragma once
#include "protocol/arrive.hpp"
#include "protocol/exchange.hpp"
#include "protocol/forward.hpp"
#include "protocol/picks.hpp"
#include "protocol/send.hpp"
