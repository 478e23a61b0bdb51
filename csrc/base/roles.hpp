// Which roles there are: what a timeline names. The names, in this order, are ROLES of
// moecomm/_native/core.pyx.
#pragma once
#include <cstdint>

namespace moecomm {

enum class RoleKind : int32_t {
  plan,
  announce,
  counts,
  send,
  forward,
  arrive,
  publish,
  reduce,
  sum,
  done,
  list,
  decode_send,
  decode_announce,
  decode_accept,
  decode_pack,
  decode_answer,
  decode_wait,
  decode_sum,
};

}  // namespace moecomm
