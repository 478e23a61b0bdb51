// Sums of rows: all lanes of a group (one warp or several), 16 bytes per lane, in the order of the list. The
// loads of eight terms are in flight before the first one is added.
#pragma once
#include "base/offset.hpp"
#include "base/terms.hpp"
#include "fabric/cuda/elements.cuh"

namespace moecomm {

constexpr int kTermsInFlight = 8;

// Adds terms in their order: first within a group of terms, then group to group.
template <class Wide, int kElements>
struct Sum {
  Wide total[kElements], part[kElements];
  bool first_group = true, first_term = true;

  __device__ Sum() {
    MOE_UNROLL(8)
    for (int i = 0; i < kElements; ++i) total[i] = part[i] = Wide{};
  }
  __device__ void add(const Wide* v, float weight, bool group_ends) {
    MOE_UNROLL(8)
    for (int i = 0; i < kElements; ++i) {
      const Wide term = v[i] * static_cast<Wide>(weight);
      part[i] = first_term ? term : part[i] + term;
    }
    first_term = false;
    if (!group_ends) return;
    MOE_UNROLL(8)
    for (int i = 0; i < kElements; ++i) total[i] = first_group ? part[i] : total[i] + part[i];
    first_group = false;
    first_term = true;
  }
};

// A lane has eight loads in flight: of one column, or of two columns if there are at most four terms. With
// fewer bytes in flight, the latency of the link would limit the speed. Indices have 32 bits, and there are
// at most two columns, so that no kernel spills registers.
template <class T>
__device__ void reduce_plain(char* dst, const Terms& terms, const float* bias, int64_t hidden, int lane,
                             int lanes) {
  constexpr int kPer = T::kPerLane;
  const TermStore& list = *terms.store;
  const int count = terms.count, end = static_cast<int>(hidden), step = lanes * kPer;
  const int shift = count <= 4 ? 2 : 3, mask = (1 << shift) - 1;  // terms of a column
  for (int e = lane * kPer; e < end; e += step << (3 - shift)) {
    Sum<typename T::Wide, kPer> sum;
    for (int first = 0; first == 0 || first < count; first += kTermsInFlight) {
      uint4 raw[kTermsInFlight];
      MOE_UNROLL(8)
      for (int i = 0; i < kTermsInFlight; ++i) {
        const int term = first + (i & mask), at = e + (i >> shift) * step;
        if (term < count && at < end)
          raw[i] = ptx::load16(static_cast<const char*>(list.row[term]) + at * T::kBytes);
      }
      MOE_UNROLL(8)
      for (int i = 0; i < kTermsInFlight; ++i) {
        const int term = first + (i & mask), at = e + (i >> shift) * step;
        if (at >= end || (term >= count && (count > 0 || term > 0))) continue;
        if (term < count) {
          typename T::Wide v[kPer];
          T::unpack(raw[i], v);
          sum.add(v, list.weight[term], terms.group_end >> term & 1);
        }
        if (term + 1 < count) continue;
        if (bias) {
          MOE_UNROLL(8)
          for (int j = 0; j < kPer; ++j) sum.total[j] += static_cast<typename T::Wide>(bias[at + j]);
        }
        ptx::store16(dst + at * T::kBytes, T::pack(sum.total));
        sum = {};
      }
    }
  }
}

// -- quantized rows: half a warp processes a tile, eight elements per lane --------------------------

struct EightBytes {
  uint32_t low, high;
};  // one byte of each of eight adjacent elements

__device__ inline uint32_t byte_of(EightBytes b, int i) {
  return (i < 4 ? b.low >> 8 * i : b.high >> 8 * (i - 4)) & 0xffu;
}
__device__ inline EightBytes pack_bytes(const uint32_t* v) {
  return {v[0] | v[1] << 8 | v[2] << 16 | v[3] << 24, v[4] | v[5] << 8 | v[6] << 16 | v[7] << 24};
}
// A row of codes may end after four bytes.
__device__ inline EightBytes load_bytes(const char* p, bool all) {
  const auto* w = as<const volatile uint32_t>(p);
  return {w[0], all ? w[1] : 0u};
}
__device__ inline void store_bytes(char* p, EightBytes b, bool all) {
  auto* w = as<uint32_t>(p);
  w[0] = b.low;
  if (all) w[1] = b.high;
}

__device__ inline void load_wire_eight(const char* row, Wire wire, int64_t e, int64_t hidden, float* v) {
  const int64_t tile = e / kTile, tiles = tiles_of(hidden);
  const int in_half = static_cast<int>(e % kTile / 8);
  if (wire == Wire::fp8) {
    const float scale = *as<const volatile float>(row + align16(hidden) + 4 * tile);
    const EightBytes codes = load_bytes(row + e, e + 4 < hidden);
    MOE_UNROLL(8)
    for (int i = 0; i < 8; ++i) v[i] = e4m3_decode<float>(byte_of(codes, i)) * scale;
    return;
  }
  const auto* head = as<const volatile float>(row + 160 * tiles + 8 * tile);
  const LogTile log{head[0], head[1]};
  const EightBytes low = load_bytes(row + 128 * tile + 8 * in_half, true),
                   high = load_bytes(row + 128 * tiles + 32 * tile + 8 * (in_half % 4), true);
  MOE_UNROLL(8)
  for (int i = 0; i < 8; ++i)
    v[i] = log_decode<float>(byte_of(low, i) | (byte_of(high, i) >> 2 * (in_half / 4) & 3u) << 8, log);
}

// The sum of one tile, eight elements per lane, for rows of which some may be quantized.
template <class T>
__device__ void sum_eight(const Terms& terms, int64_t e, int64_t hidden, Sum<float, 8>& sum) {
  const TermStore& list = *terms.store;
  for (int i = 0; i < terms.count; ++i) {
    const char* row = static_cast<const char*>(list.row[i]);
    float v[8];
    if (e >= hidden) {
      MOE_UNROLL(8)
      for (int j = 0; j < 8; ++j) v[j] = 0.0f;
    } else if (terms.coded >> i & 1) {
      load_wire_eight(row, terms.wire, e, hidden, v);
    } else {
      load_eight<T>(row, e, hidden, v);
    }
    sum.add(v, list.weight[i], terms.group_end >> i & 1);
  }
}

template <class T>
__device__ void reduce_coded(char* dst, const Terms& terms, const float* bias, int64_t hidden, int lane,
                             int lanes) {
  for (int64_t e = int64_t{lane} * 8; e < hidden; e += int64_t{lanes} * 8) {
    Sum<float, 8> sum;
    sum_eight<T>(terms, e, hidden, sum);
    if (bias) {
      MOE_UNROLL(8)
      for (int i = 0; i < 8; ++i)
        if (e + i < hidden) sum.total[i] += bias[e + i];
    }
    store_eight<T>(dst, e, hidden, sum.total);
  }
}

// The largest value of 16 lanes.
__device__ inline uint32_t half_max(uint32_t v) {
  MOE_UNROLL(4)
  for (int step = 8; step > 0; step >>= 1) {
    const uint32_t other = __shfl_xor_sync(~0u, v, step);
    v = v > other ? v : other;
  }
  return v;
}

// store(FP8 codes of a lane's part of a tile); returns the tile's scale.
template <class Store>
__device__ float encode_fp8(const float* v, ScaleKind kind, Store&& store) {
  uint32_t most = 0;
  MOE_UNROLL(8)
  for (int i = 0; i < 8; ++i) {
    const uint32_t m = finite_magnitude<uint32_t>(v[i]);
    most = most > m ? most : m;
  }
  const auto s = tile_scale<uint32_t>(__uint_as_float(half_max(most)), kind);
  uint32_t code[8];
  MOE_UNROLL(8)
  for (int i = 0; i < 8; ++i) code[i] = e4m3_encode<uint32_t>(v[i] * s.inverse);
  store(code);
  return s.scale;
}
__device__ inline float encode_fp8_eight(char* codes, int64_t e, int64_t hidden, const float* v,
                                         ScaleKind kind) {
  return encode_fp8(v, kind, [&](const uint32_t* code) {
    if (e < hidden) store_bytes(codes + e, pack_bytes(code), e + 4 < hidden);
  });
}

__device__ inline void encode_log_eight(char* row, int64_t e, int64_t hidden, const float* v, int lane) {
  uint32_t most = 0, rest = 0;  // rest: the largest ~magnitude, which gives the least magnitude
  MOE_UNROLL(8)
  for (int i = 0; i < 8; ++i) {
    const uint32_t m = finite_magnitude<uint32_t>(v[i]), normal = m < detail::kSmallestNormal ? 0u : m,
                   inverted = normal ? ~normal : 0u;
    most = most > normal ? most : normal;
    rest = rest > inverted ? rest : inverted;
  }
  most = half_max(most);
  rest = half_max(rest);
  const LogTile log = log_tile(__uint_as_float(most ? ~rest : 0u), __uint_as_float(most));
  const float inverse = log.step > 0.0f ? 1.0f / log.step : 0.0f;
  const int64_t tile = e / kTile, tiles = tiles_of(hidden);
  const int in_half = lane % 16;
  uint32_t low[8], high[8];
  MOE_UNROLL(8)
  for (int i = 0; i < 8; ++i) {
    const uint32_t code = log_encode<uint32_t>(v[i], log, inverse);
    low[i] = code & 0xffu;
    high[i] = (code >> 8) << 2 * (in_half / 4);
  }
  // Elements j, j + 32, j + 64, j + 96 share a byte: lanes 4 apart.
  EightBytes bits = pack_bytes(high);
  MOE_UNROLL(2)
  for (int step = 4; step < 16; step <<= 1) {
    bits.low |= __shfl_xor_sync(~0u, bits.low, step);
    bits.high |= __shfl_xor_sync(~0u, bits.high, step);
  }
  if (tile >= tiles) return;
  store_bytes(row + 128 * tile + 8 * in_half, pack_bytes(low), true);
  if (in_half < 4) store_bytes(row + 128 * tiles + 32 * tile + 8 * in_half, bits, true);
  if (in_half == 0) {
    auto* head = as<float>(row + 160 * tiles + 8 * tile);
    head[0] = log.low;
    head[1] = log.step;
  }
}

template <class T>
__device__ void reduce_wire(char* dst, Wire wire, const Terms& terms, int64_t hidden, int lane, int lanes) {
  for (int64_t base = 0; base < hidden;
       base += int64_t{lanes} * 8) {  // all lanes continue, because tiles are reduced by shuffles
    const int64_t e = base + int64_t{lane} * 8;
    Sum<float, 8> sum;
    sum_eight<T>(terms, e, hidden, sum);
    if (wire == Wire::logfmt10) {
      encode_log_eight(dst, e, hidden, sum.total, lane);
    } else {
      const float scale = encode_fp8_eight(dst, e, hidden, sum.total, ScaleKind::f32);
      if (lane % 16 == 0 && e < hidden) *as<float>(dst + align16(hidden) + 4 * (e / kTile)) = scale;
    }
  }
}

template <class T>
__device__ void quantize(char* codes, char* scales, const char* row, int64_t hidden, ScaleKind kind, int lane,
                         int lanes) {
  for (int64_t base = 0; base < hidden; base += int64_t{lanes} * 8) {
    const int64_t e = base + int64_t{lane} * 8, tile = e / kTile;
    float v[8];
    load_eight<T>(row, e, hidden, v);
    const float scale = encode_fp8_eight(codes, e, hidden, v, kind);
    if (lane % 16) continue;
    if (kind == ScaleKind::ue8m0) {
      if (tile < tiles_of(hidden)) scales[tile] = static_cast<char>(ue8m0_encode(scale));
    } else if (tile < tiles_of(hidden)) {
      as<float>(scales)[tile] = scale;
    }
  }
  // Pads the last int32 of ue8m0 scales.
  if (kind == ScaleKind::ue8m0 && lane == 0)
    for (int64_t i = tiles_of(hidden); i % 4; ++i) scales[i] = 0;
}

}  // namespace moecomm
