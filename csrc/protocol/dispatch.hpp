// Dispatch: the roles in the order in which one rank runs them. docs/protocol.md describes the path of a
// token.
//
//   exchange.hpp   announce, relay, place        the counts, and the final place of every row
//   picks.hpp      derive_tables                 the same if replicas are chosen for every batch
//   send.hpp       send, judge                   the rail hop
//   forward.hpp    forward, announce_arrival     the node hop
//   arrive.hpp     arrive                        the receiver's part
//
// `place` may run before or after `send`: rows are sent to the gateways before their final places are known.
#pragma once
#include "protocol/arrive.hpp"
#include "protocol/exchange.hpp"
#include "protocol/forward.hpp"
#include "protocol/picks.hpp"
#include "protocol/send.hpp"
