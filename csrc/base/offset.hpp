// Offsets into a rank's memory that know what lies there. An offset is the same on every rank; it becomes an
// address together with the place where one rank's memory begins.
#pragma once
#include <concepts>

#include "base/types.hpp"

namespace moecomm {

template <class T>
struct Offset {
  uint64_t value = 0;  // bytes

  MOE_HD T* in(char* memory) const { return reinterpret_cast<T*>(memory + value); }
  MOE_HD const T* in(const char* memory) const { return reinterpret_cast<const T*>(memory + value); }

  // Elements further on, as with a pointer; moved(): bytes further on, where elements do not lie side by
  // side.
  template <std::integral Count>
  MOE_HD constexpr Offset operator+(Count elements) const {
    return {value + sizeof(T) * elements};
  }
  MOE_HD constexpr Offset moved(uint64_t bytes) const { return {value + bytes}; }

  MOE_HD constexpr explicit operator bool() const { return value != 0; }
  // An offset of plain bytes is a number of bytes.
  MOE_HD constexpr operator uint64_t() const
    requires std::same_as<T, char>
  {
    return value;
  }
};

using CounterAt = Offset<uint64_t>;

// A record as the bytes that it is made of.
template <class T>
MOE_HD char* bytes_of(T* record) {
  return reinterpret_cast<char*>(record);
}
template <class T>
MOE_HD const char* bytes_of(const T* record) {
  return reinterpret_cast<const char*>(record);
}

// The record that lies `bytes` behind another one: for records that are longer than their type says.
template <class T>
MOE_HD T* moved(T* record, uint64_t bytes) {
  return Offset<T>{bytes}.in(bytes_of(record));
}
template <class T>
MOE_HD const T* moved(const T* record, uint64_t bytes) {
  return Offset<T>{bytes}.in(bytes_of(record));
}

}  // namespace moecomm
