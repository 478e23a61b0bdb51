// Included by rows_kernels.inl: conversion of rows to and from the formats that base/quantize.hpp defines, by
// instantiating its functions with vectors.

typedef unsigned char Cv __attribute__((vector_size(kLanes)));

struct Tile {
  static constexpr int kVectors = moecomm::kTile / kLanes;
  Fv v[kVectors];
};

static inline Uv larger(Uv a, Uv b) { return a > b ? a : b; }

static inline unsigned largest_of(Uv v) {
  unsigned m = 0;
  for (int i = 0; i < kLanes; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

// The first n elements of a vector; the rest are zero.
template <class T>
static inline Fv load_some(const char* p, long n) {
  if (n >= kLanes) return T::load(p);
  char pad[64] = {};
  __builtin_memcpy(pad, p, n * T::kBytes);
  return T::load(pad);
}

template <class T>
static inline void store_some(char* p, Fv v, long n) {
  if (n >= kLanes) return T::store(p, v);
  char pad[64];
  T::store(pad, v);
  __builtin_memcpy(p, pad, n * T::kBytes);
}

static inline Uv load_bytes(const char* p, long n) {
  Cv c = {};
  if (n >= kLanes)
    __builtin_memcpy(&c, p, kLanes);
  else
    __builtin_memcpy(&c, p, n);
  return __builtin_convertvector(c, Uv);
}

static inline void store_bytes(char* p, Uv v, long n) {
  const Cv c = __builtin_convertvector(v, Cv);
  if (n >= kLanes)
    __builtin_memcpy(p, &c, kLanes);
  else
    __builtin_memcpy(p, &c, n);
}

// Calls work(vector, first element, number of elements) for the vectors of a tile with n elements.
template <class Work>
static inline void for_vectors(long n, Work&& work) {
  if (n == moecomm::kTile) {
    for (int j = 0; j < Tile::kVectors; ++j) work(j, long{kLanes} * j, long{kLanes});
  } else {
    for (long at = 0; at < n; at += kLanes)
      work(static_cast<int>(at / kLanes), at, n - at < kLanes ? n - at : long{kLanes});
  }
}

template <class T>
static inline Tile load_tile(const char* row, long n) {
  Tile t;
  if (n < moecomm::kTile) t = Tile{};
  for_vectors(n, [&](int j, long at, long some) { t.v[j] = load_some<T>(row + at * T::kBytes, some); });
  return t;
}

template <class T>
static inline void store_tile(char* row, const Tile& t, long n) {
  for_vectors(n, [&](int j, long at, long some) { store_some<T>(row + at * T::kBytes, t.v[j], some); });
}

// -- Tiles in FP8 -------------------------------------------------------------------------------------

static inline float encode_fp8(char* codes, const Tile& t, long n, moecomm::ScaleKind kind) {
  Uv m{};
  for (int j = 0; j < Tile::kVectors; ++j) m = larger(m, moecomm::finite_magnitude<Uv>(t.v[j]));
  const auto s = moecomm::tile_scale<unsigned>(moecomm::bits_as<float>(largest_of(m)), kind);
  for_vectors(n, [&](int j, long at, long some) {
    store_bytes(codes + at, moecomm::e4m3_encode<Uv>(t.v[j] * s.inverse), some);
  });
  return s.scale;
}

static inline Tile decode_fp8(const char* codes, float scale, long n) {
  Tile t{};
  for_vectors(n, [&](int j, long at, long some) {
    t.v[j] = moecomm::e4m3_decode<Fv>(load_bytes(codes + at, some)) * scale;
  });
  return t;
}

// -- Tiles in LogFMT-10 ---------------------------------------------------------------------------------

constexpr int kHighVectors = 32 / kLanes;  // vectors of the bytes with the codes' high bits

static inline moecomm::LogTile encode_log(char* low_bits, char* high_bits, const Tile& t) {
  Uv most{}, rest{};  // rest: the largest ~magnitude, which gives the least magnitude
  for (int j = 0; j < Tile::kVectors; ++j) {
    const Uv m = moecomm::finite_magnitude<Uv>(t.v[j]);
    const Uv normal = m < moecomm::detail::kSmallestNormal ? Uv{} : m;
    most = larger(most, normal);
    rest = larger(rest, normal == 0u ? Uv{} : ~normal);
  }
  const unsigned largest = largest_of(most), least = ~largest_of(rest);
  const auto tile =
      moecomm::log_tile(moecomm::bits_as<float>(largest ? least : 0u), moecomm::bits_as<float>(largest));
  const float inverse = tile.step > 0.0f ? 1.0f / tile.step : 0.0f;
  Uv high[kHighVectors] = {};
  for (int j = 0; j < Tile::kVectors; ++j) {
    const Uv code = moecomm::log_encode<Uv>(t.v[j], tile, inverse);
    store_bytes(low_bits + kLanes * j, code & 0xffu, kLanes);
    high[j % kHighVectors] |= (code >> 8) << (j / kHighVectors * 2);
  }
  for (int j = 0; j < kHighVectors; ++j) store_bytes(high_bits + kLanes * j, high[j], kLanes);
  return tile;
}

static inline Tile decode_log(const char* low_bits, const char* high_bits, moecomm::LogTile tile) {
  Uv high[kHighVectors];
  for (int j = 0; j < kHighVectors; ++j) high[j] = load_bytes(high_bits + kLanes * j, kLanes);
  Tile t;
  for (int j = 0; j < Tile::kVectors; ++j) {
    const Uv code = load_bytes(low_bits + kLanes * j, kLanes) |
                    (high[j % kHighVectors] >> (j / kHighVectors * 2) & 3u) << 8;
    t.v[j] = moecomm::log_decode<Fv>(code, tile);
  }
  return t;
}

// -- Rows of combine's wire ------------------------------------------------------------------------------

static inline void store_wire(char* row, moecomm::Wire wire, const Tile& t, long at, long n, long hidden) {
  const long tile = at / moecomm::kTile;
  if (wire == moecomm::Wire::fp8) {
    const float scale = encode_fp8(row + at, t, n, moecomm::ScaleKind::f32);
    __builtin_memcpy(row + moecomm::align16(hidden) + 4 * tile, &scale, 4);
  } else {
    const long tiles = moecomm::tiles_of(hidden);
    const auto head = encode_log(row + 128 * tile, row + 128 * tiles + 32 * tile, t);
    __builtin_memcpy(row + 160 * tiles + 8 * tile, &head, 8);
  }
}

static inline Tile load_wire(const char* row, moecomm::Wire wire, long at, long n, long hidden) {
  const long tile = at / moecomm::kTile;
  if (wire == moecomm::Wire::fp8) {
    float scale;
    __builtin_memcpy(&scale, row + moecomm::align16(hidden) + 4 * tile, 4);
    return decode_fp8(row + at, scale, n);
  }
  const long tiles = moecomm::tiles_of(hidden);
  moecomm::LogTile head;
  __builtin_memcpy(&head, row + 160 * tiles + 8 * tile, 8);
  return decode_log(row + 128 * tile, row + 128 * tiles + 32 * tile, head);
}

// The steps of reduce_block, a tile at a time, for rows of which some are quantized.
template <class T>
static inline Tile sum_tile(const moecomm::Terms& terms, const moecomm::Terms* next, const float* bias,
                            long at, long n) {
  Tile total{}, part{};
  bool first_group = true, first_term = true;
  for (int i = 0; i < terms.count; ++i) {
    const char* row = (const char*)terms.store->row[i];
    const Tile term = terms.coded >> i & 1 ? load_wire(row, terms.wire, at, n, terms.hidden)
                                           : load_tile<T>(row + at * T::kBytes, n);
    const float w = terms.store->weight[i];
    for (int j = 0; j < Tile::kVectors; ++j)
      part.v[j] = first_term ? term.v[j] * w : part.v[j] + term.v[j] * w;
    first_term = false;
    if (terms.group_end >> i & 1) {
      for (int j = 0; j < Tile::kVectors; ++j) total.v[j] = first_group ? part.v[j] : total.v[j] + part.v[j];
      first_group = false;
      first_term = true;
    }
  }
  if (next)
    for (int i = 0; i < next->count; ++i) {
      const long bytes = next->coded >> i & 1 ? 1 : T::kBytes;
      for (long b = 0; b < n * bytes; b += 64)
        __builtin_prefetch((const char*)next->store->row[i] + at * bytes + b, 0, 2);
    }
  if (bias)
    for_vectors(n, [&](int j, long first, long some) {
      total.v[j] = total.v[j] + load_some<F32>((const char*)(bias + at + first), some);
    });
  return total;
}

template <class T>
static void reduce_coded(char* dst, const moecomm::Terms& terms, const moecomm::Terms* next,
                         const float* bias, long begin, long end) {
  for (long at = begin; at < end; at += moecomm::kTile) {
    const long n = end - at < moecomm::kTile ? end - at : moecomm::kTile;
    store_tile<T>(dst + at * T::kBytes, sum_tile<T>(terms, next, bias, at, n), n);
  }
}

template <class T>
static void encode_typed(char* dst, moecomm::Wire wire, const moecomm::Terms& terms,
                         const moecomm::Terms* next, long begin, long end, long hidden) {
  for (long at = begin; at < end; at += moecomm::kTile) {
    const long n = end - at < moecomm::kTile ? end - at : moecomm::kTile;
    store_wire(dst, wire, sum_tile<T>(terms, next, nullptr, at, n), at, n, hidden);
  }
}

static void reduce_encode(void* dst, moecomm::Wire wire, const moecomm::Terms& terms,
                          const moecomm::Terms* next, long begin, long end, long hidden,
                          moecomm::DType type) {
  switch (type) {
    case moecomm::DType::bf16: return encode_typed<BF16>((char*)dst, wire, terms, next, begin, end, hidden);
    case moecomm::DType::f16: return encode_typed<F16>((char*)dst, wire, terms, next, begin, end, hidden);
    default: return encode_typed<F32>((char*)dst, wire, terms, next, begin, end, hidden);
  }
}

// -- Quantization: tiles of a row, of a column, squares -----------------------------------------------------

template <class T>
static void quantize_typed(char* codes, char* scales, const char* row, long begin, long end, long hidden,
                           moecomm::ScaleKind kind) {
  for (long at = begin; at < end; at += moecomm::kTile) {
    const long n = end - at < moecomm::kTile ? end - at : moecomm::kTile, tile = at / moecomm::kTile;
    const float scale = encode_fp8(codes + at, load_tile<T>(row + at * T::kBytes, n), n, kind);
    if (kind == moecomm::ScaleKind::ue8m0)
      scales[tile] = (char)moecomm::ue8m0_encode(scale);
    else
      __builtin_memcpy(scales + 4 * tile, &scale, 4);
  }
  if (kind == moecomm::ScaleKind::ue8m0 && end == hidden)
    for (long i = moecomm::tiles_of(hidden); i % 4; ++i) scales[i] = 0;  // pads the last int32
}

static void quantize(void* codes, void* scales, const void* row, long begin, long end, long hidden,
                     moecomm::DType type, moecomm::ScaleKind kind) {
  switch (type) {
    case moecomm::DType::bf16:
      return quantize_typed<BF16>((char*)codes, (char*)scales, (const char*)row, begin, end, hidden, kind);
    case moecomm::DType::f16:
      return quantize_typed<F16>((char*)codes, (char*)scales, (const char*)row, begin, end, hidden, kind);
    default:
      return quantize_typed<F32>((char*)codes, (char*)scales, (const char*)row, begin, end, hidden, kind);
  }
}

template <class T>
static void quantize_columns_typed(char* codes, float* scales, const char* rows, long count, long columns,
                                   moecomm::ScaleKind kind) {
  for (long c = 0; c < columns; c += kLanes) {
    const long n = columns - c < kLanes ? columns - c : kLanes;
    Uv m{};
    for (long r = 0; r < count; ++r)
      m = larger(m, moecomm::finite_magnitude<Uv>(load_some<T>(rows + (r * columns + c) * T::kBytes, n)));
    const auto s = moecomm::tile_scale<Uv>((Fv)m, kind);
    store_some<F32>((char*)(scales + c), s.scale, n);
    for (long r = 0; r < count; ++r)
      store_bytes(codes + r * columns + c,
                  moecomm::e4m3_encode<Uv>(load_some<T>(rows + (r * columns + c) * T::kBytes, n) * s.inverse),
                  n);
  }
}

template <class T>
static void quantize_squares_typed(char* codes, float* scales, const char* rows, long count, long columns,
                                   moecomm::ScaleKind kind) {
  for (long c = 0; c < columns; c += moecomm::kTile) {
    const long n = columns - c < moecomm::kTile ? columns - c : moecomm::kTile;
    Uv m{};
    for (long r = 0; r < count; ++r)
      for_vectors(n, [&](int, long at, long some) {
        m = larger(
            m, moecomm::finite_magnitude<Uv>(load_some<T>(rows + (r * columns + c + at) * T::kBytes, some)));
      });
    const auto s = moecomm::tile_scale<unsigned>(moecomm::bits_as<float>(largest_of(m)), kind);
    scales[c / moecomm::kTile] = s.scale;
    for (long r = 0; r < count; ++r)
      for_vectors(n, [&](int, long at, long some) {
        const long i = r * columns + c + at;
        store_bytes(codes + i, moecomm::e4m3_encode<Uv>(load_some<T>(rows + i * T::kBytes, some) * s.inverse),
                    some);
      });
  }
}

static void quantize_block(void* codes, float* scales, const void* rows, long count, long columns,
                           moecomm::DType type, moecomm::ScaleKind kind, bool square) {
  const auto with = [&](auto element) {
    using T = decltype(element);
    (square ? quantize_squares_typed<T> : quantize_columns_typed<T>)((char*)codes, scales, (const char*)rows,
                                                                     count, columns, kind);
  };
  switch (type) {
    case moecomm::DType::bf16: return with(BF16{});
    case moecomm::DType::f16: return with(F16{});
    default: return with(F32{});
  }
}

template <class T>
static void dequantize_typed(char* dst, const char* codes, const float* scales, long columns,
                             bool by_column) {
  for (long c = 0; c < columns; c += kLanes) {
    const long n = columns - c < kLanes ? columns - c : kLanes;
    const Fv scale =
        by_column ? load_some<F32>((const char*)(scales + c), n) : Fv{} + scales[c / moecomm::kTile];
    store_some<T>(dst + c * T::kBytes, moecomm::e4m3_decode<Fv>(load_bytes(codes + c, n)) * scale, n);
  }
}

static void dequantize(void* dst, const void* codes, const float* scales, long columns, moecomm::DType type,
                       bool by_column) {
  switch (type) {
    case moecomm::DType::bf16:
      return dequantize_typed<BF16>((char*)dst, (const char*)codes, scales, columns, by_column);
    case moecomm::DType::f16:
      return dequantize_typed<F16>((char*)dst, (const char*)codes, scales, columns, by_column);
    default: return dequantize_typed<F32>((char*)dst, (const char*)codes, scales, columns, by_column);
  }
}

// Processes a vector of columns of `count` rows at a time: decoded to FP32 once, and kept in the first-level
// cache.
static void transpose_requantize(void* dst, float* dst_scales, const void* src, const float* src_scales,
                                 long count, long columns, long dst_stride, long scale_stride,
                                 moecomm::ScaleKind kind) {
  const long tiles = moecomm::tiles_of(columns);
  Fv value[moecomm::kTile];
  for (long c = 0; c < columns; c += kLanes) {
    const long n = columns - c < kLanes ? columns - c : kLanes;
    Uv m{};
    for (long r = 0; r < count; ++r) {
      value[r] = moecomm::e4m3_decode<Fv>(load_bytes((const char*)src + r * columns + c, n)) *
                 src_scales[r * tiles + c / moecomm::kTile];
      m = larger(m, moecomm::finite_magnitude<Uv>(value[r]));
    }
    const auto s = moecomm::tile_scale<Uv>((Fv)m, kind);
    unsigned char codes[kLanes][moecomm::kTile];
    for (long r = 0; r < count; ++r) {
      const Cv code = __builtin_convertvector(moecomm::e4m3_encode<Uv>(value[r] * s.inverse), Cv);
      for (int i = 0; i < kLanes; ++i) codes[i][r] = code[i];
    }
    for (long i = 0; i < n; ++i) {
      __builtin_memcpy((char*)dst + (c + i) * dst_stride, codes[i], count);
      dst_scales[(c + i) * scale_stride] = s.scale[i];
    }
  }
}
