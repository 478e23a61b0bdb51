// Operations on registers and predicates. Every one is as wide as its type says; whatever lies above is
// ignored when it is read.
#include <cmath>
#include <limits>

#include "machine.hpp"

namespace simt {
namespace {

template <class T>
constexpr bool kFloat = std::is_floating_point_v<T>;
template <class T>
constexpr int kBits = 8 * sizeof(T);

// The GPU's single-precision results have one NaN.
template <class T>
T canonical(T v) {
  if constexpr (std::is_same_v<T, float>)
    if (v != v) return std::bit_cast<float>(0x7fffffffu);
  return v;
}

// uint16_t would be promoted to int, whose product may overflow.
template <class T>
using Wide = std::conditional_t<
    kFloat<T>, T,
    std::conditional_t<sizeof(T) < 4, uint32_t, std::make_unsigned_t<std::conditional_t<kFloat<T>, int, T>>>>;

struct Add {
  template <class T>
  static T of(T a, T b) {
    return canonical(static_cast<T>(Wide<T>(a) + Wide<T>(b)));
  }
};
struct Sub {
  template <class T>
  static T of(T a, T b) {
    return canonical(static_cast<T>(Wide<T>(a) - Wide<T>(b)));
  }
};
struct Mul {
  template <class T>
  static T of(T a, T b) {
    return canonical(static_cast<T>(Wide<T>(a) * Wide<T>(b)));
  }
};
struct And {
  template <class T>
  static T of(T a, T b) {
    return a & b;
  }
};
struct Or {
  template <class T>
  static T of(T a, T b) {
    return a | b;
  }
};
struct Xor {
  template <class T>
  static T of(T a, T b) {
    return a ^ b;
  }
};
struct MulHi {
  template <class T>
  static T of(T a, T b) {
    using W = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
    return static_cast<T>((W{a} * W{b}) >> kBits<T>);
  }
};
template <bool kLess>
struct Extreme {
  template <class T>
  static T of(T a, T b) {
    if constexpr (kFloat<T>) {
      if (a != a) return canonical(b);
      if (b != b) return a;
      if (a == b) return std::signbit(a) == kLess ? a : b;  // -0 is less than +0
    }
    return (a < b) == kLess ? a : b;
  }
};
struct Shl {
  template <class T>
  static T of(T a, uint32_t n) {
    return n >= kBits<T> ? T(0) : static_cast<T>(Wide<T>(a) << n);
  }
};
struct Shr {
  template <class T>
  static T of(T a, uint32_t n) {
    return static_cast<T>(a >> (n >= kBits<T> ? (std::is_signed_v<T> ? kBits<T> - 1 : 0) : n)) &
           (n >= kBits<T> && !std::is_signed_v<T> ? T(0) : T(-1));
  }
};

struct Neg {
  template <class T>
  static T of(T a) {
    if constexpr (kFloat<T>)
      return a != a ? canonical(a) : -a;
    else
      return static_cast<T>(0 - Wide<T>(a));
  }
};
struct Abs {
  template <class T>
  static T of(T a) {
    if constexpr (kFloat<T>)
      return a != a ? canonical(a) : std::abs(a);
    else
      return a < 0 ? static_cast<T>(0 - Wide<T>(a)) : a;
  }
};
struct Not {
  template <class T>
  static T of(T a) {
    return static_cast<T>(~a);
  }
};
struct Same {
  template <class T>
  static T of(T a) {
    return a;
  }
};
struct Rcp {
  template <class T>
  static T of(T a) {
    return canonical(T(1) / a);
  }
};
struct Popc {
  template <class T>
  static uint32_t of(T a) {
    return std::popcount(a);
  }
};
struct Clz {
  template <class T>
  static uint32_t of(T a) {
    return std::countl_zero(a);
  }
};

template <class T, class F>
void unary(Warp& w, const Ins& i, Mask m) {
  uint64_t* d = w.reg(i.r[0]);
  const uint64_t* a = w.reg(i.r[1]);
  each(m, [&](int l) { d[l] = bits(F::of(get<T>(a[l]))); });
}
template <class T, class F, class B = T>
void binary(Warp& w, const Ins& i, Mask m) {
  uint64_t* d = w.reg(i.r[0]);
  const uint64_t *a = w.reg(i.r[1]), *b = w.reg(i.r[2]);
  each(m, [&](int l) { d[l] = bits(F::of(get<T>(a[l]), get<B>(b[l]))); });
}
template <class T, bool kRest>
void divide(Warp& w, const Ins& i, Mask m) {
  uint64_t* d = w.reg(i.r[0]);
  const uint64_t *a = w.reg(i.r[1]), *b = w.reg(i.r[2]);
  each(m, [&](int l) {
    const T x = get<T>(a[l]), y = get<T>(b[l]);
    if constexpr (kFloat<T>) {
      d[l] = bits(canonical(x / y));
    } else {
      if (y == 0) w.fault(i, l, "division by zero");
      if (std::is_signed_v<T> && y == T(-1))
        d[l] = bits(kRest ? T(0) : static_cast<T>(0 - Wide<T>(x)));
      else
        d[l] = bits(static_cast<T>(kRest ? x % y : x / y));
    }
  });
}

template <class T, class R>
void mul_wide(Warp& w, const Ins& i, Mask m) {
  uint64_t* d = w.reg(i.r[0]);
  const uint64_t *a = w.reg(i.r[1]), *b = w.reg(i.r[2]);
  each(m, [&](int l) { d[l] = bits(static_cast<R>(R{get<T>(a[l])} * R{get<T>(b[l])})); });
}
template <class T, class R>
void mad_wide(Warp& w, const Ins& i, Mask m) {
  uint64_t* d = w.reg(i.r[0]);
  const uint64_t *a = w.reg(i.r[1]), *b = w.reg(i.r[2]), *c = w.reg(i.r[3]);
  each(m, [&](int l) {
    d[l] = bits(static_cast<R>(Wide<R>(R{get<T>(a[l])} * R{get<T>(b[l])}) + Wide<R>(get<R>(c[l]))));
  });
}
template <class T>
void mad(Warp& w, const Ins& i, Mask m) {
  uint64_t* d = w.reg(i.r[0]);
  const uint64_t *a = w.reg(i.r[1]), *b = w.reg(i.r[2]), *c = w.reg(i.r[3]);
  each(m, [&](int l) {
    d[l] = bits(static_cast<T>(Wide<T>(get<T>(a[l])) * Wide<T>(get<T>(b[l])) + Wide<T>(get<T>(c[l]))));
  });
}
void fma(Warp& w, const Ins& i, Mask m) {
  uint64_t* d = w.reg(i.r[0]);
  const uint64_t *a = w.reg(i.r[1]), *b = w.reg(i.r[2]), *c = w.reg(i.r[3]);
  each(m, [&](int l) {
    d[l] = bits(canonical(std::fmaf(get<float>(a[l]), get<float>(b[l]), get<float>(c[l]))));
  });
}
// The low `length` bits of a, put into b at `at`; both numbers are of 8 bits.
template <class T>
void bfi(Warp& w, const Ins& i, Mask m) {
  uint64_t* d = w.reg(i.r[0]);
  const uint64_t *a = w.reg(i.r[1]), *b = w.reg(i.r[2]), *p = w.reg(i.r[3]), *n = w.reg(i.r[4]);
  each(m, [&](int l) {
    const uint32_t at = p[l] & 255, length = n[l] & 255;
    const T ones = length >= kBits<T> ? T(~T(0)) : static_cast<T>((T(1) << length) - 1),
            field = Shl::of(ones, at);
    d[l] = bits(static_cast<T>((get<T>(b[l]) & ~field) | (Shl::of(get<T>(a[l]), at) & field)));
  });
}
void prmt(Warp& w, const Ins& i, Mask m) {
  uint64_t* d = w.reg(i.r[0]);
  const uint64_t *a = w.reg(i.r[1]), *b = w.reg(i.r[2]), *c = w.reg(i.r[3]);
  each(m, [&](int l) {
    const uint64_t both = b[l] << 32 | get<uint32_t>(a[l]);
    uint32_t out = 0;
    for (int k = 0; k < 4; ++k) {
      const uint32_t pick = c[l] >> 4 * k & 15, byte = both >> 8 * (pick & 7) & 255;
      out |= (pick & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * k;
    }
    d[l] = out;
  });
}

template <class T>
void select(Warp& w, const Ins& i, Mask m) {
  uint64_t* d = w.reg(i.r[0]);
  const uint64_t *a = w.reg(i.r[1]), *b = w.reg(i.r[2]);
  const Mask p = w.pred(i.r[3]);
  each(m, [&](int l) { d[l] = p >> l & 1 ? get<T>(a[l]) : get<T>(b[l]); });
}
template <class T, class F>
void set_predicate(Warp& w, const Ins& i, Mask m) {
  const uint64_t *a = w.reg(i.r[1]), *b = w.reg(i.r[2]);
  Mask found = 0;
  each(m, [&](int l) { found |= Mask{F::of(get<T>(a[l]), get<T>(b[l]))} << l; });
  w.predicates[i.r[0]] = (w.predicates[i.r[0]] & ~m) | found;
}
#define COMPARE(Name, op)                \
  struct Name {                          \
    template <class T>                   \
    static bool of(T a, T b) {           \
      return a op b;                     \
    }                                    \
  };                                     \
  struct Name##u {                       \
    template <class T>                   \
    static bool of(T a, T b) {           \
      return a != a || b != b || a op b; \
    }                                    \
  };
COMPARE(Eq, ==)
COMPARE(Ne, !=)
COMPARE(Lt, <)
COMPARE(Le, <=)
COMPARE(Gt, >)
COMPARE(Ge, >=)
struct OrderedNe {
  template <class T>
  static bool of(T a, T b) {
    return a == a && b == b && a != b;
  }
};  // setp.ne of floats
struct Num {
  template <class T>
  static bool of(T a, T b) {
    return a == a && b == b;
  }
};
struct Nan {
  template <class T>
  static bool of(T a, T b) {
    return a != a || b != b;
  }
};

template <class F>
void of_predicates(Warp& w, const Ins& i, Mask m) {
  const Mask found = F::of(w.pred(i.r[1]), w.pred(i.r[2]));
  w.predicates[i.r[0]] = (w.predicates[i.r[0]] & ~m) | (found & m);
}
template <class F>
void of_predicate(Warp& w, const Ins& i, Mask m) {
  const Mask found = F::of(w.pred(i.r[1]));
  w.predicates[i.r[0]] = (w.predicates[i.r[0]] & ~m) | (found & m);
}

template <class S, class D>
struct To {
  static D of(S v) {
    if constexpr (!kFloat<S> || kFloat<D>)
      return canonical(static_cast<D>(v));  // rounds to nearest even
    else if (v != v)
      return 0;  // ptx: NaN becomes 0, and what is too large the largest
    else if (v >= std::ldexp(S(1), std::numeric_limits<D>::digits))
      return std::numeric_limits<D>::max();
    else if (v <= static_cast<S>(std::numeric_limits<D>::min()))
      return std::numeric_limits<D>::min();
    else
      return static_cast<D>(v);
  }
};
struct HalfToFloat {
  static float of(uint16_t v) { return canonical(static_cast<float>(std::bit_cast<_Float16>(v))); }
};
struct FloatToHalf {
  static uint16_t of(float v) { return v != v ? 0x7fff : std::bit_cast<uint16_t>(static_cast<_Float16>(v)); }
};
struct BfloatToFloat {
  static float of(uint16_t v) { return std::bit_cast<float>(uint32_t{v} << 16); }
};
struct FloatToBfloat {
  static uint16_t of(float v) {
    const uint32_t b = std::bit_cast<uint32_t>(v);
    return v != v ? 0x7fff : static_cast<uint16_t>((b + 0x7fff + (b >> 16 & 1)) >> 16);
  }
};

template <int kParts>
void pack(Warp& w, const Ins& i, Mask m) {
  uint64_t* d = w.reg(i.r[0]);
  const uint64_t part = (uint64_t{1} << i.integer) - 1;
  each(m, [&](int l) {
    uint64_t v = 0;
    for (int k = 0; k < kParts; ++k) v |= (w.reg(i.r[1 + k])[l] & part) << k * i.integer;
    d[l] = v;
  });
}
template <int kParts>
void unpack(Warp& w, const Ins& i, Mask m) {
  const uint64_t part = (uint64_t{1} << i.integer) - 1;
  each(m, [&](int l) {
    const uint64_t v = w.reg(i.r[0])[l];
    for (int k = 0; k < kParts; ++k)
      if (i.r[1 + k] >= 0) w.reg(i.r[1 + k])[l] = v >> k * i.integer & part;
  });
}

using Table = std::map<std::string, Operation>;

template <class T>
void add_integer(Table& all, const std::string& t) {
  const auto add = [&](const std::string& name, Handler run) { all[name + "." + t] = {run, Kind::plain}; };
  add("div", divide<T, false>), add("rem", divide<T, true>), add("min", binary<T, Extreme<true>>),
      add("max", binary<T, Extreme<false>>);
  add("mul.hi", binary<T, MulHi>), add("abs", unary<T, Abs>), add("shr", binary<T, Shr, uint32_t>);
  add("setp.lt", set_predicate<T, Lt>), add("setp.le", set_predicate<T, Le>),
      add("setp.gt", set_predicate<T, Gt>), add("setp.ge", set_predicate<T, Ge>);
  const auto convert = [&](const std::string& to, Handler run) {
    all["cvt." + to + "." + t] = {run, Kind::plain};
  };
  convert("u8", unary<T, To<T, uint8_t>>), convert("u16", unary<T, To<T, uint16_t>>),
      convert("u32", unary<T, To<T, uint32_t>>), convert("u64", unary<T, To<T, uint64_t>>);
  if constexpr (sizeof(T) >= 4)
    convert("f32", unary<T, To<T, float>>),
        all["cvt." + t + ".f32"] = {unary<float, To<float, T>>, Kind::plain};
}
template <class T>
void add_unsigned(Table& all, const std::string& t) {
  const auto add = [&](const std::string& name, Handler run) { all[name + "." + t] = {run, Kind::plain}; };
  add("add", binary<T, Add>), add("sub", binary<T, Sub>), add("mul", binary<T, Mul>), add("mad", mad<T>),
      add("neg", unary<T, Neg>), add("not", unary<T, Not>);
  add("and", binary<T, And>), add("or", binary<T, Or>), add("xor", binary<T, Xor>),
      add("shl", binary<T, Shl, uint32_t>), add("mov", unary<T, Same>);
  add("setp.eq", set_predicate<T, Eq>), add("setp.ne", set_predicate<T, Ne>), add("selp", select<T>);
  if constexpr (sizeof(T) >= 4) add("bfi", bfi<T>), add("popc", unary<T, Popc>), add("clz", unary<T, Clz>);
}
template <class T, class R>
void add_wide(Table& all, const std::string& t) {
  all["mul.wide." + t] = {mul_wide<T, R>, Kind::plain};
  all["mad.wide." + t] = {mad_wide<T, R>, Kind::plain};
}
template <class T>
void add_float(Table& all, const std::string& t) {
  const auto add = [&](const std::string& name, Handler run) { all[name + "." + t] = {run, Kind::plain}; };
  add("add", binary<T, Add>), add("sub", binary<T, Sub>), add("mul", binary<T, Mul>),
      add("div", divide<T, false>);
  add("min", binary<T, Extreme<true>>), add("max", binary<T, Extreme<false>>), add("neg", unary<T, Neg>),
      add("abs", unary<T, Abs>);
  add("setp.eq", set_predicate<T, Eq>), add("setp.ne", set_predicate<T, OrderedNe>),
      add("setp.lt", set_predicate<T, Lt>), add("setp.le", set_predicate<T, Le>);
  add("setp.gt", set_predicate<T, Gt>), add("setp.ge", set_predicate<T, Ge>),
      add("setp.equ", set_predicate<T, Equ>), add("setp.neu", set_predicate<T, Neu>);
  add("setp.ltu", set_predicate<T, Ltu>), add("setp.leu", set_predicate<T, Leu>),
      add("setp.gtu", set_predicate<T, Gtu>), add("setp.geu", set_predicate<T, Geu>);
  add("setp.num", set_predicate<T, Num>), add("setp.nan", set_predicate<T, Nan>);
}

}  // namespace

void add_arithmetic(Table& all) {
  add_integer<uint16_t>(all, "u16"), add_integer<int16_t>(all, "s16"), add_integer<uint32_t>(all, "u32"),
      add_integer<int32_t>(all, "s32");
  add_integer<uint64_t>(all, "u64"), add_integer<int64_t>(all, "s64");
  add_unsigned<uint16_t>(all, "u16"), add_unsigned<uint32_t>(all, "u32"), add_unsigned<uint64_t>(all, "u64");
  add_wide<uint16_t, uint32_t>(all, "u16"), add_wide<int16_t, int32_t>(all, "s16"),
      add_wide<uint32_t, uint64_t>(all, "u32"), add_wide<int32_t, int64_t>(all, "s32");
  add_float<float>(all, "f32"), add_float<double>(all, "f64");
  const auto add = [&](const char* name, Handler run) { all[name] = {run, Kind::plain}; };
  add("fma.f32", fma), add("rcp.f32", unary<float, Rcp>), add("prmt.u32", prmt);
  for (const char* name : {"cvt.u8.u8", "cvt.u16.u8", "cvt.u32.u8", "cvt.u64.u8"})
    add(name, unary<uint8_t, To<uint8_t, uint64_t>>);
  add("cvt.u8.s8", unary<int8_t, To<int8_t, uint8_t>>),
      add("cvt.u16.s8", unary<int8_t, To<int8_t, uint16_t>>);
  add("cvt.u32.s8", unary<int8_t, To<int8_t, uint32_t>>),
      add("cvt.u64.s8", unary<int8_t, To<int8_t, uint64_t>>);
  add("cvt.f64.f32", unary<float, To<float, double>>), add("cvt.f32.f64", unary<double, To<double, float>>);
  add("cvt.f32.f16", unary<uint16_t, HalfToFloat>), add("cvt.f16.f32", unary<float, FloatToHalf>);
  add("cvt.f32.bf16", unary<uint16_t, BfloatToFloat>), add("cvt.bf16.f32", unary<float, FloatToBfloat>);
  add("and.pred", of_predicates<And>), add("or.pred", of_predicates<Or>), add("xor.pred", of_predicates<Xor>);
  add("not.pred", of_predicate<Not>), add("mov.pred", of_predicate<Same>);
  add("pack.2", pack<2>), add("pack.4", pack<4>), add("unpack.2", unpack<2>), add("unpack.4", unpack<4>);
}

}  // namespace simt
