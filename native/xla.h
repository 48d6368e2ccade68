// Handlers for XLA's foreign function interface: names, and functions of the type xla::Handler.
#pragma once
#include <utility>

#include "xla_abi.h"

namespace sieve {

struct NamedHandler {
  const char* name;
  xla::Handler* run;
};

constexpr int XLA_HANDLERS = 8;
extern const NamedHandler xla_handlers[XLA_HANDLERS];

}  // namespace sieve
