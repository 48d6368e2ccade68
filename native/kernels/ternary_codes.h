// How codes of trits lie in a word, shared by the products of few and of many tokens.
#pragma once
#include "kernels/vec.h"

namespace sieve {
namespace SIEVE_LEVEL {

constexpr uint32_t ZEROS = 0x55555555u;  // sixteen codes of trit 0
constexpr int FLUSH = 16;                // groups after which partial sums join the total: fp32 errors grow with the shorter chain

static inline int column_of(int slot) { return 4 * (slot % 4) + slot / 4; }  // slot: two bits of a word, from the lowest
static inline int pair_column(int pair) { return 8 * (pair & 1) + (pair >> 1); }  // its partner is four columns on

static inline int32_t four(const int8_t* q) {
  int32_t word;
  memcpy(&word, q, 4);
  return word;
}

}  // namespace SIEVE_LEVEL
}  // namespace sieve
