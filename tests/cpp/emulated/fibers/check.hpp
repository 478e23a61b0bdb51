// Replaces the test harness: an error that the emulated GPU detects ends the process.
#pragma once
#include <cstdio>
#include <cstdlib>

#define CHECK(expression)                                                            \
  do {                                                                               \
    if (!(expression)) {                                                             \
      std::fprintf(stderr, "%s:%d: %s is false\n", __FILE__, __LINE__, #expression); \
      std::abort();                                                                  \
    }                                                                                \
  } while (0)
#define CHECK_EQ(a, b) CHECK((a) == (b))
