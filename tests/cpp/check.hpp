// A test harness in one header; every tests/cpp/*_test.cpp is one program.
//
//   #include "check.hpp"
//   TEST(rows_are_aligned) {
//     CHECK(align16(17) == 32);            // continues after a failure
//     CHECK_EQ(align16(17), 32u);          // the same, and prints both values
//     REQUIRE(p != nullptr);               // ends the test (only on the test's own thread)
//     SKIP("this machine has no AVX-512"); // ends the test, which counts as skipped
//   }
//
// Checks may be made on any thread. `NAME_test [PART...]` runs the tests whose names contain a PART. The last
// line is 'N passed, N failed'. The exit status is 0 only if none failed and at least one ran.
#pragma once
#include <atomic>
#include <cstdio>
#include <cstring>
#include <exception>
#include <functional>
#include <mutex>
#include <sstream>
#include <string>
#include <vector>

namespace check {

struct Test {
  const char* name;
  std::function<void()> body;
};
struct Leave {};  // thrown by REQUIRE
struct Skipped {
  std::string why;
};  // thrown by SKIP

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}
inline std::atomic<int>& failures() {
  static std::atomic<int> n{0};
  return n;
}

struct Registration {
  Registration(const char* name, std::function<void()> body) { tests().push_back({name, std::move(body)}); }
};

// Only the first failures of a test are printed, because a wrong row is wrong in thousands of places. The
// rest are counted.
inline void fail(const char* file, int line, const std::string& what) {
  static std::mutex mutex;
  const int n = failures().fetch_add(1);
  std::lock_guard lock(mutex);
  if (n < 20) std::printf("  %s:%d: %s\n", file, line, what.c_str());
  if (n == 20) std::printf("  ... more failures, not printed\n");
}

template <class T>
std::string text(const T& v) {
  std::ostringstream s;
  if constexpr (std::is_enum_v<T>)
    s << static_cast<long long>(v);
  else if constexpr (sizeof(T) == 1 && std::is_integral_v<T>)
    s << static_cast<int>(v);
  else
    s << v;
  return s.str();
}

template <class A, class B>
bool equal(const A& a, const B& b, const char* file, int line, const char* expression) {
  if (a == b) return true;
  fail(file, line, std::string(expression) + ": " + text(a) + " is not " + text(b));
  return false;
}

inline int run(int argc, char** argv) {
  int passed = 0, failed = 0, skipped = 0;
  for (const Test& t : tests()) {
    bool wanted = argc < 2;
    for (int i = 1; i < argc; ++i) wanted |= std::strstr(t.name, argv[i]) != nullptr;
    if (!wanted) continue;
    failures() = 0;
    std::string skip;
    try {
      t.body();
    } catch (const Leave&) {
    } catch (const Skipped& s) { skip = s.why; } catch (const std::exception& e) {
      fail(t.name, 0, std::string("exception: ") + e.what());
    }
    if (failures() > 0) {
      ++failed;
      std::printf("FAILED %s (%d checks)\n", t.name, failures().load());
    } else if (!skip.empty()) {
      ++skipped;
      std::printf("skipped %s: %s\n", t.name, skip.c_str());
    } else {
      ++passed;
    }
    std::fflush(stdout);
  }
  if (skipped) std::printf("%d skipped, ", skipped);
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 && passed + skipped > 0 ? 0 : 1;
}

}  // namespace check

#define CHECK_TEXT_(x) #x
#define TEST(name)                                                   \
  static void name();                                                \
  static const check::Registration name##_registration(#name, name); \
  static void name()
// One body with many parameters: TEST_CASES(name, values) { use `value` }
#define TEST_CASES(name, values)                                      \
  static void name(const std::decay_t<decltype((values)[0])>& value); \
  static const check::Registration name##_registration(#name, [] {    \
    for (const auto& v : (values)) name(v);                           \
  });                                                                 \
  static void name([[maybe_unused]] const std::decay_t<decltype((values)[0])>& value)

#define CHECK(expression)                                                                      \
  do {                                                                                         \
    if (!(expression)) check::fail(__FILE__, __LINE__, CHECK_TEXT_((expression)) " is false"); \
  } while (0)
#define CHECK_EQ(a, b) check::equal((a), (b), __FILE__, __LINE__, CHECK_TEXT_(a == b))
#define REQUIRE(expression)                                                   \
  do {                                                                        \
    if (!(expression)) {                                                      \
      check::fail(__FILE__, __LINE__, CHECK_TEXT_((expression)) " is false"); \
      throw check::Leave{};                                                   \
    }                                                                         \
  } while (0)
#define SKIP(why) \
  throw check::Skipped { why }

int main(int argc, char** argv) { return check::run(argc, argv); }
