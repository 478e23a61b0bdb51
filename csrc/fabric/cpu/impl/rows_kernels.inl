// Included by rows_avx512.cpp, rows_avx2.cpp, rows_neon.cpp and rows_base.cpp, each with its own target,
// inside its own namespace. MOE_VECTOR is the size of the target's registers in bytes; the compiler's macros
// do not give it, because g++ 12 reads a whole file before it applies a target pragma. This file includes
// nothing: inline functions of the standard library must not be compiled for a target that another machine
// lacks. It uses vector extensions, so that one source serves every target. Vectors are as wide as the
// registers, because the compiler splits wider ones lane by lane when it selects or converts.

// Everything below is inlined into one translation unit, so the vector ABI does not matter.
#pragma GCC diagnostic ignored "-Wpsabi"
constexpr int kLanes = MOE_VECTOR / 4;
typedef float Fv __attribute__((vector_size(4 * kLanes)));
typedef unsigned int Uv __attribute__((vector_size(4 * kLanes)));
typedef unsigned short Hv __attribute__((vector_size(2 * kLanes)));

// A row type converts single vectors of consecutive elements (load, store). It also converts whole registers
// of memory to kParts vectors and back (unpack, pack), in the order of elements that is cheapest; `gather`
// loads floats in that order.
constexpr int kMemory = MOE_VECTOR;

struct BF16 {
  static constexpr int kBytes = 2, kParts = 2;
  static inline Fv load(const char* p) {
    Hv h;
    __builtin_memcpy(&h, p, sizeof(h));
    const Uv u = __builtin_convertvector(h, Uv) << 16;
    return (Fv)u;
  }
  // Rounds to nearest even, in the upper half. NaN becomes the quiet NaN 0x7fc0, as in torch.
  static inline Uv round(Fv v) {
    const Uv u = (Uv)v;
    return v != v ? Uv{} + 0x7fc00000u : u + 0x7fffu + ((u >> 16) & 1u);
  }
  static inline void store(char* p, Fv v) {
    const Hv h = __builtin_convertvector(round(v) >> 16, Hv);
    __builtin_memcpy(p, &h, sizeof(h));
  }
  // Even elements, then odd ones, so that neither widening nor narrowing moves data between lanes.
  static inline void unpack(Uv u, Fv* v) {
    v[0] = (Fv)(u << 16);
    v[1] = (Fv)(u & 0xffff0000u);
  }
  static inline Uv pack(const Fv* v) { return round(v[0]) >> 16 | (round(v[1]) & 0xffff0000u); }
  static inline void gather(const float* from, Fv* v) {
    for (int i = 0; i < 2 * kLanes; ++i) v[i & 1][i / 2] = from[i];
  }
};

struct F16 {
  static constexpr int kBytes = 2, kParts = 2;
  static inline Fv load(const char* p) {
#if MOE_VECTOR == 64
    __m256i h;
    __builtin_memcpy(&h, p, 32);
    return (Fv)_mm512_cvtph_ps(h);
#elif MOE_VECTOR == 32
    __m128i h;
    __builtin_memcpy(&h, p, 16);
    return (Fv)_mm256_cvtph_ps(h);
#elif defined(__aarch64__)
    float16x4_t h;
    __builtin_memcpy(&h, p, 8);
    return (Fv)vcvt_f32_f16(h);
#else
    _Float16 h[kLanes];
    __builtin_memcpy(h, p, sizeof(h));
    Fv v;
    for (int i = 0; i < kLanes; ++i) v[i] = (float)h[i];
    return v;
#endif
  }
  static inline void store(char* p, Fv v) {
#if MOE_VECTOR == 64
    const __m256i h = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __builtin_memcpy(p, &h, 32);
#elif MOE_VECTOR == 32
    const __m128i h = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __builtin_memcpy(p, &h, 16);
#elif defined(__aarch64__)
    const float16x4_t h = vcvt_f16_f32((float32x4_t)v);
    __builtin_memcpy(p, &h, 8);
#else
    _Float16 h[kLanes];
    for (int i = 0; i < kLanes; ++i) h[i] = (_Float16)v[i];
    __builtin_memcpy(p, h, sizeof(h));
#endif
  }
  static inline void unpack(Uv u, Fv* v) {
    v[0] = load((const char*)&u);
    v[1] = load((const char*)&u + kMemory / 2);
  }
  static inline Uv pack(const Fv* v) {
    Uv u;
    store((char*)&u, v[0]);
    store((char*)&u + kMemory / 2, v[1]);
    return u;
  }
  static inline void gather(const float* from, Fv* v) { __builtin_memcpy(v, from, 2 * sizeof(Fv)); }
};

