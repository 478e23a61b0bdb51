// Typed offsets into a rank's memory. An offset is the same on every rank; together with the base address of
// one rank's memory it gives an address.
#pragma once
#include <concepts>

#include "base/types.hpp"

namespace moecomm {

template <class T>
struct Offset {
  uint64_t value = 0;  // bytes

  MOE_HD T* in(char* memory) const { return reinterpret_cast<T*>(memory + value); }
  MOE_HD const T* in(const char* memory) const { return reinterpret_cast<const T*>(memory + value); }

  // operator+ advances by elements, as with a pointer. moved() advances by bytes, for elements that are not
  // contiguous.
  template <std::integral Count>
  MOE_HD constexpr Offset operator+(Count elements) const {
    return {value + sizeof(T) * elements};
  }
  MOE_HD constexpr Offset moved(uint64_t bytes) const { return {value + bytes}; }

  MOE_HD constexpr explicit operator bool() const { return value != 0; }
  // An offset of plain bytes converts to the number of bytes.
  MOE_HD constexpr operator uint64_t() const
    requires std::same_as<T, char>
  {
    return value;
  }
};

using CounterAt = Offset<uint64_t>;

// An address as a number: for alignment, and to send it to a rank of the same process.
template <class T>
MOE_HD uint64_t address_of(const T* memory) {
  return reinterpret_cast<uint64_t>(memory);
}
inline char* memory_at(uint64_t address) { return reinterpret_cast<char*>(address); }

// The object at the beginning of these bytes.
template <class T>
MOE_HD T* as(char* bytes) {
  return Offset<T>{}.in(bytes);
}
template <class T>
MOE_HD const T* as(const char* bytes) {
  return Offset<T>{}.in(bytes);
}

// The bytes of a record.
template <class T>
MOE_HD char* bytes_of(T* record) {
  return reinterpret_cast<char*>(record);
}
template <class T>
MOE_HD const char* bytes_of(const T* record) {
  return reinterpret_cast<const char*>(record);
}

// The record that is `bytes` behind another one, for records that are longer than their type.
template <class T>
MOE_HD T* moved(T* record, uint64_t bytes) {
  return Offset<T>{bytes}.in(bytes_of(record));
}
template <class T>
MOE_HD const T* moved(const T* record, uint64_t bytes) {
  return Offset<T>{bytes}.in(bytes_of(record));
}

}  // namespace moecomm
