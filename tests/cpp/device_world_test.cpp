// Dispatch and combine with the fabric, latches and schedule of the cuda world, between ranks that map each
// other's memory.
#include "device_runner.hpp"

using namespace world;

namespace {

std::vector<Case> cases() {
  const Case base{.nodes = 2,
                  .per_node = 1,
                  .channels = 2,
                  .hidden = 1032,
                  .rounds = 2,
                  .workers = 2,
                  .senders = 1};  // rows longer than some stages
  std::vector<Case> all;
  Case c = base;
  all.push_back(c);
  c.layout = RowLayout::rank;
  all.push_back(c);
  c = base;
  c.nodes = 1;
  c.per_node = 3;
  c.senders = 2;
  c.alignment = 4;
  c.spare = 3;
  all.push_back(c);
  c = base;
  c.nodes = 3;
  c.per_node = 1;
  c.check = true;
  all.push_back(c);
  c = base;
  c.stages = 2;
  c.chunk_rows = 1;
  all.push_back(c);
  c = base;
  c.stages = 4;
  c.chunk_rows = 5;
  all.push_back(c);
  c = base;
  c.hidden = 1152;
  c.fused = ScaleKind::f32;
  all.push_back(c);
  c = base;
  c.hidden = 1152;
  c.wire = Wire::logfmt10;
  c.nodes = 3;
  c.per_node = 1;
  all.push_back(c);
  return all;
}

}  // namespace

TEST_CASES(device_worlds, cases()) { world::run_case(value, DeviceRunner<LoopbackDeviceRail>{}); }
