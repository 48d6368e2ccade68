// What the parts of the gate of decoding share: the rows that choose together, and what they may see.
#pragma once
#include <cmath>
#include <vector>

#include "buffer.h"
#include "kernels.h"
#include "scan.h"

namespace sieve {

// One row of queries as the sketch scores it, and what bounds its errors.
struct ScanRow {
  int64_t head, query, low, high;
  bool looked, sound;      // whether it ranks; whether it is finite
  double norm, stretched;  // ||q|| and ||q a||, rounded up
  double step, size, rest; // unit of the integers, sum |q^ a| / step, ||q a - q^ a|| rounded up
};

// Rows that choose together: one tile of queries of one head, or of the heads of a group.
struct GateUnit {
  int64_t batch, kv_head;
  std::vector<ScanRow> rows;
  int64_t width;                 // rows up to a multiple of SCAN_ROWS
  std::vector<int64_t> low, high;
  std::vector<int8_t> integers;  // [groups][digits][SCAN_ROWS][d]
  std::vector<float> floats;     // [width][d]
  Buffer<float> mass;            // [panels or blocks][width] base-2 log masses
  Buffer<float> lower;           // [panels][width] for proofs: lower bounds, and then `mass` holds upper ones
};

// cap * tanh(x / cap), or x where there is no cap; in fp32, so that logits which the reference cannot tell apart are equal
inline double capped(double x, float cap) { return cap == 0 ? x : cap * std::tanh(static_cast<float>(x / cap)); }

std::vector<GateUnit> units_of(const Gate& g);

// Fills the mass (and for proofs the lower bounds) of every unit; returns planes x keys read.
int64_t score(const Gate& g, std::vector<GateUnit>& units);

// Planes of the sketch with the rows of a unit, for `bits` planes.
struct Packed {
  Scan scan;
  Buffer<char> query;
  std::vector<float> factor;
  std::vector<int32_t> centre;
};
void pack(const Gate& g, const GateUnit& u, int bits, Packed& out);

}  // namespace sieve
