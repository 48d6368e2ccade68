// A run of query rows that all read the same list of numbers: key row r * row + number * step of some base. With step = -1
// row the numbers are offsets before the query; with row = 0 they are key rows themselves.
#pragma once
#include <cstdint>

namespace sieve {

constexpr int OFFSET_CHUNK = 32;  // numbers that are softmaxed together; drivers cut lists at multiples of it

struct OffsetTile {
  int32_t rows;
  int32_t d, dv;           // channels, both multiples of 16: rows are padded with zeros
  const float* q;          // [rows][d] times scale * log2 e
  const int64_t* list;     // increasing
  int32_t count;
  int64_t limit;           // row r reads the numbers up to limit + r * limit_step
  int64_t limit_step;
  const float* k;
  const float* v;
  int64_t k_row, v_row;    // floats from one query row to the next
  int64_t k_step, v_step;  // floats from one number to the next
  float* o;                // [rows][dv] unnormalised output, m and l go on from what they hold
  float* m;                // [rows] reference exponent (base 2), -inf before the first key
  float* l;                // [rows] sum of 2^(s - m)
  float* s;                // [rows][OFFSET_CHUNK] scratch of `attend_offsets`
};

// Gradients over at most OFFSET_CHUNK numbers; P is computed again from lse. Sums are added to what is there.
struct OffsetGradient {
  OffsetTile t;            // v: values with non-finite entries zero; o, m, l unused
  const float* lse;        // [rows] natural logarithm
  const float* shift;      // [rows] d lse - sum(dO * O)
  const float* d_out;      // [rows][dv]
  const float* q_clean;    // [rows][d] times scale, non-finite entries zero
  const float* k_clean;    // the keys with non-finite entries zero
  int64_t clean_row, clean_step;
  float* dq;               // [rows][d], without the scale
  float* dk;               // [kv_len][d] sums of dS times q_clean
  float* dv_sum;           // [kv_len][dv]
  int64_t sum_at;          // the key row that the base of k stands for
  float* scratch;          // 2 * rows * OFFSET_CHUNK floats
};

}  // namespace sieve
