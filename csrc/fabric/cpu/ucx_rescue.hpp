// Survives abort() calls of UCX. UCX aborts the process on errors that it cannot handle. One of them is not
// an error of the process: over tcp a put is a message, and its target sends a receipt. If the sender has
// closed the connection in the meantime, the receipt fails, and UCX calls abort() ("unexpected error:
// Endpoint timeout"). This happens to a rank that was stopped (SIGSTOP) while its peers gave up on it, when
// it continues and reads their puts, and to a rank whose peer was killed.
#pragma once
#include <csetjmp>
#include <utility>

namespace moecomm {

namespace detail {
extern thread_local sigjmp_buf* rescue_point __attribute__((tls_model("initial-exec")));
void watch_aborts();  // installs a SIGABRT handler once; the previous handler still gets all other aborts
void after_rescue();
}  // namespace detail

// Runs work(). Returns false if work() called abort(). The objects that it used are then in an unknown state:
// locks may be held, and none of them may be used again. work() must not own anything that a destructor
// releases.
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
