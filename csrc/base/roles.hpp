// The roles, as timelines name them. ROLES in moecomm/_native/cpu_world/accounts.pyx has their names in the
// same order.
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
  decode_release,
  decode_answer,
  decode_wait,
  decode_sum,
};

}  // namespace moecomm