struct F32 {
  static constexpr int kBytes = 4, kParts = 1;
  static inline Fv load(const char* p) {
    Fv v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }
  static inline void store(char* p, Fv v) { __builtin_memcpy(p, &v, sizeof(v)); }
  static inline void unpack(Uv u, Fv* v) { v[0] = (Fv)u; }
  static inline Uv pack(const Fv* v) { return (Uv)v[0]; }
  static inline void gather(const float* from, Fv* v) { v[0] = load((const char*)from); }
};

// Non-temporal stores to a 64-byte aligned destination.
static inline void stream_lines(char* dst, const char* src, long bytes) {
#if MOE_VECTOR == 64
  for (long i = 0; i < bytes; i += 64) _mm512_stream_si512((__m512i*)(dst + i), _mm512_loadu_si512(src + i));
#elif MOE_VECTOR == 32
  for (long i = 0; i < bytes; i += 32)
    _mm256_stream_si256((__m256i*)(dst + i), _mm256_loadu_si256((const __m256i*)(src + i)));
#elif defined(__SSE2__)
  for (long i = 0; i < bytes; i += 16)
    _mm_stream_si128((__m128i*)(dst + i), _mm_loadu_si128((const __m128i*)(src + i)));
#elif defined(__aarch64__)
  for (long i = 0; i < bytes; i += 16) {  // a hint; ordered like other stores
    uint64x2_t v;
    __builtin_memcpy(&v, src + i, 16);
    asm volatile("stnp %d1, %d2, [%0]"
                 :
                 : "r"(dst + i), "w"(vgetq_lane_u64(v, 0)), "w"(vgetq_lane_u64(v, 1))
                 : "memory");
  }
#else
  __builtin_memcpy(dst, src, bytes);
#endif
}

// A sum processes all terms for a few cache lines of the destination, with the partial sums in registers. The
// best number of lines, and whether to prefetch the terms of the next sum, depend on the CPU. Hence the
// variants.
constexpr int kLineRegisters = 64 / MOE_VECTOR;

template <class T, int kRegisters, bool kNext, bool kStream>
static inline void reduce_block(char* dst, const moecomm::Terms& terms, const moecomm::Terms* next,
                                const float* bias, long at) {
  constexpr int kVectors = kRegisters * T::kParts;
  Fv total[kVectors], part[kVectors], term[kVectors];
  bool first_group = true, first_term = true;
  for (int j = 0; j < kVectors; ++j) total[j] = Fv{};
  for (int i = 0; i < terms.count; ++i) {
    const char* row = (const char*)terms.store->row[i] + at * T::kBytes;
    const float w = terms.store->weight[i];
    for (int j = 0; j < kRegisters; ++j) {
      Uv u;
      __builtin_memcpy(&u, row + kMemory * j, kMemory);
      T::unpack(u, term + j * T::kParts);
    }
    for (int j = 0; j < kVectors; ++j) part[j] = first_term ? term[j] * w : part[j] + term[j] * w;
    first_term = false;
    if (terms.group_end >> i & 1) {
      for (int j = 0; j < kVectors; ++j) total[j] = first_group ? part[j] : total[j] + part[j];
      first_group = false;
      first_term = true;
    }
  }
  if (kNext && next)
    for (int i = 0; i < next->count; ++i) {
      const char* row = (const char*)next->store->row[i] + at * T::kBytes;
      for (int j = 0; j < kRegisters * kMemory; j += 64) __builtin_prefetch(row + j, 0, 2);
    }
  char* out = dst + at * T::kBytes;
  for (int j = 0; j < kRegisters; ++j) {
    Fv* v = total + j * T::kParts;
    if (bias) {
      Fv b[T::kParts];
      T::gather(bias + at + j * kLanes * T::kParts, b);
      for (int k = 0; k < T::kParts; ++k) v[k] = v[k] + b[k];
    }
    const Uv u = T::pack(v);
    if (kStream)
      stream_lines(out + kMemory * j, (const char*)&u, kMemory);
    else
      __builtin_memcpy(out + kMemory * j, &u, kMemory);
  }
}

// The tail that is shorter than a vector: the same steps on zero-padded copies.
template <class T>
static inline void reduce_tail(char* dst, const moecomm::Terms& terms, const float* bias, long at, long n) {
  Fv total = Fv{}, part = Fv{};
  bool first_group = true, first_term = true;
  char pad[64];
  for (int i = 0; i < terms.count; ++i) {
    __builtin_memset(pad, 0, 64);
    __builtin_memcpy(pad, (const char*)terms.store->row[i] + at * T::kBytes, n * T::kBytes);
    const Fv v = T::load(pad) * terms.store->weight[i];
    part = first_term ? v : part + v;
    first_term = false;
    if (terms.group_end >> i & 1) {
      total = first_group ? part : total + part;
      first_group = false;
      first_term = true;
    }
  }
  if (bias) {
    float b[kLanes] = {};
    __builtin_memcpy(b, bias + at, n * 4);
    total = total + F32::load((const char*)b);
  }
  T::store(pad, total);
  __builtin_memcpy(dst + at * T::kBytes, pad, n * T::kBytes);
}

