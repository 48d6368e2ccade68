#include "level.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace sieve {

#define SIEVE_DECLARE(name) \
  namespace name {          \
  extern const Kernels table; \
  }
SIEVE_DECLARE(portable)
SIEVE_DECLARE(avx2)
SIEVE_DECLARE(avx512)
SIEVE_DECLARE(vnni)
SIEVE_DECLARE(amx)

namespace {

struct Level {
  const char* name;
  const Kernels* table;
  bool runs;
};

[[maybe_unused]] bool amx_allowed() {
#if defined(__linux__) && defined(__x86_64__)
  // tile data is off until a process asks for it (arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA))
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}

constexpr unsigned ZEN_3_AND_4 = 0x19;  // a family of AMD's processors, of which Zen 4 has AVX-512

bool found_halves() {
#if defined(__x86_64__)
  unsigned version, b, c, d;
  return __builtin_cpu_is("amd") && __get_cpuid(1, &version, &b, &c, &d) && ((version >> 8) & 0xf) + ((version >> 20) & 0xff) == ZEN_3_AND_4;
#else
  return false;
#endif
}

const std::vector<Level>& all() {
  static const std::vector<Level> found = [] {
    std::vector<Level> list{{"portable", &portable::table, true}};
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool v2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#if defined(SIEVE_EMULATE_AVX512)
    const bool v512 = v2, dots = v2;
#else
    const bool v512 = v2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool dots = v512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16") &&
                      __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("gfni");
#endif
    (void)dots;
#ifdef SIEVE_HAS_avx2
    list.push_back({"avx2", &avx2::table, v2});
#endif
#ifdef SIEVE_HAS_avx512
    list.push_back({"avx512", &avx512::table, v512});
#endif
#ifdef SIEVE_HAS_vnni
    list.push_back({"vnni", &vnni::table, dots});
#endif
#if defined(SIEVE_EMULATE_AMX)
    list.push_back({"amx", &amx::table, dots});
#elif defined(SIEVE_HAS_amx)
    const bool parts = dots && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
                       __builtin_cpu_supports("amx-int8");
    list.push_back({"amx", &amx::table, parts && amx_allowed()});
#endif
#endif
    return list;
  }();
  return found;
}

const Level* find(const std::string& name) {
  for (const Level& l : all())
    if (l.runs && name == l.name) return &l;
  return nullptr;
}

const Level* best() {
  const Level* last = nullptr;
  for (const Level& l : all())
    if (l.runs) last = &l;
  return last;
}

const Level* named(const std::string& name) {
  if (name.empty()) return best();
  if (const Level* l = find(name)) return l;
  std::string known;
  for (const std::string& l : levels()) known += (known.empty() ? "" : ", ") + l;
  throw std::invalid_argument("`level` must be one that was built and that this machine runs (" + known + "); got '" + name +
                              "'; leave SIEVE_LEVEL unset for the fastest");
}

std::atomic<const Level*>& chosen() {
  static std::atomic<const Level*> level{[] {
    const char* asked = std::getenv("SIEVE_LEVEL");
    return named(asked ? asked : "");
  }()};
  return level;
}

}  // namespace

const Kernels& kernels() { return *chosen().load()->table; }
std::string level() { return chosen().load()->name; }
bool halves_vectors() {
  static const bool halves = found_halves();
  return halves;
}

void force_level(const std::string& name) { chosen().store(named(name)); }

std::vector<std::string> levels() {
  std::vector<std::string> names;
  for (const Level& l : all())
    if (l.runs) names.push_back(l.name);
  return names;
}

}  // namespace sieve
