#include "runtime/plan.hpp"

#include <algorithm>

namespace moecomm {

uint64_t place_plan(const BufferView& b, char* m, PlanView& view) {
  const uint64_t t = b.shape.max_tokens, k = b.shape.top_k, n = b.geometry.nodes(),
                 p = b.geometry.ranks_per_node;
  detail::Cursor c;
  const auto take = [&]<class T>(T*& table, uint64_t count) { table = c.take<T>(count).in(m); };
  take(view.picks, t);
  take(view.pick, t * k);
  take(view.slot, t * n);
  take(view.blocks, n * b.count.ints);
  take(view.rows, n);
  take(view.channel_first, n * (b.shape.channels + 1));
  take(view.send_first, n * (b.shape.channels + 1));
  take(view.row_picks, n * t);
  take(view.place, n * t * k);
  take(view.row_token, b.check ? n * t : 0);
  take(view.announced, b.check ? uint64_t(b.experts_per_rank()) * b.geometry.size : 0);
  take(view.tokens_per_expert, b.experts_per_rank());
  take(view.rows_per_expert, b.experts_per_rank());
  take(view.rank_rows, p);
  return c.at;
}

Plan::Plan(const BufferView& b) {
  memory_.reset(new char[place_plan(b, nullptr, view)]);  // not cleared: every call writes before it reads
  place_plan(b, memory_.get(), view);
  const uint64_t n = b.geometry.nodes(), p = b.geometry.ranks_per_node;
  target.resize(p);
  needed.resize(p);
  offers.resize(p);
  first.resize(std::max<uint64_t>(b.experts_per_node(), p));
  base.resize(n * first.size());
}

std::shared_ptr<Plan> PlanPool::get() {
  std::unique_ptr<Plan> plan;
  {
    std::lock_guard lock(mutex_);
    if (!idle_.empty()) {
      plan = std::move(idle_.back());
      idle_.pop_back();
    }
  }
  if (!plan) plan = std::make_unique<Plan>(view_);
  return std::shared_ptr<Plan>(plan.release(), [pool = weak_from_this()](Plan* p) {
    std::unique_ptr<Plan> owned(p);
    if (const auto home = pool.lock()) {
      std::lock_guard lock(home->mutex_);
      home->idle_.push_back(std::move(owned));
    }
  });
}

}  // namespace moecomm
