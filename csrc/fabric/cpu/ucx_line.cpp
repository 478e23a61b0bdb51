#include "fabric/cpu/ucx_line.hpp"

#include <ucp/api/ucp.h>

#include <algorithm>

namespace moecomm {

UcxLine::UcxLine(UcxContext& context, int rank, uint64_t address, ucp_rkey_h rkey, uint64_t counter_bytes)
    : context_(context), rank_(rank), address_(address), rkey_(rkey), signaled_(counter_bytes / 8) {}

void UcxLine::put(uint64_t offset, const void* src, uint64_t bytes) noexcept {
  if (!open()) return;
  issued_ = true;
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
  param.user_data = this;
  param.cb.send = [](void* request, ucs_status_t, void* line) { completed(request, line); };
  started(ucp_put_nbx(context_.endpoint(rank_), src, bytes, address_ + offset, rkey_, &param));
}

void UcxLine::get(void* to, uint64_t offset, uint64_t bytes) noexcept {
  if (!open()) return;
  issued_ = true;
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
  param.user_data = this;
  param.cb.send = [](void* request, ucs_status_t, void* line) { completed(request, line); };
  started(ucp_get_nbx(context_.endpoint(rank_), to, bytes, address_ + offset, rkey_, &param));
}

void UcxLine::started(void* request) noexcept {
  if (UCS_PTR_IS_PTR(request)) ++in_flight_;
  if (UCS_PTR_IS_ERR(request)) context_.fail(rank_);
}

void UcxLine::completed(void* request, void* line) noexcept {
  --static_cast<UcxLine*>(line)->in_flight_;
  ucp_request_free(request);
}

void UcxLine::signal(uint64_t counter, uint64_t add) noexcept {
  const uint64_t value = signaled_[counter / 8] += add;
  const auto same =
      std::find_if(waiting_.begin(), waiting_.end(), [&](const auto& s) { return s.first == counter; });
  if (same != waiting_.end())
    same->second = value;
  else
    waiting_.emplace_back(counter, value);
  if (!flushing_) flush();
}

bool UcxLine::flush_poll() noexcept {
  if (!flushing_ && issued_) flush();
  return (!flushing_ && !issued_) || !open();
}

void UcxLine::close() noexcept {
  if (rkey_) ucp_rkey_destroy(rkey_);
  rkey_ = nullptr;
}

void UcxLine::flush() noexcept {
  behind_.swap(waiting_);
  if (!issued_) return flushed(true);
  if (!open()) return flushed(false);
  issued_ = false;
  flushing_ = true;
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
  param.user_data = this;
  param.cb.send = [](void* request, ucs_status_t s, void* line) {
    ucp_request_free(request);
    static_cast<UcxLine*>(line)->flushed(s == UCS_OK);
  };
  const ucs_status_ptr_t r = ucp_ep_flush_nbx(context_.endpoint(rank_), &param);
  if (!UCS_PTR_IS_PTR(r)) flushed(!UCS_PTR_IS_ERR(r));
}

void UcxLine::flushed(bool ok) noexcept {
  flushing_ = false;
  Signals now;
  now.swap(behind_);
  if (!ok) {
    waiting_.clear();
    return context_.fail(rank_);
  }
  for (const auto& [counter, value] : now) send(counter, value);
  if (!waiting_.empty()) flush();
}

void UcxLine::send(uint64_t counter, uint64_t value) noexcept {
  if (!open()) return;
  issued_ = true;
  if (idle_.empty()) {
    cells_.push_back(std::make_unique<Cell>(Cell{this, 0}));
    idle_.push_back(cells_.back().get());
  }
  Cell* cell = idle_.back();
  idle_.pop_back();
  cell->value = value;
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
  param.user_data = cell;
  param.cb.send = [](void* request, ucs_status_t, void* data) {
    auto* done = static_cast<Cell*>(data);
    done->line->idle_.push_back(done);
    ucp_request_free(request);
  };
  const ucs_status_ptr_t r =
      ucp_put_nbx(context_.endpoint(rank_), &cell->value, 8, address_ + counter, rkey_, &param);
  if (UCS_PTR_IS_PTR(r)) return;
  idle_.push_back(cell);
  if (UCS_PTR_IS_ERR(r)) context_.fail(rank_);
}

}  // namespace moecomm
