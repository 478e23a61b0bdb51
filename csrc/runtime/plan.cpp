#include "runtime/plan.hpp"

#include <algorithm>

namespace moecomm {

uint64_t place_plan(const BufferView& b, char* m, PlanView& view) {
  const uint64_t t = b.shape.max_tokens, k = b.shape.top_k, n = b.geometry.nodes(),
                 p = b.geometry.ranks_per_node;
  detail::Cursor c;
  const uint64_t picks = c.take(t), pick = c.take(t * k * sizeof(Pick)), slot = c.take(t * n * 4);
  const uint64_t blocks = c.take(n * b.count.ints * 4), rows = c.take(n * 4),
                 channel_first = c.take(n * (b.shape.channels + 1) * 4);
  const uint64_t send_first = c.take(n * (b.shape.channels + 1) * 4);
  const uint64_t row_picks = c.take(n * t), place = c.take(n * t * k * sizeof(Place));
  const uint64_t row_token = c.take(b.check ? n * t * 4 : 0),
                 announced = c.take(b.check ? 4ull * b.experts_per_rank() * b.geometry.size : 0);
  const uint64_t per_expert = c.take(8 * b.experts_per_rank()), padded = c.take(8 * b.experts_per_rank()),
                 rank_rows = c.take(8 * p);
  view.picks = reinterpret_cast<uint8_t*>(m + picks);
  view.pick = reinterpret_cast<Pick*>(m + pick);
  view.slot = reinterpret_cast<int32_t*>(m + slot);
  view.blocks = reinterpret_cast<int32_t*>(m + blocks);
  view.send_first = reinterpret_cast<int32_t*>(m + send_first);
  view.rows = reinterpret_cast<int32_t*>(m + rows);
  view.channel_first = reinterpret_cast<int32_t*>(m + channel_first);
  view.row_picks = reinterpret_cast<uint8_t*>(m + row_picks);
  view.place = reinterpret_cast<Place*>(m + place);
  view.row_token = reinterpret_cast<int32_t*>(m + row_token);
  view.announced = reinterpret_cast<int32_t*>(m + announced);
  view.tokens_per_expert = reinterpret_cast<int64_t*>(m + per_expert);
  view.rows_per_expert = reinterpret_cast<int64_t*>(m + padded);
  view.rank_rows = reinterpret_cast<int64_t*>(m + rank_rows);
  return c.at;
}

Plan::Plan(const BufferView& b) {
  memory_.reset(new char[place_plan(b, nullptr, view)]);  // not cleared: every call writes what it reads
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