template <class T>
static void reduce_coded(char* dst, const moecomm::Terms& terms, const moecomm::Terms* next,
                         const float* bias, long begin, long end);

template <class T, int kLines, bool kNext>
static void reduce_typed(char* dst, const moecomm::Terms& terms, const moecomm::Terms* next,
                         const float* bias, long begin, long end, bool stream) {
  if (terms.coded) return reduce_coded<T>(dst, terms, next, bias, begin, end);
  long at = begin;
  constexpr int kBlock = kLines * kLineRegisters;
  constexpr long kWide = kBlock * kMemory / T::kBytes, kNarrow = kMemory / T::kBytes;
  if (stream && ((unsigned long)(dst + at * T::kBytes) & 63) == 0)
    for (; at + kWide <= end; at += kWide) reduce_block<T, kBlock, kNext, true>(dst, terms, next, bias, at);
  for (; at + kWide <= end; at += kWide) reduce_block<T, kBlock, kNext, false>(dst, terms, next, bias, at);
  for (; at + kNarrow <= end; at += kNarrow) reduce_block<T, 1, false, false>(dst, terms, nullptr, bias, at);
  for (; at < end; at += kLanes) reduce_tail<T>(dst, terms, bias, at, at + kLanes <= end ? kLanes : end - at);
}

#include "fabric/cpu/impl/quant_kernels.inl"

static void reduce_f64(double* dst, const moecomm::Terms& terms, const float* bias, long begin, long end) {
  for (long at = begin; at < end; ++at) {
    double total = 0, part = 0;
    bool first_group = true, first_term = true;
    for (int i = 0; i < terms.count; ++i) {
      const double v = ((const double*)terms.store->row[i])[at] * (double)terms.store->weight[i];
      part = first_term ? v : part + v;
      first_term = false;
      if (terms.group_end >> i & 1) {
        total = first_group ? part : total + part;
        first_group = false;
        first_term = true;
      }
    }
    dst[at] = bias ? total + (double)bias[at] : total;
  }
}

template <int kLines, bool kNext>
static void reduce(void* dst, const moecomm::Terms& terms, const moecomm::Terms* next, const float* bias,
                   long begin, long end, moecomm::DType type, bool stream) {
  char* to = (char*)dst;
  switch (type) {
    case moecomm::DType::bf16:
      return reduce_typed<BF16, kLines, kNext>(to, terms, next, bias, begin, end, stream);
    case moecomm::DType::f16:
      return reduce_typed<F16, kLines, kNext>(to, terms, next, bias, begin, end, stream);
    case moecomm::DType::f32:
      return reduce_typed<F32, kLines, kNext>(to, terms, next, bias, begin, end, stream);
    case moecomm::DType::f64: return reduce_f64((double*)dst, terms, bias, begin, end);
  }
}

static void copy(void* dst, const void* src, unsigned long bytes) { __builtin_memcpy(dst, src, bytes); }
static void zero(void* dst, unsigned long bytes) { __builtin_memset(dst, 0, bytes); }

// Non-temporal stores do not read the destination first and leave the cache to the source rows. They need
// aligned destinations. Rows are 16-byte aligned, so a short head is stored normally.
static void stream(void* dst, const void* src, unsigned long bytes) {
#if defined(__SSE2__) || defined(__aarch64__)
  char* d = (char*)dst;
  const char* s = (const char*)src;
  unsigned long head = (64 - ((unsigned long)d & 63)) & 63;
  if (head > bytes) head = bytes;
  const unsigned long tail = head + ((bytes - head) & ~63ul);
  __builtin_memcpy(d, s, head);
  stream_lines(d + head, s + head, (long)(tail - head));
  __builtin_memcpy(d + tail, s + tail, bytes - tail);
#else
  __builtin_memcpy(dst, src, bytes);
#endif
}

static void fence() {
#if defined(__SSE2__)
  _mm_sfence();
#else
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
#endif
}

// The first one is used if nothing was measured. MOE_NAME prefixes a variant with the name of its build.
extern const moecomm::SumVariant kVariants[moecomm::kSumVariants] = {
    {MOE_NAME("/1+next"), reduce<1, true>}, {MOE_NAME("/2+next"), reduce<2, true>},
    {MOE_NAME("/4+next"), reduce<4, true>}, {MOE_NAME("/1"), reduce<1, false>},
    {MOE_NAME("/2"), reduce<2, false>},     {MOE_NAME("/4"), reduce<4, false>},
};

extern const moecomm::RowKernels kKernels = {
    MOE_NAME(""), copy,          stream,   zero,           fence,      kVariants[0],
    kVariants[0], reduce_encode, quantize, quantize_block, dequantize, transpose_requantize};
