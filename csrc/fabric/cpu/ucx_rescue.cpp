#include "fabric/cpu/ucx_rescue.hpp"

#include <signal.h>

namespace moecomm::detail {

thread_local sigjmp_buf* rescue_point __attribute__((tls_model("initial-exec"))) = nullptr;

namespace {

struct sigaction before;

void on_abort(int) {
  if (rescue_point) siglongjmp(*rescue_point, 1);  // the abort() came from work() on this thread
  sigaction(SIGABRT, &before, nullptr);
  raise(SIGABRT);
}

}  // namespace

void watch_aborts() {
  [[maybe_unused]] static const int installed = [] {
    struct sigaction action{};
    action.sa_handler = on_abort;
    action.sa_flags = SA_NODEFER;  // because the handler may exit by a jump
    sigemptyset(&action.sa_mask);
    return sigaction(SIGABRT, &action, &before);
  }();
}

void after_rescue() {
  sigset_t abort_signal;
  sigemptyset(&abort_signal);
  sigaddset(&abort_signal, SIGABRT);
  pthread_sigmask(SIG_UNBLOCK, &abort_signal, nullptr);  // another handler may have blocked it
}

}  // namespace moecomm::detail
