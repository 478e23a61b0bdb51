// UCX ends the process where it meets an error that it has no answer to. One of these is no fault of the
// process: over tcp a put is a message, whose target sends a receipt; where the sender has closed the
// connection meanwhile, the receipt fails, and UCX calls abort() ("unexpected error: Endpoint timeout"). A
// rank that was stopped (SIGSTOP) while its peers gave up on it reads such puts when it goes on, and so does
// one whose peer was killed.
#pragma once
#include <csetjmp>
#include <utility>

namespace moecomm {

namespace detail {
extern thread_local sigjmp_buf* rescue_point __attribute__((tls_model("initial-exec")));
void watch_aborts();  // once; what handled SIGABRT before still does, where nobody is to be rescued
void after_rescue();
}  // namespace detail

// Runs work(); false where it called abort(). Whatever it was about is in an unknown state then: its locks
// may be held, nothing of it may be used again. work() holds nothing that a destructor would have to release.
template <class Work>
[[gnu::noinline]] bool survives_abort(Work&& work) {
  detail::watch_aborts();
  sigjmp_buf here;
  if (sigsetjmp(here, 0) != 0) {
    detail::rescue_point = nullptr;
    detail::after_rescue();
    return false;
  }
  detail::rescue_point = &here;
  std::forward<Work>(work)();
  detail::rescue_point = nullptr;
  return true;
}

}  // namespace moecomm
