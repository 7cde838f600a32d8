#pragma once

#include <cstdio>
#include <cstdlib>

// Ends the program, so that a fuzzer counts it as a finding, unless the condition holds.
#define CHECK(condition)                                                            \
  do {                                                                              \
    if (!(condition)) {                                                             \
      std::fprintf(stderr, "%s:%d: expected %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                 \
    }                                                                               \
  } while (false)
