// Instruction-set levels: each compiles every kernel once, and the best that this machine runs is chosen when first asked.
#pragma once
#include <string>
#include <vector>

namespace sieve {

struct Kernels;  // kernels.h

// The kernels to use now. The environment variable SIEVE_LEVEL (portable, avx2, avx512, vnni, amx), read once, or force_level choose.
const Kernels& kernels();

std::string level();                        // the name of the level in use
bool halves_vectors();                      // whether this machine computes 512 bits in two turns (Zen 4), which changes what is cheap
std::vector<std::string> levels();          // levels that were built and that this machine runs, slowest first
void force_level(const std::string& name);  // throws std::invalid_argument naming the choices; "" goes back to the best

}  // namespace sieve
